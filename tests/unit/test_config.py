"""Settings: precedence of the sources, and messages that name key, value and what is accepted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from kvtier.config import ConfigError, Settings, accepted

if TYPE_CHECKING:
    from pathlib import Path


def load_error(extra: dict[str, object] | None = None, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Settings.load(extra, environ)
    return str(caught.value)


def write(folder: Path, name: str, text: str) -> dict[str, str]:
    (folder / name).write_text(text, encoding="utf-8")
    return {"KVTIER_CONFIG_FILE": str(folder / name)}


def test_defaults() -> None:
    settings, sources = Settings.load_with_sources({}, {})
    assert (settings.mode, settings.tier, settings.pin_budget_fraction) == ("on", "auto", 0.5)
    assert set(sources.values()) == {"default"}


def test_extra_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    environ = write(tmp_path, "a.toml", "max_ttl_s = 1\naging_s = 2\nforget_after_s = 3\n")
    environ |= {"KVTIER_MAX_TTL_S": "10", "KVTIER_AGING_S": "20"}
    settings, sources = Settings.load_with_sources({"kvtier.max_ttl_s": 100}, environ)
    assert (settings.max_ttl_s, settings.aging_s, settings.forget_after_s) == (100, 20, 3)
    assert sources["max_ttl_s"] == "connector extra config"
    assert sources["aging_s"] == "environment"
    assert sources["forget_after_s"] == f"file {tmp_path / 'a.toml'}"
    assert sources["max_defer_s"] == "default"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", 'mode = "off"\nstage = false\n'),
        ("a.toml", '[kvtier]\nmode = "off"\nstage = false\n'),
        ("a.yaml", "mode: off\nstage: false\n"),
        ("a.yml", "kvtier:\n  mode: 'off'\n  stage: false\n"),
        ("a.json", json.dumps({"mode": "off", "stage": False})),
    ],
)
def test_file_types(tmp_path: Path, name: str, text: str) -> None:
    settings = Settings.load({}, write(tmp_path, name, text))
    assert (settings.mode, settings.stage) == ("off", False)


def test_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert Settings.load({}, write(tmp_path, "a.yaml", "")) == Settings.load({}, {})


def test_extra_dotted_and_nested_and_foreign_keys() -> None:
    extra = {"kvtier.mode": "shadow", "kvtier": {"stage": False}, "lmcache.mp.port": 5555}
    settings = Settings.load(extra, {})
    assert (settings.mode, settings.stage) == ("shadow", False)


def test_process_environment_is_the_default_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTIER_MODE", "shadow")
    assert Settings.load().mode == "shadow"


def test_directories_and_empty_variables_are_no_settings() -> None:
    environ = {"KVTIER_CACHE_DIR": "/c", "KVTIER_RUN_DIR": "/r", "KVTIER_MODE": "", "HOME": "/h"}
    assert Settings.load({}, environ) == Settings.load({}, {})


@pytest.mark.parametrize("field", ["dram_gb", "chunk_tokens"])
def test_auto_clears_a_lower_source(field: str) -> None:
    environ = {f"KVTIER_{field.upper()}": "32"}
    assert getattr(Settings.load({}, environ), field) == 32
    assert getattr(Settings.load({f"kvtier.{field}": "auto"}, environ), field) is None


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings.load({}, {}).mode = "off"  # type: ignore[misc]


def test_unknown_key_in_extra_gets_a_suggestion() -> None:
    message = load_error({"kvtier.pin_bugdet_fraction": 0.1})
    assert "connector extra config: kvtier.pin_bugdet_fraction=0.1: unknown key" in message
    assert "did you mean kvtier.pin_budget_fraction?" in message


def test_unknown_variable_gets_a_suggestion_in_its_own_spelling() -> None:
    message = load_error(KVTIER_MAX_TTL="5")
    assert "environment: KVTIER_MAX_TTL='5': unknown key" in message
    assert "did you mean KVTIER_MAX_TTL_S?" in message


def test_unknown_key_that_resembles_nothing_lists_what_is_accepted() -> None:
    message = load_error({"kvtier.qqqq": 1})
    assert "did you mean" not in message
    assert "accepted are kvtier.mode, " in message


def test_unknown_key_in_file(tmp_path: Path) -> None:
    environ = write(tmp_path, "a.json", '{"tear": "off"}')
    message = load_error(None, **environ)
    assert f"file {tmp_path / 'a.json'}: tear='off': unknown key; did you mean tier?" in message


def test_setting_without_prefix_in_extra_is_not_ignored() -> None:
    message = load_error({"mode": "off"})
    assert "mode='off': unknown key; accepted is kvtier.mode" in message


def test_dotted_and_nested_must_agree() -> None:
    message = load_error({"kvtier.mode": "off", "kvtier": {"mode": "on"}})
    assert "kvtier.mode='off'" in message
    assert "'on'" in message


def test_nested_must_be_an_object() -> None:
    assert "kvtier='off': accepted is an object" in load_error({"kvtier": "off"})


def test_all_mistakes_are_reported_at_once() -> None:
    message = load_error(KVTIER_RELOAD="maybe", KVTIER_STAGE_SPLIT_CHUNKS="0")
    assert len(message.splitlines()) == 2


BAD: dict[str, object] = {name: [] for name in Settings.model_fields} | {
    "mode": "auto",
    "pin_budget_fraction": 1.5,
    "ttl_fixed_s": "inf",
    "max_ttl_s": -1,
    "stage": "maybe",
    "stage_split_chunks": 0,
    "lookup_wait_s": True,
    "reload_first_chunks": 1.5,
    "max_programs": "many",
    "forget_after_s": 0,
    "lmcache_url": "localhost:5555",
    "dram_gb": 0,
    "chunk_tokens": 0,
    "lease_s": "nan",
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_value_names_key_value_source_and_what_is_accepted(name: str) -> None:
    message = load_error({f"kvtier.{name}": BAD[name]})
    assert message == (
        f"connector extra config: kvtier.{name}={BAD[name]!r}: accepted is {accepted(name)}"
    )


def test_accepted_is_read_from_the_field() -> None:
    assert accepted("mode") == "on, shadow, off"
    assert accepted("pin_budget_fraction") == "a number >= 0 and <= 1"
    assert accepted("dram_gb") == "a number > 0 or auto"
    assert accepted("profile_dir") == "a path or none"


def test_contradictions() -> None:
    message = load_error(KVTIER_TIER="off", KVTIER_LMCACHE_URL="tcp://h:1")
    assert "lmcache_url='tcp://h:1': contradicts tier=off" in message
    message = load_error(KVTIER_TTL_POLICY="fixed", KVTIER_TTL_FIXED_S="9", KVTIER_MAX_TTL_S="8")
    assert "ttl_fixed_s=9.0: above max_ttl_s=8.0" in message


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.toml", "mode = ", "not valid TOML"),
        ("a.yaml", "a: [", "not valid YAML"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[1]", "accepted is a table of settings"),
        ("a.ini", "", "unknown file type; accepted is .toml, .yaml, .yml or .json"),
    ],
)
def test_bad_file(tmp_path: Path, name: str, text: str, expected: str) -> None:
    message = load_error(None, **write(tmp_path, name, text))
    assert f"KVTIER_CONFIG_FILE={tmp_path / name}" in message
    assert expected in message


def test_missing_file(tmp_path: Path) -> None:
    missing = tmp_path / "no.toml"
    message = load_error(KVTIER_CONFIG_FILE=str(missing))
    assert f"KVTIER_CONFIG_FILE={missing}" in message
    assert "accepted is the path of a readable" in message
