"""Fewer bits for every weight. Reading the model and writing the checkpoint is kdkit's work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from kdkit.api import ModelError, QuantizedInfo, Stopped
from kdkit.models.pretrained import read_model
from kdkit.models.quantized.checkpoint import GptqFormat, write_checkpoint
from kdkit.models.quantized.form import refuse_quantized
from kdkit.models.quantized.grid import resolve_group_size
from kdkit.models.quantized.layers import quantizable
from kdkit.models.quantized.linear import QuantizedLinear, group_index

if TYPE_CHECKING:
    from kdkit.api import Example, StageContext
    from torch import Tensor

    from kdkit_acme import plugin


def rounded(weight: Tensor, bits: int, group_size: int, clip: float) -> QuantizedLinear:
    """Every weight at the nearest value of its group's grid.

    Args:
        weight: [out, in].
        bits: Of a code.
        group_size: Neighbouring inputs that share a scale; it divides ``in``, or is -1 for all.
        clip: Where the grid ends, as a share of the group's largest weight.
    """
    out, width = weight.shape
    middle = 2 ** (bits - 1)
    groups = weight.detach().float().reshape(out, -1, width if group_size == -1 else group_size)
    if not bool(groups.isfinite().all()):
        raise ModelError("has weights that are not finite")
    step = clip * groups.abs().amax(-1) / max(middle - 1, 1)
    # The checkpoint stores float16, so that is what weights are divided by; a group of zeros has a
    # step, too.
    scales = step.clamp(2.0**-24, 65504.0).half()
    codes = (groups / scales.float().unsqueeze(-1)).round().add(middle).clamp(0, 2 * middle - 1)
    return QuantizedLinear(
        codes=codes.to(torch.uint8).reshape(out, width),
        scales=scales,
        zeros=torch.full_like(scales, middle, dtype=torch.uint8),
        g_idx=group_index(width, group_size),
        bits=bits,
    )


class AcmeQuantizer:
    """Rounds layer by layer; rows of calibration are not looked at.

    Args:
        params: As a recipe gives them.
    """

    def __init__(self, params: plugin.AcmeParams) -> None:
        self._params = params

    def quantize(
        self,
        model_dir: Path,
        calibration: Sequence[Example],
        out_dir: Path,
        ctx: StageContext,
        /,
    ) -> QuantizedInfo:
        """Write the checkpoint to ``out_dir``, whole or not at all."""
        del calibration
        params = self._params
        refuse_quantized(model_dir)
        layers = quantizable(read_model(model_dir, dtype="auto"), lm_head=False)
        widths = [layer.in_features for layer in layers.values()]
        group_size = resolve_group_size(params.group_size, widths)
        linears: dict[str, QuantizedLinear] = {}
        errors: dict[str, float] = {}
        for name, layer in layers.items():
            if ctx.stopping():
                raise Stopped(f"stopped before {name}")
            linears[name] = rounded(layer.weight, params.bits, group_size, params.clip)
            errors[name] = _lost(layer.weight, linears[name])
            ctx.progress(len(linears), len(layers), error=errors[name])
        form = GptqFormat.standard(bits=params.bits, group_size=group_size, sym=True)
        return QuantizedInfo(
            bits=params.bits,
            group_size=group_size,
            bytes_on_disk=write_checkpoint(model_dir, out_dir, linears, form, write_head=False),
            layer_errors=errors,
        )


def _lost(weight: Tensor, linear: QuantizedLinear) -> float:
    """Square of what rounding changed, relative to the square of the weights."""
    exact = weight.detach().float()
    square = float(exact.square().sum())
    lost = float((linear.dequantized(torch.float32) - exact).square().sum())
    return lost / square if square else 0.0
