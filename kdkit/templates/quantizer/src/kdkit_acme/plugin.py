"""What kdkit reads of this package. Keep it light: what lists or checks components imports it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from kdkit.api import Params, QuantizerSpec, hookimpl
from pydantic import Field

if TYPE_CHECKING:
    from kdkit.api import Quantizer


class AcmeParams(Params):
    """Weights rounded to the nearest value of their group's grid, written as a GPTQ checkpoint."""

    bits: Literal[2, 4, 8] = 4
    """Bits of a weight."""
    group_size: Literal["auto"] | int = "auto"
    """Neighbouring inputs that share a scale; it divides the input width of every layer. ``auto``
    is 128, 64 or 32, the largest that does."""
    clip: float = Field(1.0, ge=0.1, le=1)
    """Where the grid ends, as a share of the group's largest weight. Less than 1 has smaller steps
    and moves the largest weights."""


def _build(params: AcmeParams) -> Quantizer:
    from kdkit_acme import quantizer

    return quantizer.AcmeQuantizer(params)


@hookimpl
def kdkit_quantizers() -> Iterator[QuantizerSpec[Any]]:
    """The quantizers of this package."""
    yield QuantizerSpec(
        name="acme",
        summary="Round weights to nearest on clipped grids, as a GPTQ checkpoint",
        params=AcmeParams,
        build=_build,
    )
