from __future__ import annotations

import importlib.util
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from scripts import fetch_vllm_sources, python_only_backend


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVTIER_CACHE_DIR", str(tmp_path))
    return tmp_path / "vllm-sources"


def _fake_installer(calls: list[list[str]], returncode: int = 0) -> Any:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        tree = Path(command[command.index("--target") + 1])
        if returncode == 0:
            (tree / "vllm" / "v1" / "core").mkdir(parents=True)
            (tree / "vllm" / "__init__.py").touch()
            (tree / "vllm-1.2.3.dist-info").mkdir()
        return subprocess.CompletedProcess(command, returncode, "", "no such version")

    return run


def test_backend_packs_python_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 1.2.3\n")
    for name in ("vllm/a.py", "vllm/b/[64, 64].py", "vllm/c.so", "vllm/d.json", "setup.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}")
    (tmp_path / "out").mkdir()
    file_name = python_only_backend.build_wheel("out")
    assert file_name == "vllm-1.2.3-py3-none-any.whl"
    with zipfile.ZipFile(tmp_path / "out" / file_name) as wheel:
        record = wheel.read("vllm-1.2.3.dist-info/RECORD").decode().splitlines()
        packed = set(wheel.namelist())
        assert wheel.read("vllm/a.py") == b"# vllm/a.py"
    assert {name for name in packed if name.startswith("vllm/")} == {
        "vllm/a.py",
        "vllm/b/[64, 64].py",
    }
    assert '"vllm/b/[64, 64].py",,' in record
    assert len(record) == len(packed)


def test_fetches_once_and_claims_the_cpu_platform(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", _fake_installer(calls))
    target = fetch_vllm_sources.fetch("1.2.3")
    assert target == cache / "1.2.3"
    assert fetch_vllm_sources.fetch("1.2.3") == target
    assert len(calls) == 1
    # An installer's cache must never offer this build as a real one.
    assert "--no-cache" in calls[0]
    assert calls[0][-1] == "vllm==1.2.3"
    metadata = [path.parent.name for path in target.glob("*/METADATA")]
    assert metadata == ["vllm-1.2.3+cpu.dist-info"]
    assert [path.name for path in cache.iterdir()] == ["1.2.3"]


def test_uses_pip_where_there_is_no_uv(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", _fake_installer(calls))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uv" else name)
    fetch_vllm_sources.fetch("1.2.3")
    assert calls[0][1:4] == ["-m", "pip", "install"]
    assert "--no-cache-dir" in calls[0]


def test_failure_tells_why_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", _fake_installer([], returncode=1))
    with pytest.raises(fetch_vllm_sources.FetchError, match="no such version"):
        fetch_vllm_sources.fetch("1.2.3")
    assert list(cache.iterdir()) == []
