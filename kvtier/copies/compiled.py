"""Loops over arrays, compiled where numba is: they hold no interpreter lock while they run."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)


@functools.cache
def compiled(loop: Callable[..., Any], signature: str) -> Callable[..., Any]:
    """Return the loop compiled for these types, or from numba's cache on disk; without numba as it is.

    numba is imported here and not with the module: vLLM walks ``sys.modules`` while it reads its
    configuration and fails on llvmlite, so only a worker may import it.
    """
    try:
        numba: Any = importlib.import_module("numba")
    except ImportError:
        return loop
    try:
        made: Callable[..., Any] = numba.njit(signature, nogil=True, cache=True)(loop)
    except RuntimeError as error:  # no writable directory for the cache
        logger.info("%s is compiled at each start: %s", loop.__name__, error)
        made = numba.njit(signature, nogil=True)(loop)
    return made
