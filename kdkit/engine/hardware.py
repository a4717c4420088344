"""What the machine can do, found without importing torch."""

from __future__ import annotations

import ctypes
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, Literal

__all__ = ["cpu_name", "cuda_devices", "pick_device", "resolve_precision", "threads"]

_CPUINFO: Final = Path("/proc/cpuinfo")
_BF16_FLAGS: Final = frozenset({"amx_bf16", "avx512_bf16"})
_CAPABILITY_MAJOR: Final = 75
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR of the CUDA driver API."""
_AMPERE: Final = 8


def resolve_precision(requested: str) -> Literal["bf16", "fp32"]:
    """``auto`` is bf16 where the hardware multiplies it faster than fp32, else fp32; other values are returned."""
    if requested == "bf16":
        return "bf16"
    if requested == "fp32":
        return "fp32"
    devices = cuda_devices()
    if devices:
        return "bf16" if all(major >= _AMPERE for _, major in devices) else "fp32"
    return "bf16" if _BF16_FLAGS & cpu_flags() else "fp32"


def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of the first processor; empty where the system does not say."""
    return frozenset(_cpuinfo("flags").split())


def cpu_name() -> str:
    """Marketing name of the processor, or its architecture."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def threads() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def torch_version() -> str | None:
    """Version of the installed torch with its build (``2.13.0+cpu``), or None."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def cuda_devices() -> tuple[tuple[str, int], ...]:
    """Name and major compute capability of every CUDA device that the installed torch could use."""
    if "+cpu" in (torch_version() or "+cpu"):
        return ()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    # Every call returns 0 on success; a driver without devices (or with none visible) fails in cuInit.
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_cuda_device(driver, index) for index in range(count.value))


def _cuda_device(driver: ctypes.CDLL, index: int) -> tuple[str, int]:
    device, major, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(128)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
    driver.cuDeviceGetName(name, len(name), device)
    return name.value.decode(errors="replace"), major.value


def pick_device() -> str:
    """``cuda`` or ``cpu``. Imports torch only when the driver reports a device."""
    if not cuda_devices():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def memory_bytes() -> int:
    """Physical memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
