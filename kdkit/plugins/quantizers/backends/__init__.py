"""Other programs that do the work of the quantizer ``gptq``; each runs in a process of its own. Light.

A backend is a module with ``ready()`` (is everything here?) and ``check(job)`` (can it do this?), both before any work,
and ``quantize(job, directory, follow)``, which returns the quantised layers: the caller writes the checkpoint, so that
all backends leave the same files.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Final

__all__ = ["NAMES", "find"]

NAMES: Final = {"gptqmodel": "gptqmodel", "auto-gptq": "auto_gptq"}
"""Name in recipes to module."""


def find(name: str) -> ModuleType:
    """The module of a backend other than ``reference``."""
    return import_module(f"{__name__}.{NAMES[name]}")
