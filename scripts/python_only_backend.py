"""A build backend that packs a source tree's Python files as they are.

`fetch_vllm_sources.py` puts a copy of this file where the package's own backend would be
found, as `setuptools.build_meta`. vLLM's backend needs torch, a compiler and minutes; the
scheduler needs only the Python files. Runs in the installer's build process, where nothing
but the standard library can be imported.
"""

from __future__ import annotations

import csv
import io
import zipfile
from email.parser import Parser
from pathlib import Path

PACKAGE = "vllm"
_WHEEL = """\
Wheel-Version: 1.0
Generator: python_only_backend
Root-Is-Purelib: true
Tag: py3-none-any
"""


def get_requires_for_build_wheel(config_settings: object = None) -> list[str]:  # noqa: ARG001
    """Nothing is needed to copy files."""
    return []


def build_wheel(
    wheel_directory: str,
    config_settings: object = None,  # noqa: ARG001
    metadata_directory: str | None = None,  # noqa: ARG001
) -> str:
    """Pack `PACKAGE/**/*.py` of the unpacked source distribution in the current directory.

    Args:
        wheel_directory: Where the wheel goes.
        config_settings: Unused (PEP 517).
        metadata_directory: Unused (PEP 517).

    Returns:
        The wheel's file name.
    """
    told = Parser().parsestr(Path("PKG-INFO").read_text(encoding="utf-8"))
    version = told["Version"]
    dist_info = f"{PACKAGE}-{version}.dist-info"
    file_name = f"{PACKAGE}-{version}-py3-none-any.whl"
    record = io.StringIO()
    # Not joined by hand: a file name may hold a comma.
    rows = csv.writer(record, lineterminator="\n")
    with zipfile.ZipFile(
        Path(wheel_directory) / file_name, "w", zipfile.ZIP_DEFLATED, compresslevel=1
    ) as wheel:
        for path in sorted(Path(PACKAGE).rglob("*.py")):
            wheel.write(path, str(path))
            rows.writerow([path, "", ""])
        metadata = f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {version}\n"
        for name, text in (("METADATA", metadata), ("WHEEL", _WHEEL)):
            wheel.writestr(f"{dist_info}/{name}", text)
            rows.writerow([f"{dist_info}/{name}", "", ""])
        rows.writerow([f"{dist_info}/RECORD", "", ""])
        wheel.writestr(f"{dist_info}/RECORD", record.getvalue())
    return file_name
