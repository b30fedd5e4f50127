"""The connector of all baselines: a CPU tier that every full block goes to and every hit is loaded from.

With no policy attached it is what stock LMCache and vLLM's own offloading do: all is stored, and every hit beyond
GPU memory is loaded, asynchronously, however short. A finished request's blocks stay until its stores have
ended, as with LMCache's `request_finished`.

One thing differs: a request is stored when it ends, not while it runs. The stock way, setting "store" to
"computed", follows the computation in chunks of 256 tokens, LMCache's default. It takes room in the tier for what
is in GPU memory anyway: on three machines with SWE-like programs it gained 1 % at most, and lost 28 % where the tier
was the smaller of the two (60 programs by arrival, 8B on an H100, 54 GB of KV and 40 GB of CPU memory: 458 s a
program instead of 357).

A copy under way when its request is preempted ends well: the stock connectors flush it before the blocks are given
away, and that wait, a millisecond or so, is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)

from kvtier.replay.baselines.cpu_tier import CpuTier
from kvtier.replay.baselines.hooks import BaselinePolicy
from kvtier.replay.worker import CopyRequest
from kvtier.turns.block_pool import wrap_allocation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtier.replay.machine import Machine

STORE_TOKENS: Final = 256


class BaselineMetadata(KVConnectorMetadata):  # type: ignore[misc] # vLLM's classes are Any to mypy
    """Copies that begin with a step."""

    def __init__(self, copies: list[CopyRequest]) -> None:
        self.copies = copies


@dataclass(frozen=True, slots=True)
class _Copied:
    """What a copy was for.

    Attributes:
        owner: The request, or what a policy stores.
        block_hashes: What it copies, in the order of the text.
        by_policy: Whether the policy ordered it.
    """

    owner: str
    block_hashes: list[bytes]
    by_policy: bool = False


@dataclass(slots=True)
class _Live:
    """A request in the engine, or one whose stores are under way.

    Attributes:
        request: vLLM's.
        stored_blocks: Leading blocks that are in the tier, on their way there, or refused.
        open_stores: Stores under way.
        held: Its blocks, once it has ended while stores were under way.
    """

    request: Any
    stored_blocks: int = 0
    open_stores: int = 0
    held: list[Any] = field(default_factory=list)


class BaselineConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc] # see above
    """See the module's docstring. Works after `attach`.

    Attributes:
        tier: The CPU tier.
        policy: What the baseline does beside it.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.tier = CpuTier(0)
        self.policy = BaselinePolicy()
        settings = self._kv_transfer_config.kv_connector_extra_config or {}
        self._stores_as_computed = settings.get("store") == "computed"
        self._block_tokens = int(vllm_config.cache_config.block_size)
        self._block_bytes = 0
        self._pool: Any = None
        # Of the request asked about last, which is the one that then gets blocks.
        self._local_blocks = 0
        self._live: dict[str, _Live] = {}
        self._n_under_way = 0
        self._copies: list[CopyRequest] = []

    def attach(self, machine: Machine, policy: BaselinePolicy | None = None) -> None:
        """Say what it is replayed on, and what the baseline does beside the CPU tier."""
        self.tier = CpuTier(int(machine.dram_bytes // machine.block_bytes))
        self._block_bytes = machine.block_bytes
        if policy is not None:
            self.policy = policy

    @property
    def requires_kv_delivery(self) -> bool:
        """False: what was not stored is recomputed."""
        return False

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Receive vLLM's KV cache manager and its block pool."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self._pool = kv_cache_manager.block_pool
        wrap_allocation(kv_cache_manager, self._make_room, self._before_reset)

    def _make_room(
        self, request: Any, retry: Callable[[], Any], need_blocks: Callable[[], int]
    ) -> Any:
        return self.policy.make_room(request, retry, need_blocks)

    def _before_reset(self) -> None:
        self.policy.before_reset()

    # -- a request's life --------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """A request has been queued."""
        self._live[request.request_id] = _Live(request)
        self.policy.arrived(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens to load beyond those in GPU memory; the last token is always computed."""
        first = self._local_blocks = num_computed_tokens // self._block_tokens
        hashes = request.block_hashes
        end = min((request.num_tokens - 1) // self._block_tokens, len(hashes))
        n_tokens = self.tier.n_leading(hashes, first, end) * self._block_tokens
        return n_tokens, n_tokens > 0

    def update_state_after_alloc(
        self,
        request: Any,
        blocks: Any,  # noqa: ARG002
        num_external_tokens: int,
    ) -> None:
        """Order the load, if there is one."""
        known = request.block_hashes
        if not request.num_computed_tokens:
            # Admitted, perhaps not for the first time: since then, blocks may have left the tier.
            self._live[request.request_id].stored_blocks = 0
            self.tier.touch(known[: self._local_blocks])
        if num_external_tokens:
            n_blocks = num_external_tokens // self._block_tokens
            hashes = list(known[self._local_blocks : self._local_blocks + n_blocks])
            self.tier.begin_read(hashes)
            self._copy("load", request.request_id, hashes)
        self.policy.allocated(request)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Store the rest, and keep the blocks while stores are under way."""
        live = self._live[request.request_id]
        n_full = min(
            len(request.block_hashes),
            request.num_computed_tokens // self._block_tokens,
            len(block_ids[0]),
        )
        blocks = [self._pool.blocks[block_id] for block_id in block_ids[0][:n_full]]
        if self.policy.stores_all:
            self._store(live, n_full)
            self.tier.touch(request.block_hashes[:n_full])
        if live.open_stores:
            live.held = blocks
            self._pool.touch(blocks)
        else:
            del self._live[request.request_id]
        self.policy.finished(request, blocks)
        return False, None

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See `request_finished_all_groups`."""
        return self.request_finished_all_groups(request, (block_ids,))

    # -- steps -------------------------------------------------------------------------------------

    def build_connector_meta(self, scheduler_output: Any) -> BaselineMetadata:
        """Store what the steps before have computed; returns the copies that begin now."""
        if self.policy.stores_all and self._stores_as_computed:
            known = scheduler_output.scheduled_cached_reqs
            chunk_blocks = max(1, STORE_TOKENS // self._block_tokens)
            for request_id, n_tokens in zip(known.req_ids, known.num_computed_tokens, strict=True):
                live, n_full = self._live[request_id], n_tokens // self._block_tokens
                if n_full >= live.stored_blocks + chunk_blocks:
                    self._store(live, n_full // chunk_blocks * chunk_blocks)
        self.policy.stepped(scheduler_output)
        copies, self._copies = self._copies, []
        return BaselineMetadata(copies)

    def copies_ended(self, copies: Sequence[CopyRequest]) -> None:
        """The simulation tells which copies have ended."""
        self._n_under_way -= len(copies)
        for copy in copies:
            copied: _Copied = copy.tag
            if copy.direction == "load":
                self.tier.end_read(copied.block_hashes)
                continue
            self.tier.end_write(copied.block_hashes)
            if copied.by_policy:
                self.policy.stored(copied.owner, copied.block_hashes)
                continue
            live = self._live[copied.owner]
            live.open_stores -= 1
            if not live.open_stores and live.held:
                self._pool.free_blocks(reversed(live.held))
                del self._live[copied.owner]

    def has_pending_push_work(self) -> bool:
        """Let an idle engine go on until copies have ended."""
        return self._n_under_way > 0

    def copy_for_policy(self, owner: str, block_hashes: list[bytes]) -> None:
        """Copy blocks that have room in the tier (`CpuTier.begin_write`) and that the policy keeps meanwhile."""
        self._copy("store", owner, block_hashes, by_policy=True)

    def shutdown(self) -> None:
        """Give all blocks back."""
        self.policy.before_reset()
        for live in self._live.values():
            if live.held:
                self._pool.free_blocks(reversed(live.held))
        self._live.clear()

    # -- internals ---------------------------------------------------------------------------------

    def _store(self, live: _Live, n_full: int) -> None:
        """Store a request's leading blocks that are not in the tier."""
        taken = self.tier.begin_write(live.request.block_hashes[live.stored_blocks : n_full])
        live.stored_blocks = n_full
        if taken:
            live.open_stores += 1
            self._copy("store", live.request.request_id, taken)

    def _copy(
        self, direction: Any, owner: str, block_hashes: list[bytes], *, by_policy: bool = False
    ) -> None:
        n_bytes = len(block_hashes) * self._block_bytes
        tag = _Copied(owner, block_hashes, by_policy)
        self._copies.append(CopyRequest(direction, owner, n_bytes, tag))
        self._n_under_way += 1

    # -- the worker's side, which a replay does not have --------------------------------------------

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing."""

    def wait_for_save(self) -> None:
        """Nothing."""
