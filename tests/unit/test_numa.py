"""The server's memory is put where the GPUs are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.server import numa


def device(root: Path, name: str, vendor: str, kind: str, node: str | None) -> None:
    directory = root / name
    directory.mkdir()
    (directory / "vendor").write_text(f"{vendor}\n")
    (directory / "class").write_text(f"{kind}\n")
    if node is not None:
        (directory / "numa_node").write_text(f"{node}\n")


def test_the_nodes_are_those_of_nvidias_gpus(tmp_path: Path) -> None:
    device(tmp_path, "0000:17:00.0", "0x10de", "0x030200", "0")
    device(tmp_path, "0000:65:00.0", "0x10de", "0x030000", "1")
    device(tmp_path, "0000:66:00.0", "0x10de", "0x068000", "2")  # a switch between GPUs
    device(tmp_path, "0000:01:00.0", "0x1a03", "0x030000", "3")  # another's display
    device(tmp_path, "0000:02:00.0", "0x10de", "0x030200", "-1")
    device(tmp_path, "0000:03:00.0", "0x10de", "0x030200", None)
    assert numa.gpu_nodes(tmp_path) == {0, 1}
    assert numa.gpu_nodes(tmp_path / "none") == set()


class Kernel:
    def __init__(self, answer: int = 0) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self.answer = answer

    def syscall(self, number: int, policy: int, mask: object, _: object) -> int:
        self.calls.append((number, policy, mask._obj.value))  # type: ignore[attr-defined]
        return self.answer


@pytest.mark.parametrize(
    ("nodes", "policy", "mask"), [({1}, 1, 0b10), ({0, 2}, 3, 0b101)], ids=["one", "several"]
)
def test_one_node_is_preferred_and_several_are_used_in_turn(
    nodes: set[int], policy: int, mask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numa.platform, "machine", lambda: "x86_64")
    kernel = Kernel()
    assert numa.place_memory(nodes, kernel)  # type: ignore[arg-type]
    assert kernel.calls == [(238, policy, mask)]
    assert not numa.place_memory(nodes, Kernel(-1))  # type: ignore[arg-type]


def test_nothing_is_asked_of_the_kernel_without_a_node_or_on_an_unknown_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = Kernel()
    assert not numa.place_memory(set(), kernel)  # type: ignore[arg-type]
    monkeypatch.setattr(numa.platform, "machine", lambda: "abacus")
    assert not numa.place_memory({0}, kernel)  # type: ignore[arg-type]
    assert kernel.calls == []


@pytest.mark.skipif(
    not Path("/sys/devices/system/node/node0").exists(), reason="the kernel has no memory nodes"
)
def test_the_kernel_takes_the_policy_and_a_child_inherits_it() -> None:
    code = (
        "import ctypes, os, subprocess, sys; from kvtier.server.numa import place_memory\n"
        "print(place_memory({0}, ctypes.CDLL(None)), flush=True)\n"
        "os.execvp('cat', ['cat', '/proc/self/numa_maps'])\n"
    )
    lines = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    ).stdout.splitlines()
    if lines[0] == "False":  # a container may forbid the call; then nothing has changed
        return
    assert {line.split()[1] for line in lines[1:]} == {"prefer:0"}
