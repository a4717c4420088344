"""Rounding to nearest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdkit.api.data import QuantizedInfo
from kdkit.api.errors import ModelError, Stopped
from kdkit.models.pretrained import read_model
from kdkit.models.quantized.checkpoint import GptqFormat, check_source, write_checkpoint
from kdkit.models.quantized.form import refuse_quantized
from kdkit.models.quantized.grid import GridSettings, resolve_group_size
from kdkit.models.quantized.layers import quantizable
from kdkit.models.quantized.linear import QuantizedLinear, lost_weight, round_to_nearest

if TYPE_CHECKING:
    from torch import nn

    from kdkit.api import Example, StageContext
    from kdkit.plugins.quantizers.rtn_plugin import RtnParams

__all__ = ["RtnQuantizer"]


class RtnQuantizer:
    """Rounds every weight on its own; the rows of calibration are not looked at."""

    def __init__(self, params: RtnParams) -> None:
        self.params = params

    def quantize(
        self, model_dir: Path, calibration: Sequence[Example], out_dir: Path, ctx: StageContext, /
    ) -> QuantizedInfo:
        """Write the GPTQ checkpoint.

        Raises:
            ModelError: The model is quantised already, or has layers that cannot be.
            Stopped: A signal asked for it; nothing is written.
        """
        del calibration
        params = self.params
        refuse_quantized(model_dir)
        layers = quantizable(read_model(model_dir, dtype="auto"), lm_head=params.lm_head)
        group_size = resolve_group_size(params.group_size, (layer.in_features for layer in layers.values()))
        check_source(model_dir, layers, bits=params.bits)
        ctx.log(f"rounding {len(layers)} layers to {params.bits} bits, group_size {group_size}")
        linears, errors = _rounded(layers, params, group_size, ctx)
        form = GptqFormat.standard(
            bits=params.bits, group_size=group_size, sym=params.sym, lm_head=params.lm_head, desc_act=False
        )
        size = write_checkpoint(model_dir, out_dir, linears, form, write_head=False)
        return QuantizedInfo(
            bits=params.bits, group_size=group_size, bytes_on_disk=size, layer_errors=errors, notes=form.notes()
        )


def _rounded(
    layers: Mapping[str, nn.Linear], params: RtnParams, group_size: int, ctx: StageContext
) -> tuple[dict[str, QuantizedLinear], dict[str, float]]:
    """The layers as codes, and the square of what each lost relative to the square of what it was."""
    grid = GridSettings(bits=params.bits, sym=params.sym, mse=params.mse)
    linears: dict[str, QuantizedLinear] = {}
    errors: dict[str, float] = {}
    for done, (name, layer) in enumerate(layers.items()):
        if ctx.stopping():
            raise Stopped(f"stopped before {name}; rounding starts again from the beginning")
        weight = layer.weight.detach().to(ctx.device)
        try:
            linear = round_to_nearest(weight, grid, group_size)
        except ModelError as error:
            raise ModelError(error.what, where=name, allowed=error.allowed, hint=error.hint) from error
        errors[name] = lost_weight(weight, linear)
        linears[name] = QuantizedLinear(
            linear.codes.cpu(), linear.scales.cpu(), linear.zeros.cpu(), linear.g_idx.cpu(), linear.bits
        )
        ctx.progress(done + 1, len(layers), error=errors[name])
    return linears, errors
