"""Every command of the documentation is run, or is listed here with the reason why not.

`kvtier replay` is run by `tests/engine/test_docs_replay.py`, as it needs vLLM.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from kvtier import link_messages as link
from kvtier.cli import app
from kvtier.client.connection import TARGET_VARIABLE, TOKEN_FILE_VARIABLE
from kvtier.serving import plan
from kvtier.v1 import observability_pb2, policy_pb2, program_pb2, ttl_pb2
from tests.unit.control.control_host import GAUGES, POLICY, FakeEngine, Host, program
from tests.unit.docs_commands import PAGES, ROOT, Command, commands

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMANDS = list(dict.fromkeys(commands()))
KVTIER = [command for command in COMMANDS if command.program == "kvtier"]
PROGRAM = "agent-7"
TEMPLATE = "{{ messages }}<tool_call>{{ call }}</tool_call>"

CONTROL = {"status", "top", "watch", "explain", "programs", "ttl", "policy"}
"""Commands that ask the control server: run against one with an engine that accepts everything."""
SERVES = {"serve", "record"}
"""Commands that serve a model: run with --dry-run."""
LOCAL = {"doctor", "config", "version"}
"""Commands that are run as they are."""
NOT_HERE = {
    "demo": "takes ten minutes; tests/engine/test_demo.py runs it",
    "replay": "tests/engine/test_docs_replay.py runs each",
    "calibrate": "measures; test_measuring.py runs it, and with --running operator/test_commands.py",
    "bench": "takes minutes; test_linkbench.py runs it",
    "chaos": "breaks what runs; operator/test_chaos.py runs it",
}
HARMLESS = (
    r"\(umask 077; python3 -c '.*' > tokens\)",
    r"echo (on|off|shadow) > \S+",
)
"""Run by a shell, in an empty directory."""
NOT_RUN = {
    r"make (demo|test|audit|dist)": "minutes, or a network; the target is looked up in the Makefile",
    r"sha256sum --check SHA256SUMS": "needs a release; `make dist` writes the file",
    r"pip install .*": "changes the environment; the extras are looked up in pyproject.toml",
    r"pip uninstall (-y )?(kvtier|lmcache)": "changes the environment",
    r"rm -r ~/\.cache/kvtier .*": "removes the user's files",
    r"vllm serve .*": "needs an engine; the connector is compared with kvtier serve's",
    r"curl .*": "needs an engine; its JSON is read",
    r"grpcurl .*": "another project's program; the method is looked up in the protos",
    r"grpc_health_probe .*": "another project's program; the service is looked up in the protos",
    r"promtool .*": "test_deploy_prometheus.py runs it where it is installed; its files are looked up",
    r"docker (build|run|compose) .*": "needs Docker; its files are looked up",
    r"kubectl .*": "needs a cluster; its files are looked up",
    r"(\S*/)?python3? (examples|bench)/\S+\.py.*": "needs a server or minutes; the file is looked up",
}
"""What is not run, and why; a pattern that no command matches any more is an error."""

runner = CliRunner()


def label(command: Command) -> str:
    return f"{command.page}: {command.line}"


def kind(command: Command) -> str:
    return command.words[1] if len(command.words) > 1 else ""


@pytest.mark.parametrize("command", COMMANDS, ids=label)
def test_every_command_is_run_or_listed_with_a_reason(command: Command) -> None:
    if command.program == "kvtier":
        assert kind(command) in CONTROL | SERVES | LOCAL | NOT_HERE.keys()
        return
    line = " ".join(command.words) if command.environment else command.line.partition(" #")[0]
    patterns = [*HARMLESS, *NOT_RUN]
    assert any(re.fullmatch(pattern, line.strip()) for pattern in patterns), line


def test_the_lists_hold_nothing_that_the_documentation_does_not_have() -> None:
    others = [c.line.partition(" #")[0].strip() for c in COMMANDS if c.program != "kvtier"]
    lines = [*others, *(" ".join(c.words) for c in COMMANDS if c.program != "kvtier")]
    unused = [p for p in (*HARMLESS, *NOT_RUN) if not any(re.fullmatch(p, o) for o in lines)]
    assert unused == []


# -- kvtier ----------------------------------------------------------------------------------------


def leaf(words: list[str]) -> tuple[Any, list[str]]:
    """The command that `kvtier WORDS` runs, and the words that are left for it."""
    found: Any = get_command(app)
    words = list(words)
    while hasattr(found, "commands"):
        assert words, "a group without a command"
        assert words[0] in found.commands, f"there is no command {words[0]}"
        found = found.commands[words.pop(0)]
    return found, words


@pytest.mark.parametrize("command", [c for c in KVTIER if kind(c) not in NOT_HERE], ids=label)
def test_kvtier_knows_the_command_and_its_options(command: Command) -> None:
    found, words = leaf(command.words[1:])
    context = typer.Context(found, info_name="kvtier")
    if kind(command) in SERVES:
        # What kvtier does not know goes to vLLM.
        context.ignore_unknown_options = context.allow_extra_args = True
    found.parse_args(context, words)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (TARGET_VARIABLE, TOKEN_FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KVTIER_RUN_DIR", str(tmp_path / "run"))


@pytest.mark.parametrize("command", [c for c in KVTIER if kind(c) in SERVES], ids=label)
def test_what_serves_a_model_can_be_planned(
    command: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in command.environment.items():
        monkeypatch.setenv(name, value)
    position = 2 if kind(command) == "serve" else 3
    words = command.words[1:]
    words[position - 1] = str(model)
    result = runner.invoke(app, [*words, *([] if "--dry-run" in words else ["--dry-run"])])
    assert result.exit_code == 0, result.output
    assert "KVTierConnector" in result.output


@pytest.mark.parametrize("command", [c for c in KVTIER if kind(c) in LOCAL], ids=label)
def test_what_needs_no_server_runs(command: Command) -> None:
    result = runner.invoke(app, command.words[1:])
    # doctor: 1 where this host lacks something.
    assert result.exit_code in ({0, 1} if kind(command) == "doctor" else {0}), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


class WillingEngine:
    """An engine in a thread that knows one program, decides now and then, and accepts every command."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.ready = threading.Event()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name="engine")

    def _run(self) -> None:
        engine = FakeEngine(self._run_dir)
        try:
            engine.join()
            engine.knows(program(PROGRAM))
            self.ready.set()
            while not self.stop.is_set():
                if engine.socket.poll(20):
                    self._answer(engine, link.engine_decoder.decode(engine.socket.recv()))
                else:
                    engine.send(self._decision(engine.engine_id))
        finally:
            engine.close()

    def _answer(self, engine: FakeEngine, message: Any) -> None:
        if not isinstance(message, link.Resync):
            engine.answer(message, policy=POLICY)

    def _decision(self, engine_id: str) -> link.Report:
        event = link.Decided(
            at_s=time.time(),
            program=program(PROGRAM),
            request_id="r1",
            event="pause",
            action="pin",
            reason="memory_free",
            ttl_s=60.0,
            costs=[link.OptionCost("drop", 1.5, {}), link.OptionCost("pin", 0.1, {})],
            inputs={"tool": "bash"},
        )
        return link.Report(engine_id=engine_id, sent_s=time.time(), events=[event], gauges=GAUGES)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    run_dir = tmp_path_factory.mktemp("host")
    with Host(run_dir) as host:
        engine = WillingEngine(run_dir)
        engine.thread.start()
        assert engine.ready.wait(20)
        # What the documentation removes must be there, in whatever order the tests come.
        yield host.files.unix_target
        engine.stop.set()
        engine.thread.join(20)


