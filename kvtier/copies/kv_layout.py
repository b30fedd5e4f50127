"""Where the bytes of a KV block lie: vLLM's paged KV cache seen as strided planes.

A *plane* is a run of bytes of every block at a fixed stride: block ``b`` of a plane starts at
``base_address + b * block_stride_bytes`` and is ``block_bytes`` long. One ``[NB, ...]`` layer is
one plane, a ``[2, NB, ...]`` layer two (keys, values), a head-outermost layer one per head.

A *slot* holds one chunk of ``C`` blocks as ``[plane][block in chunk][block_bytes]``, without
padding. kvtier alone reads and writes slots, so this order is its own contract; `fingerprint`
names it and belongs into the cache keys.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

SLOT_FORMAT = "kv1"
"""Version of the byte order inside a slot; change it with the order."""


_KEYS_AND_VALUES = 2
_MIN_DIMS = 2
_MIN_DIMS_SPLIT = 5
"""Dimensions of a tensor that can start with keys/values: MLA has three, joint layouts four."""


class KVLayoutError(ValueError):
    """The KV caches have a shape that kvtier cannot copy; the message says which and why."""


@dataclass(frozen=True)
class Plane:
    """Equally spaced pieces of every block; all values in bytes."""

    base_address: int
    block_stride_bytes: int
    block_bytes: int

    @property
    def is_dense(self) -> bool:
        """Whether blocks ``b`` and ``b + 1`` touch, so that they copy as one run."""
        return self.block_stride_bytes == self.block_bytes


@dataclass(frozen=True)
class KVLayout:
    """Planes of one KV cache group on one device.

    ``views`` holds one uint8 tensor ``[num_blocks, block_bytes]`` per plane. They alias the KV
    cache and keep its memory alive as long as the layout lives.
    """

    planes: tuple[Plane, ...]
    num_blocks: int
    device: torch.device
    fingerprint: str
    """dtype, block shape, order of the dimensions in memory, plane count and plane bytes: two
    engines may share slots if and only if it is equal (and the model is)."""
    views: tuple[torch.Tensor, ...] = field(repr=False, compare=False)
    _tables: dict[int, NDArray[np.int64]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_kv_caches(
        cls,
        kv_caches: Mapping[str, torch.Tensor],
        *,
        num_blocks: int | None = None,
        n_kv_cache_groups: int = 1,
    ) -> KVLayout:
        """Describe the tensors that vLLM hands to ``register_kv_caches``.

        Args:
            kv_caches: layer name -> ``[NB, ...]`` or ``[2, NB, ...]``, in layer order. Layers
                that share one tensor are counted once.
            num_blocks: block count of vLLM's block pool. Needed where an attention kernel splits
                a block (the tensors then count kernel blocks) and where ``[2, NB, ...]`` and
                ``[NB, 2, ...]`` cannot be told apart; without it the tensor's own count is used.
            n_kv_cache_groups: KV cache groups of the model; more than one is refused.

        Raises:
            KVLayoutError: hybrid models, several devices, or a block that is not contiguous.
        """
        if n_kv_cache_groups != 1:
            msg = (
                f"kvtier copies models with one KV cache group; this one has "
                f"{n_kv_cache_groups} (hybrid: sliding window, Mamba or similar layers)"
            )
            raise KVLayoutError(msg)
        if not kv_caches:
            msg = "no KV caches were registered"
            raise KVLayoutError(msg)
        planes: list[tuple[Plane, torch.UntypedStorage]] = []
        specs: list[str] = []
        spec_of: dict[Plane, str] = {}
        counts: set[int] = set()
        devices: set[torch.device] = set()
        any_in_pieces = False
        for name, tensor in kv_caches.items():
            if not isinstance(tensor, torch.Tensor):
                msg = (
                    f"KV cache {name!r} is a {type(tensor).__name__}, not one tensor: state-space "
                    "(Mamba) layers of hybrid models are not supported"
                )
                raise KVLayoutError(msg)
            layer_planes, count, spec, in_pieces = _planes_of(name, tensor, num_blocks)
            any_in_pieces |= in_pieces
            storage = tensor.untyped_storage()
            counts.add(count)
            devices.add(tensor.device)
            if any(spec_of.get(plane, spec) != spec for plane in layer_planes):
                msg = f"KV cache {name!r} overlays a layer of another shape: hybrid KV cache groups"
                raise KVLayoutError(msg)
            new = [(plane, storage) for plane in layer_planes if plane not in spec_of]
            if new:
                planes += new
                specs.append(spec)
                spec_of |= {plane: spec for plane, _ in new}
        if len(counts) != 1 or len(devices) != 1:
            msg = (
                f"layers differ in block count {sorted(counts)} or device "
                f"{sorted(map(str, devices))}: hybrid KV cache groups are not supported"
            )
            raise KVLayoutError(msg)
        (count,), (device,) = counts, devices
        order = _order_within_block([plane for plane, _ in planes])
        merged = _coalesce([planes[i] for i in order], count)
        if any_in_pieces and len(merged) > len(specs):
            msg = "the layers' blocks are not contiguous, each by itself or all together"
            raise KVLayoutError(msg)
        if order != sorted(order):
            # Slots have this order too, and only engines with the same one may share them.
            specs.append(f"order.{hashlib.sha256(repr(order).encode()).hexdigest()[:16]}")
        plane_bytes = [str(p.block_bytes) for p, _ in merged]
        return cls(
            planes=tuple(p for p, _ in merged),
            num_blocks=count,
            device=device,
            fingerprint="-".join((SLOT_FORMAT, *_run_lengths(specs), *_run_lengths(plane_bytes))),
            views=tuple(_byte_view(p, s, count) for p, s in merged),
        )

    @functools.cached_property
    def n_dense(self) -> int:
        """Planes whose blocks touch each other."""
        return sum(plane.is_dense for plane in self.planes)

    @functools.cached_property
    def block_bytes_total(self) -> int:
        """Bytes of one block over all planes."""
        return sum(plane.block_bytes for plane in self.planes)

    def slot_bytes(self, chunk_blocks: int) -> int:
        """Bytes of a slot that holds a chunk of ``chunk_blocks`` blocks."""
        return chunk_blocks * self.block_bytes_total

    def plane_table(self, chunk_blocks: int) -> NDArray[np.int64]:
        """Rows ``(base address, block stride, block bytes, offset in the slot)``, int64 [P, 4]."""
        if chunk_blocks not in self._tables:
            sizes = [plane.block_bytes * chunk_blocks for plane in self.planes]
            offsets = itertools.accumulate(sizes, initial=0)
            rows = [
                (plane.base_address, plane.block_stride_bytes, plane.block_bytes, offset)
                for plane, offset in zip(self.planes, offsets, strict=False)
            ]
            self._tables[chunk_blocks] = np.array(rows, dtype=np.int64)
        return self._tables[chunk_blocks]


def _block_axis(name: str, shape: Sequence[int], num_blocks: int | None) -> int:
    """0 for ``[NB, ...]``, 1 for ``[2, NB, ...]``."""
    may_lead = len(shape) >= _MIN_DIMS_SPLIT and shape[0] == _KEYS_AND_VALUES
    if not may_lead:
        return 0
    if num_blocks is not None:
        fits_first, fits_second = shape[0] % num_blocks == 0, shape[1] % num_blocks == 0
        if fits_first != fits_second:
            return int(fits_second)
        if fits_second and shape[1] != _KEYS_AND_VALUES:
            return 1
    elif shape[1] != _KEYS_AND_VALUES:
        return 1
    msg = f"KV cache {name!r} of shape {tuple(shape)}: cannot tell blocks from keys/values"
    raise KVLayoutError(msg)


def _planes_of(
    name: str, tensor: torch.Tensor, num_blocks: int | None
) -> tuple[list[Plane], int, str, bool]:
    """Planes of one layer's tensor, block count, a text for the fingerprint, whether a block is in pieces."""
    shape, strides = tuple(tensor.shape), tensor.stride()
    if len(shape) < _MIN_DIMS or 0 in shape:
        msg = f"KV cache {name!r} has shape {shape}; [NB, ...] or [2, NB, ...] is needed"
        raise KVLayoutError(msg)
    axis = _block_axis(name, shape, num_blocks)
    inner = [d for d in range(len(shape)) if d != axis]
    by_stride = sorted((d for d in inner if shape[d] > 1), key=lambda d: strides[d])
    piece = 1  # elements of a block that are contiguous
    outer: list[int] = []
    for d in by_stride:
        if not outer and strides[d] == piece:
            piece *= shape[d]
        else:
            outer.append(d)
    n_rows = shape[axis]
    stride = strides[axis] if n_rows > 1 else piece
    # Pieces may lie inside blocks, or blocks inside what belongs to a head; they may not overlap.
    extent = piece
    for step, n in sorted([(stride, n_rows), *((strides[d], shape[d]) for d in outer)]):
        if step < extent:
            msg = f"KV cache {name!r} (shape {shape}, strides {strides}): blocks are not contiguous"
            raise KVLayoutError(msg)
        extent += (n - 1) * step
    count = n_rows if num_blocks is None else num_blocks
    split, rest = divmod(n_rows, count)
    if rest or split == 0 or (split > 1 and stride != piece):
        msg = f"KV cache {name!r} (shape {shape}, strides {strides}) does not hold {count} blocks"
        raise KVLayoutError(msg)
    item = tensor.element_size()
    planes = [
        Plane(
            base_address=tensor.data_ptr()
            + item * sum(i * strides[d] for i, d in zip(index, sorted(outer), strict=True)),
            block_stride_bytes=stride * split * item,
            block_bytes=piece * split * item,
        )
        for index in itertools.product(*(range(shape[d]) for d in sorted(outer)))
    ]
    # The order of the dimensions in memory tells e.g. heads-first from tokens-first blocks.
    order = "".join(str(inner.index(d)) for d in by_stride)
    dims = "x".join(str(shape[d]) for d in inner)
    dtype = str(tensor.dtype).removeprefix("torch.")
    in_pieces = any(strides[d] < stride for d in outer)
    return planes, count, f"{dtype}.{dims}.{order}", in_pieces


