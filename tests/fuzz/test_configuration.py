"""Settings from anywhere: they hold, or the start is refused with the name of what is wrong. Nothing else is raised."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kvtier.calibration import LinkMeasurement, PrefillSample, Profile, load_profile, save_profile
from kvtier.config import ConfigError, Settings
from kvtier.control.token_file import TokenFile, TokenFileError
from kvtier.replay.machines.measured import read as read_machine
from tests.fuzz.hostile import DEEP, TEXTS, VALUES, as_json, damaged, damaged_bytes, fuzz

if TYPE_CHECKING:
    from pathlib import Path

NAMES = st.sampled_from([*Settings.model_fields, "kvtier", "nothing"])
GIVEN = {"mode": "shadow", "max_ttl_s": 60, "dram_gb": 4.5, "control_listen": "127.0.0.1:7461"}


def load(extra: dict[str, Any], environ: dict[str, str]) -> None:
    try:
        settings = Settings.load(extra, environ)
    except ConfigError:
        return
    assert settings.max_ttl_s >= 0
    assert 0 <= settings.pin_budget_fraction <= 1


@fuzz(60)
@given(st.dictionaries(NAMES, VALUES, max_size=3), st.booleans())
def test_connector_settings(values: dict[str, Any], is_nested: bool) -> None:
    flat = {f"kvtier.{name}": value for name, value in values.items()}
    load({"kvtier": values} if is_nested else flat, {})


@fuzz(50)
@given(st.dictionaries(NAMES.map(lambda name: f"KVTIER_{name.upper()}"), TEXTS, max_size=3))
def test_environment(environ: dict[str, str]) -> None:
    load({}, environ)


@fuzz(50)
@given(
    st.sampled_from([".json", ".yaml", ".toml"]),
    st.one_of(
        st.binary(max_size=200),
        damaged_bytes(json.dumps(GIVEN).encode()),
        damaged_bytes(yaml.safe_dump(GIVEN).encode()),
        damaged_bytes(b'mode = "shadow"\nmax_ttl_s = 60\n[kvtier]\ndram_gb = 2024-01-01\n'),
        damaged(GIVEN).map(as_json),
        st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace")),
    ),
)
def test_files(tmp_path_factory: pytest.TempPathFactory, suffix: str, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / f"settings{suffix}"
    path.write_bytes(data)
    load({}, {"KVTIER_CONFIG_FILE": str(path)})


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".toml"])
@pytest.mark.parametrize(
    "data",
    [
        DEEP,
        b"a = " + DEEP,
        b"mode: 2024-99-99",
        b"mode: !!int nonsense",
        b"mode: 1:99:99",
        b"? [a, b]\n: c",
        b"&a [*a]",
        b'{"max_ttl_s": ' + b"9" * 5000 + b"}",
        b"max_ttl_s = " + b"9" * 5000,
    ],
)
def test_a_file_that_its_parser_does_not_expect(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = tmp_path / f"settings{suffix}"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="settings"):
        Settings.load({}, {"KVTIER_CONFIG_FILE": str(path)})


def profile_text(path: Path) -> bytes:
    link = LinkMeasurement(1e-4, ((4096, 5e9), (65536, 9e9)))
    samples = (PrefillSample(0, 512, 0.25),)
    save_profile(
        path, Profile("id", "cpu", "", "model", "layout", "2026-01-01", link, link, samples)
    )
    return path.read_bytes()


@fuzz(50)
@given(st.data())
def test_calibration_profiles(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "profile.json"
    text = profile_text(path)
    found = data.draw(damaged(json.loads(text)).map(as_json) | damaged_bytes(text))
    path.write_bytes(found)
    profile = load_profile(path)
    assert profile is None or all(sample.seconds > 0 for sample in profile.prefill)
    try:
        measured = read_machine(path)
    except ValueError:
        return
    assert measured.gpu.link_bytes_per_s > 0
    assert 0 <= measured.clock.base_s < float("inf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cached_tokens", "Infinity"),
        ("new_tokens", "NaN"),
        ("seconds", "1e999"),
        ("seconds", "NaN"),
        ("seconds", "{}"),
    ],
)
def test_a_profile_with_a_number_that_is_none(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "profile.json"
    text = json.loads(profile_text(path))
    text["prefill"][0][key] = "WRONG"
    path.write_text(json.dumps(text).replace('"WRONG"', value))
    assert load_profile(path) is None


def test_a_profile_that_is_nested_without_end(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(DEEP)
    assert load_profile(path) is None


@fuzz(100)
@given(
    st.binary(max_size=200)
    | damaged_bytes(b"# tokens\n0123456789abcdef0 acme\n0123456789abcdef1\n")
)
def test_token_files(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "tokens"
    path.touch(mode=0o600)
    path.write_bytes(data)
    tokens = TokenFile(path)
    try:
        assert tokens.read() > 0
    except TokenFileError:
        assert tokens.grant("0123456789abcdef0") is None
