"""Rows of open-r1's datasets as examples: answers to learn from, and problems to be judged by tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kdkit.api.data import Example
from kdkit.api.errors import DataError
from kdkit.models.examples import messages_from_json
from kdkit.plugins.datasets.code_params import CodeforcesParams
from kdkit.plugins.datasets.code_prompts import StyledPrompt, language_of, last_block, row_language, styled_prompt
from kdkit.plugins.datasets.codeforces_groups import label
from kdkit.plugins.datasets.codeforces_tests import (
    ProblemTests,
    generated_tests,
    problem_tests,
    read_tests,
    unjudgeable,
)
from kdkit.plugins.datasets.codeforces_text import PAPER_SYSTEM, TEMPLATE, THINK_SYSTEM, limit, statement_values
from kdkit.plugins.datasets.splits import content_id
from kdkit.plugins.datasets.values import RowError, optional_text, text

__all__ = ["Answers", "Problems"]

_SYSTEM: Final = {"think": THINK_SYSTEM, "paper": PAPER_SYSTEM}
_OPEN: Final = "<think>"
_CLOSE: Final = "</think>"


def _style(params: CodeforcesParams) -> StyledPrompt:
    return styled_prompt(params, TEMPLATE, system=_SYSTEM.get(params.prompt_style))


class Answers:
    """Rows with an answer, for ``task: sft``."""

    def __init__(self, params: CodeforcesParams) -> None:
        self._params = params
        self._make_prompt = _style(params)

    def example(self, columns: Mapping[str, Any], problem: str) -> Example | str:
        """The example, or the reason for which the row is dropped."""
        asked, answer = _conversation(columns)
        if not answer.strip():
            return "empty-completion"
        if not self._params.unfinished and _is_cut(columns, answer):
            return "unfinished"
        block = last_block(answer.rpartition(_CLOSE)[2])
        if block is None:
            return "no-code"
        language = language_of(block[0])
        if self._params.language not in ("all", language):
            return "other-language"
        values = statement_values({**columns, "prompt": asked}, read_tests(columns, "examples"), language or "other")
        if not (asked or values["description"]):
            return "empty-prompt"
        completion = answer if self._params.traces else answer.rpartition(_CLOSE)[2].lstrip()
        return Example(
            # All that a template can show, so that rows that differ in it only are not taken for one.
            id=content_id(problem, *values.values(), answers=(answer,)),
            prompt=self._make_prompt(values["prompt"], values),
            completion=completion,
            category=optional_text(columns, "problem_type"),
            echo=values["description"],
            extra={**_facts(columns, problem), "language": language},
        )


def _conversation(columns: Mapping[str, Any]) -> tuple[str, str]:
    """What was asked (empty when the row does not say) and what was answered."""
    if columns.get("messages") is None:
        return optional_text(columns, "prompt").strip(), text(columns, "generation")
    try:
        messages = messages_from_json(columns["messages"])
    except DataError as error:
        raise RowError(str(error)) from error
    if [message.role for message in messages] != ["user", "assistant"]:
        raise RowError("'messages' is not one question of the user and one answer of the assistant")
    return messages[0].content.strip(), messages[1].content


def _is_cut(columns: Mapping[str, Any], answer: str) -> bool:
    reason = optional_text(columns, "finish_reason").strip().lower()
    return reason not in ("", "stop") or (_OPEN in answer and _CLOSE not in answer)


class Problems:
    """Problems with tests, for ``task: rl``; ``left_out`` receives how many tests of a problem did not fit."""

    def __init__(self, params: CodeforcesParams, left_out: dict[str, int]) -> None:
        self._params = params
        self._left_out = left_out
        self._make_prompt = _style(params)

    def example(self, columns: Mapping[str, Any], problem: str) -> Example | str:
        """The example, or the reason for which the row is dropped."""
        language = self._params.language
        if columns.get("language") is not None and row_language(columns) != language:
            return "other-language"
        if reason := unjudgeable(columns):
            return reason
        examples = read_tests(columns, "examples")
        values = statement_values(columns, examples, language)
        if not (values["description"] or optional_text(columns, "prompt").strip()):
            return "empty-prompt"
        tests = self._tests(columns, problem)
        if isinstance(tests, str):
            return tests
        return Example(
            id=problem,
            prompt=self._make_prompt(values["prompt"], values),
            category=optional_text(columns, "problem_type"),
            echo=values["description"],
            extra={
                **_facts(columns, problem),
                "language": language,
                "examples": examples,
                "official_tests": list(tests.tests),
                "official_tests_complete": tests.complete,
                "tests_left_out": tests.left_out,
                "checker": optional_text(columns, "generated_checker") or None,
                "input_mode": _input_mode(columns),
            },
        )

    def _tests(self, columns: Mapping[str, Any], problem: str) -> ProblemTests | str:
        """Tests that can judge a program, or why there are none."""
        params = self._params
        found = problem_tests(columns, generated_tests(params.generated_tests, problem), params.max_tests_bytes)
        if not found.all_known and not params.incomplete_tests and (found.tests or found.elsewhere):
            return "tests-elsewhere" if found.elsewhere else "incomplete-tests"
        if not found.tests:
            return "tests-too-large" if found.left_out else "no-tests"
        if found.left_out:
            self._left_out[problem] = found.left_out
        return found


def _input_mode(columns: Mapping[str, Any]) -> str:
    mode = optional_text(columns, "input_mode").strip().lower() or "stdio"
    if mode not in ("stdio", "file"):
        raise RowError(f"'input_mode' is {mode[:40]!r}, neither stdio nor file")
    return mode


def _facts(columns: Mapping[str, Any], problem: str) -> dict[str, Any]:
    """What rewards and reports want to know of any problem."""
    return {
        "problem_id": problem,
        "contest_id": label(columns, "contest_id"),
        "index": label(columns, "index"),
        "title": optional_text(columns, "title"),
        "time_limit": limit(columns, "time_limit"),
        "memory_limit": limit(columns, "memory_limit"),
    }
