"""A LoRA adapter's KV is told from that of other weights, also where those have the same name and path."""

from __future__ import annotations

import itertools
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvtier.turns.adapters import Adapters

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    train(path, b"old")
    return path


def train(path: Path, weights: bytes) -> None:
    file = path / "adapter_model.safetensors"
    before_ns = file.stat().st_mtime_ns if file.exists() else 0
    file.write_bytes(weights)
    os.utime(file, ns=(before_ns + 10**9, before_ns + 10**9))


def request(path: Path | str, *, name: str = "a", number: int = 1) -> Any:
    lora = SimpleNamespace(lora_name=name, lora_path=str(path), lora_int_id=number)
    return SimpleNamespace(lora_request=lora)


def looking() -> Adapters:
    """Adapters whose files are looked at with every request."""
    return Adapters(clock=itertools.count(step=10).__next__)


def test_a_request_without_an_adapter_has_none() -> None:
    assert Adapters().name_of(SimpleNamespace(lora_request=None)) == (None, True)
    assert Adapters().name_of(SimpleNamespace()) == (None, True)


def test_the_same_adapter_has_the_same_name_after_a_restart(adapter: Path) -> None:
    name, is_known = Adapters().name_of(request(adapter))
    assert is_known
    assert Adapters().name_of(request(adapter, number=7)) == (name, True)
    assert Adapters().name_of(request(adapter, name="b"))[0] != name


def test_an_adapter_that_was_trained_on_is_another_after_a_restart(adapter: Path) -> None:
    old, _ = Adapters().name_of(request(adapter))
    train(adapter, b"new")
    new, is_known = Adapters().name_of(request(adapter))
    assert is_known
    assert new != old


def test_an_adapter_whose_files_change_under_the_engine_is_pinned_only(
    adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapters = looking()
    assert adapters.name_of(request(adapter))[1]
    train(adapter, b"new")
    assert not adapters.name_of(request(adapter))[1]
    assert not adapters.name_of(request(adapter))[1]
    assert caplog.text.count("have changed since it was first used") == 1
    # Loaded again by vLLM, under a new number: it is the new one for sure.
    assert adapters.name_of(request(adapter, number=2))[1]


@pytest.mark.parametrize("path", ["/nowhere/adapter", "an/adapter-that-is-not-in-the-cache"])
def test_an_adapter_of_unknown_weights_is_pinned_only(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert not Adapters().name_of(request(path))[1]
    assert f"its files are not found at {path}" in caplog.text


def test_an_adapter_of_the_hub_is_known_by_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = {"is": "a" * 40}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda *_, **__: f"/cache/snapshots/{commit['is']}/adapter_config.json",
    )
    before, is_known = Adapters().name_of(request("hub/adapter"))
    assert is_known
    commit["is"] = "b" * 40
    assert Adapters().name_of(request("hub/adapter"))[0] != before


def test_files_are_looked_at_once_in_a_while() -> None:
    looked: list[str] = []
    now_s = [0.0]

    def weights(path: str) -> str:
        looked.append(path)
        return "w"

    adapters = Adapters(weights, lambda: now_s[0])
    for now_s[0] in (0.0, 0.5, 0.9, 1.5):
        assert adapters.name_of(request("x"))[1]
    assert looked == ["x", "x"]
    adapters.name_of(request("x", number=2))
    assert looked == ["x"] * 3, "one that was loaded just now may have other files"


def test_a_path_that_is_none_is_pinned_only() -> None:
    assert Adapters().name_of(request("~nobody-has-this-name/x")) == (
        "a:~nobody-has-this-name/x:",
        False,
    )
