"""What commands do to the KV of a paused program: keep it, give it up, stage it, bring it back."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from kvtier.backend import TierBackend, TierState
from kvtier.costs.pinned_turn import PinnedTurn
from kvtier.gpu_pin import ReleaseCause
from kvtier.turns.live_mode import LiveMode, Mode
from kvtier.turns.prefetching.plan import Wish

if TYPE_CHECKING:
    from kvtier import link_messages as messages
    from kvtier.gpu_pin import Pin, PinTable
    from kvtier.policy import Policy
    from kvtier.turns.endings import Endings
    from kvtier.turns.engine_facts import EngineFacts
    from kvtier.turns.happenings import Happenings
    from kvtier.turns.pin_charges import PinCharges
    from kvtier.turns.pin_terms import Granted, PinTerms
    from kvtier.turns.prefetch import Prefetcher
    from kvtier.turns.staging import Stager

RETURN_GRACE_S: Final = 60.0
"""A program whose tool has returned is waited for at least so long."""


class Result(NamedTuple):
    """What became of a command."""

    outcome: messages.Outcome
    reason: str
    detail: str = ""


NO_KV: Final = Result("missing", "no_kv", "no KV of the program is known in GPU memory or CPU tier")


class PauseCommands:
    """See the module's docstring. Programs are handles, and none of their turns is under way."""

    def __init__(
        self,
        facts: EngineFacts,
        tier: TierBackend,
        pins: PinTable,
        stager: Stager,
        prefetcher: Prefetcher,
        policy: Policy,
        endings: Endings,
        happenings: Happenings,
        mode: LiveMode,
        charges: PinCharges,
        terms: PinTerms,
    ) -> None:
        self._facts = facts
        self._tier = tier
        self._pins = pins
        self._stager = stager
        self._prefetcher = prefetcher
        self._policy = policy
        self._endings = endings
        self._happenings = happenings
        self._mode = mode
        self._charges = charges
        self._terms = terms

    def pin(self, program: str, ttl_s: float, now_s: float) -> Result:
        """Keep it for so long from now on, and bring it back where it is not there."""
        if self._mode.mode is not Mode.ON:
            return self._not_on()
        pins = self._pins.of_program(program)
        if not pins:
            return self._load(program, now_s, Wish(ttl_s, is_explicit=True))
        given = [granted for pin in pins if (granted := self._repin(pin, ttl_s, now_s)).ttl_s > 0]
        if not given:
            return Result("rejected", "ttl", "an override, a setting or a budget forbids it")
        least = min(given)
        told = f"{self._tokens(pins)} tokens for {least.ttl_s:.4g} s from now"
        if least.limit:
            return Result("clipped", least.limit, told)
        return Result("accepted", "pinned", told)

    def release(self, program: str) -> Result:
        """Give it up, and what is being loaded of it."""
        pins = self._pins.of_program(program)
        coming = self._prefetcher.release(program)
        if not pins and coming is None:
            return Result("missing", "no_pin", "no KV of the program is pinned")
        blocks = sum(len(pin.block_ids) for pin in pins)
        copied = any(self._pins.is_all_held(pin) for pin in pins)
        self._endings.note(*self._pins.unpin_program(program, ReleaseCause.COMMAND))
        told = f"{blocks} blocks"
        if coming is not None:
            told = f"the prefetch is stopped; {told}, and {coming} blocks when their copy has ended"
        if copied:
            return Result("clipped", "staging", f"{told} are free when their copy has ended")
        return (
            Result("clipped", "loading", told) if coming else Result("accepted", "released", told)
        )

    def stage(self, program: str, tool: str | None) -> Result:
        """Copy it to the CPU tier, where it is pinned and not there yet."""
        if self._mode.mode is not Mode.ON:
            return self._not_on()
        if self._tier.state is not TierState.READY:
            return Result("rejected", "no_tier", f"the CPU tier is {self._tier.state}")
        staged = self._staged_tokens(program)
        known = Result("accepted", "staged", f"{staged} tokens are in the CPU tier already")
        pins = self._pins.of_program(program)
        if not pins:
            return known if staged else NO_KV
        begun = 0
        for pin in pins:
            begun += self.stage_pin(pin, tool)
        return Result("accepted", "staging", f"{begun} tokens") if begun else known

    def stage_pin(self, pin: Pin, tool: str | None) -> int:
        """Begin to copy what a pin keeps; returns how many tokens, 0 where the tier has them all."""
        data = pin.data
        if not isinstance(data, PinnedTurn) or data.chain is None:
            return 0
        chain = data.chain.head(
            min(len(pin.block_ids) // self._facts.chunk_blocks, len(data.chain))
        )
        tokens = len(chain) * self._facts.chunk_tokens
        staged = self._stager.copies.chunks_of(pin.program, chain) * self._facts.chunk_tokens
        share = data.return_share if data.announced is None else 1.0
        value_s = self._policy.staged_value_s(tool, tokens) * share
        lease_s = self._policy.lease_s(tool)
        if self._stager.is_staging(pin.key) or not self._stager.start(
            pin.key, pin.program, chain, pin.block_ids, value_s, lease_s
        ):
            return 0
        pin.data = replace(
            data, strand=self._stager.copies.strands.find(pin.program, chain), staged_tokens=tokens
        )
        return tokens - staged

    def prefetch(self, program: str, now_s: float) -> Result:
        """Bring it back."""
        return self._brought_back(program, now_s, Wish())

    def tool_returned(self, program: str, now_s: float) -> Result:
        """The program is about to come back: bring its KV back, and keep what is there until then."""
        for pin in self._pins.of_program(program):
            # It must not end in the last moment.
            until_s = now_s + self._granted(pin, RETURN_GRACE_S, now_s).ttl_s
            if until_s > pin.deadline_s:
                self.set_deadline(pin, until_s)
        return self._brought_back(program, now_s, Wish(RETURN_GRACE_S))

    def set_deadline(self, pin: Pin, deadline_s: float) -> None:
        """Let a pin last until then, and charge its tenant."""
        self._charges.moves(pin, deadline_s)
        self._pins.set_deadline(pin.key, deadline_s)
        self._happenings.pinned(pin)

    # -- internals ---------------------------------------------------------------------------------

    def _not_on(self) -> Result:
        return Result("rejected", "mode", f"kvtier is {self._mode.mode}")

    def _repin(self, pin: Pin, ttl_s: float, now_s: float) -> Granted:
        """Let a pin last for so long from now on, as far as that is granted."""
        granted = self._granted(pin, ttl_s, now_s)
        if granted.ttl_s > 0:
            self.set_deadline(pin, now_s + granted.ttl_s)
            if isinstance(pin.data, PinnedTurn):
                pin.data = replace(pin.data, asked_until_s=pin.deadline_s)
        return granted

    def _granted(self, pin: Pin, asked_s: float, now_s: float) -> Granted:
        """For how long a pin may last from now on."""
        data = pin.data
        tool, tenant = (data.tool, data.tenant) if isinstance(data, PinnedTurn) else (None, None)
        return self._terms.granted(
            pin.program, tool, tenant, asked_s, len(pin.block_ids), now_s, pin
        )

    def _brought_back(self, program: str, now_s: float, wish: Wish) -> Result:
        """Load what is not there; what is pinned is there, whatever becomes of the rest."""
        result, pins = self._load(program, now_s, wish), self._pins.of_program(program)
        if not pins or result.outcome not in ("missing", "rejected"):
            return result
        told = f"{self._tokens(pins)} tokens are pinned"
        if result.outcome == "missing" or result.reason == "no_tier":
            return Result("accepted", "in_gpu", told)
        return Result("clipped", result.reason, f"{told}; of the rest: {result.detail}")

    def _load(self, program: str, now_s: float, wish: Wish) -> Result:
        outcome, reason, detail = self._prefetcher.start(program, now_s, wish)
        return Result(_OUTCOMES[outcome], reason, detail)

    def _tokens(self, pins: list[Pin]) -> int:
        return sum(len(pin.block_ids) for pin in pins) * self._facts.block_tokens

    def _staged_tokens(self, program: str) -> int:
        copies = self._stager.copies
        chunks = max(map(copies.confirmed_chunks, copies.strands.names(program)), default=0)
        return chunks * self._facts.chunk_tokens


_OUTCOMES: Final[dict[str, messages.Outcome]] = {
    "accepted": "accepted",
    "clipped": "clipped",
    "rejected": "rejected",
    "missing": "missing",
}
