"""What kdkit sees of this package. Light: loader and judge are imported when they are built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from kdkit.api import Component, Dataset, DatasetSpec, Params, Ref, RewardSpec, Runtime, Sandbox, hookimpl

if TYPE_CHECKING:
    from kdkit.api import BuildContext, DatasetLoader, Reward


class HumanEvalParams(Params):
    """Problems of HumanEval, or of your own in its columns, all of them in the order of the file.

    They are there to measure with: a model that was trained on them says nothing in an evaluation.
    """

    source: Ref[Dataset]
    """A file of JSON Lines (.jsonl or .jsonl.gz). Columns: task_id, prompt (the code up to the end of the docstring),
    entry_point (the function's name), canonical_solution (its body), test (code that defines `check`), and
    buggy_solution for `task: fix`. HumanEval.jsonl.gz and the Python part of HumanEvalPack have them."""
    task: Literal["write", "fix"] = "write"
    """``write`` asks for the function from its docstring, ``fix`` for a repaired one (HumanEvalPack's HumanEvalFix with
    docstrings)."""
    prompt_style: Literal["chat", "complete"] = "chat"
    """``chat`` is a message that asks for one code block. ``complete`` is the bare prompt, which a base model goes on
    writing: what counts is its text up to the first line that is no part of the function."""
    max_rows: int | None = Field(None, ge=1)
    """Take only the first rows."""

    @model_validator(mode="after")
    def _style_fits(self) -> Self:
        if self.task == "fix" and self.prompt_style == "complete":
            raise ValueError("task: fix has no prompt to complete: use prompt_style: chat")
        return self


class HumanEvalTestsParams(Params):
    """1 for a program that passes the tests of its problem, else 0. For rows of the dataset `humaneval`, as the judge
    of an evaluation or as a reward.

    Tests never run beside the program. The calls that they make are recorded with the problem's own solution; the
    program only gets the calls and says what they return; the tests are run once more with what it said. An object that
    calls itself equal to everything passes nothing.
    """

    sandbox: Component[Sandbox] = Field(default={"use": "auto"}, validate_default=True)
    """Where programs and tests run."""
    time_limit: float = Field(5.0, gt=0, le=60)
    """CPU seconds for all calls to a program together."""
    memory_mb: int = Field(512, ge=64)
    """Memory of a program in MiB."""
    chunk: Annotated[int, Runtime(), Field(ge=1)] = 64
    """Programs given to the sandbox at once; their outputs are in memory together."""


def _dataset(params: HumanEvalParams) -> DatasetLoader:
    from kdkit_humaneval.dataset import HumanEvalLoader

    return HumanEvalLoader(params)


def _tests(params: HumanEvalTestsParams, ctx: BuildContext) -> Reward:
    from kdkit_humaneval.judge import HumanEvalTests

    return HumanEvalTests(params, ctx.build(params.sandbox))


@hookimpl
def kdkit_datasets() -> Iterator[DatasetSpec[Any]]:
    """The dataset."""
    yield DatasetSpec(
        name="humaneval",
        summary="HumanEval and HumanEvalPack (Python): functions to write or to repair",
        params=HumanEvalParams,
        build=_dataset,
    )


@hookimpl
def kdkit_rewards() -> Iterator[RewardSpec[Any]]:
    """The judge of its answers."""
    yield RewardSpec(
        name="humaneval-tests",
        summary="The answer passes its problem's tests, run in a sandbox and from outside",
        params=HumanEvalTestsParams,
        build=_tests,
        range=(0.0, 1.0),
    )
