"""Reads LMCache's agent traces: the full text of every request, in JSON lines.

A session's prompts extend each other, so a prompt is told in pieces of 64 tokens, named by a hash of all
tokens up to their end: prompts with a common beginning share it, also those of different sessions.

What ten mini-swe-agent sessions of that project (206 requests) hold, and what is made of it:

* Lines are out of order (58 follow a later one); they are sorted by ``timestamp`` (microseconds, a number or text).
* ``input`` lacks what the model had said before: each is the one before it and the next tool result. The
  real prompts had the answers, so these are put back where an input goes on without them.
* Only the beginnings of requests are known. A gap is what is left until the next one after an estimated
  decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tokenizers import Tokenizer

from kvtier.replay.workload import Program, Run, Turn
from kvtier.replay.workloads.records import parsed
from kvtier.tools.names import command_name, fence_commands, multi_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvtier.replay.workloads.records import BadRecord, Record

    Encode = Callable[[str], Sequence[object]]

SCOPE: Final = "lmcache-agent-trace"
PIECE_TOKENS: Final = 64
CHARS_PER_TOKEN: Final = 4
"""Where no tokenizer is named."""
DECODE_S_PER_TOKEN: Final = 0.005
"""Time to generate a token: over these sessions the time between requests grows by 0.0047 s with a token of
output, and is never below 0.006 s a token. (With the 0.02 s of a slower server no gap would be left.)"""


@dataclass(frozen=True, slots=True)
class _Row:
    session: str
    at_s: float
    input: str
    output: str


def read(
    records: Iterable[Record], bad: Callable[[BadRecord], None], tokenizer: str | None = None
) -> list[Program]:
    """The programs of one file, a session each; they arrive when the recorded ones did.

    Args:
        records: Its lines.
        bad: Gets the lines that are not as expected; they are left out.
        tokenizer: Folder or file of a Hugging Face tokenizer, or its name on the hub; None: four
            characters are a token.

    Raises:
        ValueError: There is no such tokenizer.
    """
    encode = _by_length if tokenizer is None else _encoder(tokenizer)
    sessions: dict[str, list[_Row]] = {}
    for row in parsed(records, _row, bad):
        sessions.setdefault(row.session, []).append(row)
    return [_program(name, rows, encode) for name, rows in sessions.items()]


def _row(record: Record) -> _Row:
    row = _Row(
        session=record.text("session_id"),
        at_s=record.number("timestamp") / 1e6,
        input=record.text("input"),
        output=record.text("output").strip(),
    )
    if not row.input:
        raise record.bad("input", "some text")
    return row


def _by_length(text: str) -> list[object]:
    return [text[i : i + CHARS_PER_TOKEN] for i in range(0, len(text), CHARS_PER_TOKEN)]


def _encoder(name: str) -> Encode:
    path = Path(name)
    if path.is_dir():
        path /= "tokenizer.json"
    try:
        is_file = path.is_file()
        tokenizer = Tokenizer.from_file(str(path)) if is_file else Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"no tokenizer {name!r}: {error}") from error

    def encode(text: str) -> Sequence[object]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _program(name: str, rows: list[_Row], encode: Encode) -> Program:
    rows.sort(key=lambda row: row.at_s)
    outputs = [encode(row.output) for row in rows]
    turns: list[Turn] = []
    for first, end in _stretches(rows):
        tokens = list(encode(rows[first].input))
        lengths = [len(tokens)]
        for i in range(first, end - 1):
            added = rows[i + 1].input[len(rows[i].input) :]
            said = rows[i].output
            if added.startswith(said) or said not in added:
                tokens += outputs[i]
                added = added.removeprefix(said)
            tokens += encode(added)
            lengths.append(len(tokens))
        pieces = _pieces(tokens)
        for i, n_tokens in enumerate(lengths, first):
            following = rows[i + 1] if i + 1 < len(rows) else None
            output_tokens = max(1, len(outputs[i]))
            turns.append(
                Turn(
                    prompt=_cut(pieces, n_tokens),
                    output_tokens=output_tokens,
                    gap_s=_gap_s(rows[i], output_tokens, following),
                    tool=_tool(rows[i].output),
                )
            )
    return Program(name, rows[0].at_s, tuple(turns), SCOPE)


def _stretches(rows: Sequence[_Row]) -> list[tuple[int, int]]:
    """First and end index of each row of inputs that extend each other."""
    begins = [
        i for i in range(len(rows)) if not i or not rows[i].input.startswith(rows[i - 1].input)
    ]
    return list(zip(begins, [*begins[1:], len(rows)], strict=True))


def _pieces(tokens: Sequence[object]) -> list[Run]:
    pieces = []
    digest = b""
    for begin in range(0, len(tokens), PIECE_TOKENS):
        piece = tokens[begin : begin + PIECE_TOKENS]
        digest = blake2b(digest + repr(piece).encode(), digest_size=16).digest()
        pieces.append(Run(int.from_bytes(digest[:7], "big"), len(piece)))
    return pieces


def _cut(pieces: Sequence[Run], n_tokens: int) -> tuple[Run, ...]:
    """The first tokens. The part of a piece has the content of the whole, which continues it."""
    n_full, rest = divmod(n_tokens, PIECE_TOKENS)
    cut = (Run(pieces[n_full].content, rest),) if rest else ()
    return (*pieces[:n_full], *cut)


def _gap_s(row: _Row, output_tokens: int, following: _Row | None) -> float:
    if following is None:
        return 0.0
    return max(0.0, following.at_s - row.at_s - output_tokens * DECODE_S_PER_TOKEN)


def _tool(output: str) -> str | None:
    """The command of a shell block, which is how this agent calls its tool."""
    bodies, _ = fence_commands(output)
    return multi_name(name for name in map(command_name, bodies) if name is not None)
