"""Loads a workload by what the command line calls it: a generator's name, a file, or a folder of files."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

from kvtier.replay.workloads import claude_code, lmcache_trace, mooncake, recording, synthetic
from kvtier.replay.workloads.limits import apply
from kvtier.replay.workloads.records import BadRecord, Record, json_lines, read_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvtier.replay.workload import Limits, Program

__all__ = ["SYNTHETIC", "SYNTHETIC_PROGRAMS", "BadRecord", "load"]

SYNTHETIC: Final = "synthetic:"
SYNTHETIC_PROGRAMS: Final = 100
"""Programs that are generated if nobody says how many."""
_SUFFIXES: Final = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_DECODER: Final = json.JSONDecoder()
_FORMATS: Final = (
    'a JSON object with "requests" (kv-cache-tester), or JSON lines with "kvtier_turn" (kvtier record), '
    'with "hash_ids" (Mooncake) or with "session_id" and "input" (LMCache)'
)


def load(
    what: str,
    *,
    seed: int,
    limits: Limits,
    programs: int | None,
    tokenizer: str | None = None,
    skipped: list[str] | None = None,
) -> list[Program]:
    """The programs of a workload, within the limits.

    Args:
        what: ``synthetic:NAME``, a file, or a folder. Of a folder, the files whose names end in json or jsonl,
            plain or gzipped, in an order that the seed shuffles; each file's content tells its format.
        seed: Of generated programs, and of that order.
        limits: What of each program is replayed, and of how many.
        programs: How many, at most; None: as many as the files have, or 100 generated ones.
        tokenizer: For recorded text; see `lmcache_trace.read`.
        skipped: If given, records that cannot be replayed are left out, and this gets the reasons.

    Raises:
        BadRecord: A record cannot be replayed, and none may be skipped.
        ValueError: There is no such workload or tokenizer, or a number of programs is negative.
    """
    most = min((n for n in (programs, limits.max_programs) if n is not None), default=None)
    found: Iterable[Program]
    if what.startswith(SYNTHETIC):
        n_programs = SYNTHETIC_PROGRAMS if most is None else most
        found = synthetic.generate(what.removeprefix(SYNTHETIC), n_programs, seed)
    else:
        found = _recorded(_files(what, seed), tokenizer, skipped)
    within = (apply(program, limits) for program in found)
    # Files beyond the last program that is asked for are not read.
    return list(islice((program for program in within if program is not None), most))


def _files(what: str, seed: int) -> list[Path]:
    path = Path(what)
    if path.is_file():
        return [path]
    if not path.is_dir():
        names = ", ".join(SYNTHETIC + name for name in synthetic.NAMES)
        raise ValueError(f"no workload {what!r}: expected a file, a folder of files, or {names}")
    files = sorted(file for file in path.iterdir() if file.name.endswith(_SUFFIXES))
    if not files:
        raise ValueError(f"no workload in {what}: expected files named *{', *'.join(_SUFFIXES)}")
    Random(f"files/{seed}").shuffle(files)  # noqa: S311 - no secret
    return files


def _recorded(
    files: Iterable[Path], tokenizer: str | None, skipped: list[str] | None
) -> Iterator[Program]:
    def bad(error: BadRecord) -> None:
        if skipped is None:
            raise error
        skipped.append(str(error))

    names = set()
    for path in files:
        try:
            read = _read_file(path, tokenizer, bad)
        except BadRecord as error:
            bad(error)
            continue
        for program in read:
            if program.name in names:
                bad(BadRecord(f"{path}: {program.name} was read before, expected other names"))
                continue
            names.add(program.name)
            yield program


def _read_file(
    path: Path, tokenizer: str | None, bad: Callable[[BadRecord], None]
) -> list[Program]:
    text = read_text(path)
    first = _first_object(text)
    if "requests" in first:
        return [claude_code.read(Record(first, str(path)))]
    scope = path.name.removesuffix(".gz").rpartition(".")[0]
    if recording.MARK in first:
        return recording.read(json_lines(text, str(path), bad), scope, bad)
    if "hash_ids" in first:
        return mooncake.read(json_lines(text, str(path), bad), scope, bad)
    if "session_id" in first and "input" in first:
        return lmcache_trace.read(json_lines(text, str(path), bad), bad, tokenizer)
    raise BadRecord(f"{path}: not a known format, expected {_FORMATS}")


def _first_object(text: str) -> dict[str, Any]:
    """The text's JSON object, or that of the first line which is one; empty if there is none."""
    begin = 0
    while begin < len(text):
        try:
            values, _ = _DECODER.raw_decode(text, begin)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict):
            return values
        begin = text.find("\n", begin) + 1 or len(text)
    return {}
