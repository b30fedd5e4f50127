"""The examples run, and say to kvtier what they are there to show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.model_stand_in import model_stand_in
from tests.unit.scripted_control import ScriptedControl, on_unix_socket

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def control() -> Iterator[ScriptedControl]:
    with on_unix_socket() as server:
        yield server


def run(
    script: str, *arguments: str, control: ScriptedControl | None = None
) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    if control is not None:
        env["KVTIER_CONTROL_TARGET"] = control.target
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        env=env,
        input="n\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_openai_client_names_its_session_and_gives_hints() -> None:
    told = {"kvtier": {"action": "pin", "ttl_s": 30.0}}
    with model_stand_in(
        {"content": "Oslo", "kv_transfer_params": told}, {"content": "ok"}
    ) as model:
        done = run("openai_client/client.py", "--base-url", model.base_url, "--pause", "0")
    assert done.returncode == 0, done.stderr
    assert "turn 1: kvtier says {'action': 'pin', 'ttl_s': 30.0}" in done.stdout
    assert "turn 2: nobody answered the hints" in done.stdout
    (first, one), (second, two) = model.asked
    assert first["x-session-id"] == second["x-session-id"]
    assert one["kv_transfer_params"] == {"kvtier": {"tool": "lookup", "ttl_s": 30}}
    assert two["kv_transfer_params"] == {"kvtier": {"end": True}}


def test_the_bash_agent_announces_its_commands(control: ScriptedControl, tmp_path: Path) -> None:
    answers = [
        {"content": "First:\n```bash\necho one > file\n```"},
        {"content": "I do not know."},
        {"content": "```bash\nexit 3\n```"},
        {"content": "DONE"},
    ]
    arguments = ("--directory", str(tmp_path), "--yes")
    with model_stand_in(*answers) as model:
        done = run("bash_agent/agent.py", "--base-url", model.base_url, *arguments, control=control)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_text() == "one\n"
    assert "turn 2: the model wrote no command; from the script: " in done.stdout
    assert "turn 4: done" in done.stdout
    assert model.asked[-1][1]["messages"][-1]["content"] == "exit status 3\n"
    pairs = ["AnnounceToolCall", "AnnounceToolReturn"] * 3
    assert [call.method for call in control.asked] == [*pairs, "EndProgram"]
    session = model.asked[0][0]["x-session-id"]
    assert {call.request.name for call in control.asked} == {session}


def test_the_bash_agent_runs_nothing_of_the_models_unasked(
    control: ScriptedControl, tmp_path: Path
) -> None:
    answer = {"content": "```bash\ntouch file\n```"}
    with model_stand_in(answer) as model:
        done = run(
            "bash_agent/agent.py", "--base-url", model.base_url, "--directory", str(tmp_path)
        )
    assert "run it? [y/N]" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_bash_agent_works_without_a_control_server(tmp_path: Path) -> None:
    arguments = ("--directory", str(tmp_path), "--turns", "2")
    with on_unix_socket() as gone:
        pass
    with model_stand_in({"content": "?"}) as model:
        done = run("bash_agent/agent.py", "--base-url", model.base_url, *arguments, control=gone)
    assert done.returncode == 0, done.stderr
    assert "the agent goes on" in done.stderr
    assert "the end was not announced" in done.stderr
    assert (tmp_path / "now.txt").exists()


def test_the_langgraph_example_says_what_it_needs() -> None:
    script = str(EXAMPLES / "langgraph_agent/agent.py")
    # As where it is not installed.
    code = f"import runpy, sys; sys.modules['langgraph'] = None; runpy.run_path({script!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "pip install langgraph langchain-openai" in done.stderr


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("langgraph", "langchain_openai")),
    reason="langgraph and langchain-openai are not installed",
)
def test_the_langgraph_example_announces_its_tools(control: ScriptedControl) -> None:
    calls = [
        {
            "id": f"call_{name}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }
        for name, arguments in (("slow_search", {"query": "KV"}), ("word_count", {"text": "a b"}))
    ]
    answers: list[dict[str, Any]] = [
        {"content": None, "tool_calls": calls},
        {"content": "nothing"},
    ]
    with model_stand_in(*answers) as model:
        done = run("langgraph_agent/agent.py", "--base-url", model.base_url, control=control)
    assert done.returncode == 0, done.stderr
    assert "model: slow_search, word_count" in done.stdout
    assert "model: nothing" in done.stdout
    told = [message["content"] for message in model.asked[-1][1]["messages"][-2:]]
    assert told == ["the archive knows nothing of KV", "2"]
    # One pause, named after the tool that takes longest.
    assert [call.method for call in control.asked] == [
        *("AnnounceToolCall", "AnnounceToolReturn"),
        "EndProgram",
    ]
    assert control.asked[0].request.tool == "slow_search"
    session = model.asked[0][0]["x-session-id"]
    assert {call.request.name for call in control.asked} == {session}
