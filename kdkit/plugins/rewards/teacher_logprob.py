"""How probable a completion is to a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from kdkit.api.data import Dense, Example, RewardScore, Rollout
from kdkit.api.errors import ConformanceError, DataError, ModelError, RecipeError
from kdkit.models.chat import ChatEncoder, Encoded
from kdkit.models.load import load_tokenizer, token_fingerprint
from kdkit.plugins.rewards.scores import scored
from kdkit.train.batching import collate
from kdkit.train.objective import block_tokens

if TYPE_CHECKING:
    from kdkit.api import BuildContext
    from kdkit.plugins.rewards.params import TeacherLogprobParams

__all__ = ["TeacherLogprob"]


class TeacherLogprob:
    """Mean log-probability of the completion's tokens under a teacher; see ``TeacherLogprobParams``.

    Raises:
        RecipeError: The teacher has no full logits.
        ModelError: The tokenizer is not the teacher's.
    """

    def __init__(self, params: TeacherLogprobParams, ctx: BuildContext) -> None:
        spec: Any = params.teacher.found.spec
        if "logits" not in spec.gives or spec.fixed_rows:
            raise RecipeError(
                f"teacher {params.teacher.name!r} gives no full logits for new texts",
                where="reward teacher-logprob",
                hint="with top-k probabilities a token outside them has no value",
            )
        tokenizer = load_tokenizer(ctx.resolve(params.tokenizer))
        self._encoder = ChatEncoder(tokenizer)
        self._teacher = ctx.build(params.teacher)
        if self._teacher.vocabulary.fingerprint != token_fingerprint(tokenizer):
            raise ModelError(
                "the teacher has another tokenizer",
                where="reward teacher-logprob",
                hint="name the teacher's",
            )
        self._floor, self._batch_size, self._device = params.floor, params.batch_size, ctx.device

    def __call__(self, rollouts: Sequence[Rollout], /) -> list[RewardScore]:
        """See :class:`kdkit.api.protocols.Reward`."""
        sizes = [len(rollout.token_ids) for rollout in rollouts]
        # Ids in the padding of the student's head mean nothing to the teacher.
        width = self._teacher.vocabulary.size
        readable = [i for i, r in enumerate(rollouts) if sizes[i] and all(0 <= token < width for token in r.token_ids)]
        rows: dict[int, Encoded] = {}
        scores: dict[int, RewardScore] = {}
        for index in readable:
            try:
                rows[index] = self._encoded(rollouts[index])
            except DataError as error:  # without a prompt nothing predicts the first token
                scores[index] = RewardScore.unscorable(error.what)
        # Rows of similar length together; a row's value does not depend on its neighbours but for rounding.
        order = sorted(rows, key=lambda index: -sizes[index])
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            means = self._means([rows[index] for index in chosen])
            scores.update(zip(chosen, map(self._score, means), strict=True))
        return [scores.get(index) or self._score(None) for index in range(len(rollouts))]

    def close(self) -> None:
        """Release the teacher."""
        self._teacher.close()

    def _score(self, mean: float | None) -> RewardScore:
        if mean is None:
            return scored(-1.0, -1.0, 0.0, "no tokens that the teacher knows")
        return scored(mean / self._floor, -1.0, 0.0, f"{mean:.4f} nats per token")

    def _encoded(self, rollout: Rollout) -> Encoded:
        example = rollout.example or Example(id="", prompt=rollout.prompt)
        prompt, answer = self._encoder.prompt(example), tuple(rollout.token_ids)
        return Encoded(example.id, (*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer))

    def _means(self, rows: Sequence[Encoded]) -> list[float]:
        """Mean log-probability of the learned tokens of every row, in nats."""
        batch = collate(rows, device=self._device)
        labels = batch.input_ids[:, 1:][batch.labels_mask[:, 1:]]
        with torch.no_grad():
            signals = self._teacher.signals(batch)
        size = block_tokens(self._teacher.vocabulary.size)
        logprobs = []
        for start in range(0, len(labels), size):
            taken = labels[start : start + size]
            signal = signals.block(start, start + len(taken))
            if not isinstance(signal, Dense):
                raise ConformanceError(
                    f"wants logits, the teacher gave {type(signal).__name__}", where="teacher-logprob"
                )
            values = torch.log_softmax(signal.logits.float(), -1).gather(-1, taken[:, None].to(signal.logits.device))
            logprobs.append(values[:, 0].double().cpu())
        return [float(part.mean()) for part in torch.cat(logprobs).split([row.targets for row in rows])]
