"""Python functions and what they are for, in the schemas of PyTorrent, CodeSearchNet and CoSQA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kdkit.api.data import Example, Rows
from kdkit.api.protocols import LoadContext
from kdkit.models.examples import json_kind
from kdkit.plugins.datasets.code_params import HUB_CODESEARCHNET, PyTorrentParams
from kdkit.plugins.datasets.code_prompts import fenced, styled_prompt
from kdkit.plugins.datasets.docstrings import FunctionText, NotAFunctionError, read_function
from kdkit.plugins.datasets.dolly import DATA
from kdkit.plugins.datasets.options import SplitOptions
from kdkit.plugins.datasets.readers import read_rows
from kdkit.plugins.datasets.sources import load_rows
from kdkit.plugins.datasets.splits import Candidate, Convert, Part, collect, content_id, part_of, prompt_key
from kdkit.plugins.datasets.values import RowError, SourceRow, optional_text, text

__all__ = ["MAX_CODE", "PyTorrentLoader", "pytorrent_converter"]

MAX_CODE: Final = 100_000
"""Longest function, in characters; what is longer is a table of data."""
_BOM: Final = "\N{ZERO WIDTH NO-BREAK SPACE}"
_PARTS: Final[Mapping[str, Part]] = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}


class PyTorrentLoader:
    """Functions, split by package."""

    def __init__(self, params: PyTorrentParams) -> None:
        self._params = params

    def load(self, ctx: LoadContext) -> Rows:
        """The rows of the chosen split; see :class:`kdkit.api.DatasetLoader`."""
        params = self._params
        if params.source.source == HUB_CODESEARCHNET and params.config is None:
            params = params.model_copy(update={"config": "python"})
        rows = load_rows(params, params, pytorrent_converter(params), ctx, hub_split="train")
        if not rows.examples and rows.counts.get("other-split") and not rows.counts.get("shared-with-other-split"):
            ctx.log(
                f"{params.source}: no {params.split_by} is in split: {params.split}; with few packages set "
                "split_by: function, or split_by: partition where the rows have that column"
            )
        return rows

    def sample(self) -> Rows:
        """Nine functions of three invented packages."""
        convert = pytorrent_converter(self._params)
        return collect(read_rows(DATA / "pytorrent_sample.jsonl"), convert, SplitOptions(split="all"))[0]


@dataclass(frozen=True, slots=True)
class _Function:
    """A row in any of the schemas; CoSQA's query stands for its docstring."""

    source: str
    docstring: str
    summary: str
    repo: str
    path: str
    name: str
    partition: str
    language: str
    matches: bool


def pytorrent_converter(params: PyTorrentParams) -> Convert:
    """How a row becomes an example; see :class:`PyTorrentParams` for the columns."""
    make_prompt = styled_prompt(params, ("text", "signature", "name"), paper=_paper_prompt)

    def convert(row: SourceRow) -> Candidate | str:
        function = _function_of(row.columns)
        if unusable := _unusable(function):
            return unusable
        try:
            parts = read_function(function.source)
        except NotAFunctionError:
            return "unreadable-code"
        if parts.only_docstring:
            return "only-docstring"
        wanted = _wanted(function, params)
        if not wanted.strip():
            return "empty-prompt"
        code = function.source if params.keep_docstring else parts.code
        values = {"text": wanted, "signature": parts.signature, "name": function.name}
        paper = params.answer == "paper"
        example = Example(
            id=content_id(wanted, function.repo, function.path, function.name, answers=(code,)),
            prompt=make_prompt(_chat_text(wanted, parts, params), values),
            completion=f"### solution code \n\n{code}\n\n### End of code\n" if paper else code,
            references=(code,) if paper else (),
            echo=wanted,
            extra={"language": "python", "repo": function.repo, "path": function.path, "func_name": function.name},
        )
        # The order goes by the function in any case: max_rows would else take one package after the other.
        key = prompt_key(parts.code)
        # Packages carry copies of each other's functions under other docstrings.
        return Candidate(key, example, _part(function, params), shared=(key,))

    return convert


def _function_of(columns: Mapping[str, Any]) -> _Function:
    cosqa = columns.get("doc") is not None and columns.get("code") is not None and "original_string" not in columns
    source = "code" if cosqa else _first(columns, "original_string", "whole_func_string")
    docstring = "doc" if cosqa else _first(columns, "docstring", "func_documentation_string")
    return _Function(
        source=text(columns, source).removeprefix(_BOM),
        docstring=optional_text(columns, docstring),
        summary=optional_text(columns, "summary"),
        repo=optional_text(columns, _first(columns, "repo", "repository_name")).strip(),
        path=optional_text(columns, _first(columns, "path", "func_path_in_repository")),
        name=optional_text(columns, "func_name"),
        partition=optional_text(columns, _first(columns, "partition", "split_name")).strip().lower(),
        language=optional_text(columns, "language").strip().lower() or "python",
        matches=not cosqa or _label(columns),
    )


def _first(columns: Mapping[str, Any], name: str, other: str) -> str:
    """PyTorrent's name of a column, or the Hub's where only that is there."""
    return other if columns.get(name) is None and columns.get(other) is not None else name


def _label(columns: Mapping[str, Any]) -> bool:
    """CoSQA's judgement whether the code answers the query."""
    value = columns.get("label")
    if value not in (0, 1):
        raise RowError(f"'label' is {value if isinstance(value, int) else json_kind(value)}, neither 0 nor 1")
    return bool(value)


def _unusable(function: _Function) -> str:
    if function.language != "python":
        return "other-language"
    if not function.matches:
        return "no-match"
    if not function.source.strip():
        return "empty-completion"
    return "too-long" if len(function.source) > MAX_CODE else ""


def _wanted(function: _Function, params: PyTorrentParams) -> str:
    summary = function.summary.strip() if params.prompt_with.startswith("summary") else ""
    return summary or function.docstring.strip()


def _part(function: _Function, params: PyTorrentParams) -> Part | None:
    if params.split_by == "repo" and function.repo:
        return part_of(prompt_key(function.repo), params)
    if params.split_by != "partition":
        return None
    if function.partition not in _PARTS:
        raise RowError(f"'partition' is {function.partition!r}, none of {', '.join(_PARTS)}")
    return _PARTS[function.partition]


def _chat_text(wanted: str, parts: FunctionText, params: PyTorrentParams) -> str:
    kind = "class" if parts.signature.startswith("class") else "function"
    request = f"Write a Python {kind} for this description. Answer with its code, and nothing else.\n\n{wanted}"
    if params.prompt_with.endswith("+signature"):
        request += f"\n\nIt starts like this:\n\n{fenced(parts.signature, 'python')}"
    return request


def _paper_prompt(values: Mapping[str, str]) -> str:
    """Word for word as in the paper's program for GPT-2."""
    return (
        "Below is an instruction that describes a task. Write a programming script that appropriately completes the "
        f"request.\n\n### Request:\n{values['text']}\n### Response:\n"
    )
