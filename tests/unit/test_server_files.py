"""The run directory is private; its default is where all engines of a user meet."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvtier.server import files as server_files


def test_run_dir_is_private_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    created = server_files.prepare_run_dir(tmp_path / "new")
    assert created.stat().st_mode & 0o777 == 0o700

    (tmp_path / "link").symlink_to(created)
    with pytest.raises(server_files.RunDirError, match="symbolic link"):
        server_files.prepare_run_dir(tmp_path / "link")

    created.chmod(0o770)
    with pytest.raises(server_files.RunDirError, match="writable by other users"):
        server_files.prepare_run_dir(created)

    created.chmod(0o700)
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    with pytest.raises(server_files.RunDirError, match="belongs to user"):
        server_files.prepare_run_dir(created)


def test_default_run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTIER_RUN_DIR", "/somewhere")
    assert server_files.default_run_dir() == Path("/somewhere")
    monkeypatch.delenv("KVTIER_RUN_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert server_files.default_run_dir() == tmp_path / "kvtier"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    assert server_files.default_run_dir() == Path(f"/tmp/kvtier-{os.geteuid()}")
