"""Commands and client with the control server that kvtier has, and an engine that does as it is told."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from kvtier import link_messages as link
from kvtier.cli import app
from kvtier.client import InvalidArgument, KVTierClient, Outcome, TtlScope
from kvtier.client.connection import TARGET_VARIABLE
from tests.unit.control.control_host import POLICY, FakeEngine, Host, in_background, program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typer.testing import Result

    Run = Callable[..., Result]

AGENT = program("my-agent", "acme")
DECIDED = link.Decided(
    at_s=1_700_000_000.0, program=AGENT, request_id="r", event="pause", action="pin",
    reason="return_expected", ttl_s=30.0,
    costs=[link.OptionCost("drop", 2.5), link.OptionCost("pin", 0.25, {"held": 0.25})],
    inputs={"tool": "bash", "context_tokens": 120},
)  # fmt: skip


@pytest.fixture
def host() -> Iterator[Host]:
    with tempfile.TemporaryDirectory(prefix="kvtier-") as folder, Host(Path(folder)) as host:
        yield host


@pytest.fixture
def engine(host: Host) -> FakeEngine:
    engine = host.engine()
    engine.join()
    engine.knows(AGENT)
    return engine


@pytest.fixture
def kvtier(host: Host, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command line that finds the server by its run directory."""
    monkeypatch.delenv(TARGET_VARIABLE, raising=False)
    monkeypatch.setenv("KVTIER_RUN_DIR", str(host.run_dir))
    return lambda *words: CliRunner().invoke(app, words)


def test_what_the_engine_has_reported_is_shown(kvtier: Run, engine: FakeEngine) -> None:
    engine.report(DECIDED)
    status = kvtier("status")
    assert status.exit_code == 0
    assert "small" in status.output
    listed = json.loads(kvtier("programs", "ls", "--state", "paused", "--json").output)
    assert [(p["name"], p["tenant"]) for p in listed["programs"]] == [("my-agent", "acme")]
    assert kvtier("programs", "get", "my-agent", "--tenant", "acme").exit_code == 0
    policy = json.loads(kvtier("policy", "get", "--json").output)["policies"][0]["policy"]
    assert (policy["mode"], policy["max_ttl_s"], policy["stage"]) == ("on", 600.0, True)
    explained = kvtier("explain", "my-agent", "--tenant", "acme").output
    assert "pause: kept in GPU memory for 30s" in explained
    assert "context_tokens=120, tool=bash" in explained
    assert "my-agent" in kvtier("top").output


def test_a_command_reaches_the_engine_and_its_answer_the_operator(
    kvtier: Run, engine: FakeEngine
) -> None:
    answered = in_background(
        lambda: kvtier("programs", "pin", "my-agent", "1h", "--tenant", "acme")
    )
    command = engine.next(link.PinCommand)
    engine.answer(command, "clipped", "max_ttl", "120 tokens for 600 s")
    assert (command.program, command.ttl_s) == (AGENT, 3600.0)
    assert (answered().exit_code, answered().output) == (
        0,
        "clipped: 120 tokens for 600 s  (engine-0)\n",
    )


def test_an_idle_engine_defers(kvtier: Run, engine: FakeEngine) -> None:
    result = kvtier("programs", "release", "my-agent", "--tenant", "acme")
    assert result.exit_code == 0
    assert result.output.startswith("deferred: ")


def test_a_policy_is_changed(kvtier: Run, engine: FakeEngine) -> None:
    answered = in_background(lambda: kvtier("policy", "set", "stage=false", "aging_s=0", "--json"))
    command = engine.next(link.PolicyCommand)
    engine.answer(command, policy=POLICY)
    assert (command.stage, command.aging_s, command.mode) == (False, 0.0, None)
    assert json.loads(answered().output)["results"][0]["outcome"] == "accepted"


def test_overrides_are_set_listed_and_removed(kvtier: Run, host: Host) -> None:
    assert kvtier("ttl", "set", "60s", "--tool", "bash", "--mode", "cap").exit_code == 0
    assert kvtier("ttl", "set", "0", "--program", "my-agent", "--tenant", "acme").exit_code == 0
    listed = json.loads(kvtier("ttl", "ls", "--json").output)["overrides"]
    assert [override["scope"]["kind"] for override in listed] == ["program", "tool"]
    removed = json.loads(kvtier("ttl", "rm", "--tool", "bash", "--json").output)
    assert removed["saved"] is True
    again = kvtier("ttl", "rm", "--tool", "bash")
    assert again.exit_code == 1


def test_events_are_watched(host: Host, engine: FakeEngine) -> None:
    with (
        KVTierClient(host.files.unix_target) as client,
        client.watch(name="my-agent", tenant="acme") as watch,
    ):
        watch.wait_started()
        engine.report(DECIDED, link.Staged(at_s=time.time(), program=AGENT, tokens=64))
        first, second = next(watch), next(watch)
    assert getattr(first, "kind", None) == "decision"
    assert getattr(second, "fields", None) == {"tokens": "64"}


def test_a_tool_call_is_announced_once_for_one_id(host: Host, engine: FakeEngine) -> None:
    with KVTierClient(host.files.unix_target) as client:
        call = in_background(
            lambda: client.announce_tool_call(
                "my-agent", "bash", tenant="acme", expected_s=2, request_id="one"
            )
        )
        command = engine.next(link.ToolCallCommand)
        engine.answer(command, "accepted", "noted")
        assert [result.outcome for result in call()] == [Outcome.ACCEPTED]
        again = client.announce_tool_call(
            "my-agent", "bash", tenant="acme", expected_s=2, request_id="one"
        )
    assert [result.reason for result in again] == ["noted"]
    assert (command.tool, command.p50_s) == ("bash", 2.0)
    assert engine.says_nothing()


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (("programs", "get", "nobody"), 1, "kvtier: no engine knows a program 'nobody'"),
        (("programs", "pin", "my-agent", "0"), 2, "kvtier: ttl: "),
        (("programs", "pin", "my-agent", "8d"), 2, "kvtier: ttl: "),
        (("policy", "get", "--engine", "nobody"), 1, "kvtier: there is no engine 'nobody'"),
        (("ttl", "rm", "--all"), 1, "kvtier: "),
    ],
)
def test_a_refusal_is_told_in_one_line(
    line: tuple[str, ...], code: int, said: str, kvtier: Run, engine: FakeEngine
) -> None:
    result = kvtier(*line)
    assert result.exit_code == code
    assert result.stderr.startswith(said)
    assert len(result.stderr.splitlines()) == 1


def test_a_host_without_engines_is_told_apart_from_one_without_a_server(
    kvtier: Run, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtier.client.retries.RETRIES", 0)
    assert "no engine is connected" in kvtier("status").output
    top = kvtier("top")
    assert (top.exit_code, "no engine is connected" in top.output) == (0, True)
    refused = kvtier("programs", "ls")
    assert refused.exit_code == 3
    assert "no engine is connected" in refused.stderr
    assert "no control server" not in refused.stderr


def test_the_fields_of_a_bad_request_are_named(host: Host, engine: FakeEngine) -> None:
    with KVTierClient(host.files.unix_target) as client:
        with pytest.raises(InvalidArgument) as caught:
            client.set_ttl_override(TtlScope.of_tool("x" * 300), -1.0)
        assert set(caught.value.fields) == {"override.scope.tool", "override.ttl"}
        assert caught.value.reason == "BAD_FIELDS"