@pytest.mark.parametrize("command", [c for c in KVTIER if kind(c) in CONTROL], ids=label)
def test_what_asks_the_control_server_is_answered(
    command: Command, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TARGET_VARIABLE, target)
    words = without_other_host(command.words[1:])
    if kind(command) == "watch":
        words += ["--count", "1"]
    if words[:2] == ["ttl", "rm"]:
        scope = words[2:]
        assert runner.invoke(app, ["ttl", "set", "60s", *scope]).exit_code == 0
    result = runner.invoke(app, words)
    assert result.exit_code == 0, result.output
    assert result.output


def without_other_host(words: list[str]) -> list[str]:
    """The words without what leads to a server elsewhere."""
    kept = list(words)
    for option in ("--target", "--tls-ca", "--tls-cert", "--tls-key", "--token-file"):
        if option in kept:
            at = kept.index(option)
            del kept[at : at + 2]
    return [word for word in kept if word != "--tls"]


# -- other programs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if any(re.fullmatch(p, c.line) for p in HARMLESS)],
    ids=label,
)
def test_harmless_commands_run(command: Command, tmp_path: Path) -> None:
    line = re.sub(r"> /\S+", "> out", command.line)
    subprocess.run(["bash", "-ec", line], cwd=tmp_path, check=True)
    assert any(file.stat().st_size for file in tmp_path.iterdir())


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in COMMANDS:
        if command.program == "make":
            assert re.search(rf"^{command.words[1]}:", makefile, re.MULTILINE), command.line


