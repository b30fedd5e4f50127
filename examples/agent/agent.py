"""An agent loop against a running server: model turn, real tool, result appended, next turn.

    kvtier serve MODEL --port 8000      # or any OpenAI-compatible server
    python examples/agent/agent.py --base-url http://127.0.0.1:8000/v1 --agents 4 --turns 6

A model that is too small to call tools on its own does not stop the loop: it then takes
the tool to run from a script, and says so.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from openai import AsyncOpenAI, OpenAIError
from tools import DESCRIPTION, SCRIPT, find_call, run_tool

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

SYSTEM = f"""You are a software engineer who works on a small Python project with tools.
Call one tool a turn, like this:
<tool_call>{{"name": "read_file", "arguments": {{"path": "slug.py"}}}}</tool_call>
The result comes back in <tool_response>. Tools:
{DESCRIPTION}"""
TASK = (
    "Find out whether `unique_slug` can return a name that is longer than MAX_LENGTH, and "
    "what the tests say about it. The project has slug.py, counting.py and test_project.py."
)


@dataclass(frozen=True, slots=True)
class Reply:
    """One model turn; times in seconds. ``cached_tokens`` is None where the server is silent."""

    text: str
    first_token_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int | None


async def ask(
    client: AsyncOpenAI,
    model: str,
    messages: list[ChatCompletionMessageParam],
    session: str,
    max_tokens: int,
) -> Reply:
    """Send the conversation and stream the model's turn.

    ``X-Session-ID`` says which agent this is. kvtier works without it, by recognising the
    prompt; with it there is nothing to recognise.
    """
    started_s = time.monotonic()
    first_token_s: float | None = None
    text: list[str] = []
    prompt_tokens, cached_tokens = 0, None
    stream = await client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"X-Session-ID": session},
    )
    async for chunk in stream:
        for choice in chunk.choices:
            if choice.delta.content:
                first_token_s = first_token_s or time.monotonic() - started_s
                text.append(choice.delta.content)
        if chunk.usage is not None:
            prompt_tokens = chunk.usage.prompt_tokens
            details = chunk.usage.prompt_tokens_details
            cached_tokens = details.cached_tokens if details is not None else None
    total_s = time.monotonic() - started_s
    return Reply("".join(text), first_token_s or total_s, total_s, prompt_tokens, cached_tokens)


async def run_agent(
    client: AsyncOpenAI, model: str, number: int, options: argparse.Namespace
) -> None:
    """Run one agent to its last turn, printing what it does."""
    name = f"agent-{number}"
    session = f"{name}-{uuid.uuid4().hex[:8]}"
    rng = random.Random(f"{options.seed}/{name}")  # noqa: S311 - waiting times
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": TASK},
    ]
    started_s = time.monotonic()
    for turn in range(options.turns):
        reply = await ask(client, model, messages, session, options.max_tokens)
        cached = "" if reply.cached_tokens is None else f", {reply.cached_tokens} of them cached"
        print(
            f"{name} turn {turn + 1}: {reply.prompt_tokens} prompt tokens{cached}; "
            f"first token after {reply.first_token_s:.2f} s, done after {reply.total_s:.2f} s"
        )
        # The model's own text goes back unchanged: another text would be another prompt.
        messages.append({"role": "assistant", "content": reply.text})
        if turn == options.turns - 1:
            break
        call = find_call(reply.text)
        source = "the model called"
        if call is None:
            # Every agent starts elsewhere in the script, so that they do not share one prompt.
            call = SCRIPT[(turn + number) % len(SCRIPT)]
            source = "the model called no tool; from the script:"
        tool_started_s = time.monotonic()
        result = await run_tool(call, rng)
        tool_s = time.monotonic() - tool_started_s
        print(f"{name} turn {turn + 1}: {source} {call.name}, {tool_s:.2f} s")
        messages.append({"role": "user", "content": f"<tool_response>\n{result}\n</tool_response>"})
    print(f"{name}: finished after {time.monotonic() - started_s:.1f} s")


async def main(options: argparse.Namespace) -> None:
    """Run all agents at once."""
    client = AsyncOpenAI(base_url=options.base_url, api_key=options.api_key, max_retries=0)
    async with client, asyncio.TaskGroup() as group:
        model = options.model or (await client.models.list()).data[0].id
        for number in range(options.agents):
            group.create_task(run_agent(client, model, number, options))


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none", help="for a server that asks for one")
    parser.add_argument("--model", help="default: the first model of the server")
    parser.add_argument("--agents", type=int, default=1)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=80, help="of one model turn")
    parser.add_argument("--seed", type=int, default=0, help="of the tools' waiting times")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        asyncio.run(main(parse_options()))
    except (ExceptionGroup, OpenAIError) as error:
        cause = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
        if not isinstance(cause, OpenAIError):
            raise
        raise SystemExit(f"the server failed: {cause}") from error
