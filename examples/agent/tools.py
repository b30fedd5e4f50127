"""The example agent's tools: each a real subprocess in the small project beside this file."""

from __future__ import annotations

import asyncio
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping

PROJECT = Path(__file__).resolve().parent / "project"
_TIMEOUT_S = 120.0
_MAX_RESULT_CHARS = 2400
# Time of the Bash tool in SWE-rebench's recorded sessions (3,984 calls): share, seconds.
_WAIT_QUANTILES_S = ((0.10, 0.02), (0.50, 2.5), (0.90, 10.5), (0.99, 29.5))
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)

DESCRIPTION = """read_file: {"path": FILE} - a file of the project
grep: {"text": TEXT} - lines that contain a text
run_tests: {} - the project's tests
wait_for_build: {} - wait until the build machine has built the project"""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool's name and its arguments."""

    name: str
    arguments: Mapping[str, str]


# What is run, in turn, when the model calls no tool.
SCRIPT = (
    ToolCall("read_file", {"path": "slug.py"}),
    ToolCall("grep", {"text": "def "}),
    ToolCall("run_tests", {}),
    ToolCall("wait_for_build", {}),
    ToolCall("read_file", {"path": "counting.py"}),
    ToolCall("read_file", {"path": "test_project.py"}),
)


def find_call(text: str) -> ToolCall | None:
    """Return the first well-formed tool call in a model's text, None without one."""
    for match in _CALL.finditer(text):
        try:
            call = json.loads(match[1])
        except ValueError:
            continue
        arguments = call.get("arguments", {})
        if call.get("name") in _COMMANDS and isinstance(arguments, dict):
            return ToolCall(call["name"], {name: str(value) for name, value in arguments.items()})
    return None


async def run_tool(call: ToolCall, rng: random.Random) -> str:
    """Run a tool and return its output, cut to a length that suits a small context.

    A bad argument or a failing command is a result too: the model reads what went wrong.
    """
    try:
        command = _COMMANDS[call.name](call.arguments, rng)
    except (KeyError, ValueError) as error:
        return f"error: bad arguments for {call.name}: {error}"
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=PROJECT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), _TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        return f"error: {call.name} was stopped after {_TIMEOUT_S:.0f} s"
    text = output.decode(errors="replace")[:_MAX_RESULT_CHARS]
    return text if process.returncode == 0 else f"{text}\nexit status {process.returncode}"


def _read_file(arguments: Mapping[str, str], _rng: random.Random) -> list[str]:
    path = (PROJECT / arguments["path"]).resolve()
    if not path.is_relative_to(PROJECT):
        message = f"{arguments['path']} is outside the project"
        raise ValueError(message)
    return ["cat", "--", str(path)]


def _grep(arguments: Mapping[str, str], _rng: random.Random) -> list[str]:
    return ["grep", "-rnF", "--include=*.py", "-e", arguments["text"], "."]


def _run_tests(_arguments: Mapping[str, str], _rng: random.Random) -> list[str]:
    return [sys.executable, "-B", "-m", "unittest", "-v"]


def _wait_for_build(_arguments: Mapping[str, str], rng: random.Random) -> list[str]:
    return ["sleep", f"{_recorded_wait_s(rng.random()):.3f}"]


def _recorded_wait_s(share: float) -> float:
    """Seconds at a quantile: between the recorded ones on a logarithmic scale, cut at the ends."""
    lower = _WAIT_QUANTILES_S[0]
    for upper in _WAIT_QUANTILES_S:
        if share <= upper[0]:
            if upper is lower:
                return upper[1]
            part = (share - lower[0]) / (upper[0] - lower[0])
            return math.exp(math.log(lower[1]) * (1 - part) + math.log(upper[1]) * part)
        lower = upper
    return lower[1]


_COMMANDS = {
    "read_file": _read_file,
    "grep": _grep,
    "run_tests": _run_tests,
    "wait_for_build": _wait_for_build,
}
