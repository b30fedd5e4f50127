"""The small chat model cut to its first layers: its tokenizer, and a fraction of its time."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = "model.safetensors"


def write_short_model(source: Path, target: Path, n_layers: int = 3) -> None:
    """Write `source` to the new directory `target`, with so many of its layers."""
    from safetensors import safe_open  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    shutil.copytree(source, target, ignore=shutil.ignore_patterns(WEIGHTS))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": n_layers}))
    with safe_open(source / WEIGHTS, framework="pt") as weights:
        kept = {
            name: weights.get_tensor(name)
            for name in weights.keys()  # noqa: SIM118 - it is no mapping
            if _layer(name) < n_layers
        }
    save_file(kept, target / WEIGHTS, metadata={"format": "pt"})


def _layer(name: str) -> int:
    """Which layer a weight belongs to; -1: none of them."""
    head, _, rest = name.partition(".layers.")
    return int(rest.partition(".")[0]) if rest and head else -1
