"""One control server for a test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.unit.control.control_host import FakeEngine, Host

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A control server without engines, on its Unix socket."""
    with Host(tmp_path) as host:
        yield host


@pytest.fixture
def engine(host: Host) -> FakeEngine:
    """An engine of it."""
    engine = host.engine()
    engine.join()
    return engine
