"""Puts the LMCache server's memory near the GPUs, where the machine has several memory nodes.

A copy whose pages lie on the far socket crosses the link between the sockets, which other traffic uses
too. The kernel's default is the node of whichever thread touches a page first.
"""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Final

_PCI_DEVICES: Final = Path("/sys/bus/pci/devices")
_NVIDIA: Final = "0x10de"
_DISPLAY_CLASS: Final = "0x03"
_SET_MEMPOLICY: Final = {"x86_64": 238, "aarch64": 237}
_PREFERRED: Final = 1
_INTERLEAVE: Final = 3
_MASK_BITS: Final = 64


def gpu_nodes(devices: Path = _PCI_DEVICES) -> set[int]:
    """Memory nodes that the host's NVIDIA GPUs are attached to; empty where the kernel does not say."""
    nodes = set()
    for device in devices.glob("*"):
        if _read(device / "vendor") != _NVIDIA:
            continue
        if not _read(device / "class").startswith(_DISPLAY_CLASS):
            continue
        node = _read(device / "numa_node")
        if node.isdecimal():  # -1: a machine with one node
            nodes.add(int(node))
    return nodes


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def place_memory(nodes: set[int], libc: ctypes.CDLL) -> bool:
    """Have this process, and the program it becomes, take memory from these nodes first.

    One node is preferred, several are used in turn; both fall back to others when they are full.
    Safe between fork and exec.

    Returns:
        Whether the kernel accepted it. Nothing depends on it but speed.
    """
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None or not nodes or max(nodes) >= _MASK_BITS:
        return False
    mask = ctypes.c_ulong(sum(1 << node for node in nodes))
    policy = _PREFERRED if len(nodes) == 1 else _INTERLEAVE
    # The kernel reads one bit less than it is told.
    return not libc.syscall(number, policy, ctypes.byref(mask), ctypes.c_ulong(_MASK_BITS + 1))
