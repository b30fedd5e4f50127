"""A connector that measures and does nothing else: `kvtier calibrate` starts its engine with it.

It is kvtier's own, passive, so the engine chooses the memory layout that it will have with kvtier, and
the profile gets the name under which that engine will look for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from kvtier.connector import KVTierConnector
from kvtier.orders import StepOrders

REPORT_OPTION: Final = "probe_report"
"""In the connector's extra config: file to write the profile's path to."""
PASSIVE: Final[dict[str, object]] = {
    "kvtier.mode": "off",
    "kvtier.tier": "off",
    "kvtier.control": "off",
    # The measurement is asked for here, whatever profile there is.
    "kvtier.calibrate": "off",
}


class ProbeConnector(KVTierConnector):
    """See the module's docstring."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None, **_: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._probed = (vllm_config, kv_cache_config)

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Measure the link of the worker's device, and say where the profile is."""
        from kvtier import assembly  # noqa: PLC0415 - imports torch

        vllm_config, kv_cache_config = self._probed
        half = assembly.build_worker_half(vllm_config, kv_cache_config, self.settings)
        half.register(kv_caches)
        half.submit(StepOrders(measure=True))
        calibration = half.take_calibration()
        half.close()
        if calibration is not None:
            extra = vllm_config.kv_transfer_config.kv_connector_extra_config
            report = json.dumps({"profile": calibration.profile_path})
            Path(extra[REPORT_OPTION]).write_text(report, encoding="utf-8")
