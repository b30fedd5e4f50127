"""Reads Mooncake's request traces: arrival times, sizes and block hashes of single requests, no text.

The rows do not say which conversation they belong to. A row continues an earlier one if its blocks begin with
more than half of that one's, as prompts of a conversation that grows do; the longest match counts, of equal
ones the latest. Blocks after which many different ones follow are a system prompt that conversations share,
and tell nothing. Of the 12,031 rows of the published conversation trace 4,106 continue another, 3,939 of
them its whole prompt.

Arrivals are recorded, ends are not: a gap is what is left until the next arrival after an estimated decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvtier.replay.workload import Program, Turn
from kvtier.replay.workloads.block_prompts import BlockPrompts
from kvtier.replay.workloads.records import parsed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvtier.replay.workloads.records import BadRecord, Record

BLOCK_TOKENS: Final = 512
DECODE_S_PER_TOKEN: Final = 0.02
"""Estimated time to generate a token."""
SHARED_BRANCHES: Final = 16
"""A block that more different ones follow than this is shared by conversations. In the published conversation
trace 7,373 follow the first block, and at most 12 any other."""


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    arrival_s: float
    input_tokens: int
    output_tokens: int
    ids: list[int]


def read(records: Iterable[Record], scope: str, bad: Callable[[BadRecord], None]) -> list[Program]:
    """The programs of one trace, in order of arrival, named by their first row's line.

    Args:
        records: Its rows.
        scope: Name of the trace, within which equal ids are equal content.
        bad: Gets the rows that are not as expected; they are left out.
    """
    rows = sorted(parsed(records, _row, bad), key=lambda row: row.arrival_s)
    prompts = BlockPrompts(BLOCK_TOKENS, scope)
    programs = []
    for chain in _chains(rows):
        texts = prompts.of([(row.ids, row.input_tokens) for row in chain])
        turns = tuple(
            Turn(text, row.output_tokens, _gap_s(row, following))
            for row, text, following in zip(chain, texts, [*chain[1:], None], strict=True)
        )
        programs.append(Program(f"{scope}-{chain[0].line}", chain[0].arrival_s, turns, scope))
    return programs


def _row(record: Record) -> _Row:
    return _Row(
        line=record.line,
        arrival_s=record.number("timestamp") / 1000,
        input_tokens=record.whole("input_length", 1),
        output_tokens=max(1, record.whole("output_length")),
        ids=record.ids("hash_ids"),
    )


def _gap_s(row: _Row, following: _Row | None) -> float:
    if following is None:
        return 0.0
    end_s = row.arrival_s + row.output_tokens * DECODE_S_PER_TOKEN
    return max(0.0, following.arrival_s - end_s)


def _chains(rows: Sequence[_Row]) -> list[list[_Row]]:
    """The rows of each program, by arrival of its first."""
    paths, n_branches = _prefix_tree(rows)
    chains: list[list[_Row]] = []
    # Of each node the row that last came through it: its program, and how many blocks it has.
    latest: dict[int, tuple[int, int]] = {}
    for row, path in zip(rows, paths, strict=True):
        index = _continued(path, latest, n_branches)
        if index is None:
            index = len(chains)
            chains.append([])
        chains[index].append(row)
        latest.update(dict.fromkeys(path, (index, len(path))))
    return chains


def _prefix_tree(rows: Sequence[_Row]) -> tuple[list[list[int]], list[int]]:
    """Each row's way through the tree of all rows' blocks, and how many branches each node has."""
    nodes: dict[tuple[int, int], int] = {}
    n_branches = [0]
    paths = []
    for row in rows:
        path: list[int] = []
        node = 0
        for block in row.ids:
            child = nodes.setdefault((node, block), len(n_branches))
            if child == len(n_branches):
                n_branches.append(0)
                n_branches[node] += 1
            path.append(child)
            node = child
        paths.append(path)
    return paths, n_branches


def _continued(
    path: Sequence[int], latest: dict[int, tuple[int, int]], n_branches: Sequence[int]
) -> int | None:
    """The program that a row continues, None for a new one."""
    n_matched = 0
    while n_matched < len(path) and path[n_matched] in latest:
        n_matched += 1
    if not n_matched or n_branches[path[n_matched - 1]] > SHARED_BRANCHES:
        return None
    index, n_blocks = latest[path[n_matched - 1]]
    return index if 2 * n_matched > n_blocks else None
