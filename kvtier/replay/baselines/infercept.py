"""infercept: after each step, the contexts of agents that use tools are swapped, kept, or discarded by their waste.

InferCept (ICML 2024, arXiv 2402.01869; WukLab/InferCept). With each step: contexts in GPU memory are sorted by what
the cheaper of preserve and discard would waste (`min_waste`), and swapped out from the largest down, as many tokens
as the link can move during the step; of the others, those are discarded whose discard wastes less. A context goes
from its end (as in `swap_out_from_back`). Requests are ordered by when their program came: to InferCept a program is
one request, which is intercepted. It is known when a program is over.

Departures. How long a tool will take is not known: the public code has the client say so, here the time since the call
stands for it, the paper's choice without a client's word. vLLM's prefix cache and CPU tier take the place of
InferCept's own blocks: a discarded context may still be found in GPU memory until its blocks are needed, a swapped
one stays in CPU memory (least recently used first out) after it has been loaded, and need not be copied again; the
load is one copy, not spread over steps. Where some of a context has been swapped, the rest is not discarded, since
vLLM can not load the end of a text whose beginning is gone. A preempted request is recomputed, as vLLM does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvtier.replay.baselines.hooks import BaselinePolicy
from kvtier.replay.baselines.min_waste import Recompute, preserve_waste
from kvtier.replay.machine import Scheduled, step_s

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtier.replay.baselines.hooks import Surroundings


@dataclass(slots=True)
class _Intercepted:
    """A context that nobody runs.

    Attributes:
        chain: Whose it is.
        name: Of this interception: a chain has several.
        program: Whose chain it is.
        arrival_s: When that program came.
        since_s: When the tool was called.
        recompute: What it takes to compute it again.
        hashes: Of its blocks, in the order of the text.
        kept: Its leading blocks that are in GPU memory and not on their way out.
        leaving: Blocks that are being copied, by hash.
        is_partial: Some of it has been swapped, or is being swapped.
    """

    chain: str
    name: str
    program: str
    arrival_s: float
    since_s: float
    recompute: Recompute
    hashes: list[bytes]
    kept: list[Any]
    leaving: dict[bytes, Any] = field(default_factory=dict)
    is_partial: bool = False


class InferCeptPolicy(BaselinePolicy):
    """See the module's docstring."""

    stores_all = False

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._pool = around.pool
        self._connector = around.scheduler.connector
        self._by_name: dict[str, _Intercepted] = {}
        self._name_by_chain: dict[str, str] = {}
        self._program_arrival_s: dict[str, float] = {}

    # -- requests ----------------------------------------------------------------------------------

    def arrived(self, request: Any) -> None:
        """Note when a program comes."""
        facts = self._around.facts[request.request_id]
        self._program_arrival_s.setdefault(facts.program, self._around.clock())

    def allocated(self, request: Any) -> None:
        """The interception is over, and the next turn has its own references on what was kept."""
        self._let_go(self._around.facts[request.request_id].chain)

    def finished(self, request: Any, blocks: Sequence[Any]) -> None:
        """Preserve at first: with the next step it is decided."""
        facts = self._around.facts[request.request_id]
        if facts.ends_program:
            for one in list(self._by_name.values()):
                if one.program == facts.program:
                    self._let_go(one.chain)
        if facts.ends_chain or not blocks:
            return
        machine = self._around.machine
        self._pool.touch(blocks)
        self._name_by_chain[facts.chain] = request.request_id
        self._by_name[request.request_id] = _Intercepted(
            facts.chain,
            request.request_id,
            facts.program,
            self._program_arrival_s[facts.program],
            self._around.clock(),
            Recompute.of(machine, len(blocks) * machine.block_tokens),
            list(request.block_hashes[: len(blocks)]),
            list(blocks),
        )

    # -- decisions ---------------------------------------------------------------------------------

    def stepped(self, output: Any) -> None:
        """Swap what the step hides, and discard what is cheaper to compute again."""
        kept = [one for one in self._by_name.values() if one.kept]
        if not kept:
            return
        now_s = self._around.clock()
        other = sum(request.num_computed_tokens for request in self._around.scheduler.running)
        wastes = []
        for one in kept:
            context = len(one.kept) * self._around.machine.block_tokens
            preserve = preserve_waste(now_s - one.since_s, context)
            wastes.append((preserve, one.recompute.waste(other), one))
        wastes.sort(key=lambda waste: (-min(waste[:2]), waste[2].arrival_s, waste[2].name))
        budget = self._hidden_blocks(output)
        for preserve, discard, one in wastes:
            budget -= self._swap(one, budget)
            if discard < preserve and not one.is_partial:
                self._let_go(one.chain)

    def _hidden_blocks(self, output: Any) -> int:
        """Blocks that can be copied while a step is computed."""
        machine = self._around.machine
        known = output.scheduled_cached_reqs
        cached = dict(zip(known.req_ids, known.num_computed_tokens, strict=True))
        cached.update((new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs)
        parts = [
            Scheduled(cached[request_id], n_tokens)
            for request_id, n_tokens in output.num_scheduled_tokens.items()
        ]
        return int(step_s(machine, parts) * machine.link_bytes_per_s // machine.block_bytes)

    def _swap(self, one: _Intercepted, budget: int) -> int:
        """Send up to so many blocks from the end of a context to CPU memory; returns how many are sent."""
        tier = self._connector.tier
        there: list[tuple[bytes, Any]] = []
        sent: list[tuple[bytes, Any]] = []
        while one.kept:
            last = (one.hashes[len(one.kept) - 1], one.kept[-1])
            # What has been there before needs no copy.
            if tier.has(last[0]):
                there.append(last)
            elif len(sent) < budget and tier.begin_write([last[0]]):
                sent.append(last)
            else:
                break
            one.kept.pop()
            one.is_partial = True
        tier.touch([block_hash for block_hash, _ in reversed(there)])
        self._pool.free_blocks([block for _, block in there])
        if sent:
            one.leaving.update(sent)
            hashes = [block_hash for block_hash, _ in reversed(sent)]
            self._connector.copy_for_policy(one.name, hashes)
        self._forget_if_empty(one)
        return len(sent)

    def stored(self, owner: str, block_hashes: Sequence[bytes]) -> None:
        """Free the blocks that have been copied."""
        one = self._by_name.get(owner)
        if one is None:
            return
        self._pool.free_blocks([one.leaving.pop(each) for each in reversed(block_hashes)])
        self._forget_if_empty(one)

    # -- room --------------------------------------------------------------------------------------

    def make_room(
        self, request: Any, retry: Callable[[], Any], need_blocks: Callable[[], int]
    ) -> Any:
        """Discard contexts, of the program that came last first, where swapping does not do.

        A running request would be preempted; a waiting one can wait for copies and for those that run.
        """
        scheduler = self._around.scheduler
        if not request.num_computed_tokens and (
            scheduler.running or any(one.leaving for one in self._by_name.values())
        ):
            return None
        while self._by_name:
            own = self._around.facts[request.request_id].chain
            victim = max(
                self._by_name.values(),
                key=lambda one: (one.chain != own, one.arrival_s, one.name),
            )
            self._let_go(victim.chain)
            if self._pool.get_num_free_blocks() < need_blocks():
                continue
            blocks = retry()
            if blocks is not None:
                return blocks
        return None

    def before_reset(self) -> None:
        """Discard all."""
        for one in list(self._by_name.values()):
            self._let_go(one.chain)

    # -- internals ---------------------------------------------------------------------------------

    def _let_go(self, chain: str) -> None:
        """Free what is left of a context; a copy under way ends well, as when its request is preempted."""
        name = self._name_by_chain.pop(chain, None)
        if name is None:
            return
        one = self._by_name.pop(name)
        self._pool.free_blocks([*one.leaving.values(), *reversed(one.kept)])

    def _forget_if_empty(self, one: _Intercepted) -> None:
        if not one.kept and not one.leaving:
            del self._by_name[one.name]
            del self._name_by_chain[one.chain]
