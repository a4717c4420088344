"""From prompts to answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from kdkit.api import Model
from kdkit.models.chat import ChatEncoder
from kdkit.models.load import load_model
from kdkit.train.rollout import completion, stop_ids
from transformers import GenerationConfig

if TYPE_CHECKING:
    from kdkit.api import BuildContext, Completion, RolloutModel, Sampling


class AcmeRollouts:
    """Takes the model that training holds, or loads the one that is on the disk.

    Args:
        model: Where it is.
        ctx: Where it goes.
        precision: Of its weights where it is loaded.
    """

    def __init__(
        self,
        model: RolloutModel,
        ctx: BuildContext,
        precision: Literal["bf16", "fp32"],
    ) -> None:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        live = model.live
        loaded = load_model(Model(path=model.path), dtype=dtype) if live is None else live
        self._model = loaded.to(ctx.device) if live is None else loaded
        self._tokenizer = model.tokenizer
        self._stops = stop_ids(self._model, ChatEncoder(model.tokenizer))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        /,
    ) -> Sequence[Completion]:
        """One completion per prompt, in order, without dropout."""
        training = self._model.training
        self._model.eval()
        try:
            return [
                self._one(prompt, sampling, seed)
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
        finally:
            self._model.train(training)

    def _one(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Completion:
        ids = torch.tensor([list(prompt)], device=self._model.device)
        # Everything is said: what is not would come from the model's own generation_config.json.
        config = GenerationConfig(
            do_sample=sampling.do_sample,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(self._stops),
            pad_token_id=self._stops[0],
            repetition_penalty=1.0,
            num_beams=1,
            **(_sampled(sampling) if sampling.do_sample else {}),
        )
        # An answer depends on its own seed, and the generators of others stay as they are.
        devices = [ids.device] if ids.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(seed)
            out = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config
            )
        return completion(out[0, ids.shape[1] :].tolist(), self._tokenizer, self._stops)


def _sampled(sampling: Sampling) -> dict[str, float]:
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
    }
