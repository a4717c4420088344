"""Bodies of ``kdkit rewards try`` and ``kdkit rewards doctor``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kdkit.api.data import Example, RewardScore, Rollout
from kdkit.api.errors import DataError, EnvironmentUnmet, ExitCode, KdkitError, RecipeError
from kdkit.api.slots import Component, Ref, Scheduled, StageOutput, Weighted, walk
from kdkit.cli.answers import prompt_text
from kdkit.cli.output import emit, emit_json, log, table, visible

if TYPE_CHECKING:
    from kdkit.engine.context import Builder
    from kdkit.recipe import Recipe, Stage
    from kdkit.testing.hostile import HostileCompletion
    from kdkit.train.rewards import Rewarded

__all__ = ["Choice", "doctor", "try_completion"]

_WORD: Final = re.compile(r"\w+|[^\w\s]")
_TINY: Final = 1e-9
"""Sums of the same numbers may differ by rounding."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What the options of both commands say."""

    recipe: Path
    sets: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    stage: str | None = None
    example: int = 0
    sample: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """Where completions for one example are scored."""

    stage: str
    example: Example
    prompt: str
    tokens: Callable[[str], Sequence[int]]
    score: Callable[[Sequence[Rollout]], Rewarded]
    weights: dict[str, tuple[float, int]]

    def rollout(self, text: str) -> Rollout:
        return Rollout(self.prompt, text, self.tokens(text), self.example)


def try_completion(choice: Choice, completion: Path, *, as_json: bool) -> int:
    """Print the value of every component for one completion.

    Returns:
        0, or 1 when the judge failed.

    Raises:
        KdkitError: The recipe has no rewards, the example or the file cannot be read, or there is no sandbox.
    """
    text = _text(completion)
    bench = _bench(choice)
    rollout = bench.rollout(text)
    scored = bench.score([rollout])
    total = scored.totals[0]
    if as_json:
        components = {name: _json(scores[0]) for name, scores in scored.components.items()}
        for name, (weight, start) in bench.weights.items():
            components[name] |= {"weight": weight, "from_step": start}
        emit_json(
            {
                "stage": bench.stage,
                "example": bench.example.id,
                "tokens": len(rollout.token_ids),
                "components": components,
                "total": _json(total),
            }
        )
    else:
        rows = [
            [name, f"{bench.weights[name][0]:g}", _shown(scores[0]), _note(scores[0], bench.weights[name][1])]
            for name, scores in scored.components.items()
        ]
        emit(table(("REWARD", "WEIGHT", "VALUE", ""), [*rows, ["total", "", _shown(total), _note(total, 0)]]))
    return int(ExitCode.STAGE_FAILED if total.status == "infra-error" else ExitCode.OK)


def doctor(choice: Choice, *, as_json: bool) -> int:
    """Print how much the hostile completions of the bank earn, beside an honest wrong answer.

    Returns:
        0, or 5 when one of them earns more.

    Raises:
        DataError: The honest answer cannot be scored, so that there is nothing to compare with.
        KdkitError: As for :func:`try_completion`.
    """
    from kdkit.testing.hostile import honest_wrong, hostile_completions

    bench = _bench(choice)
    honest = honest_wrong(bench.example)
    bank = [honest, *hostile_completions(bench.example, bench.prompt)]
    scored = bench.score([bench.rollout(item.text) for item in bank])
    limit = scored.totals[0]
    if limit.value is None:
        raise DataError(
            f"an honest answer to example {bench.example.id!r} cannot be scored: {limit.reason}",
            where=f"stage {bench.stage}",
            hint="choose another row with --example",
        )
    flagged = [total.value is not None and total.value > limit.value + _TINY for total in scored.totals]
    if as_json:
        _emit_bank_json(bench, bank, scored, flagged)
    else:
        _emit_bank(bank, scored, flagged)
    return int(ExitCode.GATE if any(flagged) else ExitCode.OK)


def _emit_bank(bank: Sequence[HostileCompletion], scored: Rewarded, flagged: Sequence[bool]) -> None:
    names = list(scored.components)
    rows = [
        ["!" if flagged[i] else "", item.name, _shown(scored.totals[i])]
        + [_shown(scored.components[name][i]) for name in names]
        for i, item in enumerate(bank)
    ]
    emit(table(("", "COMPLETION", "TOTAL", *names), rows))
    beaten = [item for item, mark in zip(bank, flagged, strict=True) if mark]
    for item in beaten:
        emit(f"flagged: {item.name}: {item.why}")
    emit(f"{len(beaten)} of {len(bank) - 1} completions earn more than an honest wrong answer")


def _emit_bank_json(
    bench: _Bench, bank: Sequence[HostileCompletion], scored: Rewarded, flagged: Sequence[bool]
) -> None:
    entries = [
        {
            "name": item.name,
            "why": item.why,
            "flagged": flagged[i],
            "total": _json(scored.totals[i]),
            "components": {name: _json(scores[i]) for name, scores in scored.components.items()},
        }
        for i, item in enumerate(bank)
    ]
    emit_json(
        {
            "stage": bench.stage,
            "example": bench.example.id,
            "honest": entries[0],
            "completions": entries[1:],
            "flagged": [entry["name"] for entry in entries if entry["flagged"]],
        }
    )


def _shown(score: RewardScore) -> str:
    if score.value is None:
        return score.status
    return f"{score.value:.4g}"


