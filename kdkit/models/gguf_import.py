"""From a GGUF file to a plain ``save_pretrained`` directory.

transformers reads GGUF but refuses to save what it read, so the model is built again from its configuration.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kdkit.api.errors import EnvironmentUnmet, ModelError
from kdkit.models.files import staged
from kdkit.models.pretrained import load_errors, quiet, write_pretrained

if TYPE_CHECKING:
    from gguf import GGUFReader

__all__ = ["import_gguf", "import_gguf_into", "read_gguf", "require_gguf"]

_DIGITS_APART: Final = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""llama.cpp's names of the splitting rule "each digit alone, then GPT-2's rule"."""
_PLAIN_GPT2: Final = frozenset({"gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais"})
"""llama.cpp's names of GPT-2's splitting rule."""


def require_gguf() -> None:
    """Check that GGUF files can be read.

    Raises:
        EnvironmentUnmet: The ``gguf`` package is not installed.
    """
    if find_spec("gguf") is None:
        raise EnvironmentUnmet("reading GGUF needs the package gguf", hint='run: pip install "kdkit[gguf]"')


def import_gguf(source: Path, dest: Path) -> None:
    """Convert the GGUF file ``source`` to a model directory ``dest`` that plain transformers loads.

    Weights are saved as bfloat16. That loses nothing that matters for 4-bit files: a weight moves by at most 2^-9 of
    its size, far below the step of the quantization it already went through. Measured for SmolLM2-135M (Q4_1) on 2,117
    tokens of text, both computed in float32: KL(unrounded, saved) 6.5e-5 nats per token, loss 4.3292 against 4.3294.

    Raises:
        ModelError: The file cannot be read as a causal language model, or ``dest`` already exists.
        EnvironmentUnmet: The ``gguf`` package is missing, the disk is full or ``dest`` cannot be written.
    """
    with staged(dest) as directory:
        import_gguf_into(source, directory)


def import_gguf_into(source: Path, directory: Path) -> None:
    """:func:`import_gguf` for a directory that the caller makes, syncs and guards (``files.staged``)."""
    model, tokenizer = read_gguf(source)
    write_pretrained(model, tokenizer, directory, dtype=torch.bfloat16)


