"""Answers of a model to the prompts of every dataset, timed, with the memory that took."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from kdkit.api.errors import StageError
from kdkit.api.protocols import RolloutModel
from kdkit.plugins.stages.questions import prompt_ids

if TYPE_CHECKING:
    from kdkit.api import Completion, Example, StageContext
    from kdkit.plugins.stages.plugin import EvaluateParams
    from kdkit.plugins.stages.subjects import Subject

__all__ = ["ALONE", "Decoded", "answer_seed", "decode"]

ALONE: Final = ("prefill_tokens_per_s", "decode_tokens_per_s", "load_seconds")
"""What :func:`kdkit.plugins.stages.probing.probe` measures."""


@dataclass(slots=True)
class Decoded:
    """What one model answered.

    Attributes:
        answers: Dataset to completions, row by row; the samples of a row stand together.
        tokens: Generated tokens over all datasets; ``prompts``: rows, however often each is answered; ``seconds``:
            time spent on them.
        alone: Load time, and tokens a second of one prompt at a time; None where they were not measured.
    """

    answers: dict[str, Sequence[Completion]] = field(default_factory=dict)
    tokens: int = 0
    prompts: int = 0
    seconds: float = 0.0
    alone: Mapping[str, float | None] = field(default_factory=lambda: dict.fromkeys(ALONE))

    def speed(self, peak: int | None) -> dict[str, float | int | None]:
        """The ``speed`` entry of a model; None where nothing was measured."""
        per_second = 1 / self.seconds if self.seconds else None
        return {
            "generated_tokens_per_s": self.tokens * per_second if per_second else None,
            "prompts_per_s": self.prompts * per_second if per_second else None,
            **self.alone,
            "peak_memory_bytes": peak,
        }


def decode(
    subject: Subject,
    data: Mapping[str, Sequence[Example]],
    params: EvaluateParams,
    ctx: StageContext,
    before: Callable[[str], None],
) -> Decoded:
    """``params.num_samples`` answers to every row; ``before`` is called with every dataset's name before it starts.

    Raises:
        StageError: The engine gave another number of answers than it was asked for.
    """
    engine = ctx.build(
        params.rollout, RolloutModel(path=subject.artifact.path, tokenizer=subject.tokenizer, live=subject.model)
    )
    seed, samples = ctx.seed_for("evaluation"), range(params.num_samples)
    decoded = Decoded()
    for dataset, rows in data.items():
        before(dataset)
        prompts = [ids for ids in prompt_ids(subject.encoder, dataset, rows, params) for _ in samples]
        seeds = [answer_seed(seed, row.id, sample) for row in rows for sample in samples]
        started = time.monotonic()
        completions = engine.generate(prompts, params.sampling, seeds)
        decoded.seconds += time.monotonic() - started
        if len(completions) != len(prompts):
            # One answer too few would give all later rows the answer of another one.
            given = f"{len(completions)} answers to {len(prompts)} prompts on {dataset}"
            raise StageError(given, where=f"rollout {params.rollout.name}")
        decoded.prompts += len(rows)
        decoded.tokens += sum(len(completion.token_ids) for completion in completions)
        decoded.answers[dataset] = completions
    return decoded


def answer_seed(seed: int, row: str, sample: int) -> int:
    """The seed of one answer, 0 to 2**63 - 1: by row and sample, wherever the row stands among the others."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{sample}/{row}".encode()).digest()[:8], "big") % 2**63
