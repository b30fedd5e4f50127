"""One control server for a test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.unit.control.access_cases import ACME, OPEN, OTHER
from tests.unit.control.control_host import FakeEngine, Host
from tests.unit.control.link_rig import Rig, Server

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


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A token file: for all, and for two tenants."""
    path = tmp_path / "tokens"
    path.write_text(f"# who may call\n\n{OPEN}\n{ACME}  acme\n{OTHER}\tother corp\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def guarded(tmp_path: Path, tokens: Path) -> Iterator[Host]:
    """A server that wants tokens on loopback TCP."""
    with Host(tmp_path, listen="127.0.0.1:0", tokens_file=str(tokens)) as host:
        yield host


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """The other end of an engine's link, not bound yet."""
    made = Server(tmp_path / "s")
    yield made
    made.close()


@pytest.fixture
def rig(server: Server) -> Iterator[Rig]:
    """A small engine with a link to `server`."""
    made = Rig(server)
    yield made
    made.link.close()
