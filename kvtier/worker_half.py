"""The worker process: executes copy orders and reports how they went.

Orders are submitted when the step's metadata is bound, before the forward pass, so that copies overlap
with it. Results are collected after it. Nothing here blocks the forward pass.
"""

from __future__ import annotations

import datetime as dt
import logging
import time
from typing import TYPE_CHECKING, Literal

from kvtier.calibration import (
    CalibrationError,
    fresh_profile,
    load_profile,
    measure_profile,
    profile_path,
    save_profile,
)
from kvtier.copies.checked import SHARES, CheckedCopies
from kvtier.copies.checksums import load_checksums
from kvtier.copies.kv_layout import KVLayout
from kvtier.copies.plan import CopyOrder
from kvtier.cpu_pool import CpuPool, default_engine
from kvtier.orders import Calibration, Order, OrderResult, StepOrders
from kvtier.wire import KEY_BYTES

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from kvtier.backend import Region
    from kvtier.copies.plan import CopyResult
    from kvtier.copy_engine import CopyEngine
    from kvtier.cpu_pool import SharedRegion

logger = logging.getLogger(__name__)

FIRST_REMAP_S = 10.0
LONGEST_REMAP_S = 300.0
"""A region that cannot be mapped is tried again after so long, twice as long after each attempt in vain: what
is in the way may go, as a full `/dev/shm`, but finding out may take a moment of the engine's time."""


