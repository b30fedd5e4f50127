"""Each command: what it asks, what it prints, and as JSON."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.duration_pb2 import Duration

from kvtier.control.decision_history import PER_PROGRAM
from kvtier.v1 import observability_pb2, policy_pb2, program_pb2, ttl_pb2
from tests.unit.operator import sample_answers

if TYPE_CHECKING:
    from collections.abc import Callable

    from typer.testing import Result

    from tests.unit.scripted_control import ScriptedControl

    Run = Callable[..., Result]

COMMANDS = {
    "pin": (program_pb2.PinProgramResponse, "PinProgram"),
    "release": (program_pb2.ReleaseProgramResponse, "ReleaseProgram"),
    "stage": (program_pb2.StageProgramResponse, "StageProgram"),
    "prefetch": (program_pb2.PrefetchProgramResponse, "PrefetchProgram"),
    "end": (program_pb2.EndProgramResponse, "EndProgram"),
}


def words(verb: str) -> list[str]:
    return ["programs", verb, "my-agent", *(["10m"] if verb == "pin" else [])]


# -- status ----------------------------------------------------------------------------------------


def test_status_shows_each_engine(kvtier: Run, server: ScriptedControl) -> None:
    server.script["GetStatus"] = [sample_answers.status()]
    result = kvtier("status")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert lines[0].startswith(f"control server 0.1.0 at {server.target}, up 1h")
    assert "e0 small-model" in lines
    assert "gpu 8.0 GiB: 3.0 GiB pinned of a budget of 4.0 GiB, 2.0 GiB free; programs: 2" in lines
    assert (
        "cpu tier ready, 16.0 GiB used of 64.0 GiB; programs being staged: 1, requests being loaded: 2"
        in lines
    )
    assert "link to cpu 12.50 GB/s, to gpu 25.00 GB/s; calibrated 1d ago" in lines
    assert "queue running: 5, waiting: 6 (12,345 tokens), a new request waits 1.5s" in lines
    assert "when idle commands reach it at once" in lines
    assert "versions kvtier 0.1.0, vllm 0.32.0" in lines


def test_status_of_an_engine_that_has_said_little(kvtier: Run, server: ScriptedControl) -> None:
    server.script["GetStatus"] = [
        observability_pb2.GetStatusResponse(engines=[observability_pb2.EngineStatus()])
    ]
    output = kvtier("status").output
    for text in ("not calibrated", "never", "wait for its next step", "not measured"):
        assert text in output


def test_status_as_json_has_every_figure(kvtier: Run, server: ScriptedControl) -> None:
    server.script["GetStatus"] = [sample_answers.status()]
    shown = json.loads(kvtier("status", "--json").output)
    assert shown["version"] == "0.1.0"
    engine = shown["engines"][0]
    assert engine["gpu"]["pinned_bytes"] == 3 << 30
    assert engine["queue"]["delay_s"] == 1.5
    assert datetime.fromisoformat(engine["started_at"]).tzinfo is not None


def test_without_an_engine_status_says_so(kvtier: Run) -> None:
    assert "no engine is connected" in kvtier("status").output


# -- programs --------------------------------------------------------------------------------------


def test_programs_are_listed_with_the_columns_that_say_something(
    kvtier: Run, server: ScriptedControl
) -> None:
    server.script["ListPrograms"] = [sample_answers.programs()]
    lines = [line.split() for line in kvtier("programs", "ls").output.splitlines()]
    assert lines[0] == (
        [
            "program",
            "tenant",
            "state",
            "tool",
            "turns",
            "context",
            "gpu",
            "cpu",
            "ttl",
            "left",
            "returns",
            "in",
            "active",
        ]
    )
    assert lines[1][:4] == ["other", "running", "1", "512"]
    assert lines[2][:8] == ["my-agent", "acme", "paused", "bash", "7", "20,480", "20,000", "16,384"]
    assert not any("e0" in line for line in lines)


def test_programs_of_several_engines_are_told_apart(kvtier: Run, server: ScriptedControl) -> None:
    programs = [sample_answers.running(), sample_answers.paused()]
    programs[1].engine_id = "e1"
    server.script["ListPrograms"] = [program_pb2.ListProgramsResponse(programs=programs)]
    output = kvtier("programs", "ls").output
    assert "engine" in output
    assert "e1" in output


def test_programs_are_filtered_by_the_server(kvtier: Run, server: ScriptedControl) -> None:
    assert "no programs" in kvtier(
        "programs", "ls", "--state", "paused", "--state", "running", "--tenant", ""
    ).output  # fmt: skip
    request = server.requests("ListPrograms")[0]
    assert list(request.states) == [
        program_pb2.PROGRAM_STATE_PAUSED,
        program_pb2.PROGRAM_STATE_RUNNING,
    ]
    assert request.HasField("tenant")
    kvtier("programs", "ls")
    assert not server.requests("ListPrograms")[1].HasField("tenant")


def pages(n_programs: int) -> Callable[[Any], program_pb2.ListProgramsResponse]:
    def answer(request: Any) -> program_pb2.ListProgramsResponse:
        first = int(request.page_token or 0)
        end = min(n_programs, first + (request.page_size or 100))
        return program_pb2.ListProgramsResponse(
            programs=[sample_answers.running(f"p{n}") for n in range(first, end)],
            next_page_token=str(end) if end < n_programs else "",
            total_size=n_programs,
        )

    return answer


@pytest.mark.parametrize(
    ("limit", "shown"), [("1", 1), ("100", 100), ("1000", 1000), ("1500", 1500), ("0", 2500)]
)
def test_so_many_programs_are_shown_as_asked_for(
    limit: str, shown: int, kvtier: Run, server: ScriptedControl
) -> None:
    server.script["ListPrograms"] = [pages(2500)]
    listed = json.loads(kvtier("programs", "ls", "--limit", limit, "--json").output)
    assert [program["name"] for program in listed["programs"]] == [f"p{n}" for n in range(shown)]
    assert listed["total_size"] == 2500


def test_what_the_list_leaves_out_is_counted(kvtier: Run, server: ScriptedControl) -> None:
    server.script["ListPrograms"] = [pages(2500)]
    output = kvtier("programs", "ls", "--limit", "10").output
    assert output.splitlines()[-1] == "and 2,490 more: --limit 0 shows all"
    assert "more" not in kvtier("programs", "ls", "--limit", "0").output


def test_a_name_cannot_steer_the_terminal(kvtier: Run, server: ScriptedControl) -> None:
    evil = sample_answers.paused("\x1b]0;owned\x07[bold]x")
    server.script["ListPrograms"] = [program_pb2.ListProgramsResponse(programs=[evil])]
    server.script["GetProgram"] = [program_pb2.GetProgramResponse(programs=[evil])]
    for command in (("ls",), ("get", "x")):
        output = kvtier("programs", *command).output
        assert "\\x1b]0;owned\\x07[bold]x" in output
        assert "\x1b" not in output


def test_get_shows_a_program_for_each_engine(kvtier: Run, server: ScriptedControl) -> None:
    server.script["GetProgram"] = [
        program_pb2.GetProgramResponse(programs=[sample_answers.paused(), sample_answers.running()])
    ]
    lines = [
        " ".join(line.split())
        for line in kvtier("programs", "get", "my-agent", "--tenant", "acme").output.splitlines()
    ]
    for line in ("tenant acme", "state paused", "in gpu memory 20,000 tokens pinned",
                 "in cpu tier 16,384 tokens", "ttl left 48s", "known by its prefix alone"):  # fmt: skip
        assert line in lines
    assert server.requests("GetProgram") == [
        program_pb2.GetProgramRequest(name="my-agent", tenant="acme")
    ]
    shown = json.loads(kvtier("programs", "get", "my-agent", "--json").output)
    assert shown["programs"][0]["ttl_left_s"] == 48.0


@pytest.mark.parametrize("verb", list(COMMANDS))
def test_a_program_is_commanded_and_the_answer_told(
    verb: str, kvtier: Run, server: ScriptedControl
) -> None:
    response, method = COMMANDS[verb]
    server.script[method] = [response(results=[sample_answers.result(detail="so it is")])]
    result = kvtier(*words(verb), "--tenant", "acme")
    assert (result.exit_code, result.output) == (0, "accepted: so it is  (e0)\n")
    request = server.requests(method)[0]
    assert (request.name, request.tenant) == ("my-agent", "acme")
    if verb == "pin":
        assert request.ttl == Duration(seconds=600)
    shown = json.loads(kvtier(*words(verb), "--json").output)
    assert shown["results"][0] == {
        "outcome": "accepted", "reason": "pinned", "detail": "so it is", "engine_id": "e0",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        (["ACCEPTED"], 0),
        (["CLIPPED"], 0),
        (["DEFERRED"], 0),
        (["REJECTED"], 1),
        (["MISSING"], 1),
        (["UNSPECIFIED"], 1),
        (["MISSING", "ACCEPTED"], 0),
        (["REJECTED", "ACCEPTED"], 1),
        ([], 1),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_the_exit_code_says_whether_it_was_done(
    outcomes: list[str], code: int, flags: list[str], kvtier: Run, server: ScriptedControl
) -> None:
    results = [sample_answers.result(outcome) for outcome in outcomes]
    server.script["StageProgram"] = [program_pb2.StageProgramResponse(results=results)]
    assert kvtier("programs", "stage", "p", *flags).exit_code == code


def test_a_result_without_details_says_its_reason(kvtier: Run, server: ScriptedControl) -> None:
    answer = sample_answers.result("REJECTED", reason="running", detail="")
    server.script["StageProgram"] = [program_pb2.StageProgramResponse(results=[answer])]
    assert kvtier("programs", "stage", "p").output == "rejected: running  (e0)\n"


# -- ttl -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "scope", "said"),
    [
        (["--tool", "bash"], ttl_pb2.TtlScope(tool="bash"), "tool bash"),
        (["--tenant", "acme"], ttl_pb2.TtlScope(tenant="acme"), "tenant acme"),
        (["--tenant", ""], ttl_pb2.TtlScope(tenant=""), "requests without a tenant"),
        (["--all"], ttl_pb2.TtlScope(all=True), "all"),
        (
            ["--program", "p", "--tenant", "acme"],
            ttl_pb2.TtlScope(program=ttl_pb2.ProgramScope(name="p", tenant="acme")),
            "program p of acme",
        ),
    ],
)
def test_an_override_is_set_and_removed_by_its_scope(
    options: list[str], scope: ttl_pb2.TtlScope, said: str, kvtier: Run, server: ScriptedControl
) -> None:
    server.script["SetTtlOverride"] = [
        lambda r: ttl_pb2.SetTtlOverrideResponse(override=r.override, engines=2, saved=True)
    ]
    server.script["DeleteTtlOverride"] = [ttl_pb2.DeleteTtlOverrideResponse(saved=True)]
    result = kvtier("ttl", "set", "60s", *options)
    assert result.exit_code == 0
    assert result.output == f"{said}: exactly 1m\nengines that have it: 2\n"
    assert "saved" not in result.output
    sent = server.requests("SetTtlOverride")[0].override
    assert (sent.scope, sent.mode, sent.ttl.seconds) == (scope, ttl_pb2.TTL_MODE_FIXED, 60)
    assert not sent.HasField("expires_at")
    assert kvtier("ttl", "rm", *options).output == f"removed: {said}\n"
    assert server.requests("DeleteTtlOverride")[0].scope == scope


def test_an_override_may_bound_and_end(kvtier: Run, server: ScriptedControl) -> None:
    server.script["SetTtlOverride"] = [
        lambda r: ttl_pb2.SetTtlOverrideResponse(override=r.override, engines=1)
    ]
    line = ["ttl", "set", "1m30s", "--tool", "bash", "--mode", "cap", "--expires", "1h"]
    assert kvtier(*line).output.startswith("tool bash: at most 1m30s, for ")
    sent = server.requests("SetTtlOverride")[0].override
    assert sent.mode == ttl_pb2.TTL_MODE_CAP
    left = sent.expires_at.ToDatetime(tzinfo=UTC) - datetime.now(UTC)
    assert timedelta(minutes=50) < left <= timedelta(hours=1)
    shown = json.loads(kvtier(*line, "--json").output)
    assert shown["override"]["scope"] == {"kind": "tool", "name": "bash", "tenant": ""}
    assert shown["engines"] == 1


def test_an_override_that_could_not_be_saved_is_told(kvtier: Run, server: ScriptedControl) -> None:
    server.script["SetTtlOverride"] = [
        lambda r: ttl_pb2.SetTtlOverrideResponse(override=r.override)
    ]
    for line in (["set", "60", "--all"], ["rm", "--all"]):
        result = kvtier("ttl", *line)
        assert result.exit_code == 0
        assert "not saved, as the control server cannot write its state file" in result.output
    assert json.loads(kvtier("ttl", "rm", "--all", "--json").output)["saved"] is False


def test_overrides_are_listed(kvtier: Run, server: ScriptedControl) -> None:
    assert "no overrides" in kvtier("ttl", "ls").output
    server.script["ListTtlOverrides"] = [
        ttl_pb2.ListTtlOverridesResponse(
            overrides=[
                sample_answers.override(tool="bash"),
                ttl_pb2.TtlOverride(scope=ttl_pb2.TtlScope(all=True), mode=ttl_pb2.TTL_MODE_FLOOR),
            ]
        )
    ]
    lines = [line.split() for line in kvtier("ttl", "ls").output.splitlines()]
    assert lines[1][:4] == ["tool", "bash", "cap", "1m"]
    assert lines[2] == ["all", "floor", "0s", "never"]
    shown = json.loads(kvtier("ttl", "ls", "--json").output)
    assert shown["overrides"][1]["expires_at"] is None


@pytest.mark.parametrize(
    "line",
    [
        ["set", "60"],
        ["rm"],
        ["set", "60", "--tool", "bash", "--all"],
        ["set", "60", "--tool", "bash", "--tenant", "t"],
        ["rm", "--all", "--tenant", "t"],
        ["rm", "--program", "p", "--tool", "t"],
        ["set", "60", "--all", "--expires", "999999999d"],
        ["set", "soon", "--all"],
        ["set", "60", "--all", "--mode", "most"],
    ],
)
def test_a_scope_is_one_of_four_and_values_are_checked(
    line: list[str], kvtier: Run, server: ScriptedControl
) -> None:
    assert kvtier("ttl", *line).exit_code == 2
    assert server.asked == []


# -- policy ----------------------------------------------------------------------------------------


def test_policies_are_shown_side_by_side(kvtier: Run, server: ScriptedControl) -> None:
    other = sample_answers.policy(mode=policy_pb2.MODE_SHADOW, tenant_budgets=[])
    other.engine_id = "e1"
    server.script["GetPolicy"] = [
        policy_pb2.GetPolicyResponse(policies=[sample_answers.policy(), other])
    ]
    result = kvtier("policy", "get", "--engine", "e0")
    assert [line.split() for line in result.output.splitlines()] == [
        ["setting", "e0", "e1"],
        ["mode", "on", "shadow"],
        ["pin_budget_fraction", "0.5", "0.5"],
        ["max_ttl_s", "10m", "10m"],
        ["admission", "working_set", "working_set"],
        ["aging_s", "10m", "10m"],
        ["max_defer_s", "1h", "1h"],
        ["stage", "true", "true"],
        ["tenant_budgets", "acme=480GiB*1s/10m", "none"],
    ]
    assert server.requests("GetPolicy")[0].engine_id == "e0"
    shown = json.loads(kvtier("policy", "get", "--json").output)
    assert shown["policies"][0]["policy"]["max_ttl_s"] == 600.0
    assert shown["policies"][0]["policy"]["tenant_budgets"][0]["byte_seconds"] == 480 << 30


def test_settings_are_changed_by_their_names(kvtier: Run, server: ScriptedControl) -> None:
    server.script["UpdatePolicy"] = [
        policy_pb2.UpdatePolicyResponse(
            policies=[sample_answers.policy()], results=[sample_answers.result(detail="changed")]
        )
    ]
    line = ["policy", "set", "mode=shadow", "pin_budget_fraction=0.25", "max_ttl_s=5m",
            "admission=program_fcfs", "aging_s=0", "max_defer_s=1h30m", "stage=false",
            "tenant_budgets=acme=8GiB*60s/10m", "--engine", "e0"]  # fmt: skip
    result = kvtier(*line)
    assert result.exit_code == 0
    assert result.output.endswith("accepted: changed  (e0)\n")
    assert "working_set" in result.output
    request = server.requests("UpdatePolicy")[0]
    assert request.engine_id == "e0"
    assert set(request.update_mask.paths) == set(policy_pb2.Policy.DESCRIPTOR.fields_by_name)
    assert request.policy == policy_pb2.Policy(
        mode=policy_pb2.MODE_SHADOW, pin_budget_fraction=0.25, max_ttl=Duration(seconds=300),
        admission=policy_pb2.ADMISSION_PROGRAM_FCFS, aging=Duration(),
        max_defer=Duration(seconds=5400), stage=False,
        tenant_budgets=[
            {"tenant": "acme", "byte_seconds": 480 << 30, "period": Duration(seconds=600)}
        ],
    )  # fmt: skip
    assert json.loads(kvtier(*line, "--json").output)["results"][0]["outcome"] == "accepted"
    kvtier("policy", "set", "tenant_budgets=none")
    assert list(server.requests("UpdatePolicy")[-1].update_mask.paths) == ["tenant_budgets"]


def test_a_change_that_an_engine_refuses_is_an_error(kvtier: Run, server: ScriptedControl) -> None:
    server.script["UpdatePolicy"] = [
        policy_pb2.UpdatePolicyResponse(results=[sample_answers.result("REJECTED", detail="no")])
    ]
    result = kvtier("policy", "set", "stage=true")
    assert (result.exit_code, result.output) == (1, "rejected: no  (e0)\n")


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        ("mode", "NAME=VALUE, with mode, pin_budget_fraction"),
        ("colour=red", "NAME=VALUE, with mode, pin_budget_fraction"),
        ("mode=maybe", "on, shadow, off"),
        ("pin_budget_fraction=1.5", "a number from 0 to 1"),
        ("pin_budget_fraction=nan", "a number from 0 to 1"),
        ("max_ttl_s=soon", "a number of seconds, or with units"),
        ("admission=fifo", "off, program_fcfs, working_set"),
        ("stage=perhaps", "true, false"),
        ("tenant_budgets=acme", "TENANT=BYTES*DURATION/PERIOD"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_is_accepted(
    change: str, accepted: str, kvtier: Run, server: ScriptedControl
) -> None:
    result = kvtier("policy", "set", change)
    assert result.exit_code == 2
    assert f"accepted is {accepted}" in result.output
    assert server.asked == []


def test_a_setting_cannot_have_two_values(kvtier: Run) -> None:
    result = kvtier("policy", "set", "stage=true", "stage=false")
    assert result.exit_code == 2
    assert "stage: accepted is one value" in result.output


def test_without_an_engine_there_is_no_policy(kvtier: Run) -> None:
    assert kvtier("policy", "get").output == "no engine is connected\n"
    result = kvtier("policy", "set", "stage=true")
    assert (result.exit_code, result.output) == (1, "no engine was there to do it\n")


# -- explain ---------------------------------------------------------------------------------------


def test_explain_shows_every_options_cost_and_the_reason_in_words(
    kvtier: Run, server: ScriptedControl
) -> None:
    server.script["ExplainDecision"] = [sample_answers.decisions()]
    result = kvtier("explain", "my-agent", "--tenant", "acme", "--limit", "2")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert lines[0].startswith("pause: kept in GPU memory for 1m 12")
    assert lines[0].endswith("ago, engine e0, request chatcmpl-1")
    assert lines[1:7] == [
        "Until this TTL, the chance of a return is worth more than the memory. (return_expected)",
        "option expected cost",
        "-> pin_and_stage 125ms",
        "pin 250ms",
        "drop 2.5s",
        "went by: context_tokens=20480, tool=bash",
    ]
    assert "return: taken from GPU memory" in result.output
    request = server.requests("ExplainDecision")[0]
    assert (request.name, request.tenant, request.limit) == ("my-agent", "acme", 2)
    shown = json.loads(kvtier("explain", "my-agent", "--json").output)
    assert shown["decisions"][0]["costs"][1]["parts_s"] == {"held": 0.2, "miss": 0.05}


@pytest.mark.parametrize(
    "line",
    [
        "programs pin my-agent -1",
        "programs pin -10m my-agent",
        "programs pin my-agent -- -1",
        "ttl set --all -1.5h",
        "ttl set 60 --all --expires -1",
        "status --timeout -1",
    ],
)
def test_a_negative_duration_is_refused_as_a_duration(
    line: str, kvtier: Run, server: ScriptedControl
) -> None:
    result = kvtier(*line.split())
    assert result.exit_code == 2
    assert "accepted is a number of seconds, or with units" in " ".join(result.output.split())
    assert server.asked == []


def test_a_negative_number_is_no_option_where_no_duration_is(kvtier: Run) -> None:
    assert "No such option: -1" in kvtier("programs", "get", "-1").output


def test_where_nothing_was_decided_explain_says_so(kvtier: Run) -> None:
    result = kvtier("explain", "my-agent")
    assert result.exit_code == 0
    assert "no decisions yet" in result.output
    assert json.loads(kvtier("explain", "my-agent", "--json").output) == {"decisions": []}


@pytest.mark.parametrize("limit", ["0", str(PER_PROGRAM + 1), "x"])
def test_explain_shows_from_one_decision_to_all_that_are_kept(limit: str, kvtier: Run) -> None:
    assert kvtier("explain", "my-agent", "--limit", limit).exit_code == 2
    assert kvtier("explain", "my-agent", "--limit", str(PER_PROGRAM)).exit_code == 0


# -- watch -----------------------------------------------------------------------------------------


def test_watch_prints_a_line_for_each_event_and_says_what_was_lost(
    kvtier: Run, server: ScriptedControl
) -> None:
    server.script["WatchEvents"] = [
        [
            sample_answers.decided_event(),
            sample_answers.lost(3),
            sample_answers.staged_event(),
            sample_answers.staged_event(),
        ]
    ]
    result = kvtier(
        "watch", "--kind", "decision", "--kind", "staged", "--program", "my-agent",
        "--tenant", "acme", "--count", "3",
    )  # fmt: skip
    assert result.exit_code == 0
    decided, lost, staged = (line.split(maxsplit=1) for line in result.output.splitlines())
    assert decided[1] == (
        "decision      my-agent of acme  pause: kept in GPU memory for 1m (return_expected)  (e0)"
    )
    assert (
        " ".join(lost)
        == "lost 3 events: this reader is too slow, or an engine could not report all"
    )
    assert staged[1] == "staged        my-agent  tokens=16384  (e0)"
    assert server.requests("WatchEvents") == [
        observability_pb2.WatchEventsRequest(
            kinds=["decision", "staged"], name="my-agent", tenant="acme"
        )
    ]
    assert server.watch_ended.wait(10)


def test_watch_prints_json_lines(kvtier: Run, server: ScriptedControl) -> None:
    server.script["WatchEvents"] = [[sample_answers.decided_event(), sample_answers.lost(3)]]
    first, second = map(json.loads, kvtier("watch", "--json", "--count", "2").output.splitlines())
    assert first["kind"] == "decision"
    assert first["decision"]["action"] == "pin"
    assert second == {"lost": 3}


def test_watch_ends_with_an_error_when_the_server_goes_away(
    kvtier: Run, server: ScriptedControl
) -> None:
    from tests.unit.test_client import UNAVAILABLE  # noqa: PLC0415

    server.script["WatchEvents"] = [[sample_answers.lost(1), UNAVAILABLE]]
    result = kvtier("watch")
    assert result.exit_code == 3
    assert "lost 1 events" in result.output


def test_ctrl_c_ends_watch_well(
    kvtier: Run, server: ScriptedControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvtier.operator.watch.describe", interrupt)
    server.script["WatchEvents"] = [[sample_answers.lost(1)]]
    assert kvtier("watch").exit_code == 0


def test_watch_knows_the_kinds(kvtier: Run) -> None:
    result = kvtier("watch", "--kind", "gossip")
    assert result.exit_code == 2
    assert "accepted is turn_started" in result.output


# -- calibrate ----------------------------------------------------------------------------------------


def test_engines_that_run_are_asked_to_measure(kvtier: Run, server: ScriptedControl) -> None:
    done = observability_pb2.CalibrateResponse(results=[sample_answers.result()])
    server.script["Calibrate"] = [done]
    for more, engine in (((), ""), (("--engine", "e0"), "e0")):
        result = kvtier("calibrate", "--running", *more)
        assert result.exit_code == 0, result.output
        assert "accepted" in result.output
        assert server.asked[-1].request.engine_id == engine
    server.script["Calibrate"] = [observability_pb2.CalibrateResponse()]
    result = kvtier("calibrate", "--running")
    assert (result.exit_code, "no engine" in result.output) == (1, True)


def test_calibrating_what_runs_has_a_help_of_its_own(kvtier: Run) -> None:
    result = kvtier("calibrate", "--running", "--help")
    assert result.exit_code == 0
    assert "--engine" in result.output
    assert "--target" in result.output
    assert "--running" in kvtier("calibrate", "--help").output
