"""GPTQ checkpoints as whole directories: written from a plain model and its quantised layers, and read again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdkit.api.errors import KdkitError, ModelError
from kdkit.models.files import staged
from kdkit.models.hub import MODEL_FILES
from kdkit.models.pretrained import load_errors, quiet, read_config
from kdkit.models.quantized.form import (
    QUANTIZE_CONFIG,
    GptqFormat,
    old_names,
    read_form,
    read_json,
    refuse_quantized,
    with_form,
)
from kdkit.models.quantized.linear import QuantizedLinear
from kdkit.models.quantized.packing import PARTS, check_packable, pack, unpack
from kdkit.models.quantized.tensors import Entry, StoredTensors, weight_bytes, write_shards

__all__ = ["GptqFormat", "check_source", "copy_companions", "outline", "read_checkpoint", "write_checkpoint"]

_COMPANIONS: Final = tuple(name for name in MODEL_FILES if "*" not in name and name != "config.json")


def check_source(source: Path, names: Collection[str], *, bits: int) -> None:
    """Refuse before the work what :func:`write_checkpoint` would refuse after it.

    Args:
        source: Directory of a plain model.
        names: The layers that are to be quantised.
        bits: Width of a code.

    Raises:
        ModelError: A layer is stored by another name or does not fill whole words, or a value has no float16.
    """
    with StoredTensors(source) as stored:
        weights = _weights(source, stored, names, bits)
        for name in stored.names:
            if name not in weights:
                _in_float16(stored, name)


def write_checkpoint(
    source: Path, out: Path, linears: Mapping[str, QuantizedLinear], form: GptqFormat, *, write_head: bool
) -> int:
    """Write the model in ``source`` with the layers ``linears`` as codes; whole or not at all.

    All other tensors are stored as float16, as every reader expects. Configuration and tokenizer are those of
    ``source``; nothing else is taken along.

    Args:
        source: Directory of a plain model, not quantised.
        out: Directory to make.
        linears: By the name of the layer in the model; each is asked for once, in the order of the file.
        form: What the checkpoint says about itself.
        write_head: For auto-gptq: store the output projection although it is the embedding (tied), in whose place it
            would read zeros, and what transformers 4 calls by other names in config.json.

    Returns:
        Bytes of the weights on disk.

    Raises:
        ModelError: The layers and the model do not fit each other, a value has no float16, or ``out`` exists.
        EnvironmentUnmet: The disk is full or ``out`` cannot be written.
    """
    refuse_quantized(source)
    if not form.sym and form.version == 1:
        raise ModelError("asymmetric grids are written as gptq_v2: few readers take them otherwise", where=str(out))
    with staged(out) as directory:
        with StoredTensors(source) as stored:
            write_shards(_entries(source, stored, linears, form, write_head=write_head), directory)
        copy_companions(source, directory)
        config = with_form(read_json(source / "config.json"), form)
        # auto-gptq comes with transformers 4.
        _write_json(directory / "config.json", config | (old_names(config) if write_head else {}))
        _write_json(directory / QUANTIZE_CONFIG, form.config())
    return weight_bytes(out)


def copy_companions(source: Path, directory: Path) -> None:
    """Copy tokenizer, chat template and generation configuration."""
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _write_json(file: Path, data: Mapping[str, object]) -> None:
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _entries(
    source: Path,
    stored: StoredTensors,
    linears: Mapping[str, QuantizedLinear],
    form: GptqFormat,
    *,
    write_head: bool,
) -> list[Entry]:
    """What the checkpoint consists of, in the order of the source; every name is checked before anything is written."""
    model = outline(source, tensors=len(stored.names))
    weights = _weights(source, stored, linears, form.bits)
    tied = _tied_head(model)
    # One table under two names: some files have it by the name of the head alone, some by both.
    table = None if tied is None else tied[1] if tied[1] in stored.names else tied[0]
    entries = []
    for name in stored.names:
        if name in weights:
            entries.append(_packed(weights[name], linears, _shape(stored, name), form))
        elif tied is not None and name == table:
            entries.append(_plain(stored, name, tied[1]))
        elif tied is None or name != tied[0]:
            entries.append(_plain(stored, name, name))
    if tied is not None and table is not None and write_head:
        entries.append(_plain(stored, table, tied[0]))
    return entries


def _weights(source: Path, stored: StoredTensors, names: Collection[str], bits: int) -> dict[str, str]:
    """Tensor to layer for the layers ``names``, all of which are there and fill whole words."""
    weights = {f"{name}.weight": name for name in names}
    absent = sorted(weights.keys() - set(stored.names))
    if absent:
        raise ModelError(
            f"has no tensor {absent[0]} ({len(absent)} layers are stored by other names)",
            where=str(source),
            hint="load the model and save it again with save_pretrained",
        )
    check_packable({name: _shape(stored, weight) for weight, name in weights.items()}, bits)
    return weights


def _shape(stored: StoredTensors, name: str) -> tuple[int, int]:
    shape = stored.shape(name)
    if len(shape) != 2:
        raise ModelError(f"has shape {list(shape)} instead of a matrix", where=name)
    return shape[0], shape[1]


def _tied_head(model: PreTrainedModel) -> tuple[str, str] | None:
    """Names of the output projection and of the embedding when they are one tensor."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None or head.weight is not embedding.weight:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    return f"{names[id(head)]}.weight", f"{names[id(embedding)]}.weight"


