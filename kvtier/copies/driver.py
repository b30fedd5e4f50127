"""The few functions of the CUDA driver that copies are issued with, by address.

libcuda comes with the driver, so nothing needs to be installed; the addresses go into compiled code
(`copies.issue`) that calls them without the interpreter lock.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Final

_LIBRARY: Final = "libcuda.so.1"
_BATCH_SINCE: Final = 12080
"""CUDA version that introduced ``cuMemcpyBatchAsync``; asked for by version, since 13.0 changed it."""
FUNCTIONS: Final = (
    "cuMemcpyBatchAsync",
    "cuMemcpyAsync",
    "cuLaunchKernel",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
)
SUCCESS: Final = 0
NOT_READY: Final = 600
_HOST_POINTER_ATTRIBUTE: Final = 91
"""CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM."""


class DriverError(RuntimeError):
    """The CUDA driver is missing or too old for copies."""


@dataclass(frozen=True)
class Driver:
    """Addresses of driver functions.

    Attributes:
        addresses: by name, all of `FUNCTIONS`.
        has_batch: whether ``cuMemcpyBatchAsync`` is there; its address must not be called otherwise.
    """

    addresses: dict[str, int]
    has_batch: bool = True
    library: ctypes.CDLL | None = field(default=None, repr=False)

    def error_text(self, code: int) -> str:
        """Name of an error code, as the driver gives it."""
        name = ctypes.c_char_p()
        if self.library is None or self.library.cuGetErrorName(code, ctypes.byref(name)):
            return f"CUDA error {code}"
        return f"CUDA error {code} ({(name.value or b'').decode()})"

    def maps_host_memory(self, device_index: int) -> bool:
        """Whether kernels may use the host's addresses of registered memory as they are."""
        value, device = ctypes.c_int(), ctypes.c_int()
        return (
            self.library is not None
            and not self.library.cuDeviceGet(ctypes.byref(device), device_index)
            and not self.library.cuDeviceGetAttribute(
                ctypes.byref(value), _HOST_POINTER_ATTRIBUTE, device
            )
            and bool(value.value)
        )


def load_driver() -> Driver:
    """Find the functions.

    Raises:
        DriverError: no CUDA driver, or one without the functions of CUDA 12.
    """
    try:
        library = ctypes.CDLL(_LIBRARY)
        look_up = library.cuGetProcAddress_v2
        required = {name: _address(getattr(library, name)) for name in FUNCTIONS[1:]}
    except (OSError, AttributeError) as error:
        raise DriverError(f"no CUDA driver that can copy for kvtier: {error}") from error
    batch, status = ctypes.c_void_p(), ctypes.c_int()
    code = look_up(
        FUNCTIONS[0].encode(),
        ctypes.byref(batch),
        _BATCH_SINCE,
        ctypes.c_uint64(0),
        ctypes.byref(status),
    )
    has_batch = code == SUCCESS and bool(batch.value)
    address = batch.value if has_batch and batch.value else required["cuMemcpyAsync"]
    return Driver({FUNCTIONS[0]: address, **required}, has_batch, library)


def _address(function: object) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    if not address:
        raise DriverError("a function of the CUDA driver has no address")
    return address
