"""`kvtier top`: one frame, many frames, and what ends them."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import sys
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kvtier.client import KVTierClient
from kvtier.operator.top_frame import BAR_WIDTH, Bar, frame
from kvtier.operator.top_view import SHOWN_DECISIONS, Decisions, collect
from kvtier.v1 import observability_pb2, program_pb2
from tests.unit.operator import sample_answers
from tests.unit.scripted_control import Failure, ScriptedControl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typer.testing import Result

    Run = Callable[..., Result]

AMOUNTS = st.floats(0, 1e15)


@pytest.fixture
def busy(server: ScriptedControl) -> ScriptedControl:
    server.script["GetStatus"] = [sample_answers.status()]
    server.script["ListPrograms"] = [sample_answers.programs()]
    server.script["ExplainDecision"] = [sample_answers.decisions()]
    return server


@pytest.fixture
def client(busy: ScriptedControl) -> Iterator[KVTierClient]:
    with KVTierClient(busy.target) as client:
        yield client


def until(condition: Callable[[], object]) -> None:
    """Wait for what a thread of the code under test brings about."""
    while not condition():
        threading.Event().wait(0.005)


def drawn(renderable: object) -> str:
    console = Console(width=120, markup=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


# -- one frame -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--once"]])
def test_where_there_is_no_terminal_one_frame_is_printed(
    flags: list[str], kvtier: Run, busy: ScriptedControl
) -> None:
    result = kvtier("top", *flags)
    assert result.exit_code == 0
    assert "\x1b" not in result.output
    for text in ("programs: 2 running, 2 waiting, 2 paused", "engine e0  on", "█",
                 "3.0 GiB pinned + 3.0 GiB other of 8.0 GiB", "3.0 GiB of a budget of 4.0 GiB",
                 "ready", "5 running, 6 waiting", "my-agent", "return_expected"):  # fmt: skip
        assert text in result.output
    assert busy.requests("WatchEvents") == []


def test_a_frame_as_json(kvtier: Run, busy: ScriptedControl) -> None:
    shown = json.loads(kvtier("top", "--json").output)
    assert shown["counts"] == {"running": 2, "waiting": 2, "paused": 2}
    assert shown["status"]["engines"][0]["engine_id"] == "e0"
    assert [p["name"] for p in shown["programs"]] == ["other", "my-agent"]
    assert shown["decisions"][0]["decision"]["action"] == "pin"


def test_programs_are_counted_by_state(client: KVTierClient, busy: ScriptedControl) -> None:
    collect(client, Decisions())
    requests = busy.requests("ListPrograms")
    assert [list(r.states) for r in requests] == [
        [program_pb2.PROGRAM_STATE_RUNNING],
        [program_pb2.PROGRAM_STATE_WAITING],
        [program_pb2.PROGRAM_STATE_PAUSED],
        [],
    ]


def test_a_program_that_goes_meanwhile_spoils_nothing(
    client: KVTierClient, busy: ScriptedControl
) -> None:
    busy.script["ExplainDecision"] = [
        Failure(grpc.StatusCode.NOT_FOUND),
        sample_answers.decisions(),
    ]
    assert len(collect(client, Decisions()).decisions) == 2


def test_an_empty_host_has_a_frame_too(server: ScriptedControl) -> None:
    with KVTierClient(server.target) as client:
        shown = drawn(frame(collect(client, Decisions())))
    for text in ("no engine is connected", "none", "none seen yet"):
        assert text in shown


@given(st.lists(AMOUNTS, max_size=3), AMOUNTS)
def test_a_bar_is_as_wide_as_it_is_whatever_the_figures(amounts: list[float], whole: float) -> None:
    parts = [(amount, "█", "#", "red") for amount in amounts]
    assert sum(Bar(parts, whole).cells()) <= BAR_WIDTH
    assert drawn(Bar(parts, whole)).strip("\n") in {
        "█" * n + "░" * (BAR_WIDTH - n) for n in range(BAR_WIDTH + 1)
    }


def test_a_bar_shows_shares_and_never_hides_a_part() -> None:
    parts = [(0.5, "a", "a", "red"), (1e-9, "b", "b", "red")]
    assert Bar(parts, 1.0).cells() == [BAR_WIDTH // 2, 1]


# -- decisions -------------------------------------------------------------------------------------


def test_decisions_are_followed_with_what_was_lost(
    client: KVTierClient, busy: ScriptedControl
) -> None:
    busy.script["WatchEvents"] = [
        [
            sample_answers.lost(3),
            observability_pb2.WatchEventsResponse(event=observability_pb2.Event(kind="decision")),
            sample_answers.decided_event(),
        ]
    ]
    decisions = Decisions()
    with decisions.followed(client):
        until(decisions.newest)
    assert decisions.lost_events == 3
    assert [(d.name, d.decision.action) for d in decisions.newest()] == [("my-agent", "pin")]
    assert busy.watch_ended.wait(10)
    assert busy.requests("WatchEvents")[0].kinds == ["decision"]


def test_a_watch_that_fails_is_begun_anew(
    client: KVTierClient, busy: ScriptedControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtier.operator.top_view._RECONNECT_S", 0.001)
    busy.script["WatchEvents"] = [
        [Failure(grpc.StatusCode.UNAVAILABLE)],
        [sample_answers.decided_event()],
    ]
    decisions = Decisions()
    with decisions.followed(client):
        until(decisions.newest)
    assert len(busy.requests("WatchEvents")) == 2


def test_only_the_last_decisions_are_kept(client: KVTierClient, busy: ScriptedControl) -> None:
    busy.script["WatchEvents"] = [[sample_answers.decided_event()] * 50 + [sample_answers.lost(1)]]
    decisions = Decisions()
    with decisions.followed(client):
        until(lambda: decisions.lost_events)
    assert len(decisions.newest()) == SHOWN_DECISIONS


# -- live ------------------------------------------------------------------------------------------


def read_until(descriptor: int, text: str) -> str:
    """Read what a terminal shows until it shows this."""
    seen = b""
    while text.encode() not in seen:
        ready, _, _ = select.select([descriptor], [], [], 60)
        assert ready, seen.decode(errors="replace")
        seen += os.read(descriptor, 1 << 16)
    return seen.decode(errors="replace")


def drain(descriptor: int) -> None:
    """Read what is left, so that whoever writes can end."""
    with contextlib.suppress(OSError):  # what Linux says when the other end has gone
        while select.select([descriptor], [], [], 60)[0] and os.read(descriptor, 1 << 16):
            pass


@pytest.mark.parametrize("key", ["q", "\x03"])
def test_a_terminal_shows_frames_until_a_key_ends_it(key: str, busy: ScriptedControl) -> None:
    process, terminal = pty.fork()
    if process == 0:
        # Ignored where the tests run in a shell's background; a terminal's programs have it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        line = [
            sys.executable,
            "-m",
            "kvtier.cli",
            "top",
            "--target",
            busy.target,
            "--interval",
            "0.1",
        ]
        os.execve(
            sys.executable, line, os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "50"}
        )
    try:
        read_until(terminal, "last decisions")
        busy.script["GetStatus"] = [Failure(grpc.StatusCode.UNAVAILABLE)]
        # The old figures stay, with the reason.
        read_until(terminal, "old figures: no control server answers")
        read_until(terminal, "e0")
        busy.script["GetStatus"] = [observability_pb2.GetStatusResponse(version="9.9.9")]
        read_until(terminal, "9.9.9")
        os.write(terminal, key.encode())
        drain(terminal)
        _, status = os.waitpid(process, 0)
        process = 0
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        if process:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        os.close(terminal)


def test_an_unreachable_server_ends_top_at_once(kvtier: Run) -> None:
    assert kvtier("top", "--target", "unix:/no/such.sock").exit_code == 3


def test_a_frame_says_how_old_it_is(client: KVTierClient) -> None:
    from dataclasses import replace  # noqa: PLC0415

    view = replace(collect(client, Decisions()), trouble="old figures: gone", lost_events=7)
    shown = drawn(frame(replace(view, taken_at=datetime.now(UTC))))
    assert "old figures: gone" in shown
    assert "lost events: 7" in shown
