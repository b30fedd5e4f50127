"""On, shadow and off: the switch file decides, mistakes in it change nothing."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from kvtier.turns.live_mode import CHECK_INTERVAL_S, LiveMode, Mode

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def switch(tmp_path: Path) -> Path:
    return tmp_path / "mode"


def test_without_a_switch_file_the_mode_stays() -> None:
    assert LiveMode(Mode.SHADOW).refresh(1e9) is Mode.SHADOW


@pytest.mark.parametrize("text", ["off", "OFF\n", "  off  \n"])
def test_the_file_decides(switch: Path, text: str) -> None:
    live = LiveMode(Mode.ON, switch)
    assert live.refresh(0.0) is Mode.ON
    switch.write_text(text)
    assert live.refresh(CHECK_INTERVAL_S) is Mode.OFF
    assert live.mode is Mode.OFF


def test_it_is_read_once_in_a_while(switch: Path) -> None:
    live = LiveMode(Mode.ON, switch)
    live.refresh(0.0)
    switch.write_text("off")
    assert live.refresh(CHECK_INTERVAL_S * 0.99) is Mode.ON
    assert live.refresh(CHECK_INTERVAL_S) is Mode.OFF
    switch.write_text("shadow")
    assert live.refresh(CHECK_INTERVAL_S * 1.99) is Mode.OFF
    assert live.refresh(CHECK_INTERVAL_S * 2) is Mode.SHADOW


def test_without_the_file_again_the_configured_mode_is_back(switch: Path) -> None:
    live = LiveMode(Mode.SHADOW, switch)
    switch.write_text("off")
    assert live.refresh(0.0) is Mode.OFF
    switch.unlink()
    assert live.refresh(1.0) is Mode.SHADOW


@pytest.mark.parametrize("content", [b"", b"of", b"off please", b"\xff\xfe", b"x" * 1000])
def test_a_mistake_changes_nothing_and_is_told_once(
    switch: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    live = LiveMode(Mode.ON, switch)
    switch.write_text("shadow")
    live.refresh(0.0)
    caplog.clear()
    switch.write_bytes(content)
    for now_s in (1.0, 2.0, 3.0):
        assert live.refresh(now_s) is Mode.SHADOW
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "staying shadow" in errors[0].getMessage()
    assert len(errors[0].getMessage()) < 400


def test_an_unreadable_file_changes_nothing(switch: Path, caplog: pytest.LogCaptureFixture) -> None:
    switch.mkdir()
    live = LiveMode(Mode.ON, switch)
    assert live.refresh(0.0) is Mode.ON
    assert "cannot read" in caplog.text


def test_levels_are_the_metrics_values() -> None:
    assert [mode.level for mode in (Mode.OFF, Mode.SHADOW, Mode.ON)] == [0, 1, 2]