def read_gguf(source: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in the GGUF file ``source``, dequantised to float32, and its tokenizer.

    Raises:
        ModelError: The file cannot be read as a causal language model, or has parts that transformers would drop.
        EnvironmentUnmet: The ``gguf`` package is missing.
    """
    require_gguf()
    if not source.is_file():
        raise ModelError("no such file", where=str(source), allowed="a .gguf file")
    with load_errors(source, "GGUF file"):
        _refuse_unread(source)
    # The progress bar of the dequantizer has no switch.
    with quiet(), redirect_stderr(io.StringIO()), load_errors(source, "GGUF file"):
        tokenizer = _tokenizer(source)
        packed, info = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.float32,
            # Without this the weights stay packed where the package `kernels` is installed, and it is asked for code.
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    with load_errors(source, "GGUF file"):
        _refuse_defaults(packed.config, source)
    if info["missing_keys"]:
        raise ModelError(f"the GGUF file lacks {sorted(info['missing_keys'])[0]}", where=str(source))
    model = _rebuild(packed)
    model.generation_config = _generation_config(model.config, tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


def _refuse_unread(source: Path) -> None:
    """Refuse what transformers' reader leaves out without a word: the model would answer nonsense."""
    from gguf import GGUFReader

    reader = GGUFReader(source)
    arch = _text(reader, "general.architecture")
    names = {tensor.name for tensor in reader.tensors}
    scaling = _text(reader, f"{arch}.rope.scaling.type")
    dropped = None
    if arch == "gemma":
        dropped = "Gemma 1 at all"
    elif scaling not in {None, "none"}:
        dropped = f"rotary scaling ({scaling})"
    elif "rope_freqs.weight" in names:
        dropped = "scaled rotary frequencies (rope_freqs.weight)"
    elif arch == "llama" and any(name.endswith(".bias") for name in names):
        dropped = f"biases of llama ({min(name for name in names if name.endswith('.bias'))})"
    if dropped:
        raise _unread(dropped, source)


def _unread(what: str, source: Path) -> ModelError:
    hint = "take the model's safetensors, or put its own config.json and tokenizer beside the file"
    return ModelError(f"transformers does not read {what} from GGUF", where=str(source), hint=hint)


def _refuse_defaults(config: PreTrainedConfig, source: Path) -> None:
    """Refuse a file with settings of Gemma 2 and 3 other than the defaults, which transformers takes in their place."""
    from gguf import GGUFReader

    reader = GGUFReader(source)
    arch = _text(reader, "general.architecture")
    ropes = getattr(config, "rope_parameters", None) or {}
    taken = {
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "rope.freq_base_swa": (ropes.get("sliding_attention") or {}).get("rope_theta"),
        "attention.sliding_window_pattern": [
            kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ()
        ],
    }
    for name, value in taken.items():
        field = reader.get_field(f"{arch}.{name}")
        stored = None if field is None else field.contents()
        if isinstance(stored, list):
            stored = [bool(item) for item in stored]
        # A count instead of a list says "one in so many", as the architecture has it by default.
        if stored is not None and not (isinstance(value, list) and not isinstance(stored, list)) and stored != value:
            raise _unread(f"{arch}.{name}", source)


def _rebuild(packed: PreTrainedModel) -> PreTrainedModel:
    """The same model without any trace of GGUF."""
    data = _shortest_floats(packed.config.to_dict())
    for key in ("quantization_config", "_model_name_or_path"):
        data.pop(key, None)
    config = type(packed.config).from_dict(data)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # A tied head is in both state dicts, and both of its names are the same tensor here.
    model.load_state_dict(packed.state_dict(), strict=True)
    return model.eval()


def _shortest_floats(value: Any) -> Any:
    """GGUF stores numbers as float32; 1e-05 would be saved as 9.999999747378752e-06."""
    if isinstance(value, dict):
        return {key: _shortest_floats(item) for key, item in value.items()}
    if isinstance(value, float) and float(torch.tensor(value, dtype=torch.float32)) == value:
        return float(str(torch.tensor(value, dtype=torch.float32).numpy()))
    return value


def _generation_config(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if tokenizer.eos_token_id is not None else config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _tokenizer(source: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    for key in ("is_local", "local_files_only"):  # how it was loaded here, which would be saved with it
        tokenizer.init_kwargs.pop(key, None)
    _split_as_trained(tokenizer, source)
    return tokenizer


def _split_as_trained(tokenizer: PreTrainedTokenizerBase, source: Path) -> None:
    """Split text the way the model's tokenizer did, which GGUF only names.

    transformers knows some of the names and silently splits like GPT-2 for all others. For SmolLM2 that is wrong
    wherever white space meets a digit (the empty line before "1." in a list), so the model would see tokens it was not
    trained on.
    """
    from tokenizers import pre_tokenizers

    kind, rule = _metadata(source, "tokenizer.ggml.model", "tokenizer.ggml.pre")
    if kind != "gpt2" or not isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        return  # not byte-level BPE, or transformers knows the rule
    if rule in _DIGITS_APART:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif rule not in _PLAIN_GPT2:
        known = ", ".join(sorted(_DIGITS_APART | _PLAIN_GPT2))
        raise ModelError(f"its tokenizer splits text by the unknown rule {rule!r}", where=str(source), allowed=known)


def _metadata(source: Path, *keys: str) -> list[str | None]:
    from gguf import GGUFReader

    reader = GGUFReader(source)
    return [_text(reader, key) for key in keys]


def _text(reader: GGUFReader, key: str) -> str | None:
    field = reader.get_field(key)
    return None if field is None else str(field.contents())
