"""Test suites for plugin authors: subclass one in a test file, and pytest runs it.

The classes are loaded when they are named, so that the suite of a dataset does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from kdkit.testing.conformance.aligned import AlignedLossConformance
    from kdkit.testing.conformance.dataset import DatasetConformance
    from kdkit.testing.conformance.loss import TokenLossConformance
    from kdkit.testing.conformance.metric import MetricConformance
    from kdkit.testing.conformance.policy import PolicyLossConformance
    from kdkit.testing.conformance.quantizer import QuantizerConformance
    from kdkit.testing.conformance.representation import RepresentationLossConformance
    from kdkit.testing.conformance.reward import RewardConformance
    from kdkit.testing.conformance.rollout import RolloutConformance
    from kdkit.testing.conformance.sandbox import SandboxConformance
    from kdkit.testing.conformance.stage import StageConformance
    from kdkit.testing.conformance.teacher import TeacherConformance
    from kdkit.testing.conformance.tracker import TrackerConformance

__all__ = [
    "AlignedLossConformance",
    "DatasetConformance",
    "MetricConformance",
    "PolicyLossConformance",
    "QuantizerConformance",
    "RepresentationLossConformance",
    "RewardConformance",
    "RolloutConformance",
    "SandboxConformance",
    "StageConformance",
    "TeacherConformance",
    "TokenLossConformance",
    "TrackerConformance",
]

_MODULES: Final = {
    "AlignedLossConformance": "aligned",
    "DatasetConformance": "dataset",
    "MetricConformance": "metric",
    "PolicyLossConformance": "policy",
    "QuantizerConformance": "quantizer",
    "RepresentationLossConformance": "representation",
    "RewardConformance": "reward",
    "RolloutConformance": "rollout",
    "SandboxConformance": "sandbox",
    "StageConformance": "stage",
    "TeacherConformance": "teacher",
    "TokenLossConformance": "loss",
    "TrackerConformance": "tracker",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
