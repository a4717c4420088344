"""What a report shows, as titled tables of text: shared by the Markdown and the terminal rendering.

Everything is derived from ``report.json``, so an old report can be shown again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kdkit.report import ALPHA
from kdkit.report.entries import SAME, Report, bare, by_dataset, marks_of, metrics_of, quantization
from kdkit.report.figures import MISSING, amount, measured, number, p_value, percent, share, size

__all__ = [
    "Table",
    "answers_table",
    "baseline_tables",
    "bytes_per_parameter",
    "gap_table",
    "has_kernels",
    "models_table",
    "pair_tables",
    "quantization_table",
    "retention_table",
    "scores_tables",
    "speed_table",
    "verdict",
]

_SPEED: Final = {
    "generated_tokens_per_s": ("tokens/s", number),
    "prompts_per_s": ("prompts/s", number),
    "prefill_tokens_per_s": ("prefill\n(tokens/s)", number),
    "decode_tokens_per_s": ("decode\n(tokens/s)", number),
    "load_seconds": ("load\n(s)", number),
    "peak_memory_bytes": ("peak memory", size),
}


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose first column labels the rows.

    Attributes:
        title: Heading; empty for none.
        header: One text per column; a line feed separates a name from its unit.
        rows: Rows of as many cells.
        text_columns: Columns of words, which may wrap; the others hold numbers.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: tuple[int, ...] = (0,)


def models_table(report: Report) -> Table:
    """Size and training of every model."""
    rows = (
        (name, amount(model["parameters"]), size(model["bytes"]), amount(model["trained_tokens"]))
        for name, model in report["models"].items()
    )
    return Table("Models", ("model", "parameters", "on disk", "trained tokens"), tuple(rows))


def scores_tables(report: Report) -> Iterator[Table]:
    """One table per dataset: every model's score on every metric, with its interval and the mark for the reference."""
    marks = dict(marks_of(report))
    for dataset, keys in by_dataset(report).items():
        entries = [
            model["metrics"][key] for model in report["models"].values() for key in keys if key in model["metrics"]
        ]
        # A score that is undefined has no examples, which says nothing about the others.
        ns = [entry["n"] for entry in entries if entry["n"]] or [0]
        n = f"n = {min(ns):,}" + (f" to {max(ns):,}" if min(ns) < max(ns) else "")
        header = ("model", *(_header(key, dataset, metrics_of(report)[key]["unit"]) for key in keys))
        rows = tuple((name, *(_score(report, name, key, marks) for key in keys)) for name in report["models"])
        yield Table(f"Scores on {dataset} ({n})" if dataset else f"Scores ({n})", header, rows)


def baseline_tables(report: Report) -> Iterator[Table]:
    """One table per dataset: what answers score that need no model."""
    entries = {name: baseline["metrics"] for name, baseline in report.get("baselines", {}).items()}
    for dataset, keys in by_dataset(report).items():
        known = [key for key in keys if any(key in metrics for metrics in entries.values())]
        header = ("baseline", *(_header(key, dataset, metrics_of(report)[key]["unit"]) for key in known))
        rows = tuple((name, *(_plain_score(metrics.get(key)) for key in known)) for name, metrics in entries.items())
        if known:
            yield Table(f"Baselines on {dataset}" if dataset else "Baselines", header, rows)


def retention_table(report: Report) -> Table | None:
    """Each model's share of the teacher's score; None when there is none to show."""
    teacher = report["roles"]["teacher"]
    return _share_table(report, report["retention"], f"Retention: share of {teacher}'s score")


def gap_table(report: Report) -> Table | None:
    """Each student's share of the gap closed; None when there is none to show."""
    roles = report["roles"]
    title = f"Gap closed: 0 % is {roles['baseline']}, 100 % is {roles['teacher']}"
    return _share_table(report, report["gap_closed"], title)


def pair_tables(report: Report) -> Iterator[Table]:
    """One table of paired differences per metric."""
    for key, first in metrics_of(report).items():
        higher = first["higher_is_better"]
        rows = tuple(
            (
                f"{row['a']} - {row['b']}",
                measured(row["difference"], row["ci95"], sign=True),
                p_value(row["p"]),
                verdict(row, higher_is_better=higher),
            )
            for row in report["pairs"]
            if row["metric"] == key
        )
        if rows:
            title = f"Differences in {key} ({'higher' if higher else 'lower'} is better)"
            yield Table(title, ("pair", "difference", "p", "verdict"), rows, text_columns=(0, 3))


def quantization_table(report: Report) -> Table | None:
    """What was done to every quantised model and what it costs; None without one.

    Errors are means over layers: of outputs where the quantizer says what rounding to nearest would lose, else of
    weights.
    """
    found = [(name, model, model["quantization"]) for name, model in report["models"].items() if quantization(model)]
    header = ("model", "quantizer", "bits", "group\n(weights)", "bytes per\nparameter", "lost output",
              "lost output,\nrounded to nearest", "lost weight", "layers rounded\nto nearest")  # fmt: skip
    rows = tuple((name, *_quantization_cells(model, facts)) for name, model, facts in found)
    return Table("Quantised models", header, rows, text_columns=(0, 1)) if rows else None