def _order_within_block(planes: Sequence[Plane]) -> list[int]:
    """The order of planes in memory, where each block has all of them within its stride; else as they came.

    A block may have the layers of a head side by side, and not the heads of a layer.
    """
    as_they_came = list(range(len(planes)))
    strides = {plane.block_stride_bytes for plane in planes}
    first = min(plane.base_address for plane in planes)
    past = max(plane.base_address + plane.block_bytes for plane in planes)
    if len(strides) > 1 or past - first > strides.pop():
        return as_they_came
    return sorted(as_they_came, key=lambda i: planes[i].base_address)


def _coalesce(
    planes: list[tuple[Plane, torch.UntypedStorage]], num_blocks: int
) -> list[tuple[Plane, torch.UntypedStorage]]:
    """Join planes that lie side by side within each block (block-outermost layouts).

    Otherwise a block that is contiguous over all layers would be copied layer by layer.
    """
    if num_blocks == 1:  # a stride says nothing then
        return planes
    merged: list[tuple[Plane, torch.UntypedStorage]] = []
    for plane, storage in planes:
        if merged:
            last, last_storage = merged[-1]
            joined = last.block_bytes + plane.block_bytes
            if (
                last_storage.data_ptr() == storage.data_ptr()
                and last.block_stride_bytes == plane.block_stride_bytes >= joined
                and last.base_address + last.block_bytes == plane.base_address
            ):
                merged[-1] = (Plane(last.base_address, last.block_stride_bytes, joined), storage)
                continue
        merged.append((plane, storage))
    return merged


def _byte_view(plane: Plane, storage: torch.UntypedStorage, num_blocks: int) -> torch.Tensor:
    offset = plane.base_address - storage.data_ptr()
    span = (num_blocks - 1) * plane.block_stride_bytes + plane.block_bytes
    if offset < 0 or offset + span > storage.nbytes():
        msg = f"a KV plane of {span} bytes at {offset} exceeds its storage ({storage.nbytes()})"
        raise KVLayoutError(msg)
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(
        storage, offset, (num_blocks, plane.block_bytes), (plane.block_stride_bytes, 1)
    )


def _run_lengths(items: Sequence[str]) -> Iterator[str]:
    for item, group in itertools.groupby(items):
        yield f"{sum(1 for _ in group)}x{item}"
