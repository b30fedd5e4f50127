"""What kvtier knows of the engine it runs in, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

from kvtier.chunk_keys import namespace

if TYPE_CHECKING:
    from kvtier.programs import ProgramId


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Fixed facts of one engine.

    Attributes:
        owner: Name of this engine, unique on its host.
        identity: Everything the KV bytes depend on, engine-wide; goes into the key namespace.
        block_tokens: Tokens a GPU block.
        block_bytes: KV bytes of a block over all layers, of one rank.
        chunk_tokens: Tokens a chunk of the CPU tier, a multiple of `block_tokens`.
        ranks: Workers that each hold a part of the KV.
        pin_budget_fraction: Most of the GPU blocks that pins may keep.
        n_parameters: Of the model, for FLOP estimates before anything was measured.
        n_layers: Attention layers.
        attention_width: Query heads times head size.
        on_cpu: KV cache in host memory: copies compete with compute for cores.
        batch_requests: Most requests that run at a time; 0: unknown.
        step_tokens: Most tokens of a step; 0: unknown.
        trailer_bytes: Taken behind each chunk in its slot, for its checksum.
    """

    owner: str
    identity: tuple[tuple[str, str], ...]
    block_tokens: int
    block_bytes: int
    chunk_tokens: int
    ranks: int
    pin_budget_fraction: float
    n_parameters: int
    n_layers: int
    attention_width: int
    on_cpu: bool
    trailer_bytes: int = 0
    batch_requests: int = 0
    step_tokens: int = 0

    @property
    def chunk_blocks(self) -> int:
        """Blocks a chunk."""
        return self.chunk_tokens // self.block_tokens

    @property
    def slot_bytes(self) -> int:
        """KV bytes of a chunk of one rank."""
        return self.chunk_blocks * self.block_bytes

    @property
    def kv_bytes_per_token(self) -> float:
        """KV bytes of a token, all ranks."""
        return self.block_bytes * self.ranks / self.block_tokens

    def program_handle(self, program: ProgramId) -> str:
        """Name of a program in the CPU tier, the same in every engine for a named program.

        A program that only this engine can recognise (by prefix) is its own.
        """
        scope = "" if program.kind == "named" else self.owner
        text = repr((program.tenant, program.kind, program.name, scope))
        return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()

    def blocks_of(self, n_tokens: int) -> int:
        """Blocks that hold `n_tokens` tokens."""
        return -(-n_tokens // self.block_tokens)

    def namespace(self, epoch: str = "") -> str:
        """Key namespace of this engine's KV; `epoch` names its weights once they may have changed."""
        return namespace(**dict(self.identity), epoch=epoch)


@dataclass(slots=True)
class StepFacts:
    """One scheduled step.

    Attributes:
        scheduled_tokens: Tokens that the step computes.
        running_requests: Requests that the step serves.
        preempted: Ids of running requests that lost their blocks to others.
        prefill: (cached, new) tokens when the step is one request's prefill and little else.
        built_s: When it was scheduled; set by the scheduler half.
    """

    scheduled_tokens: int = 0
    running_requests: int = 0
    preempted: tuple[str, ...] = ()
    prefill: tuple[int, int] | None = None
    built_s: float = 0.0