def _note(score: RewardScore, from_step: int) -> str:
    notes = [score.reason or "", f"from step {from_step}" if from_step else ""]
    return visible("; ".join(note for note in notes if note))


def _json(score: RewardScore) -> dict[str, Any]:
    return {"status": score.status, "value": score.value, "reason": score.reason}


def _text(file: Path) -> str:
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"is no UTF-8 text: {error.reason} at byte {error.start}", where=str(file)) from error
    except FileNotFoundError as error:
        raise DataError("no such file", where=str(file)) from error
    except OSError as error:
        raise EnvironmentUnmet(f"cannot be read: {error.strerror}", where=str(file)) from error


# -- from a recipe to a bench


def _bench(choice: Choice) -> _Bench:
    from kdkit.engine.anchor import anchored
    from kdkit.engine.boundary import ComponentBoundary
    from kdkit.engine.context import Builder
    from kdkit.engine.inputs import Inputs
    from kdkit.recipe import load_recipe
    from kdkit.train.rewards import RewardSet

    recipe = load_recipe(choice.recipe, sets=choice.sets, variables=choice.variables)
    stage = _stage(recipe, choice.stage)
    params: Any = anchored(stage.params, recipe.base_dir)
    builder = Builder(recipe.seed, Inputs(recipe.base_dir), log=log)
    boundary = ComponentBoundary(stage.found, [s.found for _, s in walk(params) if isinstance(s, Component)])
    with boundary, redirect_stdout(sys.stderr):
        example = _example(params, stage.name, builder, choice)
        rewards = RewardSet.build(params.rewards, builder)
    prompt, tokens = _reading(recipe, params, builder, example)

    def score(rollouts: Sequence[Rollout]) -> Rewarded:
        try:
            with boundary, redirect_stdout(sys.stderr):
                return rewards(rollouts)
        finally:
            rewards.close()

    return _Bench(
        stage=stage.name,
        example=example,
        prompt=prompt,
        tokens=tokens,
        score=score,
        weights={term.name: (term.weight, term.from_step) for term in rewards.terms},
    )


def _stage(recipe: Recipe, name: str | None) -> Stage:
    """The stage whose parameters have a list of rewards; of several the one that learns from them."""
    found = {stage.name: stage for stage in recipe.stages.values() if _all_are(Weighted, stage.params)}
    allowed = ", ".join(found) or "none has rewards"
    if name is not None:
        if name not in found:
            raise RecipeError(f"stage {name!r} has no rewards", where=str(recipe.path), allowed=allowed)
        return found[name]
    # Stages that only measure give no step from which a reward counts.
    learning = [stage for stage in found.values() if _all_are(Scheduled, stage.params)] or list(found.values())
    if len(learning) != 1:
        what = "several stages have rewards" if found else "no stage has rewards"
        hint = "choose one with --stage" if found else None
        raise RecipeError(what, where=str(recipe.path), allowed=allowed if found else None, hint=hint)
    return learning[0]


def _all_are(slot: type[Weighted[Any]], params: Any) -> bool:
    """Whether there are rewards, all of them in slots of this kind."""
    rewards = getattr(params, "rewards", None) or []
    return bool(rewards) and all(isinstance(item, slot) and item.kind == "reward" for item in rewards)


def _example(params: Any, stage: str, builder: Builder, choice: Choice) -> Example:
    loaders = [slot for _, slot in walk(getattr(params, "data", None)) if isinstance(slot, Component)]
    if not loaders:
        raise RecipeError("the stage has no data to take an example from", where=f"stage {stage}")
    made = [slot for _, slot in walk(loaders[0]) if isinstance(slot, Ref) and isinstance(slot.source, StageOutput)]
    if made and not choice.sample:
        raise RecipeError(
            f"the data is made by a stage of the recipe: {made[0]}",
            where=f"stage {stage}",
            hint="--sample takes rows that come with the plugin",
        )
    loader: Any = builder.build(loaders[0])
    rows = (loader.sample() if choice.sample else loader.load(builder)).examples
    if choice.example >= len(rows):
        raise DataError(f"there is no row {choice.example}", where="--example", allowed=f"0 to {len(rows) - 1}")
    found: Example = rows[choice.example]
    return found


def _reading(
    recipe: Recipe, params: Any, builder: Builder, example: Example
) -> tuple[str, Callable[[str], Sequence[int]]]:
    """The prompt as the model sees it, and how it cuts texts into tokens; words where there is no model yet."""
    ref = getattr(params, "model", None)
    while isinstance(ref, Ref) and isinstance(ref.source, StageOutput):
        # A model that is trained has the tokenizer of the one it starts from.
        ref = getattr(recipe.stages[ref.source.stage].params, "model", None)
    try:
        if not isinstance(ref, Ref):
            raise DataError("the stage names no model")
        model = builder.resolve(ref)
        from kdkit.models.chat import ChatEncoder
        from kdkit.models.load import load_tokenizer

        encoder = ChatEncoder(load_tokenizer(model))
    except KdkitError as error:
        log(f"lengths are counted in words and marks, not in tokens: {error}")
        return prompt_text(example), lambda text: range(sum(1 for _ in _WORD.finditer(text)))
    return encoder.prompt_text(example), lambda text: _ids(encoder.tokenizer, text)


def _ids(tokenizer: Any, text: str) -> list[int]:
    # No model writes half of a character, and no tokenizer reads it.
    whole = text.encode("utf-8", "replace").decode()
    ids: list[int] = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
