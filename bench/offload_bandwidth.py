"""GB/s of copies between the KV cache and host memory: the same as ``kvtier bench link``.

python bench/offload_bandwidth.py [--quick] [--json FILE] [--png FILE] [--check-model]
"""

from __future__ import annotations

import typer

from kvtier.linkbench.command import link

if __name__ == "__main__":
    typer.run(link)
