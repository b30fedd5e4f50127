"""What it is replayed on: a model, the GPUs that serve it, the link to CPU memory, and how long steps take.

Data files in `machines/` hold the known ones (`machines.presets`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvtier.replay.step_clock import StepClock


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A transformer's shape, as far as speed and KV size depend on it.

    Attributes:
        name: As on the command line.
        n_parameters: All weights.
        n_active_parameters: Weights used per token (fewer in a mixture of experts).
        n_layers: Attention layers.
        n_heads: Query heads.
        n_kv_heads: Key/value heads.
        head_dim: Width of a head.
        hidden_size: Width of the residual stream.
        weight_bytes: Bytes a weight.
        kv_bytes: Bytes a KV element.
        source: Where the figures come from.
    """

    name: str
    n_parameters: float
    n_active_parameters: float
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_size: int
    weight_bytes: float = 2.0
    kv_bytes: float = 2.0
    source: str = ""

    @property
    def kv_bytes_per_token(self) -> float:
        """Keys and values of one token over all layers."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * self.kv_bytes


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One accelerator.

    Attributes:
        name: As on the command line.
        flops_per_s: Peak dense operations per second at the model's precision.
        memory_bytes_per_s: Peak bandwidth of its memory.
        memory_bytes: Size of its memory.
        link_bytes_per_s: Bandwidth to CPU memory, each way.
        compute_efficiency: Share of the peak that prefill reaches.
        memory_efficiency: Share of the bandwidth that decoding reaches.
        step_overhead_s: Time of a step besides: scheduling, launches, sampling.
        source: Where the figures come from.
    """

    name: str
    flops_per_s: float
    memory_bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float
    compute_efficiency: float = 0.5
    memory_efficiency: float = 0.8
    step_overhead_s: float = 0.004
    source: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """A model on GPUs.

    Attributes:
        model: The model.
        gpu: Each of the GPUs.
        n_gpus: Tensor parallel size.
        gpu_kv_bytes: Memory for KV, all GPUs together.
        dram_bytes: CPU memory for KV; 0 for no CPU tier.
        link_bytes_per_s: Bandwidth between GPUs and CPU memory each way, all GPUs together.
        link_latency_s: Fixed cost of one transfer.
        block_tokens: Tokens of a KV block.
        batch_tokens: Most tokens of a step.
        max_running: Most running requests.
        clock: How long steps take where that was measured; None: by the roofline.
    """

    model: ModelSpec
    gpu: GpuSpec
    n_gpus: int
    gpu_kv_bytes: float
    dram_bytes: float
    link_bytes_per_s: float
    link_latency_s: float = 0.001
    block_tokens: int = 64
    batch_tokens: int = 8192
    max_running: int = 256
    clock: StepClock | None = None

    @property
    def block_bytes(self) -> int:
        """KV of a block."""
        return int(self.block_tokens * self.model.kv_bytes_per_token)

    @property
    def gpu_blocks(self) -> int:
        """KV blocks in GPU memory."""
        return int(self.gpu_kv_bytes // self.block_bytes)


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One request's part of a step.

    Attributes:
        cached_tokens: Tokens of its context whose KV exists.
        new_tokens: Tokens that the step computes.
    """

    cached_tokens: int
    new_tokens: int


def step_s(machine: Machine, parts: Iterable[Scheduled]) -> float:
    """Duration of a step: by the machine's clock, else by a roofline: the longer of compute and memory traffic, plus the overhead.

    Compute: ``2 * active parameters`` operations a token for the matrix products, plus ``4 * layers * heads *
    head_dim * new * (cached + new / 2)`` for causal attention (QK^T and AV, two operations per multiply-add).
    Memory: all weights once, plus the KV of every context that is read. Both are spread over the GPUs.

    Args:
        machine: The machine.
        parts: The requests of the step; without any, a step takes the overhead.

    Returns:
        Seconds.
    """
    if machine.clock is not None:
        return machine.clock.step_s(parts)
    model, gpu = machine.model, machine.gpu
    operations = kv_read_bytes = 0.0
    n_tokens = 0
    per_pair = 4.0 * model.n_layers * model.n_heads * model.head_dim
    for part in parts:
        new, cached = part.new_tokens, part.cached_tokens
        n_tokens += new
        operations += per_pair * new * (cached + new / 2)
        kv_read_bytes += (cached + new) * model.kv_bytes_per_token
    if not n_tokens:
        return gpu.step_overhead_s
    operations += 2.0 * model.n_active_parameters * n_tokens
    compute_s = operations / (machine.n_gpus * gpu.flops_per_s * gpu.compute_efficiency)
    traffic_bytes = model.n_parameters * model.weight_bytes + kv_read_bytes
    bandwidth = machine.n_gpus * gpu.memory_bytes_per_s * gpu.memory_efficiency
    return max(compute_s, traffic_bytes / bandwidth) + gpu.step_overhead_s
