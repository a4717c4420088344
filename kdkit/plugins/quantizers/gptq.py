"""The quantizer ``gptq``: from a model directory and calibration rows to a GPTQ checkpoint, whoever does the work."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from kdkit.api.data import QuantizedInfo
from kdkit.api.errors import DataError, ModelError
from kdkit.models.chat import ChatEncoder
from kdkit.models.pretrained import read_config, read_model, read_tokenizer
from kdkit.models.quantized.checkpoint import GptqFormat, check_source, write_checkpoint
from kdkit.models.quantized.form import refuse_quantized
from kdkit.models.quantized.grid import GridSettings, resolve_group_size
from kdkit.models.quantized.layers import blocks, quantizable
from kdkit.models.quantized.linear import lost_weight
from kdkit.plugins.quantizers.backends import find
from kdkit.plugins.quantizers.gptq_solver import SolverSettings
from kdkit.plugins.quantizers.sequential import Sequential, SequentialSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kdkit.api import Example, StageContext
    from kdkit.plugins.quantizers.finished import LayerFigures
    from kdkit.plugins.quantizers.gptq_plugin import GptqParams

__all__ = ["GptqQuantizer", "calibration_rows"]

SHORTEST: Final = 8
"""Tokens of a row that is worth calibrating with."""
FEW: Final = 8192
"""Tokens below which the result is visibly worse: 8 rows of 512 cost SmolLM2-135M 1.8 of perplexity against 32."""

_LOOKED_AT: Final = 128
"""Tokens by which a model is tried before another program gets it."""
_OF_WEIGHTS: Final = "the errors of its layers are of weights, which GPTQ lets grow so that outputs change less"


class GptqQuantizer:
    """See :class:`kdkit.api.protocols.Quantizer` and ``GptqParams``.

    Raises:
        EnvironmentUnmet: The backend cannot work on this machine.
    """

    def __init__(self, params: GptqParams) -> None:
        if params.backend != "reference":
            # Before rows and model are read.
            find(params.backend).ready()
        self._params = params

    def quantize(
        self, model_dir: Path, calibration: Sequence[Example], out_dir: Path, ctx: StageContext, /
    ) -> QuantizedInfo:
        """Write a GPTQ checkpoint to ``out_dir``, which must not exist.

        Raises:
            DataError: No calibration row is left, or a token is unknown to the model.
            ModelError: The model is quantised already, has layers that cannot be, or a width that the group size does
                not divide.
            EnvironmentUnmet: The backend cannot work on this machine.
            Stopped: A signal asked for it; finished blocks are kept.
        """
        p = self._params
        refuse_quantized(model_dir)
        length = _row_length(model_dir, p.max_length, ctx.log)
        rows = calibration_rows(calibration, read_tokenizer(model_dir), max_length=length, log=ctx.log)
        model = read_model(model_dir, dtype="auto")
        _check_tokens(rows, model)
        linears = quantizable(model, lm_head=p.lm_head)
        size = resolve_group_size(p.group_size, [linear.in_features for linear in linears.values()])
        check_source(model_dir, linears, bits=p.bits)
        ctx.log(f"{len(linears)} layers, {p.bits} bits, groups of {'a whole row' if size == -1 else size}")
        form = GptqFormat.standard(
            bits=p.bits,
            group_size=size,
            sym=p.sym,
            # Static groups are of neighbours, whatever the order in which their columns were rounded.
            desc_act=p.desc_act and not p.static_groups,
            lm_head=p.lm_head,
            damp_percent=p.damp_percent,
            true_sequential=p.true_sequential,
            static_groups=p.static_groups,
        )
        if p.backend == "reference":
            return self._here(model, model_dir, rows, out_dir, form, ctx)
        return self._elsewhere(model, model_dir, rows, out_dir, form, ctx)

    def _here(
        self,
        model: PreTrainedModel,
        model_dir: Path,
        rows: Sequence[Sequence[int]],
        out_dir: Path,
        form: GptqFormat,
        ctx: StageContext,
    ) -> QuantizedInfo:
        p = self._params
        settings = SequentialSettings(
            solver=SolverSettings(
                grid=GridSettings(bits=p.bits, sym=p.sym, mse=p.mse),
                group_size=form.group_size,
                desc_act=p.desc_act,
                static_groups=p.static_groups,
                damp_percent=p.damp_percent,
                block_size=p.block_size,
            ),
            true_sequential=p.true_sequential,
            compute=torch.bfloat16 if ctx.precision("auto") == "bf16" else torch.float32,
            device=ctx.device,
            identity=_weights_identity(model_dir),
        )
        work = Sequential(model, quantizable(model, lm_head=p.lm_head), rows, settings, ctx)
        figures = work.run()
        written = write_checkpoint(model_dir, out_dir, work.finished, form, write_head=p.target == "auto-gptq")
        ctx.log(_summary(figures))
        return QuantizedInfo(
            bits=p.bits,
            group_size=form.group_size,
            bytes_on_disk=written,
            layer_errors={layer.name: layer.error for layer in figures},
            rtn_errors={layer.name: layer.rtn_error for layer in figures},
            kept_rtn=[layer.name for layer in figures if layer.kept == "rtn"],
            notes=[*(f"{layer.name}: {layer.note}" for layer in figures if layer.note), *form.notes()],
        )

    def _elsewhere(
        self,
        model: PreTrainedModel,
        model_dir: Path,
        rows: Sequence[Sequence[int]],
        out_dir: Path,
        form: GptqFormat,
        ctx: StageContext,
    ) -> QuantizedInfo:
        from kdkit.plugins.quantizers.backends.peer import PeerJob
        from kdkit.plugins.quantizers.backends.work import work_elsewhere

        p = self._params
        _check_finite(model, rows)
        linears = quantizable(model, lm_head=p.lm_head)
        job = PeerJob(
            source=model_dir,
            rows=rows,
            shapes={name: (linear.out_features, linear.in_features) for name, linear in linears.items()},
            blocks=len(blocks(model)),
            bits=p.bits,
            group_size=form.group_size,
            sym=p.sym,
            desc_act=p.desc_act,
            static_groups=p.static_groups,
            damp_percent=p.damp_percent,
            true_sequential=p.true_sequential,
            mse=p.mse,
            lm_head=p.lm_head,
            device=ctx.device,
        )
        result = work_elsewhere(p.backend, job, ctx)
        written = write_checkpoint(model_dir, out_dir, result.linears, form, write_head=p.target == "auto-gptq")
        return QuantizedInfo(
            bits=p.bits,
            group_size=form.group_size,
            bytes_on_disk=written,
            # A backend's losses are in a unit of its own, and nothing to compare ours with.
            layer_errors={name: lost_weight(linears[name].weight, result.linears[name]) for name in linears},
            kept_rtn=result.fell_back,
            notes=[f"quantised by {result.program}; {_OF_WEIGHTS}", *form.notes()],
        )


def calibration_rows(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int, log: Callable[[str], None]
) -> list[list[int]]:
    """Token ids of every example, prompt and answer as the model is trained on them, cut to ``max_length``.

    Raises:
        DataError: No row has enough tokens.
    """
    encoder = ChatEncoder(tokenizer)
    rows: list[list[int]] = []
    dropped: Counter[str] = Counter()
    for example in examples:
        ids = list(encoder.training(example).ids) if example.completion else encoder.prompt(example)
        if len(ids) < SHORTEST:
            dropped[f"shorter than {SHORTEST} tokens"] += 1
            continue
        rows.append(ids[:max_length])
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not rows:
        what = f"no row is left of {len(examples)} to calibrate with: {reasons or 'there is none'}"
        raise DataError(what, where="calibration", hint="give longer texts")
    tokens = sum(map(len, rows))
    log(f"calibration: {len(rows):,} rows, {tokens:,} tokens" + (f"; dropped {reasons}" if reasons else ""))
    if tokens < FEW:
        log(f"calibration: fewer than {FEW:,} tokens make a visibly worse model")
    return rows


def _row_length(model_dir: Path, asked: int, log: Callable[[str], None]) -> int:
    """Tokens of a row: not more than the model has positions for."""
    positions = getattr(read_config(model_dir).get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions >= asked:
        return asked
    log(f"calibration: rows are cut at {positions} tokens, all that the model has positions for")
    return positions


def _check_tokens(rows: Sequence[Sequence[int]], model: PreTrainedModel) -> None:
    """Refuse tokens that the model has no embedding for."""
    known = int(model.get_input_embeddings().weight.shape[0])
    largest = max(map(max, rows))
    if largest >= known:
        raise DataError(
            f"token {largest} is unknown to the model, which has {known}", where="calibration",
            hint="the tokenizer does not belong to the model",
        )  # fmt: skip


def _check_finite(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> None:
    """Refuse a model without numbers to calibrate on: other programs round all of it to nearest and say nothing."""
    row = torch.tensor([list(max(rows, key=len)[:_LOOKED_AT])])
    with torch.no_grad():
        finite = bool(model(input_ids=row, use_cache=False).logits.isfinite().all())
    if not finite:
        raise ModelError(
            "its outputs on the calibration rows are not finite", where=type(model).__name__,
            hint="backend: reference names the layer",
        )  # fmt: skip


def _weights_identity(model_dir: Path) -> str:
    """Changes with the model's architecture and sizes; the stage's key stands for the weights themselves."""
    digest = hashlib.sha256((model_dir / "config.json").read_bytes())
    for file in sorted(model_dir.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()


def _summary(figures: Sequence[LayerFigures]) -> str:
    errors, nearest = ([getattr(f, key) for f in figures] for key in ("error", "rtn_error"))
    worst = max(figures, key=lambda layer: layer.error)
    kept = sum(layer.kept == "rtn" for layer in figures)
    text = f"lost output energy: {_mean(errors):.2%} of a layer's on average, {_mean(nearest):.2%} rounded to nearest"
    text += f"; most in {worst.name} ({worst.error:.2%})"
    return text + (f"; {kept} of {len(figures)} layers keep rounding to nearest" if kept else "")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
