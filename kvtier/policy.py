"""The measured state of one engine and the decisions made from it.

Holds the estimators (link both ways, prefill, queue, generation) and the `TtlController`, feeds them with
what the engine observes, and asks `cost_model`. Deterministic: no clock, no randomness.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvtier.cost_model import (
    Decision,
    HoldReason,
    MemoryState,
    PauseState,
    ReturnReason,
    ReturnState,
    decide_pause,
    decide_return,
)
from kvtier.costs.estimators import (
    GenerationEstimator,
    PrefillEstimator,
    PrefillModel,
    QueueEstimator,
    Thinning,
)
from kvtier.costs.link_model import LinkEstimator, LinkModel
from kvtier.policy_facts import ReturnChoice
from kvtier.ttl_controller import TtlController

if TYPE_CHECKING:
    from kvtier.orders import Calibration, OrderResult
    from kvtier.policy_facts import PauseFacts, PolicyConfig
    from kvtier.turns.engine_facts import EngineFacts, StepFacts

COLD_CPU_FLOPS = 1e11
COLD_GPU_FLOPS = 3e14
COLD_LINK = LinkModel(2e-4, ((4096, 1.5e9), (65536, 4e9), (1 << 20, 8e9)))
"""Before anything was measured: below a modern CPU's memory bandwidth and PCIe 4, so that the first
decisions do not rely on a link that may not be there."""

CPU_INTERFERENCE = 0.3
"""Where copies share cores with compute, a second of copying costs each running request this much."""

SURPRISE_RATIO = 1.3
VALUE_SCALE_S = 30.0
_GAP_QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
PROBE_EVERY = 16
"""Returns in a row for which a load seemed too slow, after which one is tried all the same: a link that
is never used is never measured again."""
PROBE_RATIO = 4.0
"""... where it is expected to take at most so many times as long as computing."""


class Policy:
    """See the module's docstring."""

    def __init__(self, facts: EngineFacts, config: PolicyConfig) -> None:
        self.facts = facts
        self.config = config
        self.ttl = TtlController(fixed_ttl_s=config.fixed_ttl_s)
        self.store_link = LinkEstimator(COLD_LINK)
        self.load_link = LinkEstimator(COLD_LINK)
        # Ranks on a CPU share its cores.
        flops = COLD_CPU_FLOPS if facts.on_cpu else facts.ranks * COLD_GPU_FLOPS
        self.prefill = PrefillEstimator(
            PrefillModel.from_flops(
                facts.n_parameters, facts.n_layers, facts.attention_width, flops
            )
        )
        self.queue = QueueEstimator()
        self.generation = GenerationEstimator()
        self._interference = CPU_INTERFERENCE if facts.on_cpu else 0.0
        self.run_bytes = max(1, facts.block_bytes // max(1, facts.n_layers))
        # Steps are many and alike.
        self._decode_steps = Thinning(every=16)
        self._prefill_steps = Thinning(every=4)
        self._running_requests = 0
        self._returns_without_load = 0
        self.profile_path = ""
        self.calibrated_s: float | None = None
        """When the link was measured, Unix time; None: it was not."""
        self.prefill_samples: deque[tuple[int, int, float]] = deque(maxlen=64)

    def seed_from(self, calibration: Calibration) -> None:
        """Start from measured speeds instead of cold guesses."""
        # One rank was measured; all copy at once, each over its own link.
        self.store_link = LinkEstimator(_times(self.facts.ranks, LinkModel(*calibration.store)))
        self.load_link = LinkEstimator(_times(self.facts.ranks, LinkModel(*calibration.load)))
        self.profile_path = calibration.profile_path
        self.calibrated_s = calibration.measured_s
        if calibration.prefill:
            self.prefill = PrefillEstimator.from_samples(self.prefill.model(), calibration.prefill)

    # -- observations ------------------------------------------------------------------------------

    def observe_copy(self, result: OrderResult) -> None:
        """A copy took this long."""
        link = self.store_link if result.direction == "store" else self.load_link
        if result.direction == "load":
            self._returns_without_load = 0
        link.observe(result.n_bytes, result.run_bytes, result.seconds)
        if result.run_bytes > 0:
            self.run_bytes = result.run_bytes

    def observe_step(self, step: StepFacts, seconds: float) -> None:
        """A step took this long."""
        self._running_requests = step.running_requests
        if step.scheduled_tokens <= 0 or seconds <= 0:
            return
        if step.scheduled_tokens == step.running_requests:
            if self._decode_steps.takes():
                self.queue.observe_step(step.scheduled_tokens, seconds)
                self.generation.observe_step(step.scheduled_tokens, seconds)
            return
        self.queue.observe_step(step.scheduled_tokens, seconds)
        if step.prefill is None:
            return
        ratio = seconds / max(1e-9, self.prefill.model().seconds(*step.prefill))
        # What surprises is never left out: the model must follow at once.
        if self._prefill_steps.takes() or not 1 / SURPRISE_RATIO < ratio < SURPRISE_RATIO:
            self.prefill.observe(*step.prefill, seconds)
            self.prefill_samples.append((*step.prefill, seconds))

    def observe_output(self, tokens: int) -> None:
        """A turn has ended with an output of so many tokens."""
        self.generation.observe_turn(tokens)

    def observe_return(self, reason: str) -> None:
        """A return was decided for this reason."""
        self._returns_without_load += reason == ReturnReason.RECOMPUTE_CHEAPER

    def observe_wait(self, predicted_s: float, actual_s: float) -> None:
        """A request waited `actual_s` for its blocks."""
        self.queue.observe_wait(predicted_s, actual_s)

    # -- decisions ---------------------------------------------------------------------------------

    def queue_delay_s(self, backlog_tokens: int) -> float:
        """Predicted wait behind `backlog_tokens`."""
        return self.queue.delay_s(backlog_tokens)

    def round_s(self, n_programs: int, blocks: int) -> float:
        """Seconds that a turn would wait if nothing were kept: each other program is served one turn.

        Args:
            n_programs: Programs, the waiting one included.
            blocks: Of all their contexts, which are taken to be equally long.
        """
        if n_programs <= 1:
            return 0.0
        tokens = blocks * self.facts.block_tokens // n_programs
        prefill_s = self.prefill.model().seconds(0, tokens)
        return (n_programs - 1) * (prefill_s + self.generation.turn_s())

    def lease_s(self, tool: str | None) -> float:
        """For how long KV staged after such a turn keeps its value."""
        return self.ttl.lease_s(tool, self.config.lease_s)

    def staged_value_s(self, tool: str | None, tokens: int) -> float:
        """What staged KV is worth to the tier: seconds saved, the less the longer it lies there before.

        So KV whose program returns in a moment keeps out what may be of use in an hour, or never. The
        discount is ``1 / (1 + gap / VALUE_SCALE_S)``, expected over the gap by some of its quantiles.
        """
        away = self.ttl.learnt(tool)
        discounts = (1.0 / (1.0 + away.quantile(q) / VALUE_SCALE_S) for q in _GAP_QUANTILES)
        saved_s = max(0.0, self.prefill.model().seconds(0, tokens))
        return saved_s * sum(discounts) / len(_GAP_QUANTILES)

    def decide_return(
        self,
        prompt_tokens: int,
        local_tokens: int,
        tier_tokens: int,
        *,
        backlog_tokens: int,
        waiting_requests: int,
    ) -> tuple[ReturnChoice, dict[str, Any]]:
        """How much to reload of what the tier holds; and the entry for the decision log.

        Args:
            prompt_tokens: Of the returning request.
            local_tokens: Those of them that GPU memory holds.
            tier_tokens: Those that the tier holds, from the first one on too.
            backlog_tokens: Of loads under way.
            waiting_requests: Others that wait.
        """
        state = self._return_state(
            prompt_tokens, local_tokens, tier_tokens, backlog_tokens, waiting_requests
        )
        chunk = self.facts.chunk_tokens
        forced = self._forced_reload(tier_tokens)
        if forced is None:
            decision = decide_return(state)
            source, tokens, reason = decision.source, decision.reload_tokens, str(decision.reason)
            costs = dict(decision.costs)
            if decision.reason is ReturnReason.RECOMPUTE_CHEAPER and self._is_worth_a_probe(costs):
                source, tokens, reason = "reload", tier_tokens // chunk * chunk, PROBE_REASON
        else:
            tokens = forced // chunk * chunk
            source = "reload" if tokens > local_tokens else "recompute"
            reason, costs = FORCED_REASON, {}
        link_s = 0.0
        if tokens > local_tokens:
            n_bytes = int((tokens - local_tokens) * self.facts.kv_bytes_per_token)
            link_s = self.load_link.model().seconds(n_bytes, self.run_bytes)
        else:
            tokens = 0
        entry = {
            "action": source,
            "reason": reason,
            "reload_tokens": tokens,
            "gpu_tokens": local_tokens,
            "tier_tokens": tier_tokens,
            "prompt_tokens": prompt_tokens,
            "costs": costs,
        }
        return ReturnChoice(source, tokens, reason, link_s), entry

    def decide_pause(self, pause: PauseFacts) -> Decision:
        """Where the KV of a finished turn waits."""
        facts = self.facts
        reusable_tokens = pause.reusable_blocks * facts.block_tokens
        state = PauseState(
            now_s=pause.now_s,
            context_tokens=pause.context_tokens,
            reusable_tokens=reusable_tokens,
            kv_bytes=pause.reusable_blocks * facts.block_bytes * facts.ranks,
            n_blocks=pause.reusable_blocks,
            block_tokens=facts.block_tokens,
            chunk_tokens=facts.chunk_tokens,
            tool=pause.tool,
            is_tool_call=pause.is_tool_call,
            staged_tokens=pause.staged_tokens,
            tier_available=pause.tier_available and pause.tierable and self.config.stage,
            # The server makes room by value and refuses what is worth less than all it holds.
            tier_free_bytes=1 << 62,
            store_link=self.store_link.model(),
            load_link=self.load_link.model(),
            load_backlog_bytes=int(pause.load_backlog_tokens * facts.kv_bytes_per_token),
            run_bytes=self.run_bytes,
            prefill=self.prefill.model(),
            memory=self._memory(pause),
            running_requests=pause.running_requests,
            pin_budget_blocks_left=pause.budget_left_blocks,
            output_tokens=max(0, reusable_tokens - pause.prompt_tokens),
            output_reuse=self.ttl.output_reuse,
            ttl_bound=self.ttl.bound(pause.hint_ttl_s, pause.override),
            max_ttl_s=min(self.config.max_ttl_s, pause.ttl_limit_s),
            pin_break_probability=self.ttl.pin_break_probability,
            # A lease that has ended only lets others come first: where there is room, KV stays.
            tier_retention_s=self.config.lease_s,
            store_interference=max(0.01, self._interference),
            load_interference=self._interference,
        )
        away = pause.announced or self.ttl.away(pause.tool).thinned(pause.return_share)
        decision = decide_pause(state, away)
        if pause.ttl_limit_s < self.config.max_ttl_s and decision.ttl_s >= pause.ttl_limit_s:
            return replace(decision, reason=HoldReason.TENANT_BUDGET)
        return decision

    # -- internals ---------------------------------------------------------------------------------

    def _is_worth_a_probe(self, costs: dict[str, float]) -> bool:
        return (
            self._returns_without_load >= PROBE_EVERY
            and costs["reload_all"] <= PROBE_RATIO * costs["recompute"]
        )

    def _return_state(
        self,
        prompt_tokens: int,
        local_tokens: int,
        tier_tokens: int,
        backlog_tokens: int,
        waiting_requests: int,
    ) -> ReturnState:
        return ReturnState(
            prompt_tokens=prompt_tokens,
            gpu_hit_tokens=local_tokens,
            tier_hit_tokens=tier_tokens,
            chunk_tokens=self.facts.chunk_tokens,
            kv_bytes_per_token=self.facts.kv_bytes_per_token,
            link=self.load_link.model(),
            run_bytes=self.run_bytes,
            prefill=self.prefill.model(),
            backlog_bytes=int(backlog_tokens * self.facts.kv_bytes_per_token),
            delayed_requests=self._running_requests + waiting_requests,
            load_interference=self._interference,
        )

    def _memory(self, pause: PauseFacts) -> MemoryState:
        cached_s = 0.0
        if pause.reusable_blocks:
            tokens = pause.reusable_blocks * self.facts.block_tokens
            staged = tokens // self.facts.chunk_tokens * self.facts.chunk_tokens
            tier = staged if pause.tier_available else 0
            cached_s = decide_return(
                self._return_state(tokens + 1, 0, tier, 0, pause.waiting_requests)
            ).cost_s
            cached_s /= pause.reusable_blocks
        return MemoryState(
            free_unhashed_blocks=pause.free_unhashed_blocks,
            free_cached_blocks=max(0, pause.free_blocks - pause.free_unhashed_blocks),
            total_blocks=pause.total_blocks,
            pinned_blocks=pause.pinned_blocks,
            waiting_requests=pause.waiting_requests,
            waiting_blocks=pause.waiting_blocks,
            waiting_tokens=pause.waiting_tokens,
            throughput_tokens_per_s=self.queue.throughput_tokens_per_s,
            queue_correction=self.queue.correction,
            cached_reload_s_per_block=cached_s,
        )

    def _forced_reload(self, tier_tokens: int) -> int | None:
        match self.config.reload:
            case "always":
                return tier_tokens
            case "never":
                return 0
            case "first_k":
                return min(tier_tokens, self.config.reload_first_chunks * self.facts.chunk_tokens)
            case _:
                return None


def _times(ranks: int, link: LinkModel) -> LinkModel:
    return LinkModel(link.latency_s, tuple((run, ranks * rate) for run, rate in link.points))


def describe_costs(costs: tuple[tuple[str, float], ...]) -> dict[str, float]:
    """Costs for the decision log, finite numbers only."""
    return {name: round(seconds, 6) for name, seconds in costs if abs(seconds) < float("inf")}


FORCED_REASON = "configured"
PROBE_REASON = "link_probe"
RETURN_REASONS = frozenset({*(str(r) for r in ReturnReason), FORCED_REASON, PROBE_REASON})
"""The closed set of reasons of a return decision: label values of `decisions`."""
