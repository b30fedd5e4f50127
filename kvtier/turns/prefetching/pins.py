"""The pin of a prefetch: it begins with what GPU memory holds of the turn, and grows as the rest is loaded.

An ordinary pin in all else: pressure, its deadline, the turn's return, a newer turn, a reset end it as any
other. A prefetch whose pin has ended goes on no further.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvtier.costs.pinned_turn import PinnedTurn
from kvtier.turns.pin_terms import tenant_of

if TYPE_CHECKING:
    from kvtier.block_ids import BlockIds
    from kvtier.gpu_pin import Pin, PinTable
    from kvtier.policy import Policy
    from kvtier.turns.engine_facts import EngineFacts
    from kvtier.turns.happenings import Happenings
    from kvtier.turns.paused_turns import PausedTurn
    from kvtier.turns.pin_charges import PinCharges
    from kvtier.turns.pin_terms import Granted, PinTerms
    from kvtier.turns.prefetching.jobs import Prefetch
    from kvtier.turns.staged_copies import StagedCopies


class PrefetchPins:
    """See the module's docstring."""

    def __init__(
        self,
        facts: EngineFacts,
        pins: PinTable,
        copies: StagedCopies,
        policy: Policy,
        happenings: Happenings,
        charges: PinCharges,
        terms: PinTerms,
    ) -> None:
        self._facts = facts
        self._pins = pins
        self._copies = copies
        self._policy = policy
        self._happenings = happenings
        self._charges = charges
        self._terms = terms

    def granted(
        self,
        program: str,
        turn: PausedTurn,
        n_blocks: int,
        asked_s: float | None,
        now_s: float,
        mine: Pin | None,
    ) -> Granted:
        """For how long a prefetch of so many blocks may be pinned; see `PinTerms.granted`."""
        tenant = tenant_of(turn.salt)
        return self._terms.granted(program, turn.tool, tenant, asked_s, n_blocks, now_s, mine)

    def affordable_blocks(self, prefetch: Prefetch, now_s: float) -> float:
        """How many more blocks its tenant can pay for, for as long as it is to be pinned."""
        tenant = tenant_of(prefetch.turn.salt)
        return self._charges.affordable_blocks(tenant, prefetch.deadline_s - now_s, now_s)

    def lives(self, prefetch: Prefetch) -> bool:
        """Whether the pin is there, or was not needed yet."""
        return not prefetch.is_pinned or self._pin(prefetch) is not None

    def grow(self, prefetch: Prefetch, block_ids: BlockIds, now_s: float) -> str:
        """Pin the turn's next blocks, one at least; or why not: `pin_ended`, `budget` or `tenant_budget`."""
        pin, n_ready = self._pin(prefetch), prefetch.n_ready + len(block_ids)
        taken = pin is None and prefetch.key in self._pins
        if taken or (pin is None and (prefetch.is_pinned or prefetch.deadline_s <= now_s)):
            return "pin_ended"
        if pin is not None:
            # A command may have moved it.
            prefetch.deadline_s = pin.deadline_s
        if len(block_ids) > self.affordable_blocks(prefetch, now_s):
            return "tenant_budget"
        data = self._data(prefetch, n_ready)
        if pin is None:
            if not self._pins.pin(
                prefetch.key,
                prefetch.program,
                block_ids,
                now_s=now_s,
                ttl_s=prefetch.deadline_s - now_s,
                data=data,
            ):
                return "budget"
            pin = self._pins.get(prefetch.key)
            assert pin is not None
        else:
            if not self._pins.extend(prefetch.key, block_ids):
                return "budget"
            if isinstance(pin.data, PinnedTurn):
                pin.data = replace(
                    pin.data,
                    n_tokens=data.n_tokens,
                    prompt_blocks=data.prompt_blocks,
                    staged_tokens=data.staged_tokens,
                )
        self._charges.grows(pin, len(block_ids))
        prefetch.n_ready, prefetch.is_pinned = n_ready, True
        self._happenings.pinned(pin)
        return ""

    def _pin(self, prefetch: Prefetch) -> Pin | None:
        """The turn's pin, but not that of another program whose client has used the request's id again."""
        pin = self._pins.get(prefetch.key)
        return pin if pin is not None and pin.program == prefetch.program else None

    def adopt(self, prefetch: Prefetch, pin: Pin) -> None:
        """Go on with the turn's own pin, which keeps its head; it lasts no shorter than it was to."""
        if prefetch.deadline_s > pin.deadline_s:
            self._charges.moves(pin, prefetch.deadline_s)
            self._pins.set_deadline(pin.key, prefetch.deadline_s)
            self._happenings.pinned(pin)
        prefetch.deadline_s = pin.deadline_s
        prefetch.n_ready, prefetch.is_pinned = len(pin.block_ids), True

    def _data(self, prefetch: Prefetch, n_blocks: int) -> PinnedTurn:
        turn, facts = prefetch.turn, self._facts
        announced = self._policy.ttl.announcements.of(prefetch.program, prefetch.key)
        data = PinnedTurn(
            tool=turn.tool,
            n_tokens=n_blocks * facts.block_tokens,
            prompt_blocks=min(n_blocks, turn.prompt_blocks),
            # It did not begin with the pause.
            predicted_gap_s=0.0,
            staged_tokens=n_blocks // facts.chunk_blocks * facts.chunk_tokens,
            strand=self._copies.strands.find(prefetch.program, turn.chain),
            miss_unstaged_s=prefetch.miss_s[0],
            miss_staged_s=prefetch.miss_s[1],
            tenant=tenant_of(turn.salt),
            asked_until_s=prefetch.asked_until_s,
            chain=turn.chain,
        )
        if announced is None:
            return data
        return replace(data, announced=announced.curve, announced_s=announced.at_s)
