"""The report in a terminal: tables that are split, not wrapped, when they do not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from kdkit.report import sentences, views
from kdkit.report.views import Table

__all__ = ["render_terminal"]

_GUTTER: Final = 2
"""Blanks between columns; the box draws one of them."""
_LABEL: Final = 26
"""Longest row label that is kept on one line."""


def render_terminal(report: Mapping[str, Any], *, brief: bool = False) -> RenderableType:
    """The report for ``Console.print``; it adapts to the console's width.

    Args:
        report: The content of ``report.json``.
        brief: Only the scores, the closed gap, retention and notes: what fits on a screen.
    """
    return _Rendered(report, brief=brief)


class _Rendered:
    def __init__(self, report: Mapping[str, Any], *, brief: bool) -> None:
        self.report = report
        self.brief = brief

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in _parts(self.report, brief=self.brief):
            if isinstance(part, Table):
                yield from _tables(part, options.max_width)
            else:
                yield part
        del console


def _parts(report: Mapping[str, Any], *, brief: bool) -> Iterator[Table | RenderableType]:
    yield Text(f"Report: {report['recipe']}", style="bold")
    yield views.models_table(report)
    yield from views.scores_tables(report)
    yield from views.baseline_tables(report)
    yield Text()
    for line in (sentences.direction_line(report), sentences.legend(report), sentences.baselines_line(report)):
        if line:
            yield Text(line, style="dim")
    for table in (views.gap_table(report), views.retention_table(report)):
        if table is not None:
            yield table
    if not brief:
        yield from _details(report)
    yield from _list("Notes", report["notes"])
    if not brief:
        yield from _list("What these numbers do not say", sentences.limits(report))


def _details(report: Mapping[str, Any]) -> Iterator[Table | RenderableType]:
    tables = (views.quantization_table(report), views.speed_table(report), views.answers_table(report))
    for table in (*views.pair_tables(report), *tables):
        if table is not None:
            yield table
    yield from _list("Decoding", sentences.decoding_lines(report))


def _tables(table: Table, width: int) -> Iterator[RenderableType]:
    """The table, split by columns into as many as the width asks for; each repeats the labels."""
    yield Text()
    yield Text(table.title, style="bold")
    for number, columns in enumerate(_split(table, width)):
        if number:
            yield Text()
        grid = RichTable(box=box.SIMPLE_HEAD, padding=(0, _GUTTER - 1, 0, 0), show_edge=False, pad_edge=False)
        for index in columns:
            text = index in table.text_columns
            justify: JustifyMethod = "left" if text else "right"
            grid.add_column(Text(table.header[index]), justify=justify, overflow="fold", no_wrap=not text)
        for row in table.rows:
            grid.add_row(*(Text(row[index]) for index in columns))
        yield grid


def _split(table: Table, width: int) -> Iterator[list[int]]:
    label = min(_width(table, 0), _LABEL)
    columns, used = [0], label
    for index in range(1, len(table.header)):
        needed = _GUTTER + _width(table, index)
        # Words wrap, but none is to be broken.
        least = _GUTTER + _longest_word(table, index) if index in table.text_columns else needed
        if used + least > width and len(columns) > 1:
            yield columns
            columns, used = [0], label
        columns.append(index)
        used += needed
    yield columns


def _longest_word(table: Table, index: int) -> int:
    return max(cell_len(word) for text in _texts(table, index) for word in (text.split() or [""]))


def _width(table: Table, index: int) -> int:
    return max(map(cell_len, _texts(table, index)))


def _texts(table: Table, index: int) -> list[str]:
    return [*table.header[index].split("\n"), *(row[index] for row in table.rows)]


def _list(title: str, lines: list[str]) -> Iterator[RenderableType]:
    if lines:
        yield Text()
        yield Text(title, style="bold")
        grid = RichTable.grid(padding=(0, 1, 0, 0))
        for line in lines:
            grid.add_row(Text("-"), Text(line))
        yield grid
