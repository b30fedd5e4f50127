"""How commands reach the server, how they end when they cannot, and what their help says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import typer
from google.rpc import error_details_pb2
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.client.connection import TARGET_VARIABLE, TOKEN_FILE_VARIABLE
from kvtier.operator import add_commands
from kvtier.v1 import observability_pb2, program_pb2
from tests.unit.operator import sample_answers
from tests.unit.scripted_control import Failure, ScriptedControl, make_certificates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from typer.testing import Result

    Run = Callable[..., Result]

Code = grpc.StatusCode
NO_ENGINE = error_details_pb2.ErrorInfo(reason="NO_ENGINE")


def operator_commands() -> Iterator[tuple[list[str], str]]:
    """Words of each command, and the text after its options in its help; `chaos` asks for other things, see its tests."""
    own = typer.Typer()
    add_commands(own)

    def walk(group: typer.Typer, before: list[str]) -> Iterator[tuple[list[str], str]]:
        for command in (c for c in group.registered_commands if c.name != "chaos"):
            yield [*before, str(command.name)], str(command.epilog)
        for inner in group.registered_groups:
            assert inner.typer_instance is not None
            name = inner.typer_instance.info.name
            yield from walk(inner.typer_instance, [*before, *([str(name)] if name else [])])

    return walk(own, [])


COMMANDS = {" ".join(words): (words, epilog) for words, epilog in operator_commands()}


def failing(server: ScriptedControl, failure: Failure) -> None:
    server.script["GetStatus"] = [failure]


# -- help ------------------------------------------------------------------------------------------


def test_all_commands_are_there() -> None:
    assert set(COMMANDS) == {
        "status", "top", "explain", "watch",
        "programs ls", "programs get", "programs pin", "programs release", "programs stage",
        "programs prefetch", "programs end",
        "ttl set", "ttl ls", "ttl rm",
        "policy get", "policy set",
    }  # fmt: skip


@pytest.mark.parametrize("name", list(COMMANDS))
def test_each_help_shows_an_example_and_the_exit_codes(name: str) -> None:
    result = CliRunner().invoke(app, [*COMMANDS[name][0], "--help"])
    assert result.exit_code == 0
    assert re.search(rf"^ +kvtier {name}", result.output, re.MULTILINE)
    assert "Exit codes: 0 done; 1 the server said no; 2 wrong usage; 3 no" in result.output
    for option in ("--target", "--token-file", "--tls-ca", "--timeout", "--json"):
        assert option in result.output


@pytest.mark.parametrize("name", list(COMMANDS))
def test_each_example_of_a_help_does_something(
    name: str, kvtier: Run, server: ScriptedControl
) -> None:
    done = [sample_answers.result()]
    for verb in ("Pin", "Release", "Stage", "Prefetch", "End"):
        response = getattr(program_pb2, f"{verb}ProgramResponse")
        server.script[f"{verb}Program"] = [response(results=done)]
    server.script["UpdatePolicy"] = [_update(done)]
    server.script["ExplainDecision"] = [sample_answers.decisions()]
    server.script["WatchEvents"] = [[sample_answers.lost(1)] * 100 + [Failure(Code.UNAVAILABLE)]]
    examples = re.findall(r"^ +kvtier (.*)$", COMMANDS[name][1], re.MULTILINE)
    assert examples
    for example in examples:
        words = shlex.split(example.partition(" > ")[0].replace("host:7461", server.target))
        result = kvtier(*words)
        endless = words[0] == "watch" and "--count" not in words
        assert result.exit_code == (3 if endless else 0), result.output
    assert len(server.asked) >= len(examples)


def _update(done: list[Any]) -> Any:
    from kvtier.v1 import policy_pb2  # noqa: PLC0415

    return policy_pb2.UpdatePolicyResponse(results=done)


def test_help_loads_neither_grpc_nor_an_engine() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from kvtier.cli import app\n"
        "for words in (['--help'], ['status', '--help'], ['ttl', 'set', '--help']):\n"
        "    assert CliRunner().invoke(app, words).exit_code == 0\n"
        "heavy = ('grpc', 'google.protobuf', 'vllm', 'torch', 'rich.live')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert shown.stdout.strip() == "[]"


def test_shells_can_complete() -> None:
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).output
    environ = {
        "_KVTIER_COMPLETE": "complete_bash", "COMP_WORDS": "kvtier watch --kind st", "COMP_CWORD": "3",
    }  # fmt: skip
    result = CliRunner().invoke(app, env=environ, prog_name="kvtier")
    assert "staged" in result.output.split()


# -- where to --------------------------------------------------------------------------------------


def test_an_option_names_the_server_before_the_environment_does(
    server: ScriptedControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TARGET_VARIABLE, "unix:/nowhere")
    path = server.target.removeprefix("unix:")
    assert CliRunner().invoke(app, ["status", "--target", path]).exit_code == 0
    assert len(server.asked) == 1


def test_the_run_directory_holds_the_default_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTIER_RUN_DIR", str(tmp_path))
    (tmp_path / "kvtier.control.sock").touch()
    result = CliRunner().invoke(app, ["status"])
    assert result.exit_code == 3
    assert f"unix:{tmp_path}/kvtier.control.sock (the run directory's socket)" in result.output


def test_token_and_tls_options_are_passed_on(tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    server = ScriptedControl("127.0.0.1:0", files.credentials(mutual=True))
    token = tmp_path / "token"
    token.write_text("secret")
    result = CliRunner().invoke(
        app,
        ["programs", "ls", "--target", f"127.0.0.1:{server.port}", "--token-file", str(token),
         "--tls-ca", str(files.ca), "--tls-cert", str(files.client_cert),
         "--tls-key", str(files.client_key), "--timeout", "100m"],
    )  # fmt: skip
    server.stop()
    assert result.exit_code == 0
    assert server.asked[0].metadata["authorization"] == "Bearer secret"
    assert (server.asked[0].time_left_s or 0) > 1000


def test_the_environment_names_the_token_file(
    kvtier: Run, server: ScriptedControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("secret")
    monkeypatch.setenv(TOKEN_FILE_VARIABLE, str(tmp_path / "token"))
    assert kvtier("status").exit_code == 0
    assert server.asked[0].metadata["authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "somewhere"], "accepted is HOST:PORT"),
        (["--target", "10.0.0.1:1", "--token-file", "x"], "would be sent unencrypted"),
        (["--target", "10.0.0.1:1", "--tls-cert", "x"], "give both or neither"),
        (["--tls"], "TLS is for TCP"),
        (["--token-file", "/none"], "token file /none: No such file"),
        (["--timeout", "0"], "accepted is more than 0"),
        (["--timeout", "soon"], "accepted is a number of seconds"),
    ],
)
def test_a_connection_that_cannot_be_is_wrong_usage(
    options: list[str], said: str, kvtier: Run, server: ScriptedControl
) -> None:
    result = kvtier("status", *options)
    assert result.exit_code == 2
    assert said in result.output
    assert server.asked == []


# -- failures --------------------------------------------------------------------------------------


def test_one_line_says_what_was_tried_and_what_to_do(kvtier: Run) -> None:
    result = kvtier("status", "--target", "unix:/no/such.sock")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr == (
        "kvtier: no control server answers at unix:/no/such.sock: No such file or directory (2). "
        "Does an engine run with kvtier.control=on? --target or KVTIER_CONTROL_TARGET names another "
        "server.\n"
    )


def test_where_tls_fails_the_line_says_what_to_do_about_tls(tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    server = ScriptedControl("127.0.0.1:0", files.credentials(mutual=False))
    line = ["status", "--target", f"127.0.0.1:{server.port}"]
    plain = CliRunner().invoke(app, line)
    unchecked = CliRunner().invoke(app, [*line, "--tls"])
    server.stop()
    assert plain.exit_code == unchecked.exit_code == 3
    assert "Does it want TLS? --tls-ca names" in plain.stderr
    assert "CERTIFICATE_VERIFY_FAILED" in unchecked.stderr
    assert "--tls-ca names the certificates" in unchecked.stderr
    assert "kvtier.control=on" not in plain.stderr + unchecked.stderr


def test_grpc_itself_says_nothing(tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    server = ScriptedControl("127.0.0.1:0", files.credentials(mutual=False))
    line = ["status", "--tls", "--target", f"127.0.0.1:{server.port}"]
    shown = subprocess.run(
        [sys.executable, "-m", "kvtier.cli", *line], capture_output=True, check=False, text=True
    )
    server.stop()
    assert shown.returncode == 3
    assert len(shown.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (Failure(Code.NOT_FOUND, "no engine knows it"), 1, "kvtier: no engine knows it"),
        (Failure(Code.UNAUTHENTICATED, "a token is needed"), 1, "KVTIER_CONTROL_TOKEN_FILE"),
        (Failure(Code.PERMISSION_DENIED, "not yours"), 1, "kvtier: not yours"),
        (Failure(Code.RESOURCE_EXHAUSTED, "too many calls"), 1, "kvtier: too many calls"),
        (Failure(Code.INTERNAL, "a bug"), 1, "kvtier: a bug"),
        (Failure(Code.INVALID_ARGUMENT, "wrong"), 2, "kvtier: wrong"),
        (Failure(Code.UNAVAILABLE, "ending"), 3, "no control server answers at"),
        (
            Failure(Code.UNAVAILABLE, "no engine", [NO_ENGINE]),
            3,
            "(KVTIER_CONTROL_TARGET): no engine\n",
        ),
        (Failure(Code.UNAVAILABLE, "no engine", [NO_ENGINE]), 3, "kvtier: unix:/"),
        (Failure(Code.DEADLINE_EXCEEDED, "late"), 3, "did not answer within 5s"),
    ],
)
def test_each_failure_has_its_exit_code(
    failure: Failure, code: int, said: str, kvtier: Run, server: ScriptedControl
) -> None:
    failing(server, failure)
    result = kvtier("status")
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_what_is_wrong_with_which_field_is_told(kvtier: Run, server: ScriptedControl) -> None:
    detail = error_details_pb2.BadRequest(
        field_violations=[{"field": "ttl", "description": "at most 7 days"}]
    )
    server.script["PinProgram"] = [Failure(Code.INVALID_ARGUMENT, "wrong", [detail])]
    result = kvtier("programs", "pin", "p", "8d")
    assert (result.exit_code, result.stderr) == (2, "kvtier: wrong; ttl: at most 7 days\n")
    result = kvtier("programs", "pin", "p", "8d", "--json")
    assert json.loads(result.stderr) == {
        "error": {
            "code": "INVALID_ARGUMENT",
            "message": "wrong; ttl: at most 7 days",
            "fields": {"ttl": "at most 7 days"},
            "reason": "",
        }
    }


def test_a_message_cannot_steer_the_terminal(kvtier: Run, server: ScriptedControl) -> None:
    failing(server, Failure(Code.NOT_FOUND, "no \x1b[31mprogram [red]x"))
    assert kvtier("status").stderr == "kvtier: no \\x1b[31mprogram [red]x\n"


def test_a_silent_server_is_not_waited_for_longer_than_asked(
    kvtier: Run, server: ScriptedControl
) -> None:
    import threading  # noqa: PLC0415

    over = threading.Event()
    server.script["GetStatus"] = [lambda _: over.wait() and observability_pb2.GetStatusResponse()]
    result = kvtier("status", "--timeout", "50ms")
    over.set()
    assert result.exit_code == 3
    assert "did not answer within 50ms; --timeout allows more" in result.stderr
