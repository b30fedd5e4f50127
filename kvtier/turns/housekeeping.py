"""What is due once a step: the tier's answers, the mode, pins and programs whose time is over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvtier.gpu_pin import PinTable, ReleaseCause
from kvtier.turns.live_mode import LiveMode, Mode

if TYPE_CHECKING:
    from kvtier.programs import ProgramTable
    from kvtier.stats import Stats
    from kvtier.turns.answers import Answers
    from kvtier.turns.control import Control
    from kvtier.turns.endings import Endings
    from kvtier.turns.prefetch import Prefetcher
    from kvtier.turns.staging import Stager

FORGET_INTERVAL_S: Final = 1.0


class Housekeeping:
    """See the module's docstring."""

    def __init__(
        self,
        answers: Answers,
        mode: LiveMode,
        stats: Stats,
        pins: PinTable,
        stager: Stager,
        prefetcher: Prefetcher,
        programs: ProgramTable,
        endings: Endings,
        control: Control | None = None,
    ) -> None:
        self._answers = answers
        self._mode = mode
        self._stats = stats
        self._pins = pins
        self._stager = stager
        self._prefetcher = prefetcher
        self._programs = programs
        self._endings = endings
        self._control = control
        self._seen_mode: Mode | None = None
        self._next_forget_s = float("-inf")

    def run(self, now_s: float, *, urgent: bool = False) -> None:
        """Do what is due; `urgent`: the engine was woken, as there are commands."""
        self._answers.poll(now_s)
        # Before commands, which would lengthen what is over: an idle engine ends no pin in time.
        if expired := self._pins.expire(now_s):
            self._endings.note(*expired)
        if self._control is not None:
            self._control.run(now_s, urgent=urgent)
        mode = self._mode.refresh(now_s)
        if mode is not self._seen_mode:
            self._seen_mode = mode
            self._stats.due()
            if mode is not Mode.ON:
                # In shadow mode too: what was decided there is not done.
                self._stager.cancel_all()
                self._prefetcher.switched_off()
                self._endings.note(*self._pins.release_all(ReleaseCause.OFF))
        if now_s >= self._next_forget_s:
            self._next_forget_s = now_s + FORGET_INTERVAL_S
            for gone in self._programs.forget(now_s):
                self._endings.program_gone(gone)
