"""Program repair in the schema of BugNet: a buggy program, its error, and the program that was accepted next."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from kdkit.api.data import Example, Rows
from kdkit.api.protocols import LoadContext
from kdkit.plugins.datasets.bugnet_columns import Reading, file_of, file_readings, row_reading
from kdkit.plugins.datasets.code_params import BugNetParams
from kdkit.plugins.datasets.code_prompts import LANGUAGE_NAMES, fenced, row_language, styled_prompt
from kdkit.plugins.datasets.dolly import DATA
from kdkit.plugins.datasets.html_text import html_to_text
from kdkit.plugins.datasets.options import SplitOptions
from kdkit.plugins.datasets.readers import read_rows
from kdkit.plugins.datasets.sources import load_rows, source_rows
from kdkit.plugins.datasets.splits import Candidate, Convert, collect, content_id, part_of, prompt_key
from kdkit.plugins.datasets.values import SourceRow, optional_text, text

__all__ = ["BugNetLoader", "bugnet_converter"]

_TEMPLATE: Final = ("code", "error", "status", "description", "language")
_ERRORS: Final = {
    "WA": "wrong answer",
    "TLE": "time limit exceeded",
    "MLE": "memory limit exceeded",
    # The program ended well on the one test that it was run on.
    "0": "",
}


class BugNetLoader:
    """Pairs of programs, split by problem."""

    def __init__(self, params: BugNetParams) -> None:
        self._params = params

    def load(self, ctx: LoadContext) -> Rows:
        """The rows of the chosen split; see :class:`kdkit.api.DatasetLoader`."""
        params = self._params
        readings: dict[str, Reading | None] | None = None
        if params.columns == "auto":
            # Before any row is used, since a row early in a file may say nothing and all later ones the contrary.
            readings = file_readings(source_rows(params, ctx, hub_split="train"))
            for file, reading in readings.items():
                if reading == "swapped":
                    ctx.log(f"{file}: 'fail' and 'pass' are swapped, as in the second revision of BugNet; swapped back")
                elif reading is None:
                    ctx.log(f"{file}: no line ranges tell whether 'fail' and 'pass' are swapped; taken as named")
        return load_rows(params, params, bugnet_converter(params, readings), ctx, hub_split="train")

    def sample(self) -> Rows:
        """Ten pairs, eight in Python and two in C++, whatever the parameters choose."""
        params = self._params.model_copy(update={"language": "all", "split": "all", "columns": "as-named"})
        convert = bugnet_converter(params, None)
        return collect(read_rows(DATA / "bugnet_sample.jsonl"), convert, SplitOptions(split="all"))[0]


def bugnet_converter(params: BugNetParams, readings: Mapping[str, Reading | None] | None) -> Convert:
    """How a row becomes an example.

    Args:
        params: The loader's parameters.
        readings: What each file's rows say about its columns; None when ``params.columns`` says it.
    """
    make_prompt = styled_prompt(params, _TEMPLATE, paper=_paper_prompt)

    def convert(row: SourceRow) -> Candidate | str:
        columns = row.columns
        problem = optional_text(columns, "problem_id").strip()
        language = row_language(columns)
        reading: Reading = "swapped" if params.columns == "swapped" else "as-named"
        if readings is not None:
            reading = readings.get(file_of(row)) or "as-named"
            if row_reading(columns) not in (None, reading):
                return "contradicts-file"
        if reading == "swapped":
            columns = {**columns, "fail": columns.get("pass"), "pass": columns.get("fail")}
        buggy, accepted = text(columns, "fail"), text(columns, "pass")
        if params.language not in ("all", language):
            return "other-language"
        if not problem and params.split != "all":
            return "no-problem-id"
        if unusable := _unusable(buggy, accepted):
            return unusable
        values = _values(columns, buggy, language, with_description=params.description or params.template is not None)
        prompt = make_prompt(_chat_text(values), values)
        paper = params.answer == "paper"
        example = Example(
            # All that any style shows, so that rows that differ in it only are not taken for one.
            id=content_id(problem, *_shown(columns, values), answers=(accepted, optional_text(columns, "change"))),
            prompt=prompt,
            completion=_paper_answer(columns, accepted) if paper else accepted,
            references=(accepted,) if paper else (),
            category=values["status"],
            echo=buggy,
            extra=_extra(columns, problem, language),
        )
        # The order goes by the program: max_rows would else take all pairs of one problem after the other.
        part = part_of(prompt_key(problem), params) if problem else None
        # Two problems may have one solution: what is accepted in the test part is not trained.
        return Candidate(prompt_key(buggy), example, part, shared=(prompt_key(accepted),))

    return convert


def _unusable(buggy: str, accepted: str) -> str:
    if not buggy.strip():
        return "empty-prompt"
    if not accepted.strip():
        return "empty-completion"
    return "no-change" if buggy.split() == accepted.split() and buggy.strip() == accepted.strip() else ""


def _values(columns: Mapping[str, Any], buggy: str, language: str, *, with_description: bool) -> dict[str, str]:
    """What the prompts are made of; ``raw_error`` and ``raw_status`` as the columns have them, for the paper's."""
    error, status = optional_text(columns, "error"), optional_text(columns, "original_status")
    description = optional_text(columns, "description")
    known = _ERRORS.get(error.strip(), error.strip())
    return {
        "code": buggy,
        "error": f"exit code {known}" if re.fullmatch(r"-?\d+", known) else known,
        "status": status,
        "description": html_to_text(description) if with_description else "",
        "language": LANGUAGE_NAMES.get(language, optional_text(columns, "language")),
        "tag": language if language in LANGUAGE_NAMES else "",
        "raw_error": str(columns.get("error")),
        "raw_status": str(columns.get("original_status")),
    }


