"""The prompts that ship with kdkit, for teachers to answer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from kdkit.api.data import Example, Rows
from kdkit.api.protocols import LoadContext
from kdkit.plugins.datasets.dolly import DATA
from kdkit.plugins.datasets.options import SplitOptions
from kdkit.plugins.datasets.plugin import InstructionsParams
from kdkit.plugins.datasets.prompts import prompter
from kdkit.plugins.datasets.readers import read_rows
from kdkit.plugins.datasets.sources import select_rows
from kdkit.plugins.datasets.splits import Candidate, Convert, collect, prompt_key
from kdkit.plugins.datasets.values import SourceRow, optional_text, text

__all__ = ["InstructionsLoader"]

_SAMPLE_PER_CATEGORY = 2


class InstructionsLoader:
    """English instructions in Dolly's eight categories, without answers."""

    def __init__(self, params: InstructionsParams) -> None:
        self._params = params

    def load(self, ctx: LoadContext) -> Rows:
        """The prompts of the chosen split; see :class:`kdkit.api.DatasetLoader`."""
        convert = self._converter(self._params.categories)
        return select_rows(read_rows(DATA / "instructions.jsonl"), convert, self._params, ctx, name="instructions")

    def sample(self) -> Rows:
        """Two prompts of each category."""
        rows = list(read_rows(DATA / "instructions.jsonl"))
        groups = groupby(sorted(rows, key=_category), key=_category)
        few = [row for _, group in groups for row in list(group)[:_SAMPLE_PER_CATEGORY]]
        return collect(few, self._converter(None), SplitOptions(split="all"))[0]

    def _converter(self, categories: Sequence[str] | None) -> Convert:
        make_prompt = prompter(self._params, "en")

        def convert(row: SourceRow) -> Candidate | str:
            instruction, context = text(row.columns, "instruction"), optional_text(row.columns, "context")
            category = _category(row)
            if categories is not None and category not in categories:
                return "other-category"
            prompt = make_prompt(instruction, context, category)
            echo = context or instruction
            example = Example(id=text(row.columns, "id"), prompt=prompt, category=category, echo=echo)
            return Candidate(prompt_key(instruction, context), example, text=f"{instruction}\n\n{context}".rstrip())

        return convert


def _category(row: SourceRow) -> str:
    return text(row.columns, "category")
