"""Peak memory of a stretch of work, and giving back what earlier work held."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch

__all__ = ["PeakMemory", "release_memory"]

_STATUS: Final = Path("/proc/self/status")
_RESET: Final = Path("/proc/self/clear_refs")


class PeakMemory:
    """Context manager; ``peak_bytes`` is the device's allocated peak, or the process's resident peak on a CPU.

    None where the system cannot reset its peak counter: a peak that belongs to earlier work would be worse than none.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._resets = False
        self.peak_bytes: int | None = None

    def __enter__(self) -> Self:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return self
        try:
            _RESET.write_text("5", encoding="ascii")
            self._resets = True
        except OSError:
            self._resets = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            self.peak_bytes = int(torch.cuda.max_memory_allocated())
        elif self._resets:
            self.peak_bytes = _high_water_mark()


def release_memory() -> None:
    """Return the memory of models that nobody holds any more, so that the next measurement does not see it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    # The C library keeps freed blocks for later: 170 MB after a model of 135M parameters.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _high_water_mark() -> int | None:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
