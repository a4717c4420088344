"""Measured speed of matrix products, for ``kdkit doctor``: in a process of its own, which loads torch and may hang."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import kdkit
from kdkit.cli.checks import Check
from kdkit.engine.hardware import resolve_precision
from kdkit.engine.redact import redact

__all__ = ["measured", "speed_checks"]

_PROGRAM: Final = Path(kdkit.__file__).parent / "train" / "matmul_speed.py"
_LIMIT_SECONDS: Final = 60.0
_MARGIN: Final = 1.25
"""How much faster a dtype has to be before it is advised: measurements on a busy machine differ."""


def measured(limit: float = _LIMIT_SECONDS) -> tuple[list[dict[str, Any]], str]:
    """What the program found within ``limit`` seconds, and why it found no more; empty when it came to its end."""
    # -P: neither a file beside the program nor one in the current directory may stand for a module.
    command = [sys.executable, "-P", str(_PROGRAM)]
    try:
        done = subprocess.run(  # noqa: S603 - our own program
            command, capture_output=True, timeout=limit, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as stopped:
        return _lines(stopped.stdout or b""), f"not measured any further: it took more than {limit:g} s"
    *_, last = ["", *done.stderr.decode(errors="replace").split("\n")[:-1]]
    why = redact(" ".join(last.split())) or f"it ended with status {done.returncode}"
    return _lines(done.stdout), f"cannot be measured: {why}" if done.returncode else ""


def _lines(output: bytes) -> list[dict[str, Any]]:
    """Whole lines only: a program that was stopped may have been writing one."""
    return [json.loads(line) for line in output.split(b"\n")[:-1]]


def speed_checks(speeds: Sequence[dict[str, Any]], problem: str) -> Iterator[Check]:
    """One finding for each device and dtype, and one when ``precision: auto`` is not the faster one."""
    for speed in speeds:
        what = f"{speed['device']} {speed['dtype']}"
        if "error" in speed:
            yield Check("matmul", "note", f"{what}: {redact(speed['error'])}")
        else:
            threads = f", {speed['threads']} thread{'s'[: speed['threads'] > 1]}" if speed["threads"] else ""
            yield Check("matmul", "ok", f"{what}: {_rate(speed['flops'])} (n = {speed['size']:,}{threads})")
    if problem:
        yield Check("matmul", "note", problem)
    yield from _advice(speeds)


def _rate(flops: float) -> str:
    """Three digits of operations per second."""
    return f"{flops / 1e12:.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOP/s"


def _advice(speeds: Sequence[dict[str, Any]]) -> Iterator[Check]:
    flops = {(speed["device"], speed["dtype"]): speed["flops"] for speed in speeds if "flops" in speed}
    chosen, device = resolve_precision("auto"), "cuda:0" if ("cuda:0", "fp32") in flops else "cpu"
    other = "fp32" if chosen == "bf16" else "bf16"
    if (device, chosen) in flops and (device, other) in flops:
        ratio = flops[device, other] / flops[device, chosen]
        if ratio > _MARGIN:
            text = f"auto means {chosen}, but {other} multiplied {ratio:.1f} times as fast on {device}"
            yield Check("precision", "note", text, f"try it with precision: {other} in a stage")