def _shown(columns: Mapping[str, Any], values: Mapping[str, str]) -> tuple[str, ...]:
    names = ("code", "raw_error", "raw_status", "language")
    return (*(values[name] for name in names), optional_text(columns, "description"))


def _chat_text(values: Mapping[str, str]) -> str:
    parts = [f"This {values['language']} program has a bug. Write the corrected program, and nothing else."]
    if values["description"]:
        parts.append(f"The problem it is meant to solve:\n\n{values['description']}")
    parts.append(fenced(values["code"], values["tag"]))
    facts = {"Status": values["status"], "Error": values["error"]}
    if any(facts.values()):
        parts.append("\n".join(f"{name}: {value}" for name, value in facts.items() if value))
    return "\n\n".join(parts)


def _paper_prompt(values: Mapping[str, str]) -> str:
    """Word for word as in the paper's program for GPT-2, where the language was edited in by hand."""
    return (
        f"Below is an instruction that describes a task. Write a {values['language']} Script that contains the "
        "correction of the code bug in order to fix the bug, fix the issue or fix the error\n\n"
        f"### Code that has the bug issue or is incorrect:\n{values['code']}\n"
        f"### The reported error in the code:\n{values['raw_error']}\n\n"
        f"### Original Status:\n{values['raw_status']}\n\n"
        "### Response:\n"
    )


def _paper_answer(columns: Mapping[str, Any], accepted: str) -> str:
    # The missing space after "code" is the paper's.
    return f"Solution type {optional_text(columns, 'change') or 'undetermined'}, solution code{accepted}"


def _extra(columns: Mapping[str, Any], problem: str, language: str) -> dict[str, Any]:
    """Columns for rewards and metrics; the only test that BugNet has is the problem's sample."""
    given, expected = optional_text(columns, "input"), optional_text(columns, "output")
    tests = [{"input": given, "output": expected}] if expected.strip() else []
    return {
        "problem_id": problem,
        "language": language,
        "status": optional_text(columns, "original_status"),
        "error": optional_text(columns, "error"),
        "official_tests": tests,
        "official_tests_complete": False,
        "input_mode": "stdio",
    }