def _quantization_cells(model: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[str]:
    lost, nearest = (_mean_percent(facts[key]) for key in ("layer_errors", "rtn_errors"))
    group, kept = facts["group_size"], len(facts["kept_rtn"])
    calibrated = bool(facts["rtn_errors"])
    yield facts["quantizer"]
    yield MISSING if facts["bits"] is None else f"{facts['bits']}"
    yield MISSING if group is None else "row" if group == -1 else f"{group:,}"
    yield bytes_per_parameter(model)
    yield from (lost, nearest, MISSING) if calibrated else (MISSING, MISSING, lost)
    yield f"{kept:,} of {len(facts['layer_errors']):,}" if calibrated or kept else MISSING


def bytes_per_parameter(model: Mapping[str, Any]) -> str:
    """Of the file; 2 is that of 16-bit weights."""
    known = model["bytes"] is not None and model["parameters"]
    return number(model["bytes"] / model["parameters"]) if known else MISSING


def _mean_percent(errors: Mapping[str, float | None]) -> str:
    known = [error for error in errors.values() if error is not None]
    return f"{number(100 * sum(known) / len(known))} %" if known else MISSING


def speed_table(report: Report) -> Table | None:
    """Speed and memory while evaluating; None when nothing was measured."""
    keys = [key for key in _SPEED if any(model["speed"].get(key) is not None for model in report["models"].values())]
    models = report["models"].items()
    rows = [(name, *(_SPEED[key][1](model["speed"].get(key)) for key in keys)) for name, model in models]
    header = ("model", *(_SPEED[key][0] for key in keys))
    if not keys:
        return None
    if not has_kernels(report):
        return Table("Speed", header, tuple(rows))
    named = tuple((*row, model.get("kernel") or MISSING) for row, (_, model) in zip(rows, models, strict=True))
    return Table("Speed", (*header, "kernel"), named, text_columns=(0, len(header)))


def has_kernels(report: Report) -> bool:
    """Whether it is known what computed the answers; reports of earlier versions do not say."""
    return any(model.get("kernel") for model in report["models"].values())


def answers_table(report: Report) -> Table | None:
    """Answers that hit the token limit, are empty or were not judged, by model and dataset; None without answers."""
    several = len(report["datasets"]) > 1
    found = [
        (f"{name} on {dataset}" if several else name, counts)
        for name, model in report["models"].items()
        for dataset, counts in model["counts"].items()
        if counts.get("answers", counts["n"])
    ]
    parts = ["truncated", "empty", *(["unjudged"] if any(counts.get("unjudged") for _, counts in found) else [])]
    rows = tuple((label, *_answer_cells(counts, parts)) for label, counts in found)
    return Table("Answers", ("model", "answers", *parts), rows) if rows else None


def _answer_cells(counts: Mapping[str, int], parts: Sequence[str]) -> Iterator[str]:
    answers = counts.get("answers", counts["n"])
    yield f"{answers:,}"
    for part in parts:
        yield share(counts.get(part, 0), answers)


def verdict(row: Mapping[str, Any], *, higher_is_better: bool) -> str:
    """What a ``pairs`` entry says about its two models."""
    if row["p"] is None:
        return "no test on one example"
    if row["p"] > ALPHA:
        return SAME
    winner = row["a"] if (row["difference"] > 0) == higher_is_better else row["b"]
    corrected = row["p_holm"] is None or row["p_holm"] <= ALPHA
    return f"{winner} better" if corrected else f"{winner} better, not after correction"


def _header(key: str, dataset: str, unit: str) -> str:
    name = bare(key, dataset)
    return f"{name}\n({unit})" if unit else name


def _plain_score(entry: Mapping[str, Any] | None) -> str:
    return measured(entry["value"], entry["ci95"]) if entry else MISSING


def _score(report: Report, name: str, key: str, marks: Mapping[tuple[str, str], str]) -> str:
    entry = report["models"][name]["metrics"].get(key)
    text = _plain_score(entry)
    return f"{text} {marks[name, key]}" if (name, key) in marks else text


def _share_table(report: Report, entries: Sequence[Mapping[str, Any]], title: str) -> Table | None:
    keys = list(dict.fromkeys(entry["metric"] for entry in entries))
    datasets = {key: dataset for dataset, known in by_dataset(report).items() for key in known if key in keys}
    cells = {(entry["model"], entry["metric"]): percent(entry["value"], entry["ci95"]) for entry in entries}
    models = [name for name in report["models"] if any((name, key) in cells for key in keys)]
    rows = tuple((name, *(cells.get((name, key), MISSING) for key in keys)) for name in models)
    header = (f"{dataset}/\n{bare(key, dataset)}" if dataset else key for key, dataset in datasets.items())
    return Table(title, ("model", *header), rows) if rows else None
