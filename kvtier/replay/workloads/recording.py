"""Reads what `kvtier record` has written: the turns of real agents, hashed.

The turns of a program are told one after the other. Those that overlap, as sub-agents' and parallel requests do,
cannot be one chain: a turn continues the chain of its program that has paused by then and shares most with its
prompt, if that is more than half of the chain's last prompt; else it begins a chain of its own, as after a
compaction, which is replayed as a program of its own. Who waited for whom is not recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvtier.replay.workload import Program, Turn
from kvtier.replay.workloads.block_prompts import BlockPrompts
from kvtier.replay.workloads.records import parsed
from kvtier.turns.recorder import FORMAT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvtier.replay.workloads.records import BadRecord, Record

MARK: Final = "kvtier_turn"


@dataclass(frozen=True, slots=True)
class _Row:
    program: str
    arrived_s: float
    ended_s: float
    prompt_tokens: int
    output_tokens: int
    tool: str | None
    unit_tokens: int
    kept: int
    units: list[int]


@dataclass(slots=True)
class _Placed:
    """A row with its whole prompt."""

    row: _Row
    units: list[int]


def read(records: Iterable[Record], scope: str, bad: Callable[[BadRecord], None]) -> list[Program]:
    """The programs of one recording, in order of arrival; the first one arrives at 0.

    Args:
        records: Its lines.
        scope: Name of the recording, within which equal units are equal content.
        bad: Gets the lines that are not as expected; they are left out.
    """
    chains: dict[str, list[list[_Placed]]] = {}
    last: dict[str, list[int]] = {}
    for record, row in parsed(records, lambda record: (record, _row(record)), bad):
        before = last.get(row.program, [])
        if row.kept > len(before):
            bad(record.bad("kept", f"at most {len(before)}, what the line before has told"))
            continue
        units = before[: row.kept] + row.units
        last[row.program] = units
        _place(chains.setdefault(row.program, []), _Placed(row, units))
    found = [
        (chain, f"{scope}-{name}" + (f"-{i}" if i else ""))
        for name, of_program in chains.items()
        for i, chain in enumerate(of_program)
    ]
    found.sort(key=lambda item: item[0][0].row.arrived_s)
    begin_s = found[0][0][0].row.arrived_s if found else 0.0
    return [_program(name, chain, scope, begin_s) for chain, name in found]


def _row(record: Record) -> _Row:
    if record.whole(MARK) != FORMAT:
        raise record.bad(MARK, f"{FORMAT}, the format that this version reads")
    row = _Row(
        program=record.text("program"),
        arrived_s=record.number("arrived_s"),
        ended_s=record.number("ended_s"),
        prompt_tokens=record.whole("prompt_tokens", 1),
        output_tokens=max(1, record.whole("output_tokens")),
        tool=None if record.values.get("tool") is None else record.text("tool"),
        unit_tokens=record.whole("unit_tokens", 1),
        kept=record.whole("kept"),
        units=record.ids("units"),
    )
    if row.ended_s < row.arrived_s:
        raise record.bad("ended_s", "a time not before arrived_s")
    return row


def _place(chains: list[list[_Placed]], placed: _Placed) -> None:
    best, most = None, 0
    for chain in chains:
        tail = chain[-1]
        shared = _shared(tail.units, placed.units)
        # Lines are written when turns end; what began before the chain's last turn ended runs beside it.
        follows = placed.row.arrived_s >= tail.row.ended_s
        continues = 2 * shared > len(tail.units) or not tail.units
        if follows and continues and shared >= most:
            best, most = chain, shared
    if best is None:
        chains.append([placed])
    else:
        best.append(placed)


def _shared(left: list[int], right: list[int]) -> int:
    n = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        n += 1
    return n


def _program(name: str, chain: list[_Placed], scope: str, begin_s: float) -> Program:
    prompts = BlockPrompts(chain[0].row.unit_tokens, name).of(
        [(placed.units, placed.row.prompt_tokens) for placed in chain]
    )
    turns = []
    for i, (placed, prompt) in enumerate(zip(chain, prompts, strict=True)):
        following = chain[i + 1].row.arrived_s if i + 1 < len(chain) else placed.row.ended_s
        gap_s = max(0.0, following - placed.row.ended_s)
        turns.append(Turn(prompt, placed.row.output_tokens, gap_s, placed.row.tool))
    return Program(name, chain[0].row.arrived_s - begin_s, tuple(turns), scope)
