"""Which charts the page shows, from the numbers of the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from markupsafe import Markup

from kdkit.report.figures import MISSING, measured
from kdkit.report.html.charts import Bar, Dot, Line, bar_chart, dot_chart, line_chart
from kdkit.report.html.tables import Cell, Column, Grid
from kdkit.report.html.text import shorten, typeset
from kdkit.report.html.training import Curve, History, Stage

__all__ = ["Figure", "category_figures", "loss_figures", "reward_figures", "score_figures"]

Report = Mapping[str, Any]

_CATEGORIES: Final = 12
_MODELS: Final = 8
"""More bars in a group are no comparison for the eye; the numbers below the chart have them all."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its caption; ``series`` names its colours where the chart itself does not."""

    title: str
    facts: str
    svg: Markup
    series: tuple[str, ...] = ()
    numbers: Grid | None = None
    remark: str = ""


def score_figures(report: Report, chosen: Sequence[Column]) -> Iterator[Figure]:
    """Every model's score with its interval, one chart per metric."""
    for column in chosen:
        entries: list[tuple[str, Any, int | None]] = [
            (name, model["metrics"].get(column.key), index)
            for index, (name, model) in enumerate(report["models"].items())
        ]
        entries += [
            (name, entry["metrics"].get(column.key), None)
            for name, entry in report.get("baselines", {}).items()
            # The upper bound would push all other marks to one side.
            if name != "reference"
        ]
        dots = [
            Dot(name, typeset(measured(entry["value"], entry["ci95"])), entry["value"], _bounds(entry), index)
            for name, entry, index in entries
            if entry and entry["value"] is not None
        ]
        if dots:
            told = "; ".join(f"{dot.label} {dot.text}" for dot in dots[:20])
            svg = dot_chart(f"{column.name} by model, {column.facts}: {told}", dots, column.unit)
            yield Figure(column.name, column.direction, svg)


def category_figures(report: Report, column: Column) -> Figure | None:
    """Scores by category; None when the report has none for this metric."""
    found = {
        name: model["categories"][column.key]
        for name, model in report["models"].items()
        if model.get("categories", {}).get(column.key)
    }
    if not found:
        return None
    counts = {name: entry["n"] for of in found.values() for name, entry in of.items()}
    # The largest first, as they say most.
    categories = sorted(counts, key=lambda name: (-counts[name], name))
    order, shown = list(report["models"]), list(found)[:_MODELS]
    bars = [
        Bar(
            f"{shorten(category, 36) or '(no category)'} (n = {counts[category]:,})",
            _tip(name, found[name][category]),
            found[name][category]["value"],
            _bounds(found[name][category]),
            order.index(name),
        )
        for category in categories[:_CATEGORIES]
        for name in shown
        if found[name].get(category, {}).get("value") is not None
    ]
    if not bars:
        return None
    svg = bar_chart(f"{column.name} by category, {column.facts}; the numbers follow as a table", bars, column.unit)
    remark = "" if len(categories) <= _CATEGORIES else f"The {_CATEGORIES} largest of {len(categories)} categories."
    return Figure(column.name, column.direction, svg, tuple(shown), _category_grid(column, found, counts), remark)


def _category_grid(column: Column, found: Mapping[str, Mapping[str, Any]], counts: Mapping[str, int]) -> Grid:
    header = (Cell("category"), Cell("n"), *(Cell(name) for name in found))
    rows = tuple(
        (
            Cell(shorten(category, 60) or "(no category)"),
            Cell(f"{counts[category]:,}", sort=counts[category]),
            *(_cell(of.get(category)) for of in found.values()),
        )
        for category in sorted(counts)
    )
    return Grid(f"{column.name} by category", header, rows)


def _cell(entry: Mapping[str, Any] | None) -> Cell:
    return Cell(measured(entry["value"], entry["ci95"]), sort=entry["value"]) if entry else Cell(MISSING)


def loss_figures(history: History) -> Iterator[Figure]:
    """The losses of every training stage, in the order in which they were trained."""
    for stage in history.stages.values():
        yield from _course(history, stage, stage.curves, "Losses", "loss per token (nats)")


def reward_figures(history: History) -> Iterator[Figure]:
    """The mean rewards of every stage that has some, in the order in which they were trained."""
    for stage in history.stages.values():
        yield from _course(history, stage, stage.rewards, "Rewards", "mean reward")


def _course(history: History, stage: Stage, curves: Sequence[Curve], what: str, unit: str) -> Iterator[Figure]:
    lines = [_line(curve, curves) for curve in curves if any(y is not None for _, y in curve.points)]
    if lines:
        told = "; ".join(f"{line.label}{' held out' * line.held_out} {_path(line)}" for line in lines)
        svg = line_chart(f"{what} of stage {stage.name}: {told}", lines, "optimiser step", unit)
        models = [name for name, key in history.made_by.items() if key == stage.key]
        facts = f"{stage.kind} stage" + (f", model {', '.join(models)}" if models else "")
        yield Figure(stage.name, facts, svg)


def _line(curve: Curve, curves: Sequence[Curve]) -> Line:
    # One colour and one label per loss, so that its training and held-out curves belong together.
    names = list(dict.fromkeys(known.name for known in curves))
    label = {"loss": "total" if len(names) > 1 else "loss"}.get(curve.name, curve.name)
    return Line(label, curve.points, names.index(curve.name), curve.held_out)


def _path(line: Line) -> str:
    known = [(step, value) for step, value in line.points if value is not None]
    return f"from {known[0][1]:.3g} at step {known[0][0]:,.0f} to {known[-1][1]:.3g} at step {known[-1][0]:,.0f}"


def _tip(name: str, entry: Mapping[str, Any]) -> str:
    return f"{name}: {measured(entry['value'], entry['ci95'])} (n = {entry['n']:,})"


def _bounds(entry: Mapping[str, Any]) -> tuple[float, float] | None:
    ci95 = entry["ci95"]
    return (ci95[0], ci95[1]) if ci95 else None
