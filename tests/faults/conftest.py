"""Engines under faults: the fixtures are those of `tests/engine`."""

from __future__ import annotations

from tests.engine.conftest import (
    model_dir,
    plain,
    pytest_collection_modifyitems,
    run_dir,
    start_engine,
)

__all__ = ["model_dir", "plain", "pytest_collection_modifyitems", "run_dir", "start_engine"]
