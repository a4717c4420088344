"""Parameters of the ``gptq`` quantizer. Light: no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from kdkit.api import Params, QuantizerSpec

if TYPE_CHECKING:
    from kdkit.api import Quantizer

__all__ = ["GPTQ", "GptqParams"]


class GptqParams(Params):
    """4-bit weights that lose little (Frantar et al. 2023), as a GPTQ checkpoint; needs calibration rows."""

    backend: Literal["reference", "gptqmodel", "auto-gptq"] = "reference"
    """Who does the work: kdkit itself on CPU or GPU, gptqmodel (extra ``gptq``), or auto-gptq in an environment of its
    own with a GPU (``kdkit doctor`` says how to make it). All write the same format."""
    bits: Literal[2, 4, 8] = 4
    """Bits of a weight. 3 is packed differently by every reader and not offered."""
    group_size: Literal["auto"] | int = Field("auto")
    """Neighbouring inputs that share a scale: less error and more bytes when smaller. It has to divide the input width
    of every layer; ``auto`` is 128, 64 or 32, the largest that does. -1 is one scale for a whole row."""
    sym: bool = True
    """One fixed zero point in the middle. Without it every group has its own, a little better at 2 bits; such a
    checkpoint (``gptq_v2``) is read by fewer programs."""
    desc_act: bool = True
    """Round the weights of the largest inputs first, when many others can still make up for it. The dominant setting:
    without it GPTQ can be no better than rounding to nearest."""
    static_groups: bool = True
    """Fix groups and scales before the order is chosen. With ``desc_act`` and without this, groups follow the order of
    the inputs, and readers have to look up the group of every weight, which is slow."""
    damp_percent: float = Field(0.05, ge=0, le=1)
    """Share of the mean added to the diagonal of the inputs' second moments; more when they cannot be factored."""
    true_sequential: bool = True
    """Inside a block, too, let every layer be calibrated on what the quantised layers before it put out."""
    mse: float = Field(2.4, ge=0, le=10)
    """Exponent of the norm by which a narrower scale, which clips the largest weights, is preferred; 0 does not
    search."""
    block_size: int = Field(128, ge=1)
    """Columns whose errors are gathered before the rest makes up for them; changes speed only."""
    lm_head: bool = False
    """Quantise the output projection, too. Refused when it is the embedding itself (tied), as in most small models.
    gptqmodel reads such a checkpoint; transformers puts random numbers in the place of the projection. Only with the
    backend ``reference``."""
    target: Literal["any", "auto-gptq"] = "any"
    """``auto-gptq`` writes the output projection even when it is the embedding itself: that reader takes zeros for
    weights that a file leaves out. The file grows by the size of the embedding."""
    max_length: int = Field(512, ge=16)
    """Tokens kept of every calibration row, and never more than the model has positions for."""

    @model_validator(mode="after")
    def _readable(self) -> GptqParams:
        """auto-gptq reads symmetric checkpoints only."""
        if not self.sym and "auto-gptq" in {self.backend, self.target}:
            raise ValueError("auto-gptq reads no asymmetric checkpoints: set sym: true")
        return self


def _ready(params: GptqParams) -> None:
    if params.backend != "reference":
        from kdkit.plugins.quantizers.backends.environment import require

        require(params.backend)


def _gptq(params: GptqParams) -> Quantizer:
    from kdkit.plugins.quantizers.gptq import GptqQuantizer

    return GptqQuantizer(params)


GPTQ: QuantizerSpec[Any] = QuantizerSpec(
    name="gptq",
    summary="GPTQ: low-bit weights with error feedback, calibrated on rows of data",
    params=GptqParams,
    build=_gptq,
    ready=_ready,
    needs_calibration=True,
)
