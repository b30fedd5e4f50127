"""The end of a turn: where its KV waits, decided and done (a request's life, step 7)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvtier.backend import TierBackend, TierState
from kvtier.costs.pinned_turn import PinnedTurn
from kvtier.gpu_pin import Pin, ReleaseCause
from kvtier.policy import Policy, describe_costs
from kvtier.policy_facts import PauseFacts
from kvtier.ttl.holding import HoldReason
from kvtier.turns.pin_terms import tenant_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.block_ids import BlockIds
    from kvtier.chunk_keys import ChunkChain
    from kvtier.cost_model import Decision
    from kvtier.gpu_pin import PinTable
    from kvtier.stats import Stats
    from kvtier.tools.detection import ToolCall
    from kvtier.ttl.announcements import Announcement
    from kvtier.turns.block_pool import VllmBlockPool
    from kvtier.turns.decision_log import DecisionLog
    from kvtier.turns.engine_facts import EngineFacts
    from kvtier.turns.happenings import Happenings
    from kvtier.turns.pin_charges import PinCharges
    from kvtier.turns.staging import Stager
    from kvtier.turns.turn import Turn


@dataclass(frozen=True, slots=True)
class Load:
    """What the engine has to do at a pause.

    Attributes:
        waiting_requests: Requests that wait for their blocks.
        waiting_tokens: Their tokens.
        running_requests: Requests in the last step.
        load_backlog_tokens: Tokens of loads under way.
    """

    waiting_requests: int
    waiting_tokens: int
    running_requests: int
    load_backlog_tokens: int


DISPLACE_MARGIN = 1.25
"""Within the budget a pin yields only to one worth this much more per block: no thrash."""


class Pauses:
    """Decides for each finished turn and applies the decision."""

    def __init__(
        self,
        facts: EngineFacts,
        tier: TierBackend,
        pool: VllmBlockPool,
        pins: PinTable,
        stager: Stager,
        policy: Policy,
        stats: Stats,
        log: DecisionLog,
        release: Callable[[str, ReleaseCause], None],
        happenings: Happenings,
        charges: PinCharges,
        clock: Callable[[], float],
    ) -> None:
        self._facts = facts
        self._tier = tier
        self._pool = pool
        self._pins = pins
        self._stager = stager
        self._policy = policy
        self._stats = stats
        self._log = log
        self._release = release
        self._happenings = happenings
        self._charges = charges
        self._clock = clock

    def regret_s_per_block(self, pin: Pin, now_s: float) -> float:
        """Expected loss of ending a pin now; little where the tier has confirmed its KV."""
        data = pin.data
        staged = False
        if isinstance(data, PinnedTurn) and data.staged_tokens:
            confirmed = self._stager.copies.confirmed_chunks(data.strand) * self._facts.chunk_tokens
            staged = data.staged_tokens <= confirmed
        return self._policy.ttl.regret_s_per_block(pin, now_s, staged=staged)

    def decide(
        self,
        turn: Turn,
        call: ToolCall,
        blocks: BlockIds,
        chain: ChunkChain | None,
        *,
        now_s: float,
        aborted: bool,
        shadow: bool,
        load: Load,
    ) -> dict[str, Any] | None:
        """Pin, stage or drop; returns what the client may see of it.

        Args:
            turn: The finished turn.
            call: Whether and what tool it called.
            blocks: The turn's reusable blocks, still referenced by the request.
            chain: Chunk keys of their tokens; None when the KV may not leave the GPU.
            now_s: Monotonic time.
            aborted: The client went away: nothing is kept on purpose.
            shadow: Decide and log only.
            load: What else the engine has to do.
        """
        hints = turn.hints
        staged = 0
        if chain is not None:
            staged = self._stager.copies.chunks_of(turn.program, chain) * self._facts.chunk_tokens
        announced = self._policy.ttl.announcements.of(turn.program, turn.request_id)
        curve = announced.curve if announced is not None else None
        if call.kind == "tool" and curve is None:
            turn.return_share = self._policy.ttl.return_share(turn.index + 1, now_s)
            if not aborted:
                self._policy.ttl.observe_pause(turn.program, turn.request_id, turn.index + 1, now_s)
        expected_s = (curve or self._policy.ttl.away(call.tool)).quantile(0.5)
        displaceable = self._pins.to_end_for(
            blocks,
            lambda: self._pins.in_release_order(
                lambda pin: self.regret_s_per_block(pin, now_s), now_s
            ),
        )
        facts = self._pause_facts(
            turn.program,
            call.tool,
            tenant=turn.request.cache_salt,
            load=load,
            now_s=now_s,
            context_tokens=turn.request.num_tokens,
            reusable_blocks=len(blocks),
            prompt_tokens=turn.request.num_prompt_tokens,
            is_tool_call=call.kind == "tool",
            staged_tokens=staged,
            tier_available=hints.stage is not False,
            tierable=chain is not None,
            budget_left_blocks=self._budget_left(blocks) if displaceable is None else len(blocks),
            hint_ttl_s=hints.ttl_s,
            announced=curve,
            return_share=turn.return_share,
        )
        decision = self._policy.decide_pause(facts)
        pin = decision.action == "pin" and hints.pin is not False and not aborted
        stage = decision.stage and chain is not None and not aborted
        self._stats.count("decisions", 1, "pause", decision.action, str(decision.reason))
        pinned_blocks, staging = 0, False
        if not shadow:
            # A client that uses ids again: a prefetch may have pinned, or a command staged, the last bearer's turn.
            if turn.request_id in self._pins:
                self._release(turn.request_id, ReleaseCause.SUPERSEDED)
            self._stager.cancel(turn.request_id)
            if pin:
                strand = self._strand(turn, chain, stage=stage)
                pinned_blocks = self._pin(
                    turn, call, decision, blocks, (strand, chain), expected_s, displaceable, now_s
                )
            if stage and chain is not None:
                # After the pin, whose references staging can share.
                staging = self._stage(turn, call, decision, blocks, chain)
        if self._log.enabled:
            self._write(turn, call, decision, staged, pinned_blocks, staging=staging, since_s=now_s)
        if shadow:
            return None
        done = "pin" if pinned_blocks else "offload" if staging or staged else "drop"
        return {
            "action": done,
            "ttl_s": round(decision.ttl_s, 3) if pinned_blocks else 0.0,
            "pinned_blocks": pinned_blocks,
            "staging": staging,
            "reason": str(decision.reason),
            "tool": call.tool,
        }

    def reconsider(
        self, pin: Pin, announcement: Announcement, load: Load, now_s: float
    ) -> Decision | None:
        """Decide anew about a pin whose program has said how long it stays away.

        Returns:
            The decision, for `pinned or not and for how long`, from the announcement on; None where nothing is
            known of the turn.
        """
        data = pin.data
        if not isinstance(data, PinnedTurn):
            return None
        confirmed = self._stager.copies.confirmed_chunks(data.strand) * self._facts.chunk_tokens
        decision = self._policy.decide_pause(
            self._pause_facts(
                pin.program,
                announcement.tool,
                tenant=data.tenant,
                load=load,
                now_s=now_s,
                context_tokens=data.n_tokens,
                reusable_blocks=len(pin.block_ids),
                prompt_tokens=data.prompt_blocks * self._facts.block_tokens,
                is_tool_call=True,
                staged_tokens=min(confirmed, data.n_tokens),
                tier_available=True,
                mine=pin,
                tierable=bool(data.strand),
                budget_left_blocks=len(pin.block_ids),
                hint_ttl_s=None,
                announced=announcement.curve,
                return_share=data.return_share,
            )
        )
        if data.asked_until_s > now_s:
            # A client has asked for this very time, and the announcement does not undo that.
            decision = replace(
                decision,
                action="pin",
                ttl_s=pin.deadline_s - announcement.at_s,
                reason=HoldReason.OVERRIDE_FIXED,
            )
        if self._log.enabled:
            entry = _entry(decision, announcement.tool) | {"announced": True}
            self._log.write("pause", pin.program, pin.key, entry)
        return decision

    def _pause_facts(
        self,
        program: str,
        tool: str | None,
        *,
        tenant: str | None,
        load: Load,
        now_s: float,
        reusable_blocks: int,
        tier_available: bool,
        mine: Pin | None = None,
        **rest: Any,
    ) -> PauseFacts:
        """The engine at this moment, and `rest` of what `PauseFacts` asks for; `mine` is the pin that is there."""
        ttl, salt = self._policy.ttl, tenant_of(tenant)
        limit_s = self._charges.limit_s(salt, reusable_blocks, now_s, mine)
        return PauseFacts(
            now_s=now_s,
            tool=tool,
            reusable_blocks=reusable_blocks,
            tier_available=tier_available and self._tier.state is TierState.READY,
            free_unhashed_blocks=self._pool.n_uncached_free(reusable_blocks + 1),
            free_blocks=self._pool.n_free,
            total_blocks=self._pool.n_blocks,
            pinned_blocks=self._pins.pinned_blocks,
            waiting_requests=load.waiting_requests,
            waiting_blocks=self._facts.blocks_of(load.waiting_tokens),
            waiting_tokens=load.waiting_tokens,
            running_requests=load.running_requests,
            load_backlog_tokens=load.load_backlog_tokens,
            override=ttl.overrides.bound(now_s, program=program, tool=tool, tenant=salt),
            ttl_limit_s=limit_s,
            **rest,
        )

    def _pin(
        self,
        turn: Turn,
        call: ToolCall,
        decision: Decision,
        blocks: BlockIds,
        copy: tuple[str, ChunkChain | None],
        expected_s: float,
        displaceable: list[Pin] | None,
        now_s: float,
    ) -> int:
        """Pin what the decision keeps; returns how many blocks, 0 where the budget has no place."""
        keep = blocks[: self._facts.blocks_of(decision.keep_tokens)]
        data = self._pinned_turn(turn, call, len(keep), copy, expected_s, decision)
        mine = Pin(turn.request_id, turn.program, keep, now_s, now_s + decision.ttl_s, data)
        if displaceable and self._worth_displacing(mine, displaceable, now_s):
            for other in displaceable:
                self._release(other.key, ReleaseCause.BUDGET)
        if not self._pins.pin(
            turn.request_id,
            turn.program,
            keep,
            now_s=now_s,
            ttl_s=decision.ttl_s,
            data=data,
            owner=turn.request_id,
        ):
            return 0
        self._stats.sample("ttl_seconds", decision.ttl_s)
        self._charges.begins(mine)
        self._happenings.pinned(mine)
        return len(keep)

    def _strand(self, turn: Turn, chain: ChunkChain | None, *, stage: bool) -> str:
        """The conversation's name in the tier, as staging it will name it."""
        if chain is None:
            return ""
        strands = self._stager.copies.strands
        return (strands.take if stage else strands.find)(turn.program, chain)

    def _pinned_turn(
        self,
        turn: Turn,
        call: ToolCall,
        n_blocks: int,
        copy: tuple[str, ChunkChain | None],
        expected_s: float,
        decision: Decision,
    ) -> PinnedTurn:
        block_tokens = self._facts.block_tokens
        terms = decision.terms
        announced = self._policy.ttl.announcements.of(turn.program, turn.request_id)
        return PinnedTurn(
            tool=call.tool,
            n_tokens=n_blocks * block_tokens,
            prompt_blocks=min(n_blocks, turn.request.num_prompt_tokens // block_tokens),
            predicted_gap_s=expected_s,
            staged_tokens=decision.stage_tokens,
            strand=copy[0],
            chain=copy[1],
            miss_unstaged_s=terms.miss_unstaged_s if terms is not None else 0.0,
            miss_staged_s=terms.miss_staged_s if terms is not None else 0.0,
            tenant=tenant_of(turn.request.cache_salt),
            return_share=turn.return_share,
            announced=announced.curve if announced is not None else None,
            announced_s=announced.at_s if announced is not None else 0.0,
        )

    def _budget_left(self, blocks: BlockIds) -> int:
        """How many of these blocks could be pinned: those that pins keep already cost nothing."""
        left = self._pins.budget_blocks - self._pins.pinned_blocks
        return left + len(blocks) - self._pins.new_blocks(blocks)

    def _worth_displacing(self, mine: Pin, displaced: list[Pin], now_s: float) -> bool:
        limit = self.regret_s_per_block(mine, now_s) / DISPLACE_MARGIN
        return all(self.regret_s_per_block(pin, now_s) < limit for pin in displaced)

    def _stage(
        self,
        turn: Turn,
        call: ToolCall,
        decision: Decision,
        blocks: BlockIds,
        chain: ChunkChain,
    ) -> bool:
        """Begin to copy; False where the tier has it all."""
        saved_s = 0.0
        if decision.terms is not None:
            saved_s = self._policy.staged_value_s(call.tool, decision.stage_tokens)
            saved_s *= turn.return_share
        return self._stager.start(
            turn.request_id,
            turn.program,
            chain.head(decision.stage_tokens // self._facts.chunk_tokens),
            blocks,
            saved_s,
            self._policy.lease_s(call.tool),
            owner=turn.request_id,
        )

    def _write(
        self,
        turn: Turn,
        call: ToolCall,
        decision: Decision,
        staged_tokens: int,
        pinned_blocks: int,
        *,
        staging: bool,
        since_s: float,
    ) -> None:
        """Log what was decided (`action`, `ttl_s`), next to what was done: in shadow mode, nothing."""
        entry = _entry(decision, call.tool) | {
            "stage": staging,
            "pinned": pinned_blocks > 0,
            "staged_tokens": staged_tokens,
            "return_share": round(turn.return_share, 3),
            "decision_us": round((self._clock() - since_s) * 1e6, 1),
        }
        self._log.write("pause", turn.program, turn.request_id, entry)


def _entry(decision: Decision, tool: str | None) -> dict[str, Any]:
    """What the log says of every decision."""
    return {
        "action": decision.action,
        "ttl_s": decision.ttl_s,
        "reason": str(decision.reason),
        "stage": decision.stage,
        "stage_reason": str(decision.stage_reason),
        "tool": tool,
        "keep_tokens": decision.keep_tokens,
        "costs": describe_costs(decision.costs),
    }
