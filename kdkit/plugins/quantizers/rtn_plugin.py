"""Parameters of the ``rtn`` quantizer. Light: no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kdkit.api import Params, QuantizerSpec

if TYPE_CHECKING:
    from kdkit.api import Quantizer

__all__ = ["RTN", "RtnParams"]


class RtnParams(Params):
    """Every weight rounded to the nearest value of its group's grid: the baseline. Written as a GPTQ checkpoint."""

    bits: Literal[2, 4, 8] = 4
    """Bits of a weight. 3 is packed differently by every reader and not offered."""
    group_size: Literal["auto"] | int = "auto"
    """Neighbouring inputs that share a scale: less error and more bytes when smaller. It has to divide the input width
    of every layer; ``auto`` is 128, 64 or 32, the largest that does. -1 is one scale for a whole row."""
    sym: bool = True
    """One fixed zero point in the middle. Without it every group has its own, which rounds better and is read by fewer
    programs (``gptq_v2``)."""
    mse: float = Field(0.0, ge=0, le=10)
    """Exponent of the norm by which a narrower scale, which clips the largest weights, is preferred (2.4); 0 does not
    search."""
    lm_head: bool = False
    """Quantise the output projection, too. Refused when it is the embedding itself (tied), as in most small models.
    gptqmodel reads such a checkpoint; transformers puts random numbers in the place of the projection."""


def _rtn(params: RtnParams) -> Quantizer:
    from kdkit.plugins.quantizers.rtn import RtnQuantizer

    return RtnQuantizer(params)


RTN: QuantizerSpec[Any] = QuantizerSpec(
    name="rtn",
    summary="Round weights to nearest in groups: the baseline, as a GPTQ checkpoint",
    params=RtnParams,
    build=_rtn,
)
