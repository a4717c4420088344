"""Parameters of the stages quantize and dequantize. Light: no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kdkit.api import Component, Model, OneOrMore, Params, Ref, StageContext, StageSpec
from kdkit.api.protocols import DatasetLoader, Quantizer, StageOutputs

if TYPE_CHECKING:
    from kdkit.plugins.stages.checks import Problem

__all__ = ["DEQUANTIZE", "QUANTIZE", "DequantizeParams", "QuantizeParams"]


class QuantizeParams(Params):
    """A copy of a model with fewer bits for each weight."""

    model: Ref[Model]
    """The model; not one that is quantised already."""
    quantizer: Component[Quantizer]
    """``rtn``, ``gptq`` or ``gguf``."""
    calibration: OneOrMore[Component[DatasetLoader]] | None = None
    """Rows that show the quantizer what the model will see: its own training data, or answers that it gave itself in a
    ``generate`` stage. ``gptq`` needs them, ``rtn`` and ``gguf`` take none. Their text is not in the result."""
    max_rows: int = Field(128, ge=1)
    """Rows of calibration, drawn at random when there are more."""


class DequantizeParams(Params):
    """A quantised model as ordinary numbers again: it loads everywhere, and is as large as the model was before."""

    model: Ref[Model]
    """A GPTQ checkpoint or a GGUF file."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Precision on disk. A dequantised weight is a float16 times a whole number: float32 has it exactly."""


def _check(params: QuantizeParams) -> list[Problem]:
    spec: Any = params.quantizer.found.spec
    problems: list[Problem] = []
    if spec.needs_calibration and params.calibration is None:
        problems.append((("calibration",), f"'{params.quantizer.name}' needs rows; add calibration: {{use: DATASET}}"))
    if not spec.needs_calibration:
        problems += [
            ((name,), f"'{params.quantizer.name}' looks at no rows; leave {name} out")
            for name in ("calibration", "max_rows")
            if name in params.model_fields_set and getattr(params, name) is not None
        ]
    return problems


def _quantize(params: QuantizeParams, ctx: StageContext) -> StageOutputs:
    from kdkit.plugins.stages.quantizing import run

    return run(params, ctx)


def _dequantize(params: DequantizeParams, ctx: StageContext) -> StageOutputs:
    from kdkit.plugins.stages.quantizing import run_dequantize

    return run_dequantize(params, ctx)


QUANTIZE: StageSpec[Any] = StageSpec(
    name="quantize",
    summary="Write a copy of a model with fewer bits for each weight",
    params=QuantizeParams,
    run=_quantize,
    outputs={"model": Model},
    check=_check,
)
DEQUANTIZE: StageSpec[Any] = StageSpec(
    name="dequantize",
    summary="Write a quantised model as an ordinary one that loads everywhere",
    params=DequantizeParams,
    run=_dequantize,
    outputs={"model": Model},
)