def _packed(name: str, linears: Mapping[str, QuantizedLinear], shape: tuple[int, int], form: GptqFormat) -> Entry:
    def make() -> dict[str, Tensor]:
        linear = linears[name]
        if tuple(linear.codes.shape) != shape or linear.bits != form.bits:
            found = f"{list(linear.codes.shape)} codes of {linear.bits} bits"
            raise ModelError(f"{found} for a weight of shape {list(shape)} and {form.bits} bits", where=name)
        try:
            packed = pack(linear, version=form.version)
        except ModelError as error:
            raise ModelError(error.what, where=name, allowed=error.allowed, hint=error.hint) from error
        return {f"{name}.{part}": tensor.cpu() for part, tensor in packed.items()}

    return Entry(shape[0] * shape[1] * form.bits // 8, make)


def _plain(stored: StoredTensors, name: str, as_name: str) -> Entry:
    def make() -> dict[str, Tensor]:
        tensor = _in_float16(stored, name)
        # A second copy of a tensor needs memory of its own: the writer refuses names that share it.
        return {as_name: tensor.contiguous() if as_name == name else tensor.clone().contiguous()}

    count = 1
    for size in stored.shape(name):
        count *= size
    return Entry(2 * count, make)


def _in_float16(stored: StoredTensors, name: str) -> Tensor:
    tensor = stored.read(name)
    if tensor.is_floating_point():
        tensor = tensor.to(torch.float16)
        if not bool(tensor.isfinite().all()):
            raise ModelError("has values that are not finite in float16", where=name)
    return tensor


def outline(path: Path, *, tensors: int, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that config.json describes, without weights (on the device ``meta``) and without quantisation.

    Args:
        path: Directory of the model.
        tensors: Number of tensors in its files, which bounds the number of layers that are built.
        trust_remote_code: Run the model's own Python code.

    Raises:
        ModelError: The configuration cannot be used, or describes more layers than there are tensors.
        EnvironmentUnmet: It needs a package that is not installed.
    """
    config = read_config(path, trust_remote_code=trust_remote_code)
    depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(depth, int) and depth > tensors:
        raise ModelError(f"config.json has {depth} layers, and the files {tensors} tensors", where=str(path))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._attn_implementation = None  # noqa: SLF001 (as in pretrained.read_model)
    with quiet(), load_errors(path, "model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model.eval()


def read_checkpoint(path: Path) -> tuple[GptqFormat, dict[str, QuantizedLinear]]:
    """The description of the GPTQ checkpoint in ``path``, and its quantised layers by name.

    Raises:
        ModelError: It is no GPTQ checkpoint, or its tensors do not fit each other.
    """
    form = read_form(path)
    with StoredTensors(path) as stored:
        return form, read_layers(stored, form, path)


def read_layers(stored: StoredTensors, form: GptqFormat, path: Path) -> dict[str, QuantizedLinear]:
    """The quantised layers among the tensors of a checkpoint.

    Raises:
        ModelError: There are none, or their tensors do not fit each other.
    """
    have = set(stored.names)
    layers: dict[str, QuantizedLinear] = {}
    for name in stored.names:
        layer, _, part = name.rpartition(".")
        if part != PARTS[0]:
            continue
        tensors = {part: stored.read(f"{layer}.{part}") for part in PARTS if f"{layer}.{part}" in have}
        try:
            layers[layer] = unpack(tensors, bits=form.bits, version=form.version)
        except KdkitError as error:
            raise ModelError(error.what, where=f"{path} ({layer})", allowed=error.allowed) from error
    if not layers:
        raise ModelError("has no quantised layers", where=str(path))
    return layers


def check_fits(model: nn.Module, layers: Mapping[str, QuantizedLinear], path: Path) -> None:
    """Refuse layers that ``model`` has not, or has in another shape.

    Raises:
        ModelError: Names the first one.
    """
    modules = dict(model.named_modules())
    for name, linear in layers.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise ModelError("the model has no such linear layer", where=f"{path} ({name})")
        if module.weight.shape != linear.codes.shape:
            shape, own = list(linear.codes.shape), list(module.weight.shape)
            raise ModelError(f"has shape {shape}, and the configuration asks for {own}", where=f"{path} ({name})")
