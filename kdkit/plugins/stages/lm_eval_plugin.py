"""Parameters of the stage lm-eval. Light: neither torch nor the harness."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BeforeValidator, Field

from kdkit.api import Dataset, Model, Params, Precision, Ref, Scores, StageContext, StageSpec
from kdkit.api.protocols import StageOutputs

if TYPE_CHECKING:
    from kdkit.plugins.stages.checks import Problem

__all__ = ["LM_EVAL", "LmEvalParams"]

_FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PREFIX: Final = "lm-eval-"


def _named(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(task, str) for task in value):
        return {_PREFIX + task: task for task in value}
    return value


class LmEvalParams(Params):
    """Tasks of EleutherAI's lm-evaluation-harness on models of this recipe, as scores that a report can show.

    The harness makes prompts, reads answers and scores them; kdkit loads the models, quantised and pruned ones
    included, and keeps what every example scored, so that models are compared on the same examples. A group or a tag,
    such as `mmlu`, becomes one dataset: the mean over all of its examples, with its tasks as categories. Metrics that
    the harness computes of all answers together (BLEU, F1) have an interval from resamples, and are not compared
    between models.

    Tasks of the harness fetch their data from the Hub. Tasks that run programs of the model (`humaneval`) are always
    refused: the harness has no sandbox. Several answers to an example, which some tasks ask for, are as the task says.
    """

    models: dict[str, Ref[Model]] = Field(min_length=1)
    """Models by the name they have in the report."""
    tasks: Annotated[dict[str, str], BeforeValidator(_named), Field(min_length=1)]
    """Tasks, groups or tags by the name that the dataset has in the report; of a list, that is `lm-eval-TASK`."""
    num_fewshot: int | None = Field(None, ge=0)
    """Solved examples in every prompt; left out, as many as the task says. A task that says 0 has none."""
    limit: int | None = Field(None, ge=1)
    """Only the first examples of every task, for a try."""
    include_path: Ref[Dataset] | None = None
    """A directory with task files of your own, written as `./tasks`. Relative paths in them start from there. What
    stands in it is part of the content key; data elsewhere is not."""
    allow_code: bool = False
    """Run Python that comes with tasks: `!function` in files below `include_path`, templates without a sandbox, and
    metrics that a task loads with the package evaluate, from the Hub as well. It runs with all your rights: only for
    files that you have read."""
    apply_chat_template: bool = False
    """Put prompts into the chat template, as turns. The harness's published numbers are mostly without."""
    system_instruction: str | None = None
    """A system prompt."""
    max_length: int | None = Field(None, ge=2)
    """Longest prompt and answer in tokens; longer prompts lose their beginning. Left out, what the model can read."""
    per_device_eval_batch_size: int = Field(8, ge=1)
    """Sequences of one forward pass; in bf16 the rounding depends on it."""
    precision: Precision = "auto"
    """Weights and matrix products in bf16 or fp32."""
    resamples: int = Field(200, ge=0)
    """How often a metric of all answers together is computed for its interval; 0 gives none."""


def _check(params: LmEvalParams) -> list[Problem]:
    problems: list[Problem] = [
        ((slot, name), f"'{name}' is no name; use letters, digits, '.', '_' and '-'")
        for slot, names in (("models", params.models), ("tasks", params.tasks))
        for name in names
        if not _FILE_NAME.fullmatch(name)
    ]
    place = params.include_path
    if place is not None and not str(place.source).startswith(("./", "../", "/", "~")):
        problems.append((("include_path",), "it is a directory on this machine, such as ./tasks"))
    return problems


def _run(params: LmEvalParams, ctx: StageContext) -> StageOutputs:
    from kdkit.plugins.stages.lm_eval_run import run

    return run(params, ctx)


LM_EVAL: StageSpec[LmEvalParams] = StageSpec(
    name="lm-eval",
    summary="Score models on tasks of the lm-evaluation-harness",
    params=LmEvalParams,
    run=_run,
    outputs={"scores": Scores},
    check=_check,
    extras=("lm-eval",),
)
