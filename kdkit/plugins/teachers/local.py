"""A teacher held in memory. Its hidden states are kept between blocks, never its logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from kdkit.api.data import Dense
from kdkit.models.chat import ChatEncoder
from kdkit.models.heads import CausalParts, split, verify_split
from kdkit.models.load import Vocabulary, load_model, load_tokenizer, vocabulary
from kdkit.train.objective import valid_hidden
from kdkit.train.packing import isolates, unpack
from kdkit.train.representation import HiddenStates
from kdkit.train.rollout import generate, stop_ids

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kdkit.api import BuildContext, Completion, Example, Sampling, TokenBatch
    from kdkit.plugins.teachers.plugin import LocalTeacherParams

__all__ = ["LocalTeacher"]


@dataclass(frozen=True, slots=True)
class _HiddenSignals:
    """Last hidden states [N, D] of all valid tokens; logits are projected for the block that is asked for.

    ``layers``: the hidden states of other layers that losses compare.
    """

    parts: CausalParts
    last: Tensor
    layers: Mapping[int, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def block(self, start: int, stop: int, /) -> Dense:
        """Raw logits [stop - start, V] in the dtype of the weights."""
        return Dense(self.parts.project(self.last[start:stop]))

    def hidden(self, layers: Sequence[int], /) -> tuple[Tensor, ...]:
        """[N, D] each, in the dtype of the weights."""
        return tuple(self.layers[layer] for layer in layers)


class LocalTeacher:
    """See :class:`kdkit.api.Teacher`. Weights are cast once; no gradient ever reaches them."""

    def __init__(self, params: LocalTeacherParams, ctx: BuildContext) -> None:
        artifact = ctx.resolve(params.model)
        dtype = torch.bfloat16 if ctx.precision(params.precision) == "bf16" else torch.float32
        self.tokenizer = load_tokenizer(artifact)
        self._model = load_model(artifact, dtype=dtype).to(ctx.device)
        verify_split(self._model)
        self._parts = split(self._model)
        self._isolates = isolates(self._parts.trunk)
        self.positions: int | None = getattr(self._model.config, "max_position_embeddings", None)
        if not self._isolates:
            ctx.log(f"teacher {type(self._model).__name__} sees across rows that lie end to end: it gets padded rows")
        self._batch_size = params.batch_size
        self.vocabulary: Vocabulary = vocabulary(self.tokenizer, self._model)

    @cached_property
    def _states(self) -> HiddenStates:
        return HiddenStates(self._model)

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """Width of each of its hidden states."""
        return self._states.sizes

    @property
    def model(self) -> PreTrainedModel:
        """The model itself, which can take part in the student's sampling."""
        return self._model

    @torch.no_grad()
    def signals(self, batch: TokenBatch, /, *, layers: Sequence[int] = ()) -> _HiddenSignals:
        """One forward pass of the trunk over the batch, of whose hidden states these ``layers`` are kept."""
        # Some architectures have buffers of their number of positions, which a packed row may exceed.
        if not self._isolates or (self.positions is not None and batch.input_ids.shape[1] > self.positions):
            batch = unpack(batch)
        if not layers:
            return _HiddenSignals(self._parts, valid_hidden(self._parts.trunk, batch))
        with self._states.keep(layers) as kept:
            last = valid_hidden(self._parts.trunk, batch)
        return _HiddenSignals(self._parts, last, self._states.of_tokens(kept, last, batch, layers))

    def generate(self, prompts: Sequence[Example], sampling: Sampling, seed: int, /) -> Sequence[Completion]:
        """Answers to the prompts, rendered with the teacher's own chat template."""
        encoder = ChatEncoder(self.tokenizer)
        return generate(
            self._model,
            self.tokenizer,
            [encoder.prompt(example) for example in prompts],
            sampling,
            [(seed + index) % 2**63 for index in range(len(prompts))],
            stop_ids=stop_ids(self._model, encoder),
            batch_size=self._batch_size,
        )

    def close(self) -> None:
        """Drop the weights."""
        for name in ("_model", "_parts", "_states"):
            self.__dict__.pop(name, None)
