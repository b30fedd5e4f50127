"""The pin of a prefetch: it begins with what GPU memory holds of the turn, and grows as the rest is loaded.

An ordinary pin in all else: pressure, its deadline, the turn's return, a newer turn, a reset end it as any
other. A prefetch whose pin has ended goes on no further.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvtier.costs.pinned_turn import PinnedTurn
from kvtier.programs import bounded_name

if TYPE_CHECKING:
    from kvtier.block_ids import BlockIds
    from kvtier.gpu_pin import Pin, PinTable
    from kvtier.policy import Policy
    from kvtier.turns.engine_facts import EngineFacts
    from kvtier.turns.happenings import Happenings
    from kvtier.turns.paused_turns import PausedTurn
    from kvtier.turns.prefetch_jobs import Prefetch
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
    ) -> None:
        self._facts = facts
        self._pins = pins
        self._copies = copies
        self._policy = policy
        self._happenings = happenings

    def ttl_s(
        self, program: str, turn: PausedTurn, n_blocks: int, asked_s: float | None, now_s: float
    ) -> float:
        """For how long a prefetch of so many blocks is pinned; 0 where an operator forbids it.

        Args:
            program: Whose turn it is.
            turn: The turn.
            n_blocks: Blocks that are to be pinned in the end.
            asked_s: What the client or a command asks for; None: as long as programs stay away at most.
            now_s: Monotonic time.
        """
        ttl, tenant = self._policy.ttl, _tenant(turn)
        override = ttl.overrides.bound(now_s, program=program, tool=turn.tool, tenant=tenant)
        chosen_s = self._policy.lease_s(turn.tool) if asked_s is None else asked_s
        bound = ttl.bound(asked_s, override)
        if bound is not None:
            match bound.mode:
                case "fixed":
                    chosen_s = bound.ttl_s
                case "cap":
                    chosen_s = min(chosen_s, bound.ttl_s)
                case "floor":
                    chosen_s = max(chosen_s, bound.ttl_s)
        limit_s = ttl.budgets.ttl_limit_s(tenant, n_blocks * self._facts.block_bytes, now_s)
        return min(chosen_s, self._policy.config.max_ttl_s, limit_s)

    def lives(self, prefetch: Prefetch) -> bool:
        """Whether the pin is there, or was not needed yet."""
        return not prefetch.is_pinned or prefetch.key in self._pins

    def grow(self, prefetch: Prefetch, block_ids: BlockIds, now_s: float) -> str:
        """Pin the turn's next blocks, one at least; or return why not: `pin_ended` or `budget`."""
        pin, n_ready = self._pins.get(prefetch.key), prefetch.n_ready + len(block_ids)
        left_s = prefetch.deadline_s - now_s
        if pin is None:
            if prefetch.is_pinned or left_s <= 0:
                return "pin_ended"
            data = self._data(prefetch, n_ready)
            if not self._pins.pin(
                prefetch.key, prefetch.program, block_ids, now_s=now_s, ttl_s=left_s, data=data
            ):
                return "budget"
            pin = self._pins.get(prefetch.key)
            assert pin is not None
        else:
            if not self._pins.extend(prefetch.key, block_ids):
                return "budget"
            new = self._data(prefetch, n_ready)
            if isinstance(pin.data, PinnedTurn):
                pin.data = replace(
                    pin.data,
                    n_tokens=new.n_tokens,
                    prompt_blocks=new.prompt_blocks,
                    staged_tokens=new.staged_tokens,
                )
        self._charge(prefetch, len(block_ids), left_s, now_s)
        prefetch.n_ready, prefetch.is_pinned = n_ready, True
        self._happenings.pinned(pin)
        return ""

    def adopt(self, prefetch: Prefetch, pin: Pin, now_s: float) -> None:
        """Go on with the turn's own pin, which keeps its head; it lasts no shorter than it was to."""
        longer_s = prefetch.deadline_s - pin.deadline_s
        if longer_s > 0:
            self._charge(prefetch, len(pin.block_ids), longer_s, now_s)
            self._pins.set_deadline(pin.key, prefetch.deadline_s)
            self._happenings.pinned(pin)
        prefetch.deadline_s = pin.deadline_s
        prefetch.n_ready, prefetch.is_pinned = len(pin.block_ids), True

    def _charge(self, prefetch: Prefetch, n_blocks: int, seconds: float, now_s: float) -> None:
        budgets = self._policy.ttl.budgets
        if budgets:
            n_bytes = n_blocks * self._facts.block_bytes
            budgets.reserve(_tenant(prefetch.turn), n_bytes, seconds, now_s)

    def _data(self, prefetch: Prefetch, n_blocks: int) -> PinnedTurn:
        turn, facts = prefetch.turn, self._facts
        announced = self._policy.ttl.announcements.of(prefetch.program)
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
            tenant=_tenant(turn),
            chain=turn.chain,
        )
        if announced is None:
            return data
        return replace(data, announced=announced.curve, announced_s=announced.at_s)


def _tenant(turn: PausedTurn) -> str | None:
    return bounded_name(turn.salt) if turn.salt else None
