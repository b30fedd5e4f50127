"""A small engine around the scheduler half: schedules, computes and copies symbolic KV.

Follows vLLM's scheduler where kvtier can tell the difference: the order of the hooks, blocks that
stay a request's own until its load has ended, preemption, recompute after a failed load. Whatever
is computed on is checked: a block must hold what the request's tokens say.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kvtier.admission import AdmissionConfig, AdmissionController
from kvtier.orders import Calibration, Order, OrderResult, StepOrders
from kvtier.policy import Policy
from kvtier.policy_facts import PolicyConfig
from kvtier.programs import ProgramLimits, ProgramTable
from kvtier.scheduler_half import SchedulerHalf
from kvtier.stats import Stats
from kvtier.tools.detection import ToolCallDetector
from kvtier.turns.block_pool import VllmBlockPool, wrap_allocation
from kvtier.turns.decision_log import DecisionLog
from kvtier.turns.engine_facts import StepFacts
from kvtier.turns.live_mode import LiveMode, Mode
from kvtier.turns.recorder import TurnRecorder
from kvtier.wire import KEY_BYTES
from tests.unit.fake_vllm import BLOCK_TOKENS, FakePool, FakeRequest, content_of, engine_facts
from tests.unit.virtual_tier import VirtualTier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kvtier.backend import TierBackend

STEP_S = 0.01


@dataclass(slots=True)
class Report:
    """What the workers send at a step's end."""

    results: list[OrderResult]
    calibration: Calibration | None = None
    step_id: int = 0


@dataclass(slots=True, eq=False)
class Entry:
    """A request in the engine. `state`: waiting, loading, running; an aborted load keeps blocks."""

    request: FakeRequest
    state: str = "waiting"
    blocks: list[int] = field(default_factory=list)
    cached_blocks: int = 0
    gone: bool = False


class Workers:
    """Executes copy orders on block contents and slots; late and failing when told to.

    Attributes:
        delay: Steps from an order to its end.
        ok: Asked at the end of each order.
        spoils: Loads that fail have brought something else than was stored.
    """

    def __init__(self, pool: FakePool, ranks: int) -> None:
        self._pool = pool
        self._ranks = ranks
        self._slots: dict[tuple[str, int, int], list[object]] = {}
        self._running: list[tuple[int, Order]] = []
        self._generation = ""
        self.delay = 0
        self.ok: Callable[[Order], bool] = lambda _: True
        self.spoils = False
        self.orders: list[Order] = []
        self.cancelled: list[int] = []

    @property
    def idle(self) -> bool:
        return not self._running

    def submit(self, step: StepOrders, now_s: float) -> None:
        if step.region is not None:
            self._generation = step.region.generation
        for order in (*step.loads, *step.stores):
            assert now_s < order.deadline_s
            assert all(
                len(rank) * order.chunk_blocks == len(order.block_ids) for rank in order.slots
            )
            self.orders.append(order)
            self._running.append((self.delay, order))
        self.cancelled += step.cancels
        self._running = [
            (0 if order.order_id in step.cancels else delay, order)
            for delay, order in self._running
        ]

    def collect(self) -> tuple[list[OrderResult], list[tuple[Order, bool]]]:
        """Results of all ranks, and the loads that ended."""
        due = [order for delay, order in self._running if delay <= 0]
        self._running = [(delay - 1, order) for delay, order in self._running if delay > 0]
        results, loads = [], []
        for order in due:
            ok = order.generation == self._generation and self.ok(order)
            ok = ok and order.order_id not in self.cancelled
            for rank in range(self._ranks):
                if ok:
                    self._copy(order, rank)
                result = OrderResult(order.order_id, order.direction, ok, 1000, 1e-4, 1000)
                if self.spoils and not ok and order.direction == "load":
                    result = replace(result, spoilt_key=order.keys[:KEY_BYTES])
                results.append(result)
            if order.direction == "load":
                loads.append((order, ok))
        return results, loads

    def _copy(self, order: Order, rank: int) -> None:
        for i, slot in enumerate(order.slots[rank]):
            first = i * order.chunk_blocks
            blocks = [
                self._pool.blocks[b] for b in order.block_ids[first : first + order.chunk_blocks]
            ]
            key = (order.generation, rank, slot)
            if order.direction == "store":
                if slot >= 0:
                    self._slots[key] = [block.content for block in blocks]
                continue
            for j, (block, content) in enumerate(zip(blocks, self._slots[key], strict=True)):
                if first + j >= order.skip_blocks:
                    block.content = content