class WorkerHalf:
    """One worker's copies.

    Args:
        rank: Index of this worker's slots in each order.
        slot_bytes: Bytes a chunk that the scheduler computed; the registered tensors must agree.
        chunk_blocks: Blocks a chunk.
        n_blocks: GPU blocks of the engine, vLLM's null block included.
        model: Names the model in the calibration profile.
        profile_dir: Where profiles are kept; None to have none.
        may_measure: Whether to measure where there is no profile.
        integrity: Which chunks are summed and checked.
    """

    def __init__(
        self,
        *,
        rank: int,
        slot_bytes: int,
        chunk_blocks: int,
        n_blocks: int,
        model: str = "",
        profile_dir: Path | None = None,
        may_measure: bool = True,
        integrity: Literal["off", "sample", "full"] = "off",
    ) -> None:
        self._model = model
        self._integrity = integrity
        self._may_measure = may_measure
        self._profile_dir = profile_dir
        self._calibration: Calibration | None = None
        self._rank = rank
        self._slot_bytes = slot_bytes
        self._chunk_blocks = chunk_blocks
        self._n_blocks = n_blocks
        self._pool: CpuPool | None = None
        self._generation: str | None = None
        # Tried in vain: not again in every step, but later, or for a new generation.
        self._unmapped: Region | None = None
        self._remap_due_s = 0.0
        self._remap_wait_s = FIRST_REMAP_S
        self._loads: dict[str, Order] = {}
        self._cancelled: set[str] = set()
        self._results: list[OrderResult] = []
        self._loaded: set[str] = set()
        self._bad_blocks: set[int] = set()

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Describe the KV caches; without a layout that can be copied, every order fails.

        Raises:
            RuntimeError: Copies are to be checked, and this machine cannot compute checksums.
        """
        try:
            layout = self._layout(kv_caches)
        except ValueError as error:
            # Pins still work. What the scheduler orders fails, is counted, and is computed instead.
            logger.error("kvtier cannot copy this model's KV, it is pinned only: %s", error)  # noqa: TRY400
            return
        if self._integrity != "off":
            # Compiled now, and not in a step. Where that is not possible, the start fails.
            load_checksums()
        self._pool = CpuPool(layout, engine_factory=self._engine)
        self._kv_layout = layout
        if self._profile_dir is not None and self._rank == 0:
            self._calibration = calibrate(
                layout, self._model, self._profile_dir, may_measure=self._may_measure
            )

    def _engine(self, layout: KVLayout, region: SharedRegion) -> CopyEngine:
        """The copy engine, which chooses its ways as this machine's profile says, with what checks it."""
        engine = self._copying_engine(layout, region)
        if self._integrity == "off":
            return engine
        try:
            share = SHARES[self._integrity]
            return CheckedCopies(engine, layout, region.array, share=share, rank=self._rank)
        except BaseException:
            # Else the region stays in use, and cannot be given back.
            engine.close()
            raise

    def _copying_engine(self, layout: KVLayout, region: SharedRegion) -> CopyEngine:
        if self._profile_dir is None:
            return default_engine(layout, region)
        profile = load_profile(profile_path(self._profile_dir, self._model, layout.fingerprint))
        return default_engine(layout, region, None if profile is None else profile.switch())

    def _layout(self, kv_caches: dict[str, torch.Tensor]) -> KVLayout:
        layout = KVLayout.from_kv_caches(kv_caches, num_blocks=self._n_blocks)
        actual = layout.slot_bytes(self._chunk_blocks)
        if actual != self._slot_bytes:
            message = (
                f"a chunk of {self._chunk_blocks} blocks has {actual} bytes in the registered KV caches, "
                f"but {self._slot_bytes} by vLLM's KV cache configuration: this model's layout is not "
                "supported by kvtier's CPU tier; set kvtier.tier to off to pin only"
            )
            raise ValueError(message)
        return layout

    def submit(self, orders: StepOrders) -> None:
        """Start a step's copies, loads first, and give up those that nobody waits for."""
        if orders.measure:
            self._measure()
        region = orders.region
        if self._pool is None:
            for order in (*orders.loads, *orders.stores):
                self._refuse(order, "the KV caches' layout is not supported")
            return
        if region is not None and region.generation != self._generation:
            self._attach(region)
        for order in (*orders.loads, *orders.stores):
            if order.generation != self._generation:
                self._refuse(order, "the region of the order is not mapped here")
                continue
            self._begin(order)
            try:
                self._pool.submit(self._copy_order(order))
            except (ValueError, RuntimeError, IndexError) as error:
                self._finish(_failed(order, f"{type(error).__name__}: {error}"))
        for order_id in map(str, orders.cancels):
            if order_id in self._loads and self._pool.cancel(order_id):
                self._cancelled.add(order_id)

    def _measure(self) -> None:
        """Measure the link anew and keep the result; the engine is idle."""
        if self._pool is None or self._profile_dir is None or self._rank != 0:
            return
        try:
            self._calibration = calibrate(
                self._kv_layout, self._model, self._profile_dir, may_measure=True, afresh=True
            )
        except Exception:
            # There may be no memory for it beside a full KV cache: what was known before holds.
            logger.exception("the link could not be measured")

    def collect(self) -> None:
        """Take what the copy engine has finished."""
        if self._pool is None:
            return
        for result in self._pool.poll():
            self._finish(_to_order_result(result), result.missing_blocks)

    def take_loaded(self) -> set[str]:
        """Requests whose load ended, well or not, since the last call."""
        loaded, self._loaded = self._loaded, set()
        return loaded

    def take_bad_blocks(self) -> set[int]:
        """Blocks whose load failed since the last call: vLLM recomputes from them on."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_results(self) -> list[OrderResult]:
        """Results since the last call, for the scheduler half."""
        results, self._results = self._results, []
        return results

    def take_calibration(self) -> Calibration | None:
        """Measured speeds, once."""
        calibration, self._calibration = self._calibration, None
        return calibration

    def close(self) -> None:
        """Finish or give up what is running, and unmap. Idempotent."""
        if self._pool is not None:
            self._pool.detach()
            self._pool = None

    # -- internals ---------------------------------------------------------------------------------

    def _attach(self, region: Region) -> None:
        assert self._pool is not None
        now_s = time.monotonic()
        if region != self._unmapped:
            self._remap_wait_s = FIRST_REMAP_S
        elif now_s < self._remap_due_s:
            return
        self._generation = None
        try:
            self._pool.attach(region.shm_name, region.size_bytes, region.generation)
        except (OSError, ValueError, RuntimeError):
            # Loads and stores into it fail one by one and are counted; the engine goes on.
            logger.exception("cannot map the CPU tier's shared memory %s", region.shm_name)
            self._unmapped, self._remap_due_s = region, now_s + self._remap_wait_s
            self._remap_wait_s = min(2 * self._remap_wait_s, LONGEST_REMAP_S)
            return
        self._unmapped, self._generation = None, region.generation

    def _copy_order(self, order: Order) -> CopyOrder:
        slots = order.slots[self._rank]
        blocks, keys = order.block_ids, order.keys
        if any(slot < 0 for slot in slots):
            chunk = order.chunk_blocks
            wanted = [i for i, slot in enumerate(slots) if slot >= 0]
            blocks = tuple(b for i in wanted for b in blocks[i * chunk : (i + 1) * chunk])
            slots = [slots[i] for i in wanted]
            keys = b"".join(keys[i * KEY_BYTES : (i + 1) * KEY_BYTES] for i in wanted)
        return CopyOrder(
            order_id=str(order.order_id),
            direction=order.direction,
            request_id=order.request_id,
            block_ids=blocks,
            slots=slots,
            chunk_blocks=order.chunk_blocks,
            skip_blocks=order.skip_blocks,
            deadline_s=order.deadline_s,
            generation=order.generation,
            keys=keys,
        )

    def _begin(self, order: Order) -> None:
        if order.direction == "load":
            self._loads[str(order.order_id)] = order

    def _refuse(self, order: Order, why: str) -> None:
        """End an order without a copy: what it should have loaded is computed."""
        self._begin(order)
        self._finish(_failed(order, why))

    def _finish(self, result: OrderResult, missing: frozenset[int] | None = None) -> None:
        self._results.append(result)
        cancelled = str(result.order_id) in self._cancelled
        self._cancelled.discard(str(result.order_id))
        if not result.ok and not cancelled:
            logger.warning(
                "%s order %d failed: %s", result.direction, result.order_id, result.error
            )
        if result.direction == "load":
            order = self._loads.pop(str(result.order_id))
            if not order.request_id:
                return
            self._loaded.add(order.request_id)
            # Of a cancelled load nobody will read the blocks: they are freed, not computed.
            if not result.ok and not cancelled:
                wanted = order.block_ids[order.skip_blocks :]
                self._bad_blocks.update(b for b in wanted if missing is None or b in missing)


def calibrate(
    layout: KVLayout, model: str, profile_dir: Path, *, may_measure: bool, afresh: bool = False
) -> Calibration | None:
    """The stored profile of this machine and model if it still holds, or a measurement of two seconds.

    With `afresh` the link is measured in any case; what is known of prefill times stays.
    """
    path = profile_path(profile_dir, model, layout.fingerprint)
    stored = load_profile(path)
    profile = None if afresh else fresh_profile(profile_dir, model, layout)
    if profile is None and may_measure:
        try:
            profile = measure_profile(model, layout, () if stored is None else stored.prefill)
        except CalibrationError as error:
            logger.warning("link not measured, the cost model starts from guesses: %s", error)
    # One that no longer holds says more than a guess.
    profile = profile or stored
    if profile is None:
        return None
    if profile != stored:
        try:
            save_profile(path, profile)
        except OSError as error:
            logger.warning("calibration profile not saved: %s", error)
    return Calibration(
        store=(profile.store.latency_s, profile.store.points),
        load=(profile.load.latency_s, profile.load.points),
        prefill=tuple((p.cached_tokens, p.new_tokens, p.seconds) for p in profile.prefill),
        profile_path=str(path),
        measured_s=_unix_s(profile.measured_at),
    )


def _unix_s(iso: str) -> float | None:
    try:
        return dt.datetime.fromisoformat(iso).timestamp()
    except ValueError:
        return None


def _failed(order: Order, error: str) -> OrderResult:
    return OrderResult(
        order.order_id,
        order.direction,
        ok=False,
        n_bytes=0,
        seconds=0.0,
        run_bytes=0,
        error=error,
    )


def _to_order_result(result: CopyResult) -> OrderResult:
    return OrderResult(
        order_id=int(result.order_id),
        direction=result.direction,
        ok=result.ok,
        n_bytes=result.n_bytes,
        seconds=result.seconds,
        run_bytes=int(result.run_bytes),
        error=result.error,
        spoilt_key=result.spoilt_key,
    )
