"""What kdkit sees of this package. Light: torch is imported when the quantizer is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kdkit.api import Params, QuantizerSpec, hookimpl

if TYPE_CHECKING:
    from kdkit.api import Quantizer


class AwqParams(Params):
    """Weights that read large inputs are scaled up before they are rounded, so that they lose less (AWQ, Lin et al.
    2023). What scales the inputs down again is folded into the norm or the linear layer before, wherever that is exact;
    other layers are rounded to nearest. Written as a GPTQ checkpoint. Needs calibration rows.
    """

    bits: Literal[2, 4, 8] = 4
    """Bits of a weight. 3 is packed differently by every reader and not offered."""
    group_size: Literal["auto"] | int = "auto"
    """Neighbouring inputs that share a scale: less error and more bytes when smaller. It has to divide the input width
    of every layer; ``auto`` is 128, 64 or 32, the largest that does. -1 is one scale for a whole row."""
    sym: bool = True
    """One fixed zero point in the middle. Without it every group has its own, which rounds better and is read by fewer
    programs (``gptq_v2``)."""
    steps: int = Field(20, ge=1, le=200)
    """The scale of an input is the mean of its size to the power of alpha; the best of alpha = 0, 1/steps, ... 1 is
    taken. 0 is rounding to nearest."""
    search_tokens: int = Field(512, ge=16)
    """Tokens of the calibration rows, drawn at random, on which the outputs of a layer are compared. Sizes of inputs
    are means over all of them."""
    max_length: int = Field(512, ge=16)
    """Tokens kept of every calibration row, and never more than the model has positions for."""


def _build(params: AwqParams) -> Quantizer:
    from kdkit_awq.quantizer import AwqQuantizer

    return AwqQuantizer(params)


@hookimpl
def kdkit_quantizers() -> Iterator[QuantizerSpec[AwqParams]]:
    """The quantizer of this package."""
    yield QuantizerSpec(
        name="awq",
        summary="AWQ: scales searched on activations, folded away, then rounding to nearest",
        params=AwqParams,
        build=_build,
        needs_calibration=True,
    )
