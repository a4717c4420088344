"""What stages that learn from the student's own answers share: prompts with room for an answer, and who decodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from kdkit.api.errors import DataError, StageError
from kdkit.api.protocols import RolloutModel
from kdkit.train.encoding import row_limit
from kdkit.train.policy.rollouts import Answers, Prompt
from kdkit.train.rollout import Decoded, Mixture

if TYPE_CHECKING:
    import torch

    from kdkit.api import Component, Sampling, StageContext
    from kdkit.api.protocols import DatasetLoader, RolloutEngine
    from kdkit.models.chat import ChatEncoder
    from kdkit.plugins.stages.training import Student

__all__ = ["Room", "answers_of", "load_prompts"]


@dataclass(frozen=True, slots=True)
class Room:
    """How many tokens there are for prompt and answer, and for the answer alone.

    A prompt that leaves less is left out, or answered shortly.

    Attributes:
        max_length: Of both together, as the recipe says.
        longest: Of the answer.
        overlong: What becomes of a prompt that leaves less than that.
        parameter: What the recipe calls ``longest``.
        positions: How many tokens the student and a teacher can read; None where they do not say.
    """

    max_length: int
    longest: int
    overlong: Literal["drop", "truncate"]
    parameter: str
    positions: tuple[int | None, int | None]


def load_prompts(
    component: Component[DatasetLoader], encoder: ChatEncoder, ctx: StageContext, room: Room
) -> list[Prompt]:
    """Prompts that leave room for an answer; those that do not are counted.

    Raises:
        DataError: No prompt is left.
    """
    examples, least = ctx.load(component).examples, room.longest if room.overlong == "drop" else 1
    limit, bound = row_limit(room.max_length, room.positions)
    made = [(example, tuple(encoder.prompt(example))) for example in examples]
    kept = [
        Prompt(example.id, ids, min(room.longest, limit - len(ids)), example, encoder.prompt_text(example))
        for example, ids in made
        if limit - len(ids) >= least
    ]
    where, lost = f"dataset {component.name}", len(made) - len(kept)
    left = f"room for {least} tokens of an answer within {bound}"
    if not kept:
        shortest = min((len(ids) for _, ids in made), default=0)
        hints = [f"lower {room.parameter}", "set overlong: truncate"][: 2 if least > 1 else 0]
        hints = hints if limit < room.max_length else ["raise max_length", *hints]
        raise DataError(
            f"no prompt of {len(made)} leaves {left}; the shortest has {shortest} tokens",
            where=where,
            hint=" or ".join(hints) or "use shorter prompts",
        )
    if lost:
        ctx.log(f"{where}: {len(kept)} of {len(made)} prompts kept; the others leave no {left}")
    return kept


def answers_of(
    component: Component[RolloutEngine],
    ctx: StageContext,
    student: Student,
    encoder: ChatEncoder,
    sampling: Sampling,
    *,
    vocabulary: int,
    compute: torch.dtype,
    mixture: Mixture | None = None,
) -> Answers:
    """Decoding by the engine of the recipe.

    Args:
        component: The engine.
        ctx: Builds it.
        student: The model that is being trained.
        encoder: Of the student.
        sampling: How it answers.
        vocabulary: Leading ids that answers may have.
        compute: Precision of the matrix products.
        mixture: A second model that takes part, for an engine that mixes.
    """
    live = RolloutModel(path=student.artifact.path, tokenizer=student.tokenizer, live=student.model)
    engine: Any = ctx.build(component, live)
    if not component.found.spec.mixes:  # type: ignore[attr-defined]
        return partial(_foreign, engine, component.name, sampling, encoder, vocabulary)

    def answers(prompts: Sequence[Sequence[int]], seeds: Sequence[int], limits: Sequence[int]) -> Sequence[Decoded]:
        options = {"limits": limits, "vocabulary": vocabulary, "compute": compute, "mixture": mixture}
        found: Sequence[Decoded] = engine.decode(prompts, sampling, seeds, **options)
        return found

    return answers


def _foreign(
    engine: RolloutEngine,
    name: str,
    sampling: Sampling,
    encoder: ChatEncoder,
    vocabulary: int,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    limits: Sequence[int],
) -> list[Decoded]:
    """Answers of another engine, which leaves out the end token and knows nothing of a second model."""
    completions = engine.generate(prompts, sampling, seeds)
    where = f"rollout {name}"
    if len(completions) != len(prompts):
        raise StageError(f"{len(completions)} answers to {len(prompts)} prompts", where=where)
    end = encoder.stop_ids()[-1]
    decoded = []
    for completion, limit in zip(completions, limits, strict=True):
        ids = [*completion.token_ids, *([] if completion.truncated else [end])][:limit]
        if not ids or max(ids) >= vocabulary:
            what = "no token" if not ids else f"token {max(ids)}, where {vocabulary} may be taken"
            raise StageError(f"an answer has {what}", where=where)
        decoded.append(Decoded(ids, [], []))
    return decoded
