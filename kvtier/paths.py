"""Where kvtier keeps files between runs."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """Models and calibration profiles: ``KVTIER_CACHE_DIR``, else the user's cache directory."""
    return Path(os.environ.get("KVTIER_CACHE_DIR") or platformdirs.user_cache_dir("kvtier"))
