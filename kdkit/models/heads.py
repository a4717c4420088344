"""Splitting a causal language model into trunk and output projection.

The engine projects only the tokens it trains on, block by block, so it needs the two halves and whatever the
architecture does to the logits afterwards. A model whose halves do not add up to the whole is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from kdkit.api.errors import ModelError

__all__ = ["CausalParts", "Transform", "split", "verify_split"]

Transform: TypeAlias = Callable[[Tensor], Tensor]

_PROBE_TOKENS: Final = 8
_PROBE_LOGIT: Final = 100.0
_TOLERANCE: Final = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Relative to the largest logit: the two ways multiply other shapes, which round differently."""


@dataclass(frozen=True, slots=True)
class CausalParts:
    """The halves of a causal language model.

    Attributes:
        trunk: Module whose ``last_hidden_state`` is [B, T, D], final norm included.
        head: Output projection [.., D] -> [.., V]; its weight may be tied to the embedding.
        transform: What the architecture does to the projected logits (soft cap, scale); the identity for most.
    """

    trunk: nn.Module
    head: nn.Module
    transform: Transform

    def project(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of the hidden states [N, D], in the head's compute dtype (autocast's when that is on)."""
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(self.head.weight.dtype)
        return self.transform(self.head(hidden))


def split(model: PreTrainedModel) -> CausalParts:
    """The trunk, output projection and logit transform of ``model``, sharing its parameters.

    Call :func:`verify_split` once for a model that comes from outside.

    Raises:
        ModelError: The model has no separate trunk or no output projection.
    """
    trunk, head = model.base_model, model.get_output_embeddings()
    if trunk is model or head is None:
        raise ModelError(
            "cannot be split into trunk and output projection",
            where=type(model).__name__,
            allowed="a causal language model of transformers",
        )
    return CausalParts(trunk=trunk, head=head, transform=_transform(model.config.get_text_config()))


def _transform(config: PreTrainedConfig) -> Transform:
    cap = getattr(config, "final_logit_softcapping", None)
    multiply = getattr(config, "logit_scale", None)
    divide = getattr(config, "logits_scaling", None)
    if cap:  # Gemma 2
        return lambda logits: torch.tanh(logits / cap) * cap
    if isinstance(multiply, int | float):  # Cohere
        return lambda logits: logits * multiply
    if isinstance(divide, int | float):  # Granite
        return lambda logits: logits / divide
    return _identity


def _identity(logits: Tensor) -> Tensor:
    return logits


def verify_split(model: PreTrainedModel) -> None:
    """Check that the halves of ``model`` compute its logits, on 8 tokens in evaluation mode.

    The projection is amplified while it is compared, so that a soft cap shows even where the logits are small.

    Raises:
        ModelError: They do not; the architecture does something to its hidden states or logits that kdkit lacks.
    """
    parts, training = split(model), model.training
    rows = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(_PROBE_TOKENS, device=model.device) % rows).unsqueeze(0)
    model.eval()
    try:
        with torch.no_grad():
            got, want = _both(model, parts, ids)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise _unsupported(model, str(error)) from error
    finally:
        model.train(training)
    if got.shape != want.shape:
        raise _unsupported(model, f"logits of shape {tuple(got.shape)} instead of {tuple(want.shape)}")
    scale = float(want.abs().max())
    gap = float((got - want).abs().max())
    # Written so that a NaN is refused, too.
    if not gap <= _TOLERANCE.get(model.dtype, 2e-2) * scale:
        raise _unsupported(model, f"its logits differ by up to {gap:.3g} of {scale:.3g}")


def _both(model: PreTrainedModel, parts: CausalParts, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [8, V] in float32 from the halves and from the whole, both with the projection amplified."""
    hidden = parts.trunk(input_ids=ids, use_cache=False).last_hidden_state[0]
    raw = parts.head(hidden.to(parts.head.weight.dtype))
    largest = float(raw.abs().max())
    gain = _PROBE_LOGIT / largest if largest > 0 else 1.0
    hook = parts.head.register_forward_hook(lambda _module, _args, out: out * gain)
    try:
        whole = model(input_ids=ids, use_cache=False).logits[0]
        halves = parts.project(hidden)
    finally:
        hook.remove()
    return halves.float(), whole.float()


def _unsupported(model: PreTrainedModel, why: str) -> ModelError:
    return ModelError(
        f"the architecture is not supported for training: its output is not projection(trunk) ({why.splitlines()[0]})",
        where=type(model).__name__,
        hint="open an issue with the model's name",
    )
