"""kdkit turns a large language model into a small one from one YAML recipe, with every part a plugin.

The names below are the public Python API. They load on first use, so that ``import kdkit`` stays instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kdkit.api import Component, Params, Ref, hookimpl
    from kdkit.api.specs import (
        DatasetSpec,
        LossSpec,
        MetricSpec,
        QuantizerSpec,
        RewardSpec,
        RolloutSpec,
        SandboxSpec,
        StageSpec,
        TeacherSpec,
        TrackerSpec,
    )
    from kdkit.engine.facade import RunResult, build, run, validate

__all__ = [
    "Component",
    "DatasetSpec",
    "LossSpec",
    "MetricSpec",
    "Params",
    "QuantizerSpec",
    "Ref",
    "RewardSpec",
    "RolloutSpec",
    "RunResult",
    "SandboxSpec",
    "StageSpec",
    "TeacherSpec",
    "TrackerSpec",
    "__version__",
    "build",
    "hookimpl",
    "run",
    "validate",
]

_ENGINE: Final = frozenset({"RunResult", "build", "run", "validate"})


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'kdkit' has no attribute {name!r}")
    return getattr(import_module("kdkit.engine.facade" if name in _ENGINE else "kdkit.api"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
