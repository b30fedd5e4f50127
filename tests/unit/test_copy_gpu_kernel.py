"""The copy kernel's source, compiled for the CPU and run thread by thread; and when it is done without."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import numpy as np
import pytest
import torch

from kvtier.copies.driver import Driver
from kvtier.copies.gpu_kernel import BLOCK_THREADS, NAME, SOURCE, grid_blocks, load_kernel

COMPILER = shutil.which("g++")
# The kernel needs no barrier, so its threads may run one after the other.
SHIM = f"""
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(n)
struct alignas(16) uint4 {{ unsigned x, y, z, w; }};
struct Index {{ int x; }};
static Index threadIdx, blockIdx, gridDim, blockDim;
template <typename T> T __ldcs(const T* from) {{ return *from; }}
template <typename T> void __stcs(T* to, T value) {{ *to = value; }}
#include "{SOURCE}"
extern "C" void run(int grid, int block, const unsigned long long* targets,
                    const unsigned long long* sources, const long long* sizes, long long count) {{
  gridDim.x = grid; blockDim.x = block;
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < block; ++threadIdx.x)
      {NAME}(targets, sources, sizes, count);
}}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    directory = tmp_path_factory.mktemp("kernel")
    source, target = directory / "shim.cpp", directory / "shim.so"
    source.write_text(SHIM)
    # Misaligned words would be found here as they are on a GPU, and not on this CPU otherwise.
    checks = ["-fsanitize=alignment", "-fno-sanitize-recover", "-Wno-unknown-pragmas"]
    assert COMPILER
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", *checks]
    subprocess.run([*command, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("grid", [1, 3])
def test_every_run_is_copied_in_the_widest_words_it_allows(library: ctypes.CDLL, grid: int) -> None:
    rng = np.random.default_rng(0)
    lengths = [1, 2, 3, 4, 8, 12, 16, 31, 32, 48, 511, 512, 4096, 4112, 8192, 8200, 20_000, 65_536]
    runs = [
        (to, at, n)
        for n in lengths
        for to, at in ((0, 0), (16, 32), (8, 16), (4, 12), (1, 0), (3, 5))
    ]
    pitch = max(lengths) + 64
    source = rng.integers(0, 256, pitch * len(runs) + 64, np.uint8)
    target = rng.integers(0, 256, source.size, np.uint8)
    shift = [-array.ctypes.data % 64 for array in (target, source)]
    expected = target.copy()
    table = np.zeros((3, len(runs)), np.int64)
    for i, (to_offset, at_offset, n) in enumerate(runs):
        to, at = shift[0] + i * pitch + to_offset, shift[1] + i * pitch + at_offset
        table[:, i] = target.ctypes.data + to, source.ctypes.data + at, n
        expected[to : to + n] = source[at : at + n]
    addresses = (ctypes.c_void_p(row.ctypes.data) for row in table)
    library.run(grid, BLOCK_THREADS, *addresses, ctypes.c_longlong(len(runs)))
    np.testing.assert_array_equal(target, expected)


def test_the_grid_is_a_small_part_of_the_device() -> None:
    assert [grid_blocks(n) for n in (4, 84, 132, 148)] == [2, 5, 8, 9]


def test_without_mapped_memory_or_cupy_copies_go_by_dma(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert load_kernel(device, Driver({})) is None
    monkeypatch.setattr(Driver, "maps_host_memory", lambda *_: True)
    assert load_kernel(device, Driver({})) is None


def test_the_kernel_is_compiled_by_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    class Device:
        attributes = {"MultiProcessorCount": 132}  # noqa: RUF012

        def __init__(self, index: int) -> None:
            assert index == 1

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def module(*, code: str, options: tuple[str, ...]) -> object:
        compiled.append(code)
        return SimpleNamespace(
            get_function=lambda name: SimpleNamespace(kernel=SimpleNamespace(ptr=len(name)))
        )

    cupy = SimpleNamespace(cuda=SimpleNamespace(Device=Device), RawModule=module)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(Driver, "maps_host_memory", lambda _, index: index == 1)
    kernel = load_kernel(torch.device("cuda", 1), Driver({}))
    assert kernel is not None
    assert (kernel.function, kernel.grid_blocks) == (len(NAME), 8)
    assert compiled == [Path(SOURCE).read_text(encoding="utf-8")]
