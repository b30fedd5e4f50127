"""These tests need a CUDA GPU; without one they are skipped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvtier.copy_engine import CopyEngine


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")


@pytest.fixture
def opened() -> Iterator[list[CopyEngine]]:
    """Engines put in here are closed."""
    engines: list[CopyEngine] = []
    yield engines
    for engine in engines:
        engine.close()
