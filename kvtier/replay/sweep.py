"""One number of a replay swept; and running what is asked for, policy by policy."""

from __future__ import annotations

import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from kvtier.replay.options import NUMBERS, OWN_POLICY, OptionError, Options, check_fits
from kvtier.replay.summary import PolicyResult, summarise

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.queues import SimpleQueue

    from kvtier.replay.machine import Machine
    from kvtier.replay.policies import PolicySpec
    from kvtier.replay.simulation import Replayed
    from kvtier.replay.workload import Program

_LEVEL: Final = "VLLM_LOGGING_LEVEL"
_QUIET: Final = {
    _LEVEL: "ERROR",
    # There is no model to load, no KV memory to fill and nothing to compute.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
}
_POLL_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Sweep:
    """One option, and the values it takes one after the other."""

    option: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """Read ``NAME=VALUE,VALUE``.

        Raises:
            OptionError: It is not like this, or there is no such numeric option.
        """
        name, _, listed = text.partition("=")
        option = name.strip().removeprefix("--").replace("-", "_")
        if option not in NUMBERS:
            accepted = ", ".join(known.replace("_", "-") for known in NUMBERS)
            raise OptionError("--sweep", f"{text!r}: accepted is NAME=VALUE,VALUE with {accepted}")
        try:
            values = tuple(float(word) for word in listed.split(","))
        except ValueError:
            example = f"{option.replace('_', '-')}=1,2,4"
            raise OptionError("--sweep", f"{text!r}: accepted is as in {example}") from None
        number = NUMBERS[option]
        for value in values:
            if not number.holds(value):
                text = f"{option.replace('_', '-')}={value:g}: accepted is {number.accepted}"
                raise OptionError("--sweep", text)
        if len(set(values)) < len(values):
            raise OptionError("--sweep", f"{text!r}: accepted is each value once")
        return cls(option, tuple(int(v) for v in values) if number.whole else values)

    def apply(self, given: Mapping[str, Any]) -> list[Options]:
        """The options with each of the values.

        Raises:
            OptionError: As `Options`, or the swept option means nothing together with the others.
        """
        if self.option == "rate" and given["arrivals"] != "poisson":
            text = f"rate: means nothing with --arrivals {given['arrivals']}; accepted is poisson"
            raise OptionError("--sweep", text)
        return [Options(**{**given, self.option: value}) for value in self.values]


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy on one workload and machine."""

    policy: str
    machine: Machine
    programs: tuple[Program, ...]
    concurrency: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a cell: its figures, or why there are none."""

    cell: Cell
    result: PolicyResult | None
    replayed: Replayed | None
    error: str = ""


def make_cells(
    asked: Sequence[Options], sweep: Sweep | None, policies: Sequence[str], extra: Mapping[str, Any]
) -> tuple[list[Cell], list[str]]:
    """Every policy at every value, and why records were left out.

    Args:
        asked: The options of each value.
        sweep: Where the values are from.
        policies: Names.
        extra: Settings of kvtier.

    Raises:
        OptionError: A machine or a workload cannot be had, or one does not fit the other.
    """
    skipped: list[str] = []
    cells = []
    for number, options in enumerate(asked):
        machine, programs = options.machine(), options.load(skipped if not number else [])
        check_fits(machine, programs)
        value = sweep.values[number] if sweep else None
        for name in policies:
            own = extra if name == OWN_POLICY else {}
            cells.append(Cell(name, machine, programs, options.concurrency, own, value))
    return cells, skipped


def quiet_vllm(*, online: bool) -> None:
    """Keep vLLM, which is not imported yet, from talking and from taking memory; what the user has set stays."""
    if os.environ.get(_LEVEL, "ERROR") == "ERROR":
        # What it logs before it has read the variable, and where it leaves logging to others.
        logging.getLogger("vllm").setLevel(logging.ERROR)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if not online:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("kvtier").setLevel(logging.WARNING)


def run_cells(cells: Sequence[Cell], jobs: int, told: Callable[[int, int], None]) -> list[Outcome]:
    """Replay all cells, in this process or several at a time in processes of their own.

    Args:
        cells: What to replay.
        jobs: Processes at a time.
        told: Called with a cell's index and how many of its programs have ended; with 0 when it begins.

    Raises:
        OptionError: A policy is not known.
    """
    names = list(dict.fromkeys(cell.policy for cell in cells))
    if jobs == 1 or len(cells) == 1:
        specs = _specs(names)
        return [
            _run(specs[cell.policy], cell, lambda n, i=i: told(i, n))  # type: ignore[misc]
            for i, cell in enumerate(cells)
        ]
    context = multiprocessing.get_context("spawn")
    news: SimpleQueue[tuple[int, int]] = context.SimpleQueue()
    workers = min(jobs, len(cells))
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(news,))
    try:
        futures = [pool.submit(_run_in_worker, i, cell, names) for i, cell in enumerate(cells)]
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=_POLL_S)
            while not news.empty():
                told(*news.get())
            for future in done:
                future.result()
        return [future.result() for future in futures]
    except BaseException:
        # Nobody waits for replays whose results nobody will see.
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _specs(names: Sequence[str]) -> dict[str, PolicySpec]:
    """The policies of these names. Brings vLLM, which takes many seconds."""
    from kvtier.replay.policies import policy  # noqa: PLC0415

    try:
        return {name: policy(name) for name in names}
    except ValueError as error:
        raise OptionError("--policy", str(error)) from error


def _run(spec: PolicySpec, cell: Cell, told: Callable[[int], None]) -> Outcome:
    from kvtier.replay.simulation import Simulation, StuckError  # noqa: PLC0415

    spec = replace(spec, settings={**spec.settings, **cell.settings})
    told(0)
    try:
        replayed = Simulation(
            spec, cell.machine, cell.programs, concurrency=cell.concurrency, progress=told
        ).run()
    except StuckError as error:
        return Outcome(cell, None, None, str(error))
    return Outcome(cell, summarise(replayed, cell.programs, cell.machine), replayed)


_news: SimpleQueue[tuple[int, int]] | None = None


def _begin(news: SimpleQueue[tuple[int, int]]) -> None:
    """Set up a worker process."""
    global _news  # noqa: PLW0603 - one for each process
    _news = news


def _run_in_worker(index: int, cell: Cell, names: Sequence[str]) -> Outcome:
    news = _news
    assert news is not None
    # All of them: a wrong one is to be told before the first has been replayed.
    specs = _specs(names)
    return _run(specs[cell.policy], cell, lambda n_ended: news.put((index, n_ended)))
