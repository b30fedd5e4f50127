"""The decision log: JSON lines, and never the engine's problem."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from kvtier.turns.decision_log import DecisionLog

if TYPE_CHECKING:
    from pathlib import Path


def test_off_without_a_path() -> None:
    log = DecisionLog(None)
    assert not log.enabled
    log.write("pause", "p", "r", {})
    log.close()


def test_one_line_a_decision(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    before_s = time.time()
    log = DecisionLog(path)
    assert log.enabled
    log.write("pause", "program", "r1", {"action": "pin", "ttl_s": 2.5})
    log.write("return", "pro\ngram", "r2", {"costs": {"gpu": 1.0}})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["pause", "return"], "readable while it is open"
    assert lines[0].items() >= {"program": "program", "request_id": "r1", "ttl_s": 2.5}.items()
    assert before_s <= lines[0]["ts_s"] <= time.time()
    assert lines[1]["program"] == "pro\ngram"
    log.close()
    log.close()
    assert not log.enabled
    log.write("pause", "p", "r", {})
    assert len(path.read_text().splitlines()) == 2


def test_it_appends(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for i in range(2):
        log = DecisionLog(path)
        log.write("pause", "p", str(i), {})
        log.close()
    assert [json.loads(line)["request_id"] for line in path.read_text().splitlines()] == ["0", "1"]


def test_a_full_disk_turns_it_off(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    class FullDisk:
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    log = DecisionLog(tmp_path / "log.jsonl")
    log.close()
    log._lines._file = FullDisk()  # type: ignore[assignment]
    log.write("pause", "p", "r", {})
    assert not log.enabled
    assert "No space left" in caplog.text
    log.write("pause", "p", "r", {})
    log.close()
    assert len(caplog.records) == 1


def test_a_path_that_cannot_be_opened_is_told_at_start(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no-such-directory"):
        DecisionLog(tmp_path / "no-such-directory" / "log.jsonl")
