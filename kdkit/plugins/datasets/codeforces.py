"""Competitive programming in the schemas of open-r1: answers with reasoning traces, and problems with tests."""

from __future__ import annotations

from collections.abc import Mapping

from kdkit.api.data import Rows
from kdkit.api.protocols import LoadContext
from kdkit.plugins.datasets.code_params import HUB_CODEFORCES, CodeforcesParams
from kdkit.plugins.datasets.codeforces_groups import aliases, problem_groups, problem_id
from kdkit.plugins.datasets.codeforces_rows import Answers, Problems
from kdkit.plugins.datasets.codeforces_text import statement_of
from kdkit.plugins.datasets.dolly import DATA
from kdkit.plugins.datasets.options import SplitOptions
from kdkit.plugins.datasets.readers import read_rows
from kdkit.plugins.datasets.sources import load_rows, source_rows
from kdkit.plugins.datasets.splits import Candidate, Convert, collect, part_of, prompt_key
from kdkit.plugins.datasets.values import SourceRow

__all__ = ["CodeforcesLoader", "codeforces_converter"]


class CodeforcesLoader:
    """Answers or problems, split by problem."""

    def __init__(self, params: CodeforcesParams) -> None:
        self._params = params

    def load(self, ctx: LoadContext) -> Rows:
        """The rows of the chosen split; see :class:`kdkit.api.DatasetLoader`."""
        params = self._params.model_copy(update={"config": self._params.config or _hub_config(self._params)})
        left_out: dict[str, int] = {}
        groups = problem_groups(source_rows(params, ctx, hub_split="train")) if params.split != "all" else {}
        rows = load_rows(params, params, codeforces_converter(params, groups, left_out), ctx, hub_split="train")
        if left_out:
            ctx.log(
                f"{params.source}: left out {sum(left_out.values())} tests of {len(left_out)} problems, which have "
                f"more than {params.max_tests_bytes:,} bytes of tests"
            )
        if elsewhere := rows.counts.get("tests-elsewhere"):
            ctx.log(f"{params.source}: {elsewhere} problems have their tests in other files; set generated_tests")
        return rows

    def sample(self) -> Rows:
        """Eight problems: with an answer for ``task: sft``, with tests for ``task: rl``."""
        update = {"language": "python", "split": "all", "generated_tests": None}
        convert = codeforces_converter(self._params.model_copy(update=update), {}, {})
        return collect(read_rows(DATA / "codeforces_sample.jsonl"), convert, SplitOptions(split="all"))[0]


def _hub_config(params: CodeforcesParams) -> str | None:
    source = params.source.source
    if source == HUB_CODEFORCES["sft"]:
        return "solutions_py_decontaminated" if params.language == "python" else "solutions_decontaminated"
    return "verifiable" if source == HUB_CODEFORCES["rl"] else None


def codeforces_converter(params: CodeforcesParams, groups: Mapping[str, str], left_out: dict[str, int]) -> Convert:
    """How a row becomes an example.

    Args:
        params: The loader's parameters.
        groups: See :func:`problem_groups`.
        left_out: Receives how many tests of a problem did not fit.
    """
    maker = Answers(params) if params.task == "sft" else Problems(params, left_out)

    def convert(row: SourceRow) -> Candidate | str:
        problem = problem_id(row.columns)
        aliases(row.columns)  # raises when they are none, and the part would be wrong
        example = maker.example(row.columns, problem)
        if isinstance(example, str):
            return example
        part = part_of(prompt_key(groups.get(problem, problem)), params)
        # The order goes by the example: max_rows would else take all answers to one problem after the other.
        return Candidate(prompt_key(example.id), example, part, text=statement_of(row.columns, example.prompt))

    return convert
