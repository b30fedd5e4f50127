"""An agent whose only tool is bash; it tells kvtier when a command runs and when it has returned.

kvtier serve MODEL --port 8000
python examples/bash_agent/agent.py --base-url http://127.0.0.1:8000/v1 --task "Count the files here."
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import uuid
from typing import TYPE_CHECKING

from openai import OpenAI, OpenAIError

from kvtier.client import ControlError, KVTierClient

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

SYSTEM = """You solve a task with a shell. Write exactly one command in each answer, like this:
```bash
ls -la
```
You get its output. When the task is solved, write DONE instead of a command."""
FENCE = re.compile(r"```(?:bash|sh)\s*\n(.*?)```", re.DOTALL)
# What is run, in turn, when the model writes no command.
SCRIPT = ("ls -la", "date > now.txt && sleep 1", "wc -c now.txt")
TIMEOUT_S = 60.0
EXPECTED_S = 2.0
MAX_OUTPUT_CHARS = 4000


def find_command(text: str) -> str | None:
    """Return the one command in a model's answer, None where there is none, or several."""
    found = FENCE.findall(text)
    return found[0].strip() if len(found) == 1 else None


def run(command: str, directory: str) -> str:
    """Run a command and return what the model is to read, its failure included."""
    try:
        done = subprocess.run(
            ["bash", "-c", command],  # noqa: S607 - the tool is bash
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {TIMEOUT_S:.0f} s"
    output = done.stdout.decode(errors="replace")[:MAX_OUTPUT_CHARS]
    return f"exit status {done.returncode}\n{output}"


def allowed(command: str, options: argparse.Namespace) -> bool:
    """Ask the user, unless told not to."""
    if options.yes:
        return True
    print(f"the model wants to run:\n{command}")
    return input("run it? [y/N] ").strip().lower() == "y"


def solve(
    openai: OpenAI, kvtier: KVTierClient, directory: str, options: argparse.Namespace
) -> None:
    """Let the model work on the task, turn by turn."""
    model = options.model or openai.models.list().data[0].id
    # One name for both: the requests carry it, and the announcements are about it.
    session = f"bash-agent-{uuid.uuid4().hex[:8]}"
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": options.task},
    ]
    for turn in range(options.turns):
        answer = openai.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=options.max_tokens,
            temperature=0,
            extra_headers={"X-Session-ID": session},
        )
        text = answer.choices[0].message.content or ""
        messages.append({"role": "assistant", "content": text})
        command = find_command(text)
        if command is None and "DONE" in text:
            print(f"turn {turn + 1}: done")
            break
        if command is None:
            command = SCRIPT[turn % len(SCRIPT)]
            print(f"turn {turn + 1}: the model wrote no command; from the script: {command}")
        elif not allowed(command, options):
            break
        else:
            print(f"turn {turn + 1}: {command}")
        # Whatever becomes of the announcements, the command runs.
        with kvtier.tool_call(session, "bash", expected_s=EXPECTED_S):
            output = run(command, directory)
        messages.append({"role": "user", "content": output})
    try:
        kvtier.end_program(session)
    except ControlError as error:
        print(f"the end was not announced: {error}", file=sys.stderr)


def main(options: argparse.Namespace) -> None:
    """Open both clients, and a directory for the commands."""
    with (
        OpenAI(base_url=options.base_url, api_key=options.api_key, max_retries=0) as openai,
        KVTierClient() as kvtier,
        tempfile.TemporaryDirectory(prefix="bash-agent-") as directory,
    ):
        solve(openai, kvtier, options.directory or directory, options)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="Find out how many files are here, and say it.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none", help="for a server that asks for one")
    parser.add_argument("--model", help="default: the first model of the server")
    parser.add_argument("--directory", help="where commands run; default: a new, empty one")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=120, help="of one model turn")
    parser.add_argument("--yes", action="store_true", help="run the model's commands unasked")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse_options())
    except OpenAIError as error:
        raise SystemExit(f"the server failed: {error}") from error
