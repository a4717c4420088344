"""Rollouts with transformers: any architecture, any device, no server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kdkit.api.artifacts import Model
from kdkit.models.chat import ChatEncoder
from kdkit.models.load import load_model
from kdkit.train.rollout import Decoded, Mixture, decode, generate, stop_ids

if TYPE_CHECKING:
    from kdkit.api import BuildContext, Completion, RolloutModel, Sampling
    from kdkit.plugins.rollouts.plugin import TransformersRolloutParams

__all__ = ["TransformersRollouts"]


class TransformersRollouts:
    """See :class:`kdkit.api.RolloutEngine`. Uses the live model when there is one, else loads the directory."""

    def __init__(self, params: TransformersRolloutParams, ctx: BuildContext, model: RolloutModel) -> None:
        dtype = torch.bfloat16 if ctx.precision(params.precision) == "bf16" else torch.float32
        live = model.live
        self._model = live if live is not None else load_model(Model(path=model.path), dtype=dtype).to(ctx.device)
        self._tokenizer = model.tokenizer
        self._stop_ids = stop_ids(self._model, ChatEncoder(model.tokenizer))
        self._batch_size = params.batch_size

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], /
    ) -> Sequence[Completion]:
        """One completion per prompt, dropout off whatever mode the live model is in."""
        training = self._model.training
        self._model.eval()
        try:
            return generate(
                self._model,
                self._tokenizer,
                prompts,
                sampling,
                seeds,
                stop_ids=self._stop_ids,
                batch_size=self._batch_size,
            )
        finally:
            self._model.train(training)

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        /,
        *,
        limits: Sequence[int],
        vocabulary: int,
        compute: torch.dtype,
        mixture: Mixture | None,
    ) -> list[Decoded]:
        """Token ids with log-probabilities, and the ids that top-k and top-p kept; the model is in evaluation mode.

        See :func:`kdkit.train.rollout.decode` for the arguments.
        """
        return decode(
            self._model,
            prompts,
            sampling,
            seeds,
            stop_ids=self._stop_ids,
            batch_size=self._batch_size,
            limits=limits,
            vocabulary=vocabulary,
            compute=compute,
            mixture=mixture,
            logprobs=True,
            support=True,
        )
