"""Two turns with a pause between them: a session's name in a header, hints in the body.

kvtier serve MODEL --port 8000      # or any OpenAI-compatible server
python examples/openai_client/client.py --base-url http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import argparse
import time
import uuid
from typing import TYPE_CHECKING, Any

from openai import OpenAI, OpenAIError

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion, ChatCompletionMessageParam


def ask(
    client: OpenAI,
    model: str,
    messages: list[ChatCompletionMessageParam],
    session: str,
    hints: dict[str, Any],
) -> ChatCompletion:
    """Send one turn.

    The header alone is enough, and kvtier works without it too: it then knows a returning agent by
    its prompt. What is known of the pause after the turn goes into `kv_transfer_params.kvtier`; vLLM
    passes it on, and other servers ignore it.
    """
    return client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=40,
        temperature=0,
        extra_headers={"X-Session-ID": session},
        extra_body={"kv_transfer_params": {"kvtier": hints}},
    )


def show(turn: int, answer: ChatCompletion) -> None:
    """Print what the turn cost, and what kvtier did with its KV."""
    usage = answer.usage
    details = usage.prompt_tokens_details if usage is not None else None
    cached = "unknown" if details is None else details.cached_tokens
    total = usage.prompt_tokens if usage is not None else "unknown"
    print(f"turn {turn}: {total} prompt tokens, cached: {cached}")
    # Not a field of OpenAI's: the client keeps it beside them.
    params = (answer.model_extra or {}).get("kv_transfer_params") or {}
    told = params.get("kvtier")
    print(f"turn {turn}: kvtier says {told}" if told else f"turn {turn}: nobody answered the hints")


def main(options: argparse.Namespace) -> None:
    """Hold the conversation."""
    session = f"example-{uuid.uuid4().hex[:8]}"
    with OpenAI(base_url=options.base_url, api_key=options.api_key, max_retries=0) as client:
        model = options.model or client.models.list().data[0].id
        messages: list[ChatCompletionMessageParam] = [
            {"role": "system", "content": "You are a terse assistant. " * 40},
            {"role": "user", "content": "Name a city."},
        ]
        # This turn's tool is known, and how long its KV is worth keeping.
        answer = ask(client, model, messages, session, {"tool": "lookup", "ttl_s": 30})
        show(1, answer)
        time.sleep(options.pause)
        messages.append(
            {"role": "assistant", "content": answer.choices[0].message.content or ""},
        )
        messages.append({"role": "user", "content": "The lookup says: it has 2 million people."})
        # Nothing follows: nothing needs to be kept.
        show(2, ask(client, model, messages, session, {"end": True}))


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none", help="for a server that asks for one")
    parser.add_argument("--model", help="default: the first model of the server")
    parser.add_argument("--pause", type=float, default=2.0, help="between the turns, s")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse_options())
    except OpenAIError as error:
        raise SystemExit(f"the server failed: {error}") from error
