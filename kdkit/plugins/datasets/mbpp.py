"""Mostly Basic Python Problems: functions to write from a sentence, and assertions that judge them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kdkit.api.data import Example, Rows
from kdkit.api.protocols import LoadContext
from kdkit.models.asserts import CallTest, setup_code, split_assert
from kdkit.models.examples import json_kind
from kdkit.plugins.datasets.code_params import MbppParams
from kdkit.plugins.datasets.code_prompts import StyledPrompt, fenced, styled_prompt
from kdkit.plugins.datasets.codeforces_text import THINK_SYSTEM
from kdkit.plugins.datasets.dolly import DATA
from kdkit.plugins.datasets.options import SplitOptions
from kdkit.plugins.datasets.readers import read_rows
from kdkit.plugins.datasets.sources import load_rows
from kdkit.plugins.datasets.splits import Candidate, Convert, Part, collect, content_id, part_of, prompt_key
from kdkit.plugins.datasets.values import RowError, SourceRow, optional_text, text

__all__ = ["MbppLoader", "mbpp_converter"]

_HUB_SPLITS: Final = "train+validation+test+prompt"
_FEW_SHOT: Final = range(1, 11)
_PARTS: Final[Mapping[range, Part]] = {
    range(11, 511): "test",
    range(511, 601): "validation",
    range(601, 975): "train",
}
_NAMED: Final = 5


class MbppLoader:
    """Problems in the official parts."""

    def __init__(self, params: MbppParams) -> None:
        self._params = params

    def load(self, ctx: LoadContext) -> Rows:
        """The rows of the chosen split; see :class:`kdkit.api.DatasetLoader`."""
        params = self._params
        unjudgeable: dict[str, str] = {}
        rows = load_rows(params, params, mbpp_converter(params, unjudgeable), ctx, hub_split=_HUB_SPLITS)
        if unjudgeable:
            first = "; ".join(f"{name}: {reason}" for name, reason in list(unjudgeable.items())[:_NAMED])
            more = "; ..." if len(unjudgeable) > _NAMED else ""
            ctx.log(f"{params.source}: left out {len(unjudgeable)} problems that cannot be judged ({first}{more})")
        return rows

    def sample(self) -> Rows:
        """Ten problems, with answers for ``task: sft``."""
        convert = mbpp_converter(self._params.model_copy(update={"split": "all"}), {})
        return collect(read_rows(DATA / "mbpp_sample.jsonl"), convert, SplitOptions(split="all"))[0]


def mbpp_converter(params: MbppParams, unjudgeable: dict[str, str]) -> Convert:
    """How a row becomes an example; ``unjudgeable`` receives problems of the chosen split and why they are left out."""
    make_prompt = styled_prompt(
        params, ("text", "function", "tests"), system=THINK_SYSTEM if params.prompt_style == "think" else None
    )

    def convert(row: SourceRow) -> Candidate | str:
        columns = row.columns
        wanted = optional_text(columns, "text").strip() or text(columns, "prompt").strip()
        sources = _texts(columns, "test_list")
        if not wanted or not sources:
            return "no-tests" if wanted else "empty-prompt"
        task = _task(columns)
        if task in _FEW_SHOT and params.split != "all":
            return "few-shot"
        part = next((part for numbers, part in _PARTS.items() if task in numbers), None)
        part = part or part_of(prompt_key(wanted), params)
        tests = [split_assert(source) for source in sources]
        name = f"mbpp/{task}" if task is not None else content_id(wanted, *sources)
        if params.task == "rl" and params.split in ("all", part) and (reason := _unjudgeable(columns, tests)):
            unjudgeable[name] = reason
            return "unjudgeable"
        answer = None if params.task == "rl" else _answer(columns)
        if answer == "":
            return "empty-completion"
        example = Example(
            id=name,
            prompt=_prompt(make_prompt, wanted, sources[: params.shown_tests], tests[0]),
            completion=answer,
            echo=wanted,
            extra=_extra(columns, sources),
        )
        return Candidate(prompt_key(wanted, *sources), example, part, text=wanted)

    return convert


def _task(columns: Mapping[str, Any]) -> int | str | None:
    """The number of an MBPP task, or the name that another problem has."""
    value = columns.get("task_id")
    if isinstance(value, bool) or not isinstance(value, int | str | None):
        raise RowError(f"'task_id' is {json_kind(value)}, neither text nor a whole number")
    return value


def _texts(columns: Mapping[str, Any], name: str) -> list[str]:
    value = columns.get(name) or []
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise RowError(f"{name!r} is not a list of texts")
    return [part.strip() for part in value]


def _unjudgeable(columns: Mapping[str, Any], tests: list[CallTest | str]) -> str:
    if setup_code(columns) is None:
        return "what prepares its tests is no Python"
    reasons = (f"test {number} - {test}" for number, test in enumerate(tests, 1) if isinstance(test, str))
    return next(reasons, "")


def _answer(columns: Mapping[str, Any]) -> str:
    code = text(columns, "code").replace("\r\n", "\n").strip()
    return fenced(code, "python") if code else ""


def _extra(columns: Mapping[str, Any], sources: list[str]) -> dict[str, Any]:
    return {
        "language": "python",
        "task_id": columns.get("task_id"),
        "test_list": sources,
        "test_setup_code": optional_text(columns, "test_setup_code"),
        "test_imports": _texts(columns, "test_imports"),
    }


def _prompt(make_prompt: StyledPrompt, wanted: str, shown: list[str], first: CallTest | str) -> Any:
    name, count = (None if isinstance(first, str) else first.call()) or ("", 0)
    tests = "\n".join(shown)
    parts = ["Write a Python function for this task.", wanted]
    if shown:
        parts.append(
            f"It has to pass {'this test' if len(shown) == 1 else 'these tests'}:\n\n{fenced(tests, 'python')}"
        )
    elif name:
        parts.append(f"It is called `{name}` and takes {count} argument{'' if count == 1 else 's'}.")
    parts.append("Put the function, with what it imports, into one code block that begins with ```python.")
    return make_prompt("\n\n".join(parts), {"text": wanted, "function": name, "tests": tests})
