"""The number format that the demo's engine computes in."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

Dtype = Literal["bfloat16", "float32"]
BYTES: Final[dict[Dtype, int]] = {"bfloat16": 2, "float32": 4}
_BFLOAT16: Final = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
"""As Linux names these instructions, on x86-64 and on ARM."""


def engine_dtype(*, on_cpu: bool, cpuinfo: Path = Path("/proc/cpuinfo")) -> Dtype:
    """Return `bfloat16` where the hardware multiplies it, else `float32`.

    A CPU without such instructions takes up to seventy times as long for bfloat16 as for float32 (512 x 576 times
    576 x 1536 on one core of an AMD EPYC with AVX2, PyTorch 2.13: 1.1 and 78 GFLOP/s).

    Args:
        on_cpu: The engine computes on this machine's CPU.
        cpuinfo: Says what that can.
    """
    if not on_cpu:
        return "bfloat16"
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "float32"
    return "bfloat16" if _BFLOAT16 & set(text.split()) else "float32"
