"""How long it takes to get a context's KV back: what the papers measure once per model and machine."""

from __future__ import annotations

from kvtier.replay.machine import Machine, Scheduled, step_s


def prefill_s(machine: Machine, n_tokens: int) -> float:
    """Seconds to compute a context from nothing, in chunks of a step, with nothing else in the batch."""
    seconds, done = 0.0, 0
    while done < n_tokens:
        chunk = min(machine.batch_tokens, n_tokens - done)
        seconds += step_s(machine, [Scheduled(done, chunk)])
        done += chunk
    return seconds


def reload_s(machine: Machine, n_tokens: int) -> float:
    """Seconds to copy a context from CPU memory, with nothing else on the link."""
    return (
        machine.link_latency_s
        + n_tokens * machine.model.kv_bytes_per_token / machine.link_bytes_per_s
    )


def restore_s(machine: Machine, n_tokens: int) -> float:
    """Seconds to get a context back that is not in GPU memory: from the CPU tier where there is one."""
    if machine.dram_bytes >= machine.block_bytes:
        return reload_s(machine, n_tokens)
    return prefill_s(machine, n_tokens)
