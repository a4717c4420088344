"""Your own rows, in the shapes that TRL reads, and the examples that stages write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeAlias

from kdkit.api.data import Example, Message, Rows
from kdkit.api.errors import DataError
from kdkit.api.protocols import LoadContext
from kdkit.models.examples import (
    EXAMPLE_KEYS,
    example_from_json,
    json_kind,
    messages_from_json,
    prompt_from_json,
)
from kdkit.plugins.datasets.decontaminate import prompt_text
from kdkit.plugins.datasets.dolly import DATA
from kdkit.plugins.datasets.options import SplitOptions
from kdkit.plugins.datasets.plugin import JsonlParams
from kdkit.plugins.datasets.readers import read_rows
from kdkit.plugins.datasets.sources import load_rows
from kdkit.plugins.datasets.splits import Candidate, collect, content_id, prompt_key
from kdkit.plugins.datasets.values import RowError, SourceRow, text

__all__ = ["JsonlLoader", "shape_of"]

Shape: TypeAlias = Literal["kdkit examples", "messages", "prompt and completion", "prompt only"]
_SAID: Final[Mapping[Shape, str]] = {
    "kdkit examples": "rows that kdkit wrote",
    "messages": "rows with messages",
    "prompt and completion": "rows with prompt and completion",
    "prompt only": "rows with a prompt only",
}
_OWN: Final = ("messages", "prompt", "completion", "id", "category", "references")
"""Columns with a meaning; all others are kept in ``Example.extra``."""


class JsonlLoader:
    """Rows of one shape, found from the first row."""

    def __init__(self, params: JsonlParams) -> None:
        self._params = params

    def load(self, ctx: LoadContext) -> Rows:
        """The rows of the chosen split; see :class:`kdkit.api.DatasetLoader`."""
        reader = _Reader(every_turn=self._params.every_turn)
        rows = load_rows(self._params, self._params, reader.convert, ctx, hub_split="train")
        if reader.shape:
            ctx.log(f"{self._params.source}: {_SAID[reader.shape]}")
        return rows

    def sample(self) -> Rows:
        """Twelve rows with prompt and completion."""
        rows = (
            SourceRow(row.where, {"prompt": row.columns["instruction"], "completion": row.columns["response"]})
            for row in read_rows(DATA / "dolly_sample_en.jsonl")
        )
        return collect(rows, _Reader(every_turn=False).convert, SplitOptions(split="all"))[0]


def shape_of(columns: Mapping[str, Any]) -> Shape:
    """The shape of a row; columns with null count as absent.

    Raises:
        RowError: None of the shapes.
    """
    if set(columns) == EXAMPLE_KEYS:
        return "kdkit examples"
    present = {name for name, value in columns.items() if value is not None}
    if "messages" in present:
        if present & {"prompt", "completion"}:
            raise RowError("has 'messages' and also 'prompt' or 'completion'")
        return "messages"
    if "prompt" in present:
        return "prompt and completion" if "completion" in present else "prompt only"
    names = ", ".join(sorted(columns)) or "none"
    raise RowError(f"has neither 'messages' nor 'prompt' (columns: {names}); for 'instruction' use the dataset dolly")


class _Reader:
    """Converts rows and holds them to the shape of the first one."""

    def __init__(self, *, every_turn: bool) -> None:
        self.shape: Shape | None = None
        self._first = ""
        self._every_turn = every_turn

    def convert(self, row: SourceRow) -> Candidate | str:
        shape = shape_of(row.columns)
        if self.shape is None:
            self.shape, self._first = shape, row.where
        elif shape != self.shape:
            # Never skipped: a file of two shapes is a mistake in making it, not one bad row.
            raise DataError(f"has the shape {shape!r}, but {self._first} has {self.shape!r}", where=row.where)
        try:
            example = self._example(shape, row.columns)
        except DataError as error:
            raise RowError(str(error)) from error
        if not _has_text(example.prompt):
            return "empty-prompt"
        if example.completion is not None and not example.completion.strip():
            return "empty-completion"
        return Candidate(prompt_key(example.prompt), example, text=prompt_text(example.prompt))

    def _example(self, shape: Shape, columns: Mapping[str, Any]) -> Example:
        if shape == "kdkit examples":
            return example_from_json(columns)
        prompt, completion = _PARSERS[shape](columns)
        references = _references(columns)
        return Example(
            id=_label(columns, "id") or content_id(prompt, answers=(completion, *references)),
            prompt=prompt,
            completion=completion,
            every_turn=shape == "messages" and self._every_turn,
            references=references,
            category=_label(columns, "category"),
            extra={name: value for name, value in columns.items() if name not in _OWN},
        )


_Turns: TypeAlias = str | tuple[Message, ...]


def _messages(columns: Mapping[str, Any]) -> tuple[_Turns, str | None]:
    messages = messages_from_json(columns["messages"])
    if messages[-1].role != "assistant":
        raise RowError(
            f"the last message is of the role {messages[-1].role!r}: only an answer of the assistant is learned"
        )
    if len(messages) == 1:
        raise RowError("has an answer but no message before it")
    return messages[:-1], messages[-1].content


def _prompt(columns: Mapping[str, Any]) -> tuple[_Turns, str | None]:
    prompt = prompt_from_json(columns["prompt"])
    if not isinstance(prompt, str) and prompt[-1].role == "assistant":
        raise RowError("the last message of 'prompt' is of the assistant, so there is nothing to answer")
    return prompt, None


def _prompt_completion(columns: Mapping[str, Any]) -> tuple[_Turns, str | None]:
    prompt, _ = _prompt(columns)
    if isinstance(prompt, str):
        return prompt, text(columns, "completion")
    value = columns["completion"]
    if isinstance(value, str):
        raise RowError("'prompt' is a list of messages and 'completion' a text; both have to be the same")
    messages = messages_from_json(value, "completion")
    if [message.role for message in messages] != ["assistant"]:
        raise RowError("'completion' is not exactly one message of the assistant; use 'messages' for several turns")
    return prompt, messages[0].content


_PARSERS: Final[Mapping[str, Callable[[Mapping[str, Any]], tuple[_Turns, str | None]]]] = {
    "messages": _messages,
    "prompt and completion": _prompt_completion,
    "prompt only": _prompt,
}


def _has_text(prompt: _Turns) -> bool:
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return any(message.content.strip() for message in prompt if message.role != "system")


def _label(columns: Mapping[str, Any], name: str) -> str:
    value = columns.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise RowError(f"{name!r} is {json_kind(value)}, neither text nor a whole number")
    return "" if value is None else str(value)


def _references(columns: Mapping[str, Any]) -> tuple[str, ...]:
    value = columns.get("references")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise RowError("'references' is not a list of texts")
    return tuple(value)
