"""The ``gguf`` quantizer: a model directory as one GGUF file that llama.cpp and Ollama run.

Format and block layouts: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, written with the package ``gguf``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdkit.api import Example, QuantizedInfo, StageContext
from kdkit.api.errors import ModelError, Stopped
from kdkit.models.files import staged
from kdkit.models.gguf_import import require_gguf
from kdkit.models.gguf_layout import Exported, Family, export_tensors, family_of, write_architecture
from kdkit.models.locate import check_directory
from kdkit.models.pretrained import load_errors, quiet, read_config, read_model, read_tokenizer
from kdkit.models.quantized.form import refuse_quantized
from kdkit.plugins.quantizers.gguf_export_tokenizer import Vocabulary, read_vocabulary, write_vocabulary
from kdkit.plugins.quantizers.gguf_plugin import GgufParams

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

__all__ = ["BLOCK", "GgufQuantizer"]

BLOCK: Final = 32
"""Weights that share a scale, in all block types offered."""
_ROWS: Final = 4096
"""Rows quantized at a time: the package's arithmetic needs a multiple of their size."""
_BITS: Final = {"F16": 16, "Q8_0": 8, "Q4_0": 4, "Q4_1": 4}
_FILE_TYPES: Final = {"F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0", "Q4_1": "MOSTLY_Q4_1"}


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor and how it is stored."""

    tensor: Exported
    kind: GGMLQuantizationType

    @property
    def narrow(self) -> bool:
        """Whether it is a matrix that blocks do not divide."""
        return len(self.tensor.shape) > 1 and self.tensor.shape[-1] % BLOCK != 0


class GgufQuantizer:
    """Writes ``model-TYPE.gguf``, config.json, generation_config.json and the tokenizer's files."""

    def __init__(self, params: GgufParams) -> None:
        self.params = params

    def quantize(
        self, model_dir: Path, calibration: Sequence[Example], out_dir: Path, ctx: StageContext, /
    ) -> QuantizedInfo:
        """Export the model in ``model_dir`` to ``out_dir``, which must be absent or empty; it is whole or absent.

        Args:
            model_dir: A ``save_pretrained`` directory with its tokenizer.
            calibration: Not read; rounding to blocks needs no data.
            out_dir: Receives one .gguf file, config.json and the tokenizer's files.
            ctx: For progress, notes and stopping.

        Raises:
            ModelError: The model cannot be read, or llama.cpp would not compute or tokenize as it does.
            EnvironmentUnmet: The package ``gguf`` is missing, or the disk is full.
            Stopped: The run was asked to stop; nothing is written.
        """
        del calibration
        require_gguf()
        where = str(model_dir)
        check_directory(model_dir, where=where)
        refuse_quantized(model_dir)
        config = read_config(model_dir)
        with load_errors(model_dir, "configuration"):
            family = family_of(config, where)
        tokenizer = read_tokenizer(model_dir)
        model = read_model(model_dir, dtype="auto")
        with load_errors(model_dir, "tokenizer"):
            vocabulary = _vocabulary(model, tokenizer, where)
        entries = _entries(model, family, self.params, where)
        notes = list(vocabulary.notes)
        narrow = [entry.tensor.source for entry in entries if entry.narrow]
        if narrow and self.params.type != "F16":
            notes.append(f"{len(narrow)} matrices stay in F16, such as {narrow[0]}: no multiple of {BLOCK} wide")
        with staged(out_dir) as directory:
            file = directory / f"model-{self.params.type}.gguf"
            errors = _write(file, model, family, vocabulary, entries, self.params, ctx)
            _write_companions(model, tokenizer, directory)
        size = (out_dir / file.name).stat().st_size
        return QuantizedInfo(
            bits=_BITS[self.params.type],
            group_size=1 if self.params.type == "F16" else BLOCK,
            bytes_on_disk=size,
            layer_errors=errors,
            notes=notes,
        )


def _vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, where: str) -> Vocabulary:
    ends: Any = getattr(model.generation_config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    rows = model.get_input_embeddings().weight.shape[0]
    return read_vocabulary(tokenizer, rows=rows, ends=listed, bos=model.config.bos_token_id, where=where)


def _entries(model: PreTrainedModel, family: Family, params: GgufParams, where: str) -> list[_Entry]:
    from gguf import GGMLQuantizationType

    tables = {"token_embd.weight", "output.weight"}
    entries = []
    for tensor in export_tensors(model, family, where):
        kind: str = params.table if tensor.name in tables else params.type
        if len(tensor.shape) == 1:
            kind = "F32"
        elif tensor.shape[-1] % BLOCK:
            kind = "F16"
        entries.append(_Entry(tensor, GGMLQuantizationType[kind]))
    return entries


def _write(
    file: Path,
    model: PreTrainedModel,
    family: Family,
    vocabulary: Vocabulary,
    entries: Sequence[_Entry],
    params: GgufParams,
    ctx: StageContext,
) -> dict[str, float]:
    """Write the file tensor by tensor, so that memory holds one of them beside the model.

    Returns:
        Name of each matrix to the square of what it lost, relative to the square of what it was.
    """
    from gguf import GGUFWriter, LlamaFileType, quant_shape_to_byte_shape

    errors: dict[str, float] = {}
    writer = GGUFWriter(file, family.arch)
    try:
        writer.add_type("model")
        writer.add_quantization_version(2)
        writer.add_file_type(LlamaFileType[_FILE_TYPES[params.type]])
        write_architecture(writer, model.config, family, len(vocabulary.tokens))
        write_vocabulary(writer, vocabulary)
        for entry in entries:
            shape = entry.tensor.shape
            size = int(np.prod(quant_shape_to_byte_shape(shape, entry.kind)))
            writer.add_tensor_info(entry.tensor.name, shape, np.dtype(np.float32), size, raw_dtype=entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, entry in enumerate(entries):
            if ctx.stopping():
                raise Stopped("stopped while the GGUF file was written; it is made again from its start")
            lost = _write_tensor(writer, entry)
            if len(entry.tensor.shape) > 1:
                errors[entry.tensor.source.removesuffix(".weight")] = lost
            ctx.progress(number + 1, len(entries), error=lost)
    finally:
        writer.close()
    return errors


def _write_tensor(writer: GGUFWriter, entry: _Entry) -> float:
    """Write one tensor; returns its relative squared error."""
    from gguf.quants import dequantize

    packed, square, lost = [], 0.0, 0.0
    for rows in entry.tensor.read().split(_ROWS):
        values = np.ascontiguousarray(rows.float().numpy())
        packed.append(_pack(values, entry))
        square += float(np.square(values, dtype=np.float64).sum())
        lost += float(np.square(dequantize(packed[-1], entry.kind) - values, dtype=np.float64).sum())
    writer.write_tensor_data(np.concatenate(packed))
    return lost / square if square else 0.0


def _pack(values: np.ndarray[Any, Any], entry: _Entry) -> np.ndarray[Any, Any]:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    largest = float(np.abs(values).max())
    if not math.isfinite(largest):
        raise ModelError("has values that are not finite", where=entry.tensor.source)
    # A scale of a block is stored in float16 too, so that the limit holds for the block types.
    if entry.kind != GGMLQuantizationType.F32 and largest > torch.finfo(torch.float16).max:
        raise ModelError("has values too large for float16, which GGUF's types store", where=entry.tensor.source)
    return np.asarray(quantize(values, entry.kind))


def _write_companions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    with quiet():
        tokenizer.save_pretrained(directory)
        model.config.save_pretrained(directory)
        model.generation_config.save_pretrained(directory)
