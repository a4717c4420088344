"""Answers of several models to the same prompts, for reading: in columns, or one below the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from kdkit.cli.output import visible

if TYPE_CHECKING:
    from kdkit.api.data import Example
    from kdkit.train.answers import Answer

__all__ = ["Row", "facts", "plain", "prompt_text", "rich_rows"]

_COLUMN: Final = 38
"""Narrowest column: two of them and the rule between fit 80 characters."""
_RULE: Final = 3
_LONG: Final = 1000
"""A terminal shows this many characters of a prompt; the answers matter more."""
_TAB: Final = 4


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt with its answers.

    Attributes:
        title: Such as ``prompt 2 of 3 (questions.txt:2)``.
        prompt: What was asked.
        answers: By label, in the order of the models; None where the work was stopped before.
    """

    title: str
    prompt: str
    answers: Mapping[str, Answer | None]


def prompt_text(example: Example) -> str:
    """The prompt for a person: messages with their roles."""
    if isinstance(example.prompt, str):
        return example.prompt
    return "\n".join(f"{message.role}: {message.content}" for message in example.prompt)


def facts(answer: Answer | None) -> str:
    """How long an answer is and took."""
    if answer is None:
        return "stopped before this answer"
    unit = "token" if answer.tokens == 1 else "tokens"
    text = f"{answer.tokens:,} {unit} in {answer.seconds:.2f} s, {answer.tokens_per_s:,.0f} tokens/s"
    return f"{text}, truncated" if answer.truncated else text


def plain(rows: Sequence[Row]) -> Iterator[str]:
    """Lines for a file or another program: no colours, nothing wrapped."""
    for row in rows:
        yield f"== {visible(row.title)}"
        yield visible(row.prompt)
        for label, answer in row.answers.items():
            yield ""
            yield f"-- {visible(label)} ({facts(answer)})"
            if answer is not None:
                yield _said(answer)
        yield ""


def rich_rows(rows: Sequence[Row], console: Console) -> None:
    """Print all rows, each in columns where they are wide enough for all of its answers."""
    for row in rows:
        console.print(Text(f"== {visible(row.title)}", style="bold"), soft_wrap=True)
        console.print(Text(_clipped(visible(row.prompt)), style="cyan"), soft_wrap=True)
        console.print()
        width = (console.width + _RULE) // max(len(row.answers), 1) - _RULE
        if len(row.answers) > 1 and _fits(row, width):
            console.print(_columns(row, width))
        else:
            console.print(_stacked(row), soft_wrap=True)
        console.print()


def _said(answer: Answer) -> str:
    text = visible(answer.text.expandtabs(_TAB)).strip("\n")
    return text if text.strip() else "(empty answer)"


def _clipped(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[:_LONG]}... ({len(text) - _LONG:,} more characters)"


def _fits(row: Row, width: int) -> bool:
    """Whether columns of ``width`` are readable: prose wraps well, code does not."""
    texts = [_said(answer) for answer in row.answers.values() if answer is not None]
    return width >= _COLUMN and all(cell_len(line) <= width for text in texts for line in _code(text))


def _code(text: str) -> Iterator[str]:
    """Lines between fences, and those that are indented."""
    fenced = False
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line


def _columns(row: Row, width: int) -> RenderableType:
    grid = Table(box=box.SQUARE, show_edge=False, pad_edge=False, show_footer=True, footer_style="")
    for label, answer in row.answers.items():
        grid.add_column(
            Text(visible(label), style="bold"),
            _facts(answer),
            overflow="fold",
            vertical="top",
            width=width,
        )
    grid.add_row(*(Text("" if answer is None else _said(answer)) for answer in row.answers.values()))
    return grid


def _stacked(row: Row) -> RenderableType:
    parts: list[Text] = []
    for label, answer in row.answers.items():
        head = Text.assemble(("-- ", "dim"), (visible(label), "bold"), " (", _facts(answer), ")")
        parts += [head] if answer is None else [head, Text(_said(answer))]
        parts.append(Text())
    return Group(*parts[:-1])


def _facts(answer: Answer | None) -> Text:
    text = Text(facts(answer), style="dim")
    text.highlight_words(["truncated"], style="not dim bold yellow")
    return text
