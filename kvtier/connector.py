"""`KVTierConnector`: vLLM's connector hooks, handed to the scheduler half or the worker half.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVTierConnector",
        "kv_connector_module_path": "kvtier.connector", "kv_role": "kv_both"}'

Nothing is decided here. Light to import: vLLM's API process imports it for the metrics.

A defect in kvtier must not take the engine down: an exception in a hook is logged, counted, and turns
kvtier off in this engine, with every block given back.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kvtier.config import Settings
from kvtier.logs import join_vllms_log
from kvtier.metadata import KVTierMetadata, KVTierWorkerMetadata
from kvtier.metrics import KVTierPromMetrics, KVTierStats
from kvtier.orders import StepOrders, failing_load
from kvtier.turns.allocated_blocks import AllocatedBlocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvtier.backend import Region
    from kvtier.orders import Order, OrderResult
    from kvtier.scheduler_half import SchedulerHalf
    from kvtier.worker_half import WorkerHalf

try:  # vLLM 0.32 and later tell apart where external hits come from.
    from vllm.v1.metrics.stats import CacheHitSource
except ImportError:
    CacheHitSource = None

logger = logging.getLogger(__name__)


def _guarded(default: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return `default` where there is no scheduler half, or where it fails."""

    def decorate(hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def call(self: KVTierConnector, *args: Any, **kwargs: Any) -> Any:
            if self.scheduler_half is None:
                return default
            try:
                return hook(self, *args, **kwargs)
            except Exception:
                logger.exception("kvtier failed in %s and is off in this engine now", hook.__name__)
                self._give_up()
                return default

        return call

    return decorate


class KVTierConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module's docstring.

    Attributes:
        scheduler_half: In the scheduler's process, unless kvtier is passive there.
        worker_half: In a worker process, unless there is nothing to copy.
    """

    if CacheHitSource is not None:
        _cache_hit_source = CacheHitSource.HOST

    def __init__(
        self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None, **_: Any
    ) -> None:
        transfer = vllm_config.kv_transfer_config
        # Read by vLLM after this constructor: a failed load must become a recompute, not a failed request.
        transfer.kv_load_failure_policy = "recompute"
        super().__init__(vllm_config, role, kv_cache_config)
        join_vllms_log()
        self.settings = Settings.load(transfer.kv_connector_extra_config)
        self.scheduler_half: SchedulerHalf | None = None
        self.worker_half: WorkerHalf | None = None
        self._lease: Any = None
        self._is_alone = transfer.kv_connector != "MultiConnector"
        self._step_id = 0
        # Orders that must still reach the workers when the scheduler half has gone.
        self._last_loads: list[Order] = []
        self._last_region: Region | None = None
        # What still takes results when the scheduler half has gone.
        self._late_results: Callable[[Iterable[OrderResult]], bool] | None = None
        self._local_tokens = 0
        self._deferred_id: str | None = None
        self._block_tokens = int(vllm_config.cache_config.block_size)
        self._stats_off: dict[str, Any] = {}
        # Heavy; the API process never gets here.
        from kvtier import assembly, engine_config  # noqa: PLC0415

        try:
            engine_config.check_supported(vllm_config, kv_cache_config)
        except engine_config.Unsupported as reason:
            if self.settings.tier == "require":
                raise RuntimeError(
                    f"kvtier.tier is require, but there is no CPU tier: {reason}"
                ) from None
            logger.warning("kvtier is passive in this engine: %s", reason)
            return
        if role == KVConnectorRole.SCHEDULER:
            self.scheduler_half, self._lease = assembly.build_scheduler_half(
                vllm_config, kv_cache_config, self.settings
            )
        elif self.settings.tier != "off":
            self.worker_half = assembly.build_worker_half(
                vllm_config, kv_cache_config, self.settings
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a preempted request is recomputed. True would livelock vLLM 0.27-0.29."""
        return False

    def _give_up(self) -> None:
        half, self.scheduler_half = self.scheduler_half, None
        if half is None:
            return
        half.stats.count("failures", 1, "internal")
        self._stats_off = half.stats.take()
        # Requests that wait for these would wait for ever.
        self._last_loads += half.reader.take_orders()
        self._last_region = half.tier.region
        try:
            if half.shutdown(engine_goes_on=True):
                self._late_results = half.late_results
        except Exception:
            logger.exception("kvtier could not give everything back")

    # -- scheduler: start --------------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Receive vLLM's KV cache manager and its block pool."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self._bind(kv_cache_manager)

    @_guarded(None)
    def _bind(self, manager: Any) -> None:
        from kvtier.turns import block_pool, step_view  # noqa: PLC0415 - not in the API process

        half = self.scheduler_half
        assert half is not None
        # Beside another connector, which may still read a finished request's blocks, they stay its.
        own = block_pool.request_blocks(manager) if self._is_alone else None
        self._step_facts = step_view.step_facts
        half.bind(block_pool.VllmBlockPool(manager.block_pool, own))
        block_pool.wrap_allocation(manager, self._make_room, self._before_reset, self._after_reset)
        if self._is_alone:
            # Another connector may want to know what is in GPU memory.
            block_pool.spare_lookups(manager, self)

    def _make_room(
        self, request: Any, retry: Callable[[], Any], need_blocks: Callable[[], int]
    ) -> Any:
        """See `SchedulerHalf.make_room`.

        What vLLM itself raises in `retry` is vLLM's to handle, and blocks that it has given are given:
        a failure of kvtier's after that must not hide them.
        """
        raised: list[Exception] = []
        given: list[Any] = []
        works = self.scheduler_half is not None

        def noted_retry() -> Any:
            try:
                result = retry()
            except Exception as error:
                raised.append(error)
                raise
            given[:] = [] if result is None else [result]
            return result

        self._guarded_make_room(request, noted_retry, need_blocks, raised)
        if raised:
            raise raised[0]
        if works and not given and self.scheduler_half is None:
            # kvtier has just given up, and with it all that it held.
            return retry()
        return given[0] if given else None

    @_guarded(None)
    def _guarded_make_room(
        self,
        request: Any,
        retry: Callable[[], Any],
        need_blocks: Callable[[], int],
        raised: list[Exception],
    ) -> None:
        assert self.scheduler_half is not None
        try:
            self.scheduler_half.make_room(request, retry, need_blocks)
        except Exception:
            if not raised:
                raise

    @_guarded(None)
    def _before_reset(self) -> None:
        assert self.scheduler_half is not None
        self.scheduler_half.before_reset()

    @_guarded(None)
    def _after_reset(self) -> None:
        assert self.scheduler_half is not None
        self.scheduler_half.after_reset()

    # -- scheduler: a request's life ---------------------------------------------------------------

    @_guarded(None)
    def on_new_request(self, request: Any) -> None:
        """See `SchedulerHalf.on_new_request`."""
        assert self.scheduler_half is not None
        self.scheduler_half.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """See `SchedulerHalf.match`. Loads are always asynchronous."""
        # Most questions are about requests that were deferred in the step before.
        if self._deferred_id == request.request_id or self._stands(request.request_id):
            return None, False
        matched: tuple[int | None, bool] = self._match(request, num_computed_tokens)
        return matched

    def defers(self, request_id: str) -> bool:
        """Whether `get_num_new_matched_tokens`, which comes next, will say "not now" whatever is in GPU memory."""
        # Not guarded as a whole: where kvtier has given up, what it has said last must not stand.
        self._deferred_id = request_id if self._stands(request_id) else None
        return self._deferred_id is not None

    @_guarded(False)
    def _stands(self, request_id: str) -> bool:
        assert self.scheduler_half is not None
        return self.scheduler_half.deferrals.stands(request_id)

    @_guarded((0, False))
    def _match(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self.scheduler_half is not None
        self._local_tokens = num_computed_tokens
        n_tokens = self.scheduler_half.match(request, num_computed_tokens)
        return n_tokens, bool(n_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """See `SchedulerHalf.on_allocated`."""
        ordered = self._on_allocated(
            request, lambda: AllocatedBlocks(blocks.blocks[0]), num_external_tokens
        )
        if num_external_tokens and not ordered:
            # vLLM will wait for this load, though kvtier has failed: one that fails ends the wait.
            first = self._local_tokens // self._block_tokens
            last = -(-(self._local_tokens + num_external_tokens) // self._block_tokens)
            missing = AllocatedBlocks(blocks.blocks[0])[first:last]
            self._last_loads.append(failing_load(request.request_id, missing))

    @_guarded(False)
    def _on_allocated(
        self, request: Any, block_ids: Callable[[], Sequence[int]], n_external: int
    ) -> bool:
        assert self.scheduler_half is not None
        self.scheduler_half.on_allocated(request, block_ids, n_external)
        return True

    @_guarded(None)
    def program_age_s(self, request: Any) -> float | None:
        """For `kvtier.scheduler`: how long ago the program of a request came."""
        assert self.scheduler_half is not None
        return self.scheduler_half.program_age_s(request)

    @_guarded((False, None))
    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See `SchedulerHalf.finished`. Blocks are never held back this way (DESIGN D2)."""
        assert self.scheduler_half is not None
        told = self.scheduler_half.finished(request, block_ids[0] if block_ids else [])
        # Only who speaks to kvtier gets an answer: other clients' responses stay as they were.
        wants = (
            isinstance(request.kv_transfer_params, dict) and "kvtier" in request.kv_transfer_params
        )
        return False, {"kvtier": told} if told and wants else None

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See `request_finished_all_groups`."""
        result: tuple[bool, dict[str, Any] | None] = self.request_finished_all_groups(
            request, (block_ids,)
        )
        return result

    # -- scheduler: steps --------------------------------------------------------------------------

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """See `SchedulerHalf.build`."""
        metadata = self._build(scheduler_output)
        if metadata is not None:
            return metadata
        orders = StepOrders(self._last_region, self._last_loads)
        self._last_loads = []
        return KVTierMetadata(orders)

    @_guarded(None)
    def _build(self, output: Any) -> KVTierMetadata:
        assert self.scheduler_half is not None
        return KVTierMetadata(self.scheduler_half.build(self._step_facts(output)))

    def update_connector_output(self, connector_output: Any) -> None:
        """See `SchedulerHalf.on_worker`."""
        meta = connector_output.kv_connector_worker_meta
        if not isinstance(meta, KVTierWorkerMetadata):
            return
        late_results = self._late_results
        self._on_worker(meta)
        if late_results is None:
            return
        try:
            if not late_results(meta.results):
                self._late_results = None
        except Exception:
            logger.exception("kvtier could not take a late result")
            self._late_results = None

    @_guarded(None)
    def _on_worker(self, report: KVTierWorkerMetadata) -> None:
        assert self.scheduler_half is not None
        self.scheduler_half.on_worker(report)

    @_guarded(False)
    def has_pending_push_work(self) -> bool:
        """Keep an idle engine stepping while a pause is being staged."""
        assert self.scheduler_half is not None
        return self.scheduler_half.has_work()

    @_guarded(True)
    def reset_cache(self) -> bool:
        """The connector's part of a reset: KV from before must not be read again."""
        assert self.scheduler_half is not None
        self.scheduler_half.reset_tier()
        return True

    # -- worker ------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """See `WorkerHalf.register`."""
        if self.worker_half is not None:
            self.worker_half.register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Start the step's copies now, before the forward pass, so that they overlap with it."""
        super().bind_connector_metadata(connector_metadata)
        if not isinstance(connector_metadata, KVTierMetadata):
            return
        self._step_id = connector_metadata.orders.step_id
        if self.worker_half is not None:
            self.worker_half.submit(connector_metadata.orders)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing: see `bind_connector_metadata`."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request is scheduled only after its load."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing: turns are staged after they end."""

    def wait_for_save(self) -> None:
        """Nothing: the blocks that a copy reads are kept until it has ended."""

    def get_finished(
        self,
        finished_req_ids: set[str],  # noqa: ARG002
    ) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose load has ended."""
        if self.worker_half is None:
            return None, None
        self.worker_half.collect()
        return None, self.worker_half.take_loaded() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks to recompute."""
        return self.worker_half.take_bad_blocks() if self.worker_half is not None else set()

    def build_connector_worker_meta(self) -> KVTierWorkerMetadata | None:
        """The end of a step, and results, for the scheduler half."""
        if self.worker_half is None:
            return KVTierWorkerMetadata(step_id=self._step_id) if self._step_id else None
        half = self.worker_half
        return KVTierWorkerMetadata(half.take_results(), half.take_calibration(), self._step_id)

    # -- both --------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVTierStats | None:
        """What was counted since the last call."""
        data = self._stats_off
        self._stats_off = {}
        if self.scheduler_half is not None:
            data = self.scheduler_half.take_stats()
        return KVTierStats(data) if data else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVTierStats:
        """Stats from what came over the wire."""
        return KVTierStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVTierPromMetrics:
        """Kvtier's families in vLLM's registry."""
        return KVTierPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """Give everything back and leave the tier."""
        if self.scheduler_half is not None:
            self.scheduler_half.shutdown()
            self.scheduler_half = None
        if self.worker_half is not None:
            self.worker_half.close()
            self.worker_half = None
        if self._lease is not None:
            self._lease.close()
            self._lease = None
