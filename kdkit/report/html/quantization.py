"""What every layer of a quantised model lost, beside what it would have lost by rounding to nearest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kdkit.report.entries import quantization
from kdkit.report.figures import MISSING, number
from kdkit.report.html.charts import Line, line_chart
from kdkit.report.html.plots import Figure
from kdkit.report.html.tables import Cell, Grid

__all__ = ["quantization_figures"]

Errors = Mapping[str, float | None]


def quantization_figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    """One chart per quantised model that has figures of its layers."""
    for index, (name, model) in enumerate(report["models"].items()):
        facts = quantization(model)
        if facts is None or not any(error is not None for error in facts["layer_errors"].values()):
            continue
        own, nearest = facts["layer_errors"], facts["rtn_errors"]
        lines = [Line(facts["quantizer"], _points(own, own), index)]
        if nearest:
            # Dashed, under a label of its own.
            lines.append(Line("nearest", _points(nearest, own), index + 1, held_out=True))
        what = "output" if nearest else "weight"
        told = f"Lost {what} by layer of {name}" + ("; dashed: rounded to nearest" if nearest else "")
        svg = line_chart(f"{told}; the numbers follow as a table", lines, "layer", f"lost {what} (%)")
        yield Figure(
            name,
            f"lost {what} by layer" + (", dashed: rounded to nearest" if nearest else ""),
            svg,
            numbers=_grid(name, facts),
            remark=_kept(facts),
        )


def _points(errors: Errors, layers: Errors) -> tuple[tuple[float, float | None], ...]:
    """By the number of the layer, in percent."""
    known = (errors.get(layer) for layer in layers)
    return tuple((float(place), None if error is None else 100 * error) for place, error in enumerate(known))


def _kept(facts: Mapping[str, Any]) -> str:
    names = list(facts["kept_rtn"])
    if not names:
        return ""
    return f"Rounded to nearest after all: {', '.join(names[:5])}" + (", ..." if len(names) > 5 else "") + "."


def _grid(name: str, facts: Mapping[str, Any]) -> Grid:
    nearest = facts["rtn_errors"]
    header = [Cell("layer"), Cell("lost", "%")] + ([Cell("rounded to nearest", "%")] if nearest else [])
    kept = set(facts["kept_rtn"])
    rows = tuple(
        (
            Cell(layer, "rounded to nearest" if layer in kept else "", "quiet"),
            _cell(error),
            *([_cell(nearest.get(layer))] if nearest else []),
        )
        for layer, error in facts["layer_errors"].items()
    )
    return Grid(f"Layers of {name}", tuple(header), rows)


def _cell(error: float | None) -> Cell:
    return Cell(MISSING) if error is None else Cell(number(100 * error), sort=100 * error)
