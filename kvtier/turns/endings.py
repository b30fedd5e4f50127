"""The ends of pins, turns and programs: counted, logged, and told to all who remember them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtier.backend import TierBackend, TierState
from kvtier.gpu_pin import PinTable, ReleaseCause
from kvtier.programs import TurnResult

if TYPE_CHECKING:
    from kvtier.admission import AdmissionController
    from kvtier.gpu_pin import Released
    from kvtier.policy import Policy
    from kvtier.programs import CensoredGap, ProgramGone, ProgramTable
    from kvtier.stats import Stats
    from kvtier.tools.detection import ToolCall
    from kvtier.turns.decision_log import DecisionLog
    from kvtier.turns.engine_facts import EngineFacts
    from kvtier.turns.happenings import Happenings
    from kvtier.turns.pin_charges import PinCharges
    from kvtier.turns.prefetch import Prefetcher
    from kvtier.turns.returns import Returns
    from kvtier.turns.staging import Stager
    from kvtier.turns.turn import Turn


_NATURAL_ENDS = {ReleaseCause.HANDOFF, ReleaseCause.TTL}
"""The pin lasted as long as it should. Other causes say nothing of the next pin's fate."""


class Endings:
    """See the module's docstring."""

    def __init__(
        self,
        facts: EngineFacts,
        tier: TierBackend,
        programs: ProgramTable,
        pins: PinTable,
        admission: AdmissionController[str],
        policy: Policy,
        stats: Stats,
        log: DecisionLog,
        happenings: Happenings,
        charges: PinCharges,
    ) -> None:
        self._facts = facts
        self._tier = tier
        self._programs = programs
        self._pins = pins
        self._admission = admission
        self._policy = policy
        self._stats = stats
        self._log = log
        self._happenings = happenings
        self._charges = charges

    def bind(self, stager: Stager, returns: Returns, prefetcher: Prefetcher) -> None:
        """Receive those who remember programs, and themselves end pins through this."""
        self._stager = stager
        self._returns = returns
        self._prefetcher = prefetcher

    def note(self, *released: Released | None) -> None:
        """Pins have ended."""
        for item in released:
            if item is None:
                continue
            self._charges.ends(item.pin)
            self._stats.count("pin_releases", 1, item.cause)
            if item.cause in _NATURAL_ENDS or item.cause is ReleaseCause.PRESSURE:
                self._policy.ttl.observe_pin_end(broken=item.cause is ReleaseCause.PRESSURE)
            if self._log.enabled:
                entry = {"cause": str(item.cause), "blocks": len(item.pin.block_ids)}
                self._log.write("release", item.pin.program, item.pin.key, entry)
            if not self._pins.of_program(item.pin.program):
                self._admission.on_kv_released(item.pin.program)

    def unpin(self, key: str, cause: ReleaseCause) -> None:
        """End a pin, if there is one."""
        self.note(self._pins.unpin(key, cause))

    def turn_aborted(self, turn: Turn, now_s: float) -> None:
        """A request has gone that never began."""
        gone = self._programs.turn_aborted(turn.request_id, now_s)
        self._admission.on_aborted(turn.request_id)
        self._policy.ttl.announcements.turns_over(turn.program, (turn.request_id,))
        self._happenings.turn_ended(turn, None, None, now_s, aborted=True)
        if gone is not None:
            self.program_gone(gone)

    def turn_finished(
        self, turn: Turn, call: ToolCall, n_reusable: int, now_s: float, *, aborted: bool = False
    ) -> bool:
        """A turn is over; returns whether its program is over with it.

        Args:
            turn: The turn.
            call: The tool that its output calls.
            n_reusable: Its leading blocks that a later prompt can hit.
            now_s: Monotonic time.
            aborted: The client went away in the middle of it: it may come back with the same prompt.
        """
        request = turn.request
        end = self._programs.turn_finished(
            TurnResult(
                request_id=turn.request_id,
                tool=call.tool,
                is_tool_call=call.kind == "tool",
                context_tokens=request.num_tokens,
                service_tokens=request.num_tokens - turn.local_tokens,
                block_hashes=request.block_hashes,
                reusable_blocks=min(n_reusable, len(request.block_hashes)),
            ),
            now_s,
        )
        self._admission.on_turn_ended(
            turn.request_id,
            context_blocks=self._facts.blocks_of(request.num_tokens),
            goes_on=aborted or call.kind != "none",
            gap_s=self._policy.ttl.mean_gap_s(call.tool),
            now_s=now_s,
        )
        self._policy.observe_output(request.num_output_tokens)
        expected_s = self._policy.ttl.away(call.tool).quantile(0.5)
        self._happenings.turn_ended(turn, call.tool, expected_s, now_s, aborted=aborted)
        if end is None:
            return False
        self._policy.ttl.announcements.turns_over(turn.program, end.superseded)
        for key in end.superseded:
            self.unpin(key, ReleaseCause.SUPERSEDED)
        self._policy.ttl.returning.forget(turn.program, end.superseded)
        self.gaps(end.gaps)
        if end.ended:
            self.program_ended(turn.program)
        return end.ended

    def gaps(self, gaps: tuple[CensoredGap, ...]) -> None:
        """Pauses that nobody watches any more."""
        for gap in gaps:
            self._policy.ttl.observe_censored(gap.tool, gap.waited_s)

    def program_ended(self, program: str) -> None:
        """The client has ended a program: its KV is of no use, in the tier neither."""
        self.note(*self._pins.unpin_program(program, ReleaseCause.ENDED))
        if self._tier.state is TierState.READY:
            for name in self._stager.copies.strands.names(program):
                self._tier.drop(self._stager.copies.namespace, name)
        self._forget(program)

    def program_gone(self, gone: ProgramGone) -> None:
        """The program table has forgotten a program."""
        self.gaps(gone.gaps)
        program = self._facts.program_handle(gone.program)
        for gap in gone.gaps:
            self._policy.ttl.returning.gone(program, gap.ended_request_id)
        self._forget(program)

    def _forget(self, program: str) -> None:
        self._admission.on_program_ended(program)
        self.note(*self._pins.unpin_program(program, ReleaseCause.ENDED))
        self._returns.forget(program)
        self._stager.forget(program)
        self._prefetcher.forget(program)
        self._policy.ttl.announcements.forget(program)
        self._policy.ttl.returning.forget_program(program)
        self._happenings.program_gone(program)
