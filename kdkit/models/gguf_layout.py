"""What a GGUF file says about an architecture, and how llama.cpp names and lays out its weights: there and back.

llama.cpp computes each architecture its own way and takes only some numbers from the file. A configuration that it
would compute differently is refused here, because nothing else would tell: the file loads and answers nonsense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kdkit.api.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["Exported", "Family", "export_tensors", "family_named", "family_of", "write_architecture"]

_GEMMA_27B: Final = {"gemma2": 46, "gemma3": 62}
"""The number of layers by which llama.cpp takes a model for the 27B one, whose attention scale differs."""
_LARGEST: Final = 2**31
"""GGUF stores counts as uint32, which llama.cpp reads into int32."""


@dataclass(frozen=True, slots=True)
class Family:
    """How llama.cpp treats an architecture.

    Attributes:
        arch: Its name there (``general.architecture``).
        activations: Values of ``hidden_act`` or ``hidden_activation`` that it computes.
        interleaved: Rows of q and k are stored with the two halves of each rotary pair side by side.
        norm_offset: What it adds to stored norm weights less what transformers adds.
        tied: It has no output projection of its own.
        sliding: Layers alternate between a sliding window and full attention.
    """

    arch: str
    activations: frozenset[str]
    interleaved: bool = False
    norm_offset: float = 0.0
    tied: bool = False
    sliding: bool = False


@dataclass(frozen=True, slots=True)
class Exported:
    """A tensor of the file.

    Attributes:
        name: Its name there.
        source: Its name in the model.
        shape: [out, in], or one size.
        read: Its values, laid out as llama.cpp wants them.
        restore: The model's values from those of the file; None where the configuration says as much.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    restore: Callable[[Tensor], Tensor] | None


_SILU: Final = frozenset({"silu", "swish"})
_TANH: Final = frozenset({"gelu_pytorch_tanh"})
_FAMILIES: Final[Mapping[str, Family]] = {
    "llama": Family("llama", _SILU, interleaved=True),
    "qwen2": Family("qwen2", _SILU),
    "gemma": Family("gemma", _TANH, norm_offset=1.0, tied=True),
    "gemma2": Family("gemma2", _TANH, norm_offset=1.0, tied=True, sliding=True),
    "gemma3_text": Family("gemma3", _TANH, norm_offset=1.0, sliding=True),
}


def family_named(model_type: str) -> Family | None:
    """How llama.cpp treats the architecture that transformers calls ``model_type``; None when not known here."""
    return _FAMILIES.get(model_type)


def family_of(config: PreTrainedConfig, where: str) -> Family:
    """How llama.cpp treats the architecture of ``config``.

    Raises:
        ModelError: It is none of the supported ones, or has a setting that llama.cpp ignores.
    """
    family = _FAMILIES.get(config.model_type)
    names = config.architectures or []
    if family is None or any(not name.endswith("ForCausalLM") for name in names):
        name = names[0] if names else config.model_type
        allowed = "the text models llama, qwen2, gemma, gemma2, gemma3_text"
        raise ModelError(f"the architecture {name} cannot be exported to GGUF", where=where, allowed=allowed)
    for what, allowed in _mismatches(config, family):
        raise ModelError(f"llama.cpp does not compute {what}", where=where, allowed=allowed)
    return family


def _mismatches(config: PreTrainedConfig, family: Family) -> Iterator[tuple[str, str]]:
    """Settings that llama.cpp would silently take for others: what is there, and what it computes."""
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in family.activations:
        yield f"the activation {activation!r}", " or ".join(sorted(family.activations))
    for part, rope in _ropes(config).items():
        kind = rope.get("rope_type", "default")
        known = ["default", "linear", *(["llama3"] if family.arch == "llama" else [])]
        if part == "sliding_attention":
            known = ["default"]
        if kind not in known:
            yield f"rotary positions of type {kind!r}", ", ".join(known)
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            yield f"partial_rotary_factor {rope['partial_rotary_factor']}", "1"
    for name, number in _numbers(config).items():
        if not isinstance(number, (int, float)) or not 0 < number < _LARGEST:
            yield f"{name} {number!r}", "a positive number of ordinary size"
    if _head_dim(config) % 2:
        yield f"head_dim {_head_dim(config)}", "an even number"
    if family.tied and not config.tie_word_embeddings:
        yield "an output projection apart from the token table", "tie_word_embeddings: true"
    if family.arch == "qwen2":
        yield from _qwen2_mismatches(config)
    if family.arch.startswith("gemma"):
        yield from _gemma_mismatches(config, family)


def _numbers(config: PreTrainedConfig) -> dict[str, Any]:
    """What the file takes from the configuration and no weight confirms."""
    numbers: dict[str, Any] = {name: getattr(config, name) for name in ("max_position_embeddings", "rms_norm_eps")}
    for rope in _ropes(config).values():
        numbers |= {name: rope[name] for name in ("rope_theta", "factor") if name in rope}
    optional = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
    return numbers | {name: value for name in optional if (value := getattr(config, name, None)) is not None}


