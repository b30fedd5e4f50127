"""Reads recorded Claude Code sessions in the format of kv-cache-tester: sizes, block hashes and times, no text.

What a sample of 102 sessions (7,048 requests) of that project holds, and what is made of it:

* ``type`` is "s" for streamed requests (1,343) and "n" for others (5,705). They differ only in what the
  recorder saw: for 641 streamed requests it missed the end, so that ``api_time`` and ``stop`` are missing,
  and the next ``think_time`` counts from an earlier request or is missing too. There the end is estimated,
  and the gap is what is left until the next request's ``t``. No request comes twice, once of each type.
* ``hash_ids`` cover the full blocks of ``in`` tokens; the rest, less than a block, has no id (`BlockPrompts`).
* 0 output tokens (4 requests) count as 1: an engine generates no less.
* Of a sub-agent ``t`` is when it *ended*: for all nine ``t - duration_ms`` is at most 0.9 s after the end of
  the request that started it, also where several run at once. If it lies before that request, ``t`` is taken
  for the beginning. Requests of a sub-agent count ``t`` from its beginning.
* Tools have no names: a turn that stopped with "tool_use" called ``tool``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvtier.replay.workload import Child, Program, Turn
from kvtier.replay.workloads.block_prompts import BlockPrompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtier.replay.workloads.records import Record

SCOPE: Final = "kv-cache-tester"
"""Scope of sessions whose ids mean the same in all files (``hash_id_scope`` "global")."""
TTFT_S: Final = 2.4
DECODE_S_PER_TOKEN: Final = 0.018
"""Where the end of a request was not recorded: time to its first token, and then per token. Medians of the
702 streamed requests whose end was."""


@dataclass(frozen=True, slots=True)
class _SubAgent:
    """Times in seconds since the chain's beginning."""

    start_s: float
    end_s: float
    turns: tuple[Turn, ...]


@dataclass(slots=True)
class _Request:
    """Times in seconds since the chain's beginning; `ended`: the end was recorded, not estimated."""

    start_s: float
    end_s: float
    ended: bool
    think_s: float | None
    ids: list[int]
    input_tokens: int
    output_tokens: int
    tool: str | None
    agents: list[_SubAgent] = field(default_factory=list)

    def gap_s(self, following: _Request | None) -> float:
        """Seconds from the end of this turn, and of its sub-agents, to the next request; 0 if none follows."""
        if following is None:
            return 0.0
        if self.agents:
            gap_s = following.start_s - max(agent.end_s for agent in self.agents)
        elif self.ended and following.think_s is not None:
            gap_s = following.think_s
        else:
            gap_s = following.start_s - self.end_s
        return max(0.0, gap_s)


def read(session: Record) -> Program:
    """The program of one session, which begins at 0 s: sessions have no common clock.

    Raises:
        BadRecord: A field is not as expected.
    """
    name = session.values.get("id")
    if not isinstance(name, str) or not name:
        name = Path(session.file).name.split(".")[0]
    prompts = BlockPrompts(session.whole("block_size", 1), name)
    turns = _chain(session.records("requests"), prompts)
    if not turns:
        raise session.bad("requests", "at least one request")
    shared = session.values.get("hash_id_scope") == "global"
    return Program(name, 0.0, turns, scope=SCOPE if shared else "")


def _chain(entries: Sequence[Record], prompts: BlockPrompts) -> tuple[Turn, ...]:
    requests: list[_Request] = []
    for entry in entries:
        if entry.values.get("type") != "subagent":
            requests.append(_request(entry))
        elif not requests:
            raise entry.bad("type", "a request before the first sub-agent")
        else:
            agent = _sub_agent(entry, requests[-1].start_s, prompts)
            if agent.turns:
                requests[-1].agents.append(agent)
    texts = prompts.of([(request.ids, request.input_tokens) for request in requests])
    return tuple(
        Turn(
            prompt=text,
            output_tokens=request.output_tokens,
            gap_s=request.gap_s(following),
            tool=request.tool,
            children=tuple(
                Child(max(0.0, agent.start_s - request.end_s), agent.turns)
                for agent in request.agents
            ),
        )
        for request, text, following in zip(requests, texts, [*requests[1:], None], strict=False)
    )


def _request(entry: Record) -> _Request:
    start_s = entry.number("t")
    output_tokens = max(1, entry.whole("out"))
    duration_s = entry.number_if_any("api_time")
    estimate_s = TTFT_S + DECODE_S_PER_TOKEN * output_tokens
    return _Request(
        start_s=start_s,
        end_s=start_s + (estimate_s if duration_s is None else duration_s),
        ended=duration_s is not None,
        think_s=entry.number_if_any("think_time"),
        ids=entry.ids("hash_ids"),
        input_tokens=entry.whole("in", 1),
        output_tokens=output_tokens,
        tool="tool" if entry.values.get("stop") == "tool_use" else None,
    )


def _sub_agent(entry: Record, parent_start_s: float, prompts: BlockPrompts) -> _SubAgent:
    turns = _chain(entry.records("requests"), prompts)
    end_s = entry.number("t")
    duration_s = entry.number("duration_ms") / 1000
    start_s = end_s - duration_s
    if start_s < parent_start_s:
        start_s, end_s = end_s, end_s + duration_s
    return _SubAgent(start_s, end_s, turns)
