"""The server's size, environment and command line."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

import pytest

from kvtier.server import launch as server_launch
from kvtier.server.launch import ServerSpec, SupervisorError, default_dram_bytes


def test_default_dram_bytes() -> None:
    gib = 1 << 30
    assert default_dram_bytes(ram_available_bytes=64 * gib, shm_available_bytes=64 * gib) == (
        16 * gib
    )
    by_shm = default_dram_bytes(ram_available_bytes=64 * gib, shm_available_bytes=10 * gib)
    assert by_shm == 8 * gib
    with pytest.raises(SupervisorError, match="--shm-size"):
        default_dram_bytes(ram_available_bytes=64 * gib, shm_available_bytes=64 << 20)
    with pytest.raises(SupervisorError, match="of RAM are available"):
        default_dram_bytes(ram_available_bytes=gib // 2, shm_available_bytes=64 * gib)


def test_available_ram_respects_a_container_limit(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 100\n")
    assert server_launch.available_ram_bytes(tmp_path) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert server_launch.available_ram_bytes(tmp_path) > 1 << 20


def test_lmcache_command_line() -> None:
    spec = ServerSpec(
        chunk_tokens=64, dram_bytes=(300 << 20) + 5, server_module="m", extra_args=("--x",)
    )
    argv = server_launch.server_command(spec, server_launch.Endpoint(1, 2, "segment"))
    assert argv[0] == sys.executable
    pairs = dict(itertools.pairwise(argv))
    assert pairs["--host"] == pairs["--http-host"] == "127.0.0.1"
    assert float(pairs["--l1-size-gb"]) * (1 << 30) == 300 << 20
    assert json.loads(pairs["--server-module"]) == {"module_path": "m", "config": {}}
    assert pairs["--kv-event-log-size"] == "0"
    assert argv[-1] == "--x"
    assert ServerSpec.from_json(spec.to_json()) == spec


def test_bytecode_is_cached_only_where_python_would_keep_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "lmcache"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("KVTIER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.delitem(sys.modules, "lmcache", raising=False)
    spec = ServerSpec(chunk_tokens=64, dram_bytes=1 << 28)

    env = server_launch.server_environment(spec)
    assert env["PYTHONPYCACHEPREFIX"] == str(tmp_path / "cache" / "pycache")
    assert "PYTHONDONTWRITEBYTECODE" not in env

    (package / "__pycache__").mkdir()
    env = server_launch.server_environment(spec)
    assert "PYTHONPYCACHEPREFIX" not in env
    assert env["PYTHONDONTWRITEBYTECODE"] == "1"


def test_relative_python_path_survives_the_change_of_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    spec = ServerSpec(chunk_tokens=64, dram_bytes=1 << 28, env=(("EXTRA", "1"),))
    env = server_launch.server_environment(spec)
    assert str(Path.cwd() / "somewhere") in env["PYTHONPATH"].split(os.pathsep)
    assert (env["EXTRA"], env["LMCACHE_TRACK_USAGE"]) == ("1", "false")
