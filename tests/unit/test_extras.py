"""What the project's extras ask for goes with what their packages ask for."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def cupy_of(requirements: list[str]) -> set[str]:
    names = (Requirement(text).name for text in requirements)
    return {name for name in names if name.startswith("cupy")}


def required_by(package: str) -> list[str]:
    try:
        return requires(package) or []
    except PackageNotFoundError:
        return []


@pytest.mark.skipif(not required_by("lmcache"), reason="needs LMCache")
def test_a_gpu_gets_the_cupy_of_lmcache_and_no_other() -> None:
    # Each CuPy is the package `cupy`: one installed over another for a different CUDA breaks both.
    extras = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert cupy_of(extras["gpu"]) == cupy_of(required_by("lmcache"))
