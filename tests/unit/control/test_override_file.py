"""The state file: whatever is in its place, the server starts, says what it ignored, and keeps it."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.control.override_book import OverrideBook
from kvtier.control.override_file import MAX_FILE_BYTES, OverrideFile
from kvtier.link_messages import ProgramKey, TtlOverride

if TYPE_CHECKING:
    from pathlib import Path

LATER_S = time.time() + 1e6
ALL = [
    TtlOverride(mode="fixed", ttl_s=0.0, program=ProgramKey("acme", "agent")),
    TtlOverride(mode="cap", ttl_s=1.5, program=ProgramKey(None, "r#1", named=False)),
    TtlOverride(mode="floor", ttl_s=604_800.0, tool="bash", expires_s=LATER_S),
    TtlOverride(mode="cap", ttl_s=5.0, tenant="acme"),
    TtlOverride(mode="cap", ttl_s=6.0),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "overrides.json"


def put(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def kept(path: Path) -> list[bytes]:
    """Copies beside the file."""
    return [p.read_bytes() for p in path.parent.glob(f"{path.name}.ignored-*")]


def test_what_is_written_is_read_again(path: Path) -> None:
    assert OverrideFile(path).read() == []
    assert OverrideFile(path).write(ALL)
    assert path.stat().st_mode & 0o777 == 0o600
    assert OverrideFile(path).read() == ALL
    assert list(path.parent.iterdir()) == [path]


NEWER = json.dumps({"version": 2, "overrides": [{"mode": "new"}], "more": True})
DAMAGED: dict[str, bytes] = {
    "truncated": b'{"version": 1, "overri',
    "empty": b"",
    "garbage": bytes(range(256)),
    "not an object": b"[1, 2]",
    "deep": b"[" * 100_000,
    "no overrides": b'{"version": 1}',
    "overrides of a wrong kind": b'{"version": 1, "overrides": {}}',
    "no version": b'{"overrides": []}',
    "newer": NEWER.encode(),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_file_that_cannot_be_used_is_ignored_told_of_and_kept(
    path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    put(path, content)
    file = OverrideFile(path)
    assert file.read() == []
    assert "that is ignored" in caplog.text
    assert str(path) in caplog.text
    # Reading changes nothing.
    assert path.read_bytes() == content
    assert kept(path) == []
    # Writing keeps a copy, once.
    assert file.write(ALL)
    assert file.write(ALL[:1])
    assert kept(path) == [content]
    assert OverrideFile(path).read() == ALL[:1]


def test_a_newer_files_version_is_named(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(path, NEWER)
    OverrideFile(path).read()
    assert "newer kvtier" in caplog.text
    assert "version is 2" in caplog.text


BAD_ENTRIES: dict[str, Any] = {
    "mode": {"mode": "maximum", "ttl_s": 1},
    "negative": {"mode": "cap", "ttl_s": -1},
    "too long": {"mode": "cap", "ttl_s": 604_801},
    "nan": {"mode": "cap", "ttl_s": float("nan")},
    "text": {"mode": "cap", "ttl_s": "1"},
    "expiry": {"mode": "cap", "ttl_s": 1, "expires_s": float("inf")},
    "two scopes": {"mode": "cap", "ttl_s": 1, "tool": "a", "tenant": "b"},
    "empty": {"mode": "cap", "ttl_s": 1, "tool": ""},
    "unknown field": {"mode": "cap", "ttl_s": 1, "colour": "red"},
    "no object": 7,
}


@pytest.mark.parametrize("entry", BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_good_overrides_beside_a_bad_one_hold_and_the_file_is_kept(
    path: Path, entry: Any, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"mode": "cap", "ttl_s": 5.0, "tenant": "acme"}
    put(path, json.dumps({"version": 1, "overrides": [entry, good]}))
    before = path.read_bytes()
    file = OverrideFile(path)
    assert file.read() == [ALL[3]]
    assert "number 1: " in caplog.text
    assert file.write([])
    assert kept(path) == [before]


def test_a_read_only_file_holds_and_is_left_alone(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    OverrideFile(path).write(ALL)
    path.chmod(0o400)
    before = path.read_bytes()
    file = OverrideFile(path)
    assert file.read() == ALL
    assert "read-only" in caplog.text
    assert file.write([]) is False
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["directory", "pipe", "too long"])
def test_what_is_no_state_file_at_all_is_left_in_its_place(
    path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(b" " * (MAX_FILE_BYTES + 1))
    file = OverrideFile(path)
    assert file.read() == []
    assert ("more than" if kind == "too long" else "not a regular file") in caplog.text
    assert file.write(ALL) is False
    assert list(path.parent.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    file = OverrideFile(tmp_path / "file" / "overrides.json")
    assert file.read() == []
    assert file.write(ALL) is False
    assert "not saved" in caplog.text


def test_a_full_disk_leaves_the_old_file_and_no_litter(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = OverrideFile(path)
    file.write(ALL)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert file.write([]) is False
    assert OverrideFile(path).read() == ALL
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("content", [NEWER, '{"version": 1, "overri'], ids=["newer", "truncated"])
def test_a_full_disk_leaves_a_file_that_was_ignored_in_its_place(
    path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(path, content)
    file = OverrideFile(path)
    file.read()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        assert file.write(ALL) is False
    assert path.read_bytes() == content.encode()
    assert list(path.parent.iterdir()) == [path]
    assert file.write(ALL)
    assert kept(path) == [content.encode()]
    assert OverrideFile(path).read() == ALL


def test_there_is_always_a_file_while_one_that_was_ignored_is_replaced(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(path, NEWER)
    file = OverrideFile(path)
    file.read()
    monkeypatch.setattr(type(path), "replace", _stop)
    with pytest.raises(RuntimeError):
        file.write(ALL)
    assert path.read_text() == NEWER
    assert kept(path) == [NEWER.encode()]


def _stop(*_: object) -> None:
    raise RuntimeError


def test_without_links_a_file_that_was_ignored_is_kept_too(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    put(path, NEWER)
    file = OverrideFile(path)
    file.read()
    monkeypatch.setattr(os, "link", refuse)
    assert file.write(ALL)
    assert kept(path) == [NEWER.encode()]
    assert OverrideFile(path).read() == ALL


def test_a_link_to_the_file_stays_a_link(path: Path, tmp_path: Path) -> None:
    OverrideFile(path).write([])
    link = tmp_path / "link"
    link.symlink_to(path)
    OverrideFile(link).write(ALL)
    assert link.is_symlink()
    assert OverrideFile(path).read() == ALL


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["version", "overrides", "mode", "ttl_s", "tool"]), inner
                )
            ),
            max_leaves=10,
        ).map(lambda value: json.dumps({"version": 1, "overrides": [value]}).encode()),
    )
)
def test_any_content_can_be_read(path: Path, content: bytes) -> None:
    put(path, content)
    for override in OverrideFile(path).read():
        assert 0 <= override.ttl_s <= 604_800


def test_what_has_expired_is_not_taken_over() -> None:
    past = TtlOverride(mode="cap", ttl_s=1.0, tool="old", expires_s=99.0)
    book = OverrideBook(lambda: 100.0, [past, *ALL])
    assert book.all() == [ALL[1], ALL[0], *ALL[2:]]