def _qwen2_mismatches(config: PreTrainedConfig) -> Iterator[tuple[str, str]]:
    if any(kind != "full_attention" for kind in config.layer_types or ()):
        yield "a sliding window for qwen2", "use_sliding_window: false"
    if _head_dim(config) * config.num_attention_heads != config.hidden_size:
        yield f"head_dim {_head_dim(config)}", "hidden_size / num_attention_heads for qwen2"


def _gemma_mismatches(config: PreTrainedConfig, family: Family) -> Iterator[tuple[str, str]]:
    if config.attention_bias:
        yield "attention_bias for gemma", "false"
    if config.use_bidirectional_attention:
        yield "use_bidirectional_attention", "false"
    if not family.sliding:
        return
    big = config.num_hidden_layers == _GEMMA_27B[family.arch]
    scale = config.hidden_size // config.num_attention_heads if big else _head_dim(config)
    if config.query_pre_attn_scalar != scale:
        yield f"query_pre_attn_scalar {config.query_pre_attn_scalar}", f"{scale} for this shape"
    caps = config.attn_logit_softcapping, config.final_logit_softcapping
    if family.arch == "gemma2" and None in caps:
        yield "gemma2 without soft caps", "attn_logit_softcapping and final_logit_softcapping"
    if family.arch == "gemma3" and caps[0] is not None:
        yield f"attn_logit_softcapping {caps[0]} for gemma3", "none"


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _ropes(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """Rotary parameters by kind of layer; most architectures have one kind."""
    ropes = config.rope_parameters or {}
    if "full_attention" in ropes:
        return {part: dict(rope) for part, rope in ropes.items() if rope}
    return {"full_attention": dict(ropes)}


def write_architecture(writer: GGUFWriter, config: PreTrainedConfig, family: Family, rows: int) -> None:
    """Write the shape of the model; ``rows`` is the height of its token table."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(rows)
    head_dim = _head_dim(config)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    _write_rope(writer, config)
    if not family.sliding:
        return
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
        # Said layer by layer: pruning layers breaks the alternation that llama.cpp would assume.
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    if config.attn_logit_softcapping is not None:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _write_rope(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    from gguf import RopeScalingType

    ropes = _ropes(config)
    full = ropes["full_attention"]
    writer.add_rope_freq_base(full.get("rope_theta", 10000.0))
    if full.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"].get("rope_theta", 10000.0))


def export_tensors(model: PreTrainedModel, family: Family, where: str) -> Iterator[Exported]:
    """Every tensor of the file, in a fixed order.

    Raises:
        ModelError: A weight has no place in llama.cpp's architecture.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == family.arch)
    names = get_tensor_name_map(MODEL_ARCH(arch), model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if there is None:
            raise ModelError(f"the weight {name} has no place in GGUF's {family.arch}", where=where)
        yield _exported(there, name, tensor, model.config, family)
    factors = _llama3_factors(model.config)
    if factors is not None:
        yield Exported("rope_freqs.weight", "rope", tuple(factors.shape), lambda: factors, None)


def _exported(there: str, name: str, tensor: Tensor, config: PreTrainedConfig, family: Family) -> Exported:
    heads = 0
    if family.interleaved and ".self_attn.q_proj." in name:
        heads = config.num_attention_heads
    elif family.interleaved and ".self_attn.k_proj." in name:
        heads = config.num_key_value_heads
    offset = family.norm_offset if name.endswith("norm.weight") else 0.0

    def read() -> Tensor:
        values = tensor.detach().cpu()
        if heads:
            values = _interleave(values, heads)
        return values.float() + offset if offset else values

    def restore(values: Tensor) -> Tensor:
        return _deinterleave(values, heads) if heads else values - offset

    return Exported(there, name, tuple(tensor.shape), read, restore)


def _interleave(values: Tensor, heads: int) -> Tensor:
    """Rows [heads * D, ...] of q or k with rotary partners i and i + D/2 moved next to each other, as 2i and 2i + 1."""
    halves = values.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(values.shape)


def _deinterleave(values: Tensor, heads: int) -> Tensor:
    """The inverse of :func:`_interleave`."""
    pairs = values.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).reshape(values.shape)


def _llama3_factors(config: PreTrainedConfig) -> Tensor | None:
    """What llama.cpp divides each rotary frequency by, [head_dim / 2]; None where they are as they come."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = _ropes(config)["full_attention"]
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    steps = torch.arange(0, _head_dim(config), 2, dtype=torch.float32) / _head_dim(config)
    return torch.as_tensor((rope["rope_theta"] ** -steps) / scaled, dtype=torch.float32)
