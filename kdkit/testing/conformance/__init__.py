"""Test suites for plugin authors: subclass one in a test file, and pytest runs it."""

from __future__ import annotations

from kdkit.testing.conformance.loss import TokenLossConformance
from kdkit.testing.conformance.policy import PolicyLossConformance
from kdkit.testing.conformance.quantizer import QuantizerConformance
from kdkit.testing.conformance.reward import RewardConformance

__all__ = ["PolicyLossConformance", "QuantizerConformance", "RewardConformance", "TokenLossConformance"]
