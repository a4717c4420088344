"""Instruction data in the schemas of Dolly, its multilingual copy and MiniLLM's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from kdkit.api.data import Example, Rows
from kdkit.api.protocols import LoadContext
from kdkit.models.examples import json_kind
from kdkit.plugins.datasets.options import SplitOptions
from kdkit.plugins.datasets.plugin import HUB_DOLLY, DollyParams
from kdkit.plugins.datasets.prompts import Prompter, prompter
from kdkit.plugins.datasets.readers import read_rows
from kdkit.plugins.datasets.sources import load_rows
from kdkit.plugins.datasets.splits import Candidate, Convert, collect, content_id, prompt_key
from kdkit.plugins.datasets.values import RowError, SourceRow, optional_text, text

__all__ = ["DATA", "DollyLoader", "dolly_converter"]

DATA: Final = Path(__file__).parent / "data"
"""Rows written for kdkit that ship with it."""
_BOM: Final = "\N{ZERO WIDTH NO-BREAK SPACE}"


class DollyLoader:
    """Rows with an instruction, an optional context and one answer or several."""

    def __init__(self, params: DollyParams) -> None:
        self._params = params

    def load(self, ctx: LoadContext) -> Rows:
        """The rows of the chosen split; see :class:`kdkit.api.DatasetLoader`."""
        params = self._params
        convert = dolly_converter(prompter(params, params.language), params.categories, styled=bool(params.template))
        hub_split = next((split for repo, split in HUB_DOLLY.values() if repo == params.source.source), "train")
        return load_rows(params, params, convert, ctx, hub_split=hub_split)

    def sample(self) -> Rows:
        """Twelve rows in the language and prompt style of the parameters, of all categories."""
        convert = dolly_converter(prompter(self._params, self._params.language), None, styled=False)
        rows = read_rows(DATA / f"dolly_sample_{self._params.language}.jsonl")
        return collect(rows, convert, SplitOptions(split="all"))[0]


def dolly_converter(make_prompt: Prompter, categories: Sequence[str] | None, *, styled: bool) -> Convert:
    """How a row becomes an example; MiniLLM calls context, response and category input, output and topic.

    Args:
        make_prompt: Makes the prompt.
        categories: Those to take; all when None.
        styled: ``make_prompt`` is a template of the user, which may show the category, and may not show the context.
    """

    def convert(row: SourceRow) -> Candidate | str:
        columns = row.columns
        # Some real rows start with a byte order mark, which is no text.
        instruction = text(columns, "instruction").removeprefix(_BOM)
        context = optional_text(columns, _either(columns, "context", "input")).removeprefix(_BOM)
        context = context if context.strip() else ""
        category = optional_text(columns, _either(columns, "category", "topic"))
        answers = _answers(columns)
        if categories is not None and category not in categories:
            return "other-category"
        if not instruction.strip():
            return "empty-prompt"
        if not answers[0].strip():
            return "empty-completion"
        prompt = make_prompt(instruction, context, category)
        example = Example(
            id=content_id(instruction, context, *([category] if styled else []), answers=answers),
            prompt=prompt,
            completion=answers[0],
            references=answers if len(answers) > 1 else (),
            category=category,
            echo=context or instruction,
        )
        words = f"{instruction}\n\n{context}".rstrip()
        # The same words can be one instruction, or an instruction and a context; a template can leave either out.
        shared = (prompt_key(words), *([prompt_key(prompt)] if styled else []))
        return Candidate(prompt_key(instruction, context), example, text=words, shared=shared)

    return convert


def _either(columns: Mapping[str, Any], name: str, other: str) -> str:
    """Whichever of two columns is there; both at once would leave open which one is meant."""
    if columns.get(other) is None:
        return name
    if columns.get(name) is not None:
        raise RowError(f"has both {name!r} and {other!r}")
    return other


def _answers(columns: Mapping[str, Any]) -> tuple[str, ...]:
    name = _either(columns, "response", "output")
    value = columns.get(name)
    if not isinstance(value, list):
        return (text(columns, name),)
    if not value or not all(isinstance(item, str) for item in value):
        raise RowError(f"{name!r} is {'a list of other things than texts' if value else json_kind(value)}")
    return tuple(value)
