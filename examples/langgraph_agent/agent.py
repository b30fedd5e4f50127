"""A LangGraph agent whose tools' node tells kvtier when tools run and when they have returned.

kvtier serve MODEL --port 8000
python examples/langgraph_agent/agent.py --base-url http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import argparse
import time
import uuid
from typing import TYPE_CHECKING, Any

from kvtier.client import ControlError, KVTierClient

try:
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from langgraph.graph import END, START, MessagesState, StateGraph
except ImportError as error:
    raise SystemExit(
        f"this example needs langgraph and langchain-openai ({error}): "
        "pip install langgraph langchain-openai"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable

    from langgraph.graph.state import CompiledStateGraph

    Node = Callable[[MessagesState], dict[str, Any]]


@tool
def word_count(text: str) -> int:
    """Count the words of a text."""
    return len(text.split())


@tool
def slow_search(query: str) -> str:
    """Search a slow archive."""
    time.sleep(2.0)
    return f"the archive knows nothing of {query}"


TOOLS = {found.name: found for found in (word_count, slow_search)}
EXPECTED_S = {"word_count": 0.01, "slow_search": 2.0}


def announced(node: Node, kvtier: KVTierClient, session: str) -> Node:
    """Wrap the node that runs tools: its calls are announced before, their return after it.

    Several calls of one turn are one pause: it is named after the tool that takes longest.
    """

    def run(state: MessagesState) -> dict[str, Any]:
        names = [call["name"] for call in state["messages"][-1].tool_calls]
        longest = max(names, key=lambda name: EXPECTED_S.get(name, 0.0))
        with kvtier.tool_call(session, longest, expected_s=EXPECTED_S.get(longest)):
            return node(state)

    return run


def run_tools(state: MessagesState) -> dict[str, Any]:
    """Run the tools that the last message calls."""
    calls = state["messages"][-1].tool_calls
    return {"messages": [TOOLS[call["name"]].invoke(call) for call in calls]}


def build(model: ChatOpenAI, kvtier: KVTierClient, session: str) -> CompiledStateGraph:
    """Return the graph: the model, and its tools for as long as it calls some."""
    bound = model.bind_tools(list(TOOLS.values()))

    def call_model(state: MessagesState) -> dict[str, Any]:
        return {"messages": [bound.invoke(state["messages"])]}

    def calls_tools(state: MessagesState) -> str:
        return "tools" if state["messages"][-1].tool_calls else END

    graph = StateGraph(MessagesState)
    graph.add_node("model", call_model)
    graph.add_node("tools", announced(run_tools, kvtier, session))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", calls_tools, ["tools", END])
    graph.add_edge("tools", "model")
    return graph.compile()


def main(options: argparse.Namespace) -> None:
    """Run the graph on one question."""
    # One name for both: the requests carry it, and the announcements are about it.
    session = f"langgraph-{uuid.uuid4().hex[:8]}"
    model = ChatOpenAI(
        model=options.model,
        base_url=options.base_url,
        api_key=options.api_key,
        temperature=0,
        default_headers={"X-Session-ID": session},
    )
    with KVTierClient() as kvtier:
        graph = build(model, kvtier, session)
        for step in graph.stream({"messages": [("user", options.question)]}, stream_mode="updates"):
            for node, update in step.items():
                message = update["messages"][-1]
                calls = ", ".join(call["name"] for call in getattr(message, "tool_calls", []))
                print(f"{node}: {calls or message.content}")
        try:
            kvtier.end_program(session)
        except ControlError as error:
            print(f"the end was not announced: {error}")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--question", default="What does the archive know of KV caches?")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none", help="for a server that asks for one")
    parser.add_argument("--model", default="Qwen/Qwen3-4B-Instruct-2507")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_options())
