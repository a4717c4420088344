"""How fast this machine multiplies matrices: a program that ``kdkit doctor`` runs. It imports nothing of kdkit.

Every line it prints is one JSON object: device, dtype, and either ``flops`` (operations per second of the fastest
product of two square matrices, which takes 2 n^3), ``size`` (n) and ``threads``, or ``error``. Lines come as they are
found, so that a reader who stops waiting has those before.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any, Final

import torch

__all__ = ["devices", "measure"]

_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SECONDS: Final = 0.3
"""How long products of one dtype are repeated."""
_LARGEST: Final = {"cpu": 2048, "cuda": 8192}
_ENOUGH: Final = {"cpu": 0.02, "cuda": 0.002}
"""Seconds of a product from which larger ones are not tried: below, the time to start one would count."""
_SMALLEST: Final = 256


def devices() -> list[str]:
    """``cpu`` and every CUDA device."""
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def measure(device: str, dtype: torch.dtype, seconds: float = _SECONDS) -> dict[str, Any]:
    """Operations per second of the fastest product in ``seconds``, the size of its matrices, the threads at work."""
    kind, size = device.partition(":")[0], _SMALLEST
    product = _product(device, dtype, size)
    while (took := _time(product, device)) < _ENOUGH[kind] and size < _LARGEST[kind]:
        size *= 2
        product = _product(device, dtype, size)
    best, end = took, perf_counter() + seconds
    while perf_counter() < end:
        best = min(best, _time(product, device))
    return {"flops": 2 * size**3 / best, "size": size, "threads": torch.get_num_threads() if kind == "cpu" else None}


def _product(device: str, dtype: torch.dtype, size: int) -> Callable[[], Any]:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> Any:
        return torch.mm(a, b, out=out)

    product()  # the first one chooses a kernel and starts threads
    return product


def _time(product: Callable[[], Any], device: str) -> float:
    _wait(device)
    start = perf_counter()
    product()
    _wait(device)
    return perf_counter() - start


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _lines() -> Iterator[dict[str, Any]]:
    for device in devices():
        for name, dtype in _DTYPES.items():
            try:
                yield {"device": device, "dtype": name, **measure(device, dtype)}
            except RuntimeError as error:  # this build cannot, or the device has no memory left
                yield {"device": device, "dtype": name, "error": str(error).strip().partition("\n")[0]}


if __name__ == "__main__":
    torch.manual_seed(0)
    for line in _lines():
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
