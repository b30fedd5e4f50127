"""A scripted control server, and kvtier's command line pointed at it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.client.connection import TARGET_VARIABLE, TOKEN_FILE_VARIABLE
from tests.unit.scripted_control import ScriptedControl, on_unix_socket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typer.testing import Result


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtier.client.retries.FIRST_DELAY_S", 0.001)
    monkeypatch.delenv(TARGET_VARIABLE, raising=False)
    monkeypatch.delenv(TOKEN_FILE_VARIABLE, raising=False)


@pytest.fixture
def server() -> Iterator[ScriptedControl]:
    with on_unix_socket() as server:
        yield server


@pytest.fixture
def kvtier(server: ScriptedControl, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv(TARGET_VARIABLE, server.target)
    return lambda *words: CliRunner().invoke(app, words)
