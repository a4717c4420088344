"""Small problems with tests, which a small model can learn to solve."""

from __future__ import annotations

from collections.abc import Iterator

from kdkit.api.data import Example, Message, Rows
from kdkit.api.protocols import LoadContext
from kdkit.plugins.datasets.code_params import IOProblemsParams
from kdkit.plugins.datasets.code_prompts import fenced
from kdkit.plugins.datasets.codeforces_text import THINK_SYSTEM
from kdkit.plugins.datasets.io_templates import Problem, Template, problem, templates
from kdkit.plugins.datasets.options import SplitOptions
from kdkit.plugins.datasets.sources import select_rows
from kdkit.plugins.datasets.splits import Candidate, collect, content_id, part_of, prompt_key
from kdkit.plugins.datasets.values import SourceRow

__all__ = ["IOProblemsLoader"]

_SAMPLE_STEP = 20
_ASK = "Write a Python program."


class IOProblemsLoader:
    """Problems of generated templates; a template is in one part only."""

    def __init__(self, params: IOProblemsParams) -> None:
        self._params = params
        self._templates = {template.name: template for template in templates()}

    def load(self, ctx: LoadContext) -> Rows:
        """The problems of the chosen split; see :class:`kdkit.api.DatasetLoader`."""
        return select_rows(self._rows(self._params.per_template), self._convert, self._params, ctx, name="io-problems")

    def sample(self) -> Rows:
        """One problem of every twentieth template."""
        rows = list(self._rows(1))[::_SAMPLE_STEP]
        return collect(rows, self._convert, SplitOptions(split="all"))[0]

    def _rows(self, count: int) -> Iterator[SourceRow]:
        for template in self._templates.values():
            if template.level <= self._params.max_level:
                for number in range(count):
                    yield SourceRow(f"{template.name}:{number}", {"template": template.name, "number": number})

    def _convert(self, row: SourceRow) -> Candidate | str:
        template = self._templates[row.columns["template"]]
        made = problem(template, row.columns["number"])
        example = self._example(template, made)
        part = part_of(prompt_key(template.name), self._params)
        return Candidate(prompt_key(made.statement), example, part=part, text=made.statement)

    def _example(self, template: Template, made: Problem) -> Example:
        think, answers = self._params.think, self._params.task == "sft"
        user = Message("user", f"{_ASK} {made.statement}")
        tests = [{"input": given, "output": expected} for given, expected in made.tests]
        return Example(
            id=content_id(made.statement),
            prompt=(Message("system", THINK_SYSTEM), user) if think else (user,),
            completion=_answer(made, think=think) if answers else None,
            category=f"level-{template.level}",
            echo=made.statement,
            extra={
                "template": template.name,
                "level": template.level,
                "language": "python",
                "time_limit": 1.0,
                "examples": tests[:1],
                "official_tests": tests[1:],
            },
        )


def _answer(made: Problem, *, think: bool) -> str:
    code = fenced(made.program, "python")
    if not think:
        return code
    steps = "\n".join(f"Step {number}: {text}" for number, text in enumerate(made.steps, 1))
    return f"<think>\n{steps}\n</think>\n{code}"
