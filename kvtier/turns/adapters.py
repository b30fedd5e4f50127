"""Which LoRA adapter's KV a request computes, told by the adapter's files and not by its name alone.

vLLM names an adapter's KV by the adapter's name and path. That is enough for a cache that ends with the engine; the
CPU tier's copies are there after a restart, when an adapter that was trained on may lie at the same path.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvtier.checkpoints import fingerprint, hub_commit

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

ADAPTER_FILES: Final = ("*.safetensors", "*.bin", "*.pt", "adapter_config.json")
MAX_ADAPTERS: Final = 4096
LOOK_AGAIN_S: Final = 1.0


def weights_of(path: str) -> str:
    """What tells the weights at an adapter's path, or of this name on the hub; empty if nothing does."""
    try:
        if Path(path).expanduser().is_dir():
            return fingerprint(str(Path(path).expanduser()), ADAPTER_FILES)
        return "" if Path(path).is_absolute() else hub_commit(path, "adapter_config.json")
    except (OSError, RuntimeError, ValueError):
        # Unreadable, a home that nobody has, no path at all: nothing tells the weights.
        return ""


class Adapters:
    """Names adapters for the CPU tier's keys.

    Args:
        weights: See `weights_of`.
        clock: Monotonic, seconds.
    """

    def __init__(
        self,
        weights: Callable[[str], str] = weights_of,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._weights = weights
        self._clock = clock
        self._looked: OrderedDict[str, tuple[float, str]] = OrderedDict()
        # By vLLM's id, which is new for each adapter that is loaded, unless it is loaded in place.
        self._first_seen: OrderedDict[tuple[int, str, str], str] = OrderedDict()
        self._told: set[str] = set()

    def name_of(self, request: Any) -> tuple[str | None, bool]:
        """The request's adapter, and whether its KV may leave the GPU; None without an adapter.

        An adapter whose files have changed since its first request is pinned only: nobody tells when workers
        load it anew, so whether KV is of the old or of the new weights is not known. A change between vLLM's
        load and the first request, or while a turn is under way, is not noticed in time.
        """
        lora = getattr(request, "lora_request", None)
        if lora is None:
            return None, True
        name, path = str(lora.lora_name), str(lora.lora_path)
        key = (int(lora.lora_int_id), name, path)
        if key not in self._first_seen:
            # vLLM has just loaded it: what was seen a moment ago may be the one before.
            self._looked.pop(path, None)
        weights = self._weights_now(path)
        first = self._first_seen.setdefault(key, weights)
        self._first_seen.move_to_end(key)
        if len(self._first_seen) > MAX_ADAPTERS:
            self._first_seen.popitem(last=False)
        if not weights:
            self._tell(name, f"its files are not found at {path}")
        elif weights != first:
            self._tell(name, f"its files at {path} have changed since it was first used")
        return f"{name}:{path}:{first}", bool(weights) and weights == first

    def _weights_now(self, path: str) -> str:
        """As of a moment ago: requests come faster than adapters change, and files may be far away."""
        now_s, known = self._clock(), self._looked.get(path)
        if known is None or now_s - known[0] >= LOOK_AGAIN_S:
            known = now_s, self._weights(path)
            self._looked[path] = known
            self._looked.move_to_end(path)
            if len(self._looked) > MAX_ADAPTERS:
                self._looked.popitem(last=False)
        return known[1]

    def _tell(self, name: str, why: str) -> None:
        if name not in self._told and len(self._told) < MAX_ADAPTERS:
            self._told.add(name)
            logger.warning("kvtier: KV of LoRA adapter %s is pinned only: %s", name, why)
