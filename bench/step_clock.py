"""vLLM's scheduler with a clock: how long each step of the engine takes, and what it costs its process.

For `--scheduler-cls bench.step_clock.TimedScheduler`, as `bench/control_load.py` does: a step lasts from the
scheduler's call to the one that takes in the step's output, so everything that kvtier does in hooks is in it.
Without asynchronous scheduling, steps do not overlap. One row a step goes to the file that `BENCH_STEPS_FILE`
names, from the first step on: what that costs is part of every figure alike. The processor time that the
scheduler's thread spends in kvtier's hooks is told besides: unlike the whole process's, it is kvtier's alone. So are
the instructions of the whole process, where the machine counts them.
"""

from __future__ import annotations

import os
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.hooks import HOOKS
from bench.instructions import Instructions
from kvtier.scheduler import ProgramScheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FILE_VARIABLE = "BENCH_STEPS_FILE"
_ROW = struct.Struct("<7q")


class Step(NamedTuple):
    """One step; times in nanoseconds, `ended_ns` monotonic.

    Of processor time `cpu_ns` is the whole process's in the step, `hooks_ns` kvtier's hooks' since the last step.
    `instructions` are the whole process's in the step; 0 where they are not counted.
    """

    pid: int
    ended_ns: int
    wall_ns: int
    cpu_ns: int
    tokens: int
    hooks_ns: int
    instructions: int


class TimedScheduler(ProgramScheduler):
    """See the module's docstring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's."""
        super().__init__(*args, **kwargs)
        path = Path(os.environ[FILE_VARIABLE])
        self._file = path.open("ab", buffering=0)
        self._pid = os.getpid()
        self._begun = 0, 0, 0
        self._instructions: Instructions | None = None
        self._hooks_ns = 0
        self._in_hook = False
        for name in HOOKS:
            setattr(self.connector, name, self._timed(getattr(self.connector, name)))

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._in_hook:
                return hook(*args, **kwargs)
            self._in_hook = True
            began_ns = time.thread_time_ns()
            try:
                return hook(*args, **kwargs)
            finally:
                self._hooks_ns += time.thread_time_ns() - began_ns
                self._in_hook = False

        return timed

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; a step begins."""
        if not self._begun[0]:
            # All threads of the engine have started.
            with suppress(OSError):
                self._instructions = Instructions(self._pid)
        self._begun = time.monotonic_ns(), time.process_time_ns(), self._counted()
        return super().schedule(*args, **kwargs)

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; a step ends. Steps that compute nothing are not counted."""
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)
        if n_tokens := scheduler_output.total_num_scheduled_tokens:
            wall_ns, cpu_ns, counted = self._begun
            ended_ns, ended_cpu_ns = time.monotonic_ns(), time.process_time_ns()
            wall_ns, cpu_ns = ended_ns - wall_ns, ended_cpu_ns - cpu_ns
            counted = self._counted() - counted
            row = self._pid, ended_ns, wall_ns, cpu_ns, n_tokens, self._hooks_ns, counted
            self._file.write(_ROW.pack(*row))
            self._hooks_ns = 0
        return outputs

    def _counted(self) -> int:
        return 0 if self._instructions is None else self._instructions.count()


def read_steps(path: Path) -> Iterator[Step]:
    """Read all steps of a file, in their order."""
    data = path.read_bytes()
    whole = len(data) - len(data) % _ROW.size
    return (Step(*row) for row in _ROW.iter_unpack(data[:whole]))
