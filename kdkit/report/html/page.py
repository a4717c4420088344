"""Puts the page together: numbers, charts, samples, one template, and a policy under which only our own script runs."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from kdkit.report import sentences, views
from kdkit.report.figures import number
from kdkit.report.html.charts import COLOURS
from kdkit.report.html.plots import category_figures, loss_figures, reward_figures, score_figures
from kdkit.report.html.quantization import quantization_figures
from kdkit.report.html.samples import read_samples
from kdkit.report.html.tables import (
    columns,
    pair_grids,
    plain_grid,
    scores_grid,
    sentence,
    share_grid,
    sizes_grid,
)
from kdkit.report.html.text import clean, typeset
from kdkit.report.html.training import read_history

__all__ = ["render_html"]

_TEMPLATE: Final = "report.html.jinja"


def render_html(report: Mapping[str, Any], scores: Sequence[Path] = ()) -> str:
    """The report as one HTML document that loads nothing.

    Args:
        report: The content of ``report.json``.
        scores: The directories it was made from, for samples and loss curves; without them there are none.

    Raises:
        DataError: A predictions file beside the scores cannot be read.
    """
    style, script = _part("report.css"), _part("report.js")
    environment = Environment(
        loader=DictLoader({_TEMPLATE: _part(_TEMPLATE)}),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "typeset": typeset}
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    # Both are files of this package.
    code = {"style": Markup(style), "script": Markup(script)}  # noqa: S704
    return environment.get_template(_TEMPLATE).render(**_content(report, scores), **code, policy=policy)


def _content(report: Mapping[str, Any], scores: Sequence[Path]) -> dict[str, Any]:
    history, known = read_history(scores), columns(report)
    by_dataset = [list(of) for _, of in groupby(known, key=lambda column: column.dataset)]
    roles = report["roles"]
    gap = f"Gap closed: 0 % is {roles['baseline']}, 100 % is {roles['teacher']}"
    kept = f"Retention: share of {roles['teacher']}'s score"
    shares = (share_grid(report, report["gap_closed"], gap), share_grid(report, report["retention"], kept))
    return {
        "report": report,
        "summary": sentence(report),
        "colours": {name: index % COLOURS for index, name in enumerate(report["models"])},
        "scores": [(scores_grid(report, of), list(score_figures(report, of))) for of in by_dataset],
        "legend": sentences.legend(report).partition(" (+)")[0],
        "shares": [grid for grid in shares if grid],
        "pairs": list(pair_grids(report)),
        "categories": _categories(report, by_dataset),
        "losses": list(loss_figures(history)),
        "rewards": list(reward_figures(history)),
        "held_out": any(curve.held_out for stage in history.stages.values() for curve in stage.curves),
        "samples": read_samples(scores, report),
        "quantized": plain_grid(views.quantization_table(report)),
        "layers": list(quantization_figures(report)),
        "sizes": sizes_grid(report, history),
        "answers": plain_grid(views.answers_table(report)),
        "decoding": sentences.decoding_lines(report),
        "limits": sentences.limits(report),
        "stages": list(history.stages.values()),
        "versions": _versions(history.stages.values()),
    }


def _categories(report: Mapping[str, Any], by_dataset: Sequence[Sequence[Any]]) -> list[tuple[str, list[Any]]]:
    found = [
        (of[0].dataset, [figure for column in of if (figure := category_figures(report, column))]) for of in by_dataset
    ]
    return [(dataset, figures) for dataset, figures in found if figures]


def _versions(stages: Any) -> list[str]:
    """``kdkit 0.1.0``; several versions of one library when the stages ran under several."""
    found: dict[str, dict[str, None]] = {}
    for stage in stages:
        for name, version in stage.versions.items():
            found.setdefault(name, {})[version] = None
    return [f"{name} {' and '.join(of)}" for name, of in found.items()]


def _part(name: str) -> str:
    return files("kdkit.report.html").joinpath("templates", name).read_text(encoding="utf-8")


def _visible(value: Any) -> Any:
    """Every value the template writes passes here before it is escaped."""
    return value if isinstance(value, Markup) else clean(str(value))


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
