from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from kdkit.api import ModelError, Quantizer
from kdkit.testing.conformance import QuantizerConformance

from kdkit_acme import plugin, quantizer

(SPEC,) = plugin.kdkit_quantizers()


class TestQuantizer(QuantizerConformance):
    # Of the largest logit: four bits are coarse in a model as small as the suite's.
    tolerance: ClassVar[float] = 0.7

    def build(self) -> Quantizer:
        built: Quantizer = SPEC.build(SPEC.params(group_size=32))
        return built


def test_weights_move_by_half_a_step_at_most() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    linear = quantizer.rounded(weight, bits=4, group_size=32, clip=1.0)
    moved = (linear.dequantized(torch.float32) - weight).abs().reshape(8, 2, 32)
    assert bool((moved <= 0.501 * linear.scales.float().unsqueeze(-1)).all())


def test_groups_of_zeros_and_of_a_whole_row() -> None:
    linear = quantizer.rounded(torch.zeros(2, 32), bits=2, group_size=-1, clip=0.5)
    assert linear.scales.shape == (2, 1)
    assert not linear.dequantized(torch.float32).any()


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ModelError, match="not finite"):
        quantizer.rounded(torch.full((2, 32), torch.nan), bits=4, group_size=32, clip=1.0)
