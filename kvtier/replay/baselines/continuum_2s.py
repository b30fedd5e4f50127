"""continuum-2s: what Continuum's public code does (Hanchenli/vllm-continuum, January 2026), which is not its paper.

There is no utility model. A finished turn is pinned for 2.0 s if it called a tool whose gaps have had a mean of
2.0 s at most, as an unknown tool's have; any other is not. A pin ends when its time is over unless the next turn
waits then, or when that turn ends. Pinned programs go first, then by the arrival of the program. Pins are worth
more than running requests: where one of these finds no block, the running request of the program that came last
is preempted, one on its last step only if there is no other, and a pin ends only when no other request runs;
for a waiting request one pin a step ends when nothing runs. The pin that would last longest ends first.

Departures. Tools are known, where the code looks for a single bash block in the answer; the last step is known,
where clients that end early do not send it. Sub-agents are jobs of their own, where the code fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vllm.v1.request import RequestStatus

from kvtier.replay.baselines.retention import RetentionPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.replay.baselines.facts import RequestFacts
    from kvtier.replay.baselines.hooks import Surroundings

TTL_S: Final = 2.0


class Continuum2sPolicy(RetentionPolicy):
    """See the module's docstring."""

    def __init__(self, around: Surroundings) -> None:
        super().__init__(around)
        # By tool: the number of its gaps, and their sum.
        self._gaps_s: dict[str, tuple[int, float]] = {}
        around.scheduler.rank_waiting = self._rank_waiting
        around.scheduler.rank_running = self._rank_running

    def _rank_waiting(self, request: Any) -> int:
        return 0 if self.around.facts[request.request_id].chain in self.pins else 1

    def _rank_running(self, request: Any) -> int:
        return 0 if self.around.facts[request.request_id].ends_program else 1

    def ttl_s(self, facts: RequestFacts, n_tokens: int) -> float:  # noqa: ARG002
        """2 s, or none."""
        if facts.tool is None:
            return 0.0
        n_gaps, sum_s = self._gaps_s.get(facts.tool, (1, 0.0))
        return TTL_S if sum_s / n_gaps <= TTL_S else 0.0

    def saw_gap(self, tool: str | None, gap_s: float) -> None:
        """A sample of the tool's mean."""
        if tool is not None:
            n_gaps, sum_s = self._gaps_s.get(tool, (0, 0.0))
            self._gaps_s[tool] = (n_gaps + 1, sum_s + gap_s)

    def hand_over(self, chain: str) -> None:
        """Nothing: the pin lasts until the next turn ends."""

    def make_room(
        self,
        request: Any,
        retry: Callable[[], Any],
        need_blocks: Callable[[], int],  # noqa: ARG002
    ) -> Any:
        """End pins, where nothing else can be done."""
        running = self.around.scheduler.running
        if request.status == RequestStatus.RUNNING:
            while self.pins and len(running) <= 1:
                self.pins.release(self.pins.latest_expiring())
                blocks = retry()
                if blocks is not None:
                    return blocks
        elif self.pins and not running:
            # The request is tried again with the next step.
            self.pins.release(self.pins.latest_expiring())
        return None
