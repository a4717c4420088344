"""Competitive programming in the schemas of open-r1: answers with reasoning traces, and problems with tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from kdkit.api.data import Rows
from kdkit.api.protocols import LoadContext
from kdkit.plugins.datasets.code_params import HUB_CODEFORCES, CodeforcesParams
from kdkit.plugins.datasets.codeforces_rows import Answers, Problems, label
from kdkit.plugins.datasets.dolly import DATA
from kdkit.plugins.datasets.options import SplitOptions
from kdkit.plugins.datasets.readers import read_rows
from kdkit.plugins.datasets.sources import load_rows
from kdkit.plugins.datasets.splits import Candidate, Convert, collect, content_id, part_of, prompt_key
from kdkit.plugins.datasets.values import RowError, SourceRow, text

__all__ = ["CodeforcesLoader", "codeforces_converter"]


class CodeforcesLoader:
    """Answers or problems, split by problem."""

    def __init__(self, params: CodeforcesParams) -> None:
        self._params = params

    def load(self, ctx: LoadContext) -> Rows:
        """The rows of the chosen split; see :class:`kdkit.api.DatasetLoader`."""
        params = self._params.model_copy(update={"config": self._params.config or _hub_config(self._params)})
        tally = Counter[str]()
        rows = load_rows(params, params, codeforces_converter(params, tally), ctx, hub_split="train")
        if tally["tests"]:
            ctx.log(
                f"{params.source}: left out {tally['tests']} tests of {tally['problems']} problems, which have more "
                f"than {params.max_tests_bytes:,} bytes of tests"
            )
        if elsewhere := rows.counts.get("tests-elsewhere"):
            ctx.log(f"{params.source}: {elsewhere} problems have their tests in other files; set generated_tests")
        return rows

    def sample(self) -> Rows:
        """Eight problems: with an answer for ``task: sft``, with tests for ``task: rl``."""
        update = {"language": "python", "split": "all", "generated_tests": None}
        convert = codeforces_converter(self._params.model_copy(update=update), Counter())
        return collect(read_rows(DATA / "codeforces_sample.jsonl"), convert, SplitOptions(split="all"))[0]


def _hub_config(params: CodeforcesParams) -> str | None:
    source = params.source.source
    if source == HUB_CODEFORCES["sft"]:
        return "solutions_py_decontaminated" if params.language == "python" else "solutions_decontaminated"
    return "verifiable" if source == HUB_CODEFORCES["rl"] else None


def codeforces_converter(params: CodeforcesParams, tally: Counter[str]) -> Convert:
    """How a row becomes an example; ``tally`` counts ``tests`` left out and the ``problems`` they belong to."""
    maker = Answers(params) if params.task == "sft" else Problems(params, tally)

    def convert(row: SourceRow) -> Candidate | str:
        problem, group = _identity(row.columns)
        example = maker.example(row.columns, problem)
        if isinstance(example, str):
            return example
        # The order goes by the example: max_rows would else take all answers to one problem after the other.
        return Candidate(prompt_key(example.id), example, part_of(prompt_key(group), params))

    return convert


def _identity(columns: Mapping[str, Any]) -> tuple[str, str]:
    """A problem's id, and what it shares with the same problem under its other ids."""
    contest, index = label(columns, "contest_id"), label(columns, "index")
    problem = label(columns, "id") or (f"{contest}/{index}" if contest and index else "")
    if not problem:
        # Without ids the statement is the problem.
        problem = content_id(text(columns, "description"))
    aliases = columns.get("aliases") or []
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise RowError("'aliases' is not a list of texts")
    # Divisions share problems: 1000/A may be 999/C, and each names the other.
    return problem, min([problem, *(alias for alias in aliases if alias.strip())])