def test_extras_and_versions_of_pip_are_those_of_the_project() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for command in COMMANDS:
        if command.program == "pip" and command.words[1] == "install":
            for word in command.words[2:]:
                for extra in re.findall(r"\[(\w+)\]", word):
                    assert f"\n{extra} = [" in project
                if "==" in word:
                    assert f'"{word}"' in project


def test_the_connector_of_vllm_serve_is_the_one_that_kvtier_serve_takes() -> None:
    found = [c for c in COMMANDS if c.program == "vllm"]
    assert found
    for command in found:
        transfer = json.loads(command.words[command.words.index("--kv-transfer-config") + 1])
        assert transfer["kv_connector"] == plan.CONNECTOR
        assert transfer["kv_connector_module_path"] == plan.CONNECTOR_MODULE


def test_bodies_of_requests_are_json() -> None:
    for command in COMMANDS:
        if command.program in {"curl", "grpcurl"} and "-d" in command.words:
            json.loads(command.words[command.words.index("-d") + 1])


def test_methods_and_services_of_grpc_exist() -> None:
    modules = (observability_pb2, policy_pb2, program_pb2, ttl_pb2)
    services = {
        service.full_name: {method.name for method in service.methods}
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
    }
    named = [word for c in COMMANDS for word in c.words if word.startswith("kvtier.v1.")]
    assert named
    for word in named:
        service, _, method = word.partition("/")
        assert service in services
        assert not method or method in services[service]


def test_files_that_commands_name_exist() -> None:
    looked_up = 0
    for command in COMMANDS:
        words = command.words
        named = [word for word in words if re.fullmatch(r"[\w.-]+/\S+\.(py|yml|yaml)", word)]
        if command.program in {"docker", "kubectl"}:
            pairs = itertools.pairwise(words)
            named += [value for option, value in pairs if option in {"-f", "-k"}]
        # Commands of deploy/README.md are for its own directory, or the repository's root.
        folders = [ROOT / "deploy", ROOT] if command.page.startswith("deploy") else [ROOT]
        for name in named:
            looked_up += 1
            assert any((folder / name).exists() for folder in folders), command.line
    assert looked_up


def test_commands_within_sentences_exist() -> None:
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    texts += [(ROOT / "deploy" / "prometheus" / "alerts.yml").read_text(encoding="utf-8")]
    named = {
        found
        for text in texts
        for found in re.findall(r"`kvtier ([a-z]+(?: [a-z]+)*)(?=`| -| [A-Z])", text)
    }
    assert "serve" in named
    for words in named:
        found: Any = get_command(app)
        for word in words.split():
            if hasattr(found, "commands"):
                assert word in found.commands, f"kvtier {words}"
                found = found.commands[word]
