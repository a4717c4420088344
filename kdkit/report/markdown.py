"""``report.md``: the tables for a README, a pull request or a model card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kdkit.report import sentences, views
from kdkit.report.views import Table

__all__ = ["render_markdown"]


def render_markdown(report: Mapping[str, Any]) -> str:
    """The report as GitHub Markdown, ending with a line feed."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"# Report: {_plain(report['recipe'])}"
    yield ""
    models = views.models_table(report)
    for scores in views.scores_tables(report):
        rows = tuple((*facts, *cells[1:]) for facts, cells in zip(models.rows, scores.rows, strict=True))
        yield from _table(Table(scores.title, (*models.header, *scores.header[1:]), rows))
    for baselines in views.baseline_tables(report):
        yield from _table(baselines)
    for line in (sentences.direction_line(report), sentences.legend(report), sentences.baselines_line(report)):
        if line:
            yield _plain(line)
            yield ""
    for table in (views.gap_table(report), views.retention_table(report)):
        if table is not None:
            yield from _table(table)
    for table in views.pair_tables(report):
        yield from _table(table)
    for table in (views.quantization_table(report), views.speed_table(report), views.answers_table(report)):
        if table is not None:
            yield from _table(table)
    yield from _list("Decoding", sentences.decoding_lines(report))
    yield from _list("Notes", report["notes"])
    yield from _list("What these numbers do not say", sentences.limits(report))


def _table(table: Table) -> Iterator[str]:
    yield f"## {_plain(table.title)}"
    yield ""
    yield _row(table.header)
    rules = ["---" if index in table.text_columns else "---:" for index in range(len(table.header))]
    yield f"| {' | '.join(rules)} |"
    for row in table.rows:
        yield _row(row)
    yield ""


def _list(title: str, lines: list[str]) -> Iterator[str]:
    if lines:
        yield f"## {title}"
        yield ""
        for line in lines:
            yield f"- {_plain(line)}"
        yield ""


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(map(_plain, cells))} |"


def _plain(text: str) -> str:
    """``text`` on one line, with the characters escaped that would become markup."""
    for char in "\\|*_`<[":
        text = text.replace(char, "\\" + char)
    return " ".join(text.replace("/\n", "/").split())
