"""What is written for a GPU, held against CUDA's own compiler and headers, which need none."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from kvtier.copies import driver, issue, lane
from kvtier.copies.gpu_kernel import BLOCK_THREADS, SOURCE

COMPILER: Final = shutil.which("g++")


def _toolkit(pattern: str) -> Path | None:
    """The newest such file of NVIDIA's packages in this environment."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec is not None else None
    found = [file for place in places or () for file in Path(place).glob(pattern)]
    return max(found, default=None)


NVRTC: Final = _toolkit("cu*/lib/libnvrtc.so.*")
HEADER: Final = _toolkit("cu*/include/cuda.h")
REGISTERS_OF_A_MULTIPROCESSOR: Final = 65_536


def compile_for(architecture: str) -> str:
    """What NVRTC says of the kernel; it must compile."""
    assert NVRTC is not None
    nvrtc = ctypes.CDLL(str(NVRTC))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    code = SOURCE.read_bytes()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, b"copy.cu", 0, None, None) == 0
    # As CuPy is asked to compile it, and told to say what it needs.
    options = [b"--std=c++17", f"--gpu-architecture={architecture}".encode(), b"--ptxas-options=-v"]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * 3)(*options))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    assert not failed, log.value.decode()
    return log.value.decode()


@pytest.mark.skipif(NVRTC is None, reason="needs nvidia-cuda-nvrtc")
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"])
def test_the_kernel_keeps_its_words_in_registers(architecture: str) -> None:
    log = compile_for(architecture)
    # Words that are spilled to memory are not in flight.
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log
    used = re.search(r"Used (\d+) registers", log)
    assert used is not None
    assert int(used[1]) <= REGISTERS_OF_A_MULTIPROCESSOR // BLOCK_THREADS


CHECKS: Final = """
#include <cstddef>
#include <type_traits>
#include <cuda.h>
#include <cudaTypedefs.h>

// How many words a function takes, where each is as wide as a pointer or narrower.
template <typename... A>
constexpr std::size_t words(CUresult (*)(A...)) {
  static_assert(((std::is_scalar_v<A> && !std::is_floating_point_v<A> && sizeof(A) <= 8) && ...));
  return sizeof...(A);
}
"""
TYPES: Final = {
    "cuMemcpyBatchAsync": f"v{driver._BATCH_SINCE}",
    "cuMemcpyAsync": "v4000",
    "cuEventRecord": "v2000",
    "cuEventQuery": "v2000",
    "cuEventSynchronize": "v2000",
}
"""The version of each function that a name without one has."""


def checks() -> list[str]:
    """What must be so, in C++."""
    fields = {
        "src_access_order": "srcAccessOrder",
        "src_location": "srcLocHint",
        "dst_location": "dstLocHint",
        "flags": "flags",
    }
    ours = lane.CopyAttributes
    found = [f"sizeof(CUmemcpyAttributes_v1) == {ctypes.sizeof(ours)}"]
    for name, theirs in fields.items():
        field = getattr(ours, name)
        found += [
            f"offsetof(CUmemcpyAttributes_v1, {theirs}) == {field.offset}",
            f"sizeof(CUmemcpyAttributes_v1::{theirs}) == {field.size}",
        ]
    found += [
        f"CU_MEMCPY_SRC_ACCESS_ORDER_STREAM == {lane._ORDER_STREAM}",
        f"CU_MEMCPY_SRC_ACCESS_ORDER_ANY == {lane._ORDER_ANY}",
        f"CUDA_SUCCESS == {driver.SUCCESS}",
        f"CUDA_ERROR_NOT_READY == {driver.NOT_READY}",
        f"CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM == {driver._HOST_POINTER_ATTRIBUTE}",
    ]
    found += [
        f"words(PFN_{name}_{TYPES[name]}{{}}) == {n_words}"
        for name, n_words in issue._WORDS.items()
    ]
    numbers = ", ".join(["unsigned int"] * issue._LAUNCH_INTS)
    launch = f"CUresult (*)(CUfunction, {numbers}, CUstream, void**, void**)"
    look_up = "CUresult (*)(const char*, void**, int, cuuint64_t, CUdriverProcAddressQueryResult*)"
    batch = (
        "CUresult (*)(CUdeviceptr*, CUdeviceptr*, std::size_t*, std::size_t, CUmemcpyAttributes_v1*, "
        "std::size_t*, std::size_t, std::size_t*, CUstream)"
    )
    return [
        *found,
        f"std::is_same_v<PFN_cuLaunchKernel_v4000, {launch}>",
        f"std::is_same_v<PFN_cuGetProcAddress_v12000, {look_up}>",
        f"std::is_same_v<PFN_cuMemcpyBatchAsync_{TYPES['cuMemcpyBatchAsync']}, {batch}>",
    ]


@pytest.mark.skipif(COMPILER is None or HEADER is None, reason="needs g++ and nvidia-cuda-runtime")
def test_the_driver_is_called_as_its_headers_say(tmp_path: Path) -> None:
    assert COMPILER is not None
    assert HEADER is not None
    assert issue._WORDS.keys() | {"cuLaunchKernel"} == set(driver.FUNCTIONS)
    source = tmp_path / "checks.cpp"
    source.write_text(CHECKS + "".join(f"static_assert({check});\n" for check in checks()))
    command = [COMPILER, "-std=c++17", "-fsyntax-only", f"-I{HEADER.parent}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