class MiniEngine:
    """See the module's docstring.

    Attributes:
        weights: Number of weight updates; KV of other weights must not be computed on.
        told: What kvtier told the client of each finished request.
    """

    def __init__(
        self,
        n_blocks: int = 40,
        tier: TierBackend | None = None,
        ranks: int = 1,
        mode: Mode = Mode.ON,
        switch_file: Path | None = None,
        config: PolicyConfig | None = None,
        limits: ProgramLimits | None = None,
        pin_budget_fraction: float = 1.0,
        record_file: Path | None = None,
        link: Any = None,
    ) -> None:
        self.facts = engine_facts(ranks=ranks, pin_budget_fraction=pin_budget_fraction)
        self.tier = tier or VirtualTier(ranks=ranks)
        self.pool = FakePool(n_blocks)
        self.workers = Workers(self.pool, ranks)
        self.now_s = 1000.0
        self.preempted: list[str] = []
        self.weights = 0
        self.waiting: list[Entry] = []
        self.running: list[Entry] = []
        self.loading: dict[str, Entry] = {}
        self.told: dict[str, Any] = {}
        self.stats = Stats()
        self.half = SchedulerHalf(
            self.facts,
            tier=self.tier,
            programs=ProgramTable(limits),
            admission=AdmissionController(AdmissionConfig()),
            policy=Policy(self.facts, config or PolicyConfig()),
            detector=ToolCallDetector(None, lambda _: "", {}),
            stats=self.stats,
            log=DecisionLog(None, link),
            recorder=TurnRecorder(record_file, BLOCK_TOKENS),
            mode=LiveMode(mode, switch_file),
            clock=lambda: self.now_s,
            decode=lambda ids: "".join(map(chr, ids)),
            split_chunks=2,
            link=link,
        )
        self.half.bind(VllmBlockPool(self.pool))
        wrap_allocation(self, self.half.make_room, self.half.before_reset, self.half.after_reset)

    # -- what wrap_allocation replaces -------------------------------------------------------------

    def allocate_slots(
        self, request: FakeRequest, n_new: int, cached: Sequence[int] = (), n_free: int = 0
    ) -> Any:
        """New blocks behind the cached ones, all with a reference; None when there are too few.

        `n_free` must be free at least, though not all of them are taken now.
        """
        hit = [self.pool.blocks[b] for b in cached]
        if max(n_new, n_free) > self.pool.get_num_free_blocks() - sum(b.ref_cnt == 0 for b in hit):
            return None
        self.pool.touch(hit)
        taken = self.pool.take(n_new)
        assert taken is not None
        return [*cached, *(b.block_id for b in taken)]

    def reset_prefix_cache(self) -> bool:
        return self.pool.reset()

    # -- the client's side -------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running or self.loading or self.half.has_work())

    def add(self, request: FakeRequest) -> FakeRequest:
        self.half.on_new_request(request)
        self.waiting.append(Entry(request))
        return request

    def wake(self) -> None:
        """As vLLM's API process does where the engine is idle: no request, but its hooks."""
        request = FakeRequest("wake", [1], kv_transfer_params={"kvtier": {"wake": True}})
        self.half.on_new_request(request)
        self.half.finished(request, [])

    def abort(self, request_id: str) -> None:
        entry = next(e for e in self._entries() if e.request.request_id == request_id)
        self._finish(entry, "FINISHED_ABORTED")

    def run(self, *requests: FakeRequest, max_steps: int = 300) -> MiniEngine:
        """Add requests and step until nothing is left to do."""
        for request in requests:
            self.add(request)
        for _ in range(max_steps):
            if not self.busy and self.workers.idle:
                return self
            self.step()
        states = {e.request.request_id: e.state for e in self._entries()}
        raise AssertionError(f"unfinished: {states}, work {self.half.has_work()}")

    def update_weights(self) -> bool:
        """New weights: running requests are recomputed, both caches are reset."""
        for entry in list(self.running):
            self._preempt(entry)
        if self.loading or not self.reset_prefix_cache():
            return False
        self.half.reset_tier()
        self.weights += 1
        return True

    # -- a step ------------------------------------------------------------------------------------

    def step(self) -> None:
        scheduled = self._schedule()
        tokens = sum(e.request.num_tokens - e.request.num_computed_tokens for e in scheduled)
        orders = self.half.build(StepFacts(tokens, len(scheduled), tuple(self.preempted)))
        self.preempted = []
        self.workers.submit(orders, self.now_s)
        for entry in scheduled:
            self._compute(entry)
        results, loads = self.workers.collect()
        self.now_s += STEP_S
        for order, ok in loads:
            if order.request_id:
                self._loaded(order, ok=ok)
        self.half.on_worker(Report(results, step_id=orders.step_id))
        for entry in scheduled:
            entry.request.output_token_ids.append(7 + len(entry.request.output_token_ids))
            if len(entry.request.output_token_ids) >= entry.request.max_tokens:
                self._finish(entry, "FINISHED_LENGTH_CAPPED")
        # As vLLM does when it asks for the connector's figures.
        self.half.report(self.now_s)

    def _schedule(self) -> list[Entry]:
        scheduled: list[Entry] = []
        preempted = False
        for entry in list(self.running):
            if entry not in self.running:
                continue
            need = -(-entry.request.num_tokens // BLOCK_TOKENS) - len(entry.blocks)
            new = self.allocate_slots(entry.request, need) if need else []
            while new is None:
                victim = self.running[-1]
                self._preempt(victim)
                preempted = True
                if victim in scheduled:
                    scheduled.remove(victim)
                if victim is entry:
                    break
                new = self.allocate_slots(entry.request, need)
            if new is not None:
                entry.blocks += new
                scheduled.append(entry)
        if not preempted:
            self._schedule_waiting(scheduled)
        return scheduled

    def _schedule_waiting(self, scheduled: list[Entry]) -> None:
        for entry in list(self.waiting):
            request = entry.request
            if entry.blocks:
                # Its load has ended: what it needs beyond comes now.
                need = -(-request.num_tokens // BLOCK_TOKENS) - len(entry.blocks)
                new = self.allocate_slots(request, need) if need else []
                if new is None:
                    return
                entry.blocks += new
                external = 0
            else:
                hit = self.pool.find(request.block_hashes)[
                    : (request.num_tokens - 1) // BLOCK_TOKENS
                ]
                local = len(hit) * BLOCK_TOKENS
                matched = self.half.match(request, local)
                if matched is None:
                    continue
                external = matched
                total = local + external if external else request.num_tokens
                assert total <= request.num_tokens
                assert not external or total < request.num_tokens
                # As vLLM: all of the prompt must fit, and what is loaded must leave room for the
                # rest of what was loaded before, or both could wait for each other for ever.
                n_free = -(-request.num_tokens // BLOCK_TOKENS) - len(hit)
                n_free += self._unfinished_loads() if external else 0
                n_new = -(-total // BLOCK_TOKENS) - len(hit)
                blocks = self.allocate_slots(request, n_new, hit, n_free)
                if blocks is None:
                    return
                entry.blocks, entry.cached_blocks = blocks, len(hit)
                request.num_computed_tokens = local + external
            blocks = entry.blocks
            self.half.on_allocated(request, blocks.copy, external)
            self.waiting.remove(entry)
            if external:
                entry.state = "loading"
                request.set_status("WAITING_FOR_REMOTE_KVS")
                self.loading[request.request_id] = entry
            else:
                entry.state = "running"
                request.set_status("RUNNING")
                self.running.append(entry)
                scheduled.append(entry)

    def _unfinished_loads(self) -> int:
        """Blocks that requests with loaded KV still need before they can run."""
        held = [e for e in (*self.waiting, *self.loading.values()) if e.blocks]
        return sum(-(-e.request.num_tokens // BLOCK_TOKENS) - len(e.blocks) for e in held)

    def _compute(self, entry: Entry) -> None:
        request = entry.request
        computed = request.num_computed_tokens // BLOCK_TOKENS
        self._check(entry, computed)
        tokens = request.all_token_ids
        for i in range(computed, len(entry.blocks)):
            self.pool.blocks[entry.blocks[i]].content = self._content(request, tokens, i)
        request.num_computed_tokens = request.num_tokens
        for block, block_hash in zip(entry.blocks, request.block_hashes, strict=False):
            self.pool.cache(block, block_hash)

    def _content(self, request: FakeRequest, tokens: list[int], block: int) -> bytes:
        return content_of(tokens, block, salt=(request.salt, self.weights))

    def _check(self, entry: Entry, n_blocks: int) -> None:
        tokens = entry.request.all_token_ids
        for i in range(n_blocks):
            found = self.pool.blocks[entry.blocks[i]].content
            where = f"block {i} of {entry.request.request_id}"
            assert found == self._content(entry.request, tokens, i), f"{where} holds other KV"

    def _loaded(self, order: Order, *, ok: bool) -> None:
        entry = self.loading.pop(order.request_id)
        request = entry.request
        if entry.gone:
            self._free(entry)
            return
        entry.state = "waiting"
        request.set_status("WAITING")
        self.waiting.insert(0, entry)
        if not ok:
            # From the first bad block on; without any good one the request starts over.
            request.num_computed_tokens = entry.cached_blocks * BLOCK_TOKENS
            if not entry.cached_blocks:
                self._free(entry)
            return
        n_blocks = request.num_computed_tokens // BLOCK_TOKENS
        self._check(entry, n_blocks)
        for block, block_hash in zip(entry.blocks[:n_blocks], request.block_hashes, strict=False):
            self.pool.cache(block, block_hash)

    def _preempt(self, entry: Entry) -> None:
        self.running.remove(entry)
        self._free(entry)
        self.preempted.append(entry.request.request_id)
        entry.request.num_computed_tokens = 0
        entry.request.set_status("PREEMPTED")
        entry.state = "waiting"
        self.waiting.insert(0, entry)

    def _finish(self, entry: Entry, status: str) -> None:
        request = entry.request
        request.set_status(status)
        self.told[request.request_id] = self.half.finished(request, entry.blocks)
        if entry.state == "loading":
            entry.gone = True
            return
        (self.running if entry.state == "running" else self.waiting).remove(entry)
        self._free(entry)

    def _free(self, entry: Entry) -> None:
        self.pool.free_blocks([self.pool.blocks[b] for b in reversed(entry.blocks)])
        entry.blocks = []

    def _entries(self) -> list[Entry]:
        return [*self.waiting, *self.running, *(e for e in self.loading.values() if not e.gone)]
