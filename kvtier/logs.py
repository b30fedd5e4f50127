"""Where kvtier's log goes inside vLLM's processes."""

from __future__ import annotations

import logging


def join_vllms_log() -> None:
    """Say things where vLLM does, unless the program has set up its own logging."""
    ours, vllms = logging.getLogger("kvtier"), logging.getLogger("vllm")
    if ours.handlers or logging.getLogger().handlers:
        return
    for handler in vllms.handlers:
        ours.addHandler(handler)
    # kvtier's warnings are few, and tell why KV is lost: they come through whatever vLLM's level is.
    ours.setLevel(min(vllms.level, logging.WARNING))
