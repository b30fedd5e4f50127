"""Policies that keep a finished turn's KV in GPU memory for a while: everything but how long.

The course of events is that of Continuum (arXiv 2511.02230, Algorithm 1 and section 5.2): a pin ends when the
next turn gets its blocks, with the program's last turn, and when its time is over unless the next turn
waits by then. Where an allocation fails, pins end one by one until it fits, that of the program which has come
last first; the chain's own, which would not help, at the very end. So pins can not deadlock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvtier.replay.baselines.hooks import BaselinePolicy, Surroundings
from kvtier.replay.baselines.pins import Pin, Pins

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtier.replay.baselines.facts import RequestFacts


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request that has no blocks yet.

    Attributes:
        chain: Whose it is.
        arrived_s: When it came.
        returns: Whether the chain had a turn before.
    """

    chain: str
    arrived_s: float
    returns: bool


class RetentionPolicy(BaselinePolicy, ABC):
    """See the module's docstring.

    Args:
        around: What it works with; the scheduler is one of `ordering.RankedScheduler`.
    """

    def __init__(self, around: Surroundings) -> None:
        self.around = around
        self.pins = Pins(around.pool)
        self._waiting: dict[str, _Waiting] = {}
        self._program_arrival_s: dict[str, float] = {}
        # By chain: the tool that it called, and when.
        self._called: dict[str, tuple[str | None, float]] = {}
        around.scheduler.before_step = self.before_step

    # -- what a policy decides ---------------------------------------------------------------------

    @abstractmethod
    def ttl_s(self, facts: RequestFacts, n_tokens: int) -> float:
        """How long to keep a context of so many tokens; 0 for not at all."""

    def saw_gap(self, tool: str | None, gap_s: float) -> None:
        """A chain has returned so long after it called that tool."""

    def saw_queueing(self, delay_s: float) -> None:
        """A returning request without a pin has waited so long for its blocks."""

    def saw_chain(self, n_turns: int) -> None:
        """A chain has ended after so many turns."""

    # -- the course of events ----------------------------------------------------------------------

    def arrived(self, request: Any) -> None:
        """Measure the gap, and begin to measure the queueing delay."""
        facts, now_s = self.around.facts[request.request_id], self.around.clock()
        self._program_arrival_s.setdefault(facts.program, now_s)
        called = self._called.pop(facts.chain, None)
        if called is not None:
            self.saw_gap(called[0], now_s - called[1])
        self._waiting[request.request_id] = _Waiting(facts.chain, now_s, called is not None)

    def before_step(self) -> None:
        """End the pins whose time is over."""
        if self.pins:
            self.pins.expire(self.around.clock(), {one.chain for one in self._waiting.values()})

    def allocated(self, request: Any) -> None:
        """Hand the pin's blocks over to the next turn."""
        waited = self._waiting.pop(request.request_id, None)
        if waited is None:
            return
        if waited.returns and waited.chain not in self.pins:
            self.saw_queueing(self.around.clock() - waited.arrived_s)
        self.hand_over(waited.chain)

    def hand_over(self, chain: str) -> None:
        """The next turn has its own references on the blocks."""
        self.pins.release(chain)

    def finished(self, request: Any, blocks: Sequence[Any]) -> None:
        """Pin a turn's KV, or end the program's pins."""
        facts, now_s = self.around.facts[request.request_id], self.around.clock()
        if facts.ends_chain:
            self.saw_chain(facts.index + 1)
        if facts.ends_program:
            self.pins.release_program(facts.program)
        self.pins.release(facts.chain)
        if facts.ends_chain:
            return
        self._called[facts.chain] = (facts.tool, now_s)
        ttl_s = self.ttl_s(facts, request.num_tokens)
        if ttl_s > 0 and blocks:
            arrival_s = self._program_arrival_s[facts.program]
            self.pins.add(Pin(facts.chain, facts.program, arrival_s, now_s + ttl_s, blocks))

    def make_room(
        self, request: Any, retry: Callable[[], Any], need_blocks: Callable[[], int]
    ) -> Any:
        """End pins until the allocation fits."""
        own = self.around.facts[request.request_id].chain
        while self.pins:
            self.pins.release(self.pins.latest_arrived(last=own))
            if self.around.pool.get_num_free_blocks() < need_blocks():
                continue
            blocks = retry()
            if blocks is not None:
                return blocks
        return None

    def before_reset(self) -> None:
        """End all pins."""
        self.pins.release_all()
