"""The command line: what is printed, what is refused, and which exit codes are given."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvtier import __version__
from kvtier.cli import app, settings_reference

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "configuration.md"
HERMES_TEMPLATE = "{{ messages }}<tool_call>{{ call }}</tool_call>"

runner = CliRunner()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KVTIER_MODE", "KVTIER_TOOL_CALL_PARSER", "KVTIER_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("kvtier.serving.process.runs_on_cpu", lambda: True)
    monkeypatch.setattr("kvtier.serving.plan._vllm", lambda: ["vllm"])


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "chat_template.jinja").write_text(HERMES_TEMPLATE)
    return str(tmp_path)


@pytest.mark.parametrize("command", ["serve", "record", "doctor", "config", "version"])
def test_help_of_each_command(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Usage: kvtier {command}" in result.output


def test_version() -> None:
    assert runner.invoke(app, ["version"]).output == f"{__version__}\n"


@pytest.mark.parametrize("mode", ["shadow", "off"])
def test_a_kvtier_that_changes_nothing_leaves_the_scheduler_alone(
    model: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTIER_MODE", mode)
    assert "--scheduler-cls" not in runner.invoke(app, ["serve", model, "--dry-run"]).output
    asked = runner.invoke(app, ["serve", model, "--program-scheduler", "--dry-run"])
    assert "--scheduler-cls" in asked.output


def test_dry_run_prints_exactly_the_command(model: str) -> None:
    result = runner.invoke(app, ["serve", model, "--port", "8000", "-tp", "2", "--dry-run"])
    assert result.exit_code == 0
    words = shlex.split(result.output)
    assert words[:-1] == [
        "vllm", "serve", model, "--port", "8000", "-tp", "2",
        "--block-size", "32",
        "--tool-call-parser", "hermes", "--enable-auto-tool-choice",
        "--scheduler-cls", "kvtier.scheduler.ProgramScheduler",
        "--scheduling-policy", "priority",
        "--middleware", "kvtier.middleware.KVTierMiddleware",
        "--kv-transfer-config",
    ]  # fmt: skip
    assert json.loads(words[-1]) == {
        "kv_connector": "KVTierConnector",
        "kv_connector_module_path": "kvtier.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"kvtier.tool_call_parser": "hermes"},
    }


def test_the_middleware_can_be_declined(model: str) -> None:
    assert "KVTierMiddleware" in runner.invoke(app, ["serve", model, "--dry-run"]).output
    declined = runner.invoke(app, ["serve", model, "--no-middleware", "--dry-run"])
    assert declined.exit_code == 0
    assert "KVTierMiddleware" not in declined.output


def test_dry_run_json(model: str) -> None:
    result = runner.invoke(app, ["serve", model, "--dry-run", "--json"])
    plan = json.loads(result.output)
    assert plan["command"][:3] == ["vllm", "serve", model]
    assert plan["extra_config"] == {"kvtier.tool_call_parser": "hermes"}
    assert "tool parser hermes: inferred from the chat template" in plan["notes"]


def test_own_parser_setting_is_not_overridden(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTIER_TOOL_CALL_PARSER", "mistral")
    plan = json.loads(runner.invoke(app, ["serve", model, "--dry-run", "--json"]).output)
    assert plan["extra_config"] == {}
    assert plan["command"][plan["command"].index("--tool-call-parser") + 1] == "mistral"


def test_record_serves_and_records(model: str, tmp_path: Path) -> None:
    file = tmp_path / "turns.jsonl"
    result = runner.invoke(app, ["record", str(file), model, "--port", "8000", "--dry-run"])
    assert result.exit_code == 0
    words = shlex.split(result.output)
    transfer = json.loads(words[words.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector_extra_config"]["kvtier.record_file"] == str(file)
    assert words[words.index("--port") + 1] == "8000"


def test_record_says_where_it_cannot_write(model: str, tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "missing" / "turns.jsonl"):
        result = runner.invoke(app, ["record", str(file), model, "--dry-run"])
        assert result.exit_code == 2
        assert "a file that can be written, in a directory that exists" in result.output


def test_serve_refuses_json_without_dry_run(model: str) -> None:
    result = runner.invoke(app, ["serve", model, "--json"])
    assert result.exit_code == 2
    assert "--json prints the plan of --dry-run" in result.output


def test_serve_reports_a_bad_setting_before_anything_starts(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTIER_MODE", "maybe")
    result = runner.invoke(app, ["serve", model])
    assert result.exit_code == 2
    assert "KVTIER_MODE='maybe': accepted is on, shadow, off" in result.output


def test_serve_reports_a_bad_setting_in_the_flag(model: str) -> None:
    transfer = json.dumps({"kv_connector_extra_config": {"kvtier.mdoe": "on"}})
    result = runner.invoke(app, ["serve", model, "--kv-transfer-config", transfer, "--dry-run"])
    assert result.exit_code == 2
    assert "did you mean kvtier.mode?" in result.output


def test_serve_exit_code_is_vllms(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtier.serving.process.run_serve", lambda *_, **__: 7)
    assert runner.invoke(app, ["serve", model]).exit_code == 7


def test_config_shows_value_and_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTIER_MODE", "shadow")
    shown = json.loads(runner.invoke(app, ["config", "--json"]).output)
    assert shown["mode"] == {"value": "shadow", "source": "environment"}
    assert shown["stage"] == {"value": True, "source": "default"}
    text = runner.invoke(app, ["config"]).output
    assert re.search(r"mode +shadow +environment", text)
    assert re.search(r"dram_gb +auto +default", text)


def test_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTIER_NOPE", "1")
    result = runner.invoke(app, ["config"])
    assert result.exit_code == 2
    assert "KVTIER_NOPE='1': unknown key" in result.output


def test_documentation_has_the_reference_of_this_version() -> None:
    """`kvtier config --reference` prints the table."""
    assert settings_reference() in DOCUMENTATION.read_text(encoding="utf-8")
    assert runner.invoke(app, ["config", "--reference"]).output == settings_reference()


def test_demo_is_listed() -> None:
    assert re.search(r"^  demo ", runner.invoke(app, ["--help"]).output, re.MULTILINE)


def test_the_operators_commands_are_listed() -> None:
    output = runner.invoke(app, ["--help"]).output
    for command in ("status", "top", "programs", "ttl", "policy", "explain", "watch"):
        assert re.search(rf"^  {command} ", output, re.MULTILINE), command
