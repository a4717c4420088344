"""The stages quantize and dequantize."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdkit.api.artifacts import Model
from kdkit.api.errors import ConformanceError, DataError, ModelError
from kdkit.models.card import ModelCard, render_card
from kdkit.models.load import load_model, load_tokenizer
from kdkit.models.locate import check_directory, model_format
from kdkit.models.prune import prune
from kdkit.models.quantized.form import refuse_quantized
from kdkit.models.quantized.tensors import weight_bytes
from kdkit.models.save import PROVENANCE_FILE, read_provenance, save_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kdkit.api import Component, Example, StageContext
    from kdkit.api.data import QuantizedInfo
    from kdkit.api.protocols import DatasetLoader, StageOutputs
    from kdkit.plugins.stages.quantizing_plugin import DequantizeParams, QuantizeParams

__all__ = ["run", "run_dequantize"]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def run(params: QuantizeParams, ctx: StageContext) -> StageOutputs:
    """Write ``model/`` with the quantised copy.

    Raises:
        ModelError: The model is quantised already, or cannot be quantised so.
        DataError: No row of calibration is left.
        ConformanceError: The quantizer wrote no complete model.
        Stopped: A signal asked for it.
    """
    artifact = ctx.resolve(params.model)
    _refuse(artifact)
    out = ctx.out / "model"
    _clear(out)
    quantizer = ctx.build(params.quantizer)
    calibration = _calibration(params.calibration, params.max_rows, ctx) if params.calibration else []
    source = _source(artifact, ctx)
    before = weight_bytes(source)
    info = quantizer.quantize(source, calibration, out, ctx)
    _check_written(out, params.quantizer.found.qualified_name)
    size = weight_bytes(out)
    ctx.log(f"{before / 1e6:,.1f} MB of weights are now {size / 1e6:,.1f} MB (1/{before / max(size, 1):.2f})")
    if info.kept_rtn:
        names = ", ".join(info.kept_rtn[:3]) + (", ..." if len(info.kept_rtn) > 3 else "")
        ctx.log(f"{len(info.kept_rtn)} of {len(info.layer_errors)} layers are rounded to nearest: {names}")
    for note in info.notes:
        ctx.log(note)
    facts = _facts(info, params.quantizer.name, before=before, after=size)
    _describe(artifact, out, ctx, {"quantization": facts}, f"Quantised with kdkit by {params.quantizer.name}.")
    return {"model": Model(path=out, format=model_format(out), info=facts)}


def _refuse(artifact: Model) -> None:
    where = artifact.name or str(artifact.path)
    if artifact.format != "full":
        raise ModelError(
            f"is already quantised ({artifact.format})", where=where, hint="quantise the model that it was made from"
        )
    if artifact.trust_remote_code:
        raise ModelError(
            "a model with code of its own cannot be quantised: every reader would have to run that code", where=where
        )
    check_directory(artifact.path, where=where)
    refuse_quantized(artifact.path)


def _clear(out: Path) -> None:
    """Remove what an attempt left behind that was killed while it wrote."""
    for path in (out, *out.parent.glob(f".{out.name}.*")):
        shutil.rmtree(path, ignore_errors=True)


def _source(artifact: Model, ctx: StageContext) -> Path:
    """The directory to quantise: a pruned copy where the recipe drops layers."""
    if artifact.keep_layers is None:
        return artifact.path
    pruned = ctx.checkpoints / "pruned"
    if not pruned.is_dir():
        ctx.log(f"pruning to the layers {artifact.keep_layers} first")
        prune(artifact.path, pruned, artifact.keep_layers)
    return pruned


def _calibration(components: Sequence[Component[DatasetLoader]], max_rows: int, ctx: StageContext) -> list[Example]:
    """Up to ``max_rows`` rows with text, in the order of the data."""
    examples = [example for component in components for example in ctx.load(component).examples]
    rows = [example for example in examples if _has_text(example)]
    if not rows:
        raise DataError(f"none of the {len(examples)} rows of calibration has any text", where=f"stage {ctx.name}")
    if len(rows) < len(examples):
        ctx.log(f"calibration: {len(examples) - len(rows)} of {len(examples)} rows have no text and are left out")
    if len(rows) <= max_rows:
        return rows
    # Datasets come in an order (by problem, by length): the first rows alone would be no fair sample.
    chosen = sorted(random.Random(ctx.seed_for("calibration")).sample(range(len(rows)), max_rows))  # noqa: S311
    return [rows[index] for index in chosen]


def _has_text(example: Example) -> bool:
    prompt = example.prompt if isinstance(example.prompt, str) else "".join(turn.content for turn in example.prompt)
    return bool(prompt.strip() or (example.completion or "").strip())


def _check_written(out: Path, name: str) -> None:
    try:
        check_directory(out)
    except ModelError as error:
        raise ConformanceError(f"the quantizer wrote no complete model: {error.what}", where=name) from error


def _facts(info: QuantizedInfo, quantizer: str, *, before: int, after: int) -> dict[str, Any]:
    return {
        "quantizer": quantizer,
        "bits": info.bits,
        "group_size": info.group_size,
        "bytes": after,
        "bytes_before": before,
        "layer_errors": dict(info.layer_errors),
        "rtn_errors": dict(info.rtn_errors),
        "kept_rtn": list(info.kept_rtn),
        "notes": list(info.notes),
    }


def _describe(artifact: Model, out: Path, ctx: StageContext, facts: Mapping[str, Any], summary: str) -> None:
    """Provenance and card: what the model was, and what this stage added."""
    before = read_provenance(artifact.path)
    base = str(before.get("base_model", artifact.name))
    after = {**before, **facts, "base_model": base, "recipe": ctx.recipe, "stage": ctx.name}
    text = json.dumps(after, indent=2, sort_keys=True, allow_nan=False)
    (out / PROVENANCE_FILE).write_text(text + "\n", encoding="utf-8")
    shown: dict[str, Any] = dict(facts.get("quantization", {}))
    rows: dict[str, Any] = {
        key: shown[key] for key in ("quantizer", "bits", "group_size", "bytes", "bytes_before") if key in shown
    }
    card = ModelCard(name=f"{ctx.recipe}: {ctx.name}", summary=summary, base_model=base, facts=rows)
    (out / "README.md").write_text(render_card(card), encoding="utf-8")


def run_dequantize(params: DequantizeParams, ctx: StageContext) -> StageOutputs:
    """Write ``model/`` with the numbers that the codes stand for.

    Raises:
        ModelError: The model is not quantised, or cannot be read.
        StageError: A weight is too large for ``dtype``.
    """
    artifact = ctx.resolve(params.model)
    if artifact.format not in {"gptq", "gguf"}:
        raise ModelError("is not quantised", where=artifact.name or str(artifact.path), allowed="format gptq or gguf")
    dtype, out = _DTYPES[params.dtype], ctx.out / "model"
    _clear(out)
    tokenizer, model = load_tokenizer(artifact), load_model(artifact, dtype=torch.float32)
    facts = {key: value for key, value in read_provenance(artifact.path).items() if key != "quantization"}
    facts |= {"recipe": ctx.recipe, "stage": ctx.name, "parameters": model.num_parameters()}
    facts.setdefault("base_model", artifact.name)
    facts.setdefault("trained_tokens", 0)
    card = ModelCard(
        name=f"{ctx.recipe}: {ctx.name}",
        summary=f"A {artifact.format} model, dequantised with kdkit.",
        base_model=str(facts["base_model"]),
        facts={"parameters": facts["parameters"], "dtype": params.dtype},
    )
    save_model(model, tokenizer, out, dtype=dtype, card=render_card(card), provenance=facts)
    return {"model": Model(path=out, info={"parameters": facts["parameters"], "bytes": weight_bytes(out)})}
