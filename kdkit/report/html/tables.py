"""The report's tables for the page: cells with a value to sort by, and the words that belong to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from kdkit.report import ALPHA, views
from kdkit.report.figures import MISSING, amount, measured, number, p_value, percent, size
from kdkit.report.html.training import History

__all__ = [
    "BASELINES",
    "Cell",
    "Column",
    "Grid",
    "columns",
    "pair_grids",
    "plain_grid",
    "scores_grid",
    "sentence",
    "share_grid",
    "sizes_grid",
]

Report = Mapping[str, Any]
Tone = Literal["", "better", "worse", "same", "quiet"]

BASELINES: Final = {
    "identity": "repeats its input",
    "empty": "answers nothing",
    "majority": "always the most common reference",
    "reference": "the reference itself",
}
_SPEEDS: Final[Mapping[str, tuple[str, Callable[[float | None], str]]]] = {
    "generated_tokens_per_s": ("tokens/s", number),
    "prompts_per_s": ("prompts/s", number),
    "prefill_tokens_per_s": ("prefill tokens/s", number),
    "decode_tokens_per_s": ("decode tokens/s", number),
    "load_seconds": ("load (s)", number),
    "peak_memory_bytes": ("peak memory", size),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell.

    Attributes:
        text: The content.
        note: A second, smaller line.
        tone: How the note is coloured; its words say the same.
        sort: What the column is sorted by; None sorts last.
    """

    text: str
    note: str = ""
    tone: Tone = ""
    sort: float | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """A metric on a dataset.

    Attributes:
        key: Its key in ``metrics``.
        dataset: The dataset; the only one of a report is called by its name too.
        name: The key without the dataset.
        unit: Empty when the value has none.
    """

    key: str
    dataset: str
    name: str
    unit: str
    higher_is_better: bool | None

    @property
    def direction(self) -> str:
        """``higher is better``, the opposite, or neither."""
        words = {True: "higher is better", False: "lower is better", None: "neither end is better"}
        return words[self.higher_is_better]

    @property
    def facts(self) -> str:
        """Unit and direction."""
        return ", ".join(filter(None, (self.unit, self.direction)))


@dataclass(frozen=True, slots=True)
class Grid:
    """A table.

    Attributes:
        title: Heading.
        header: Name and unit of each column.
        rows: Rows of as many cells; the first labels the row.
        foot: Rows that stay last however the others are sorted.
        text: Columns of words; the others hold numbers.
    """

    title: str
    header: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    foot: tuple[tuple[Cell, ...], ...] = ()
    text: tuple[int, ...] = (0,)


def columns(report: Report) -> list[Column]:
    """All metrics, dataset by dataset, in the order of the report."""
    names = list(report["datasets"])
    found: dict[str, Column] = {}
    for model in report["models"].values():
        for key, entry in model["metrics"].items():
            fitting = [name for name in names if len(names) > 1 and key.startswith(f"{name}/")]
            dataset = max(fitting, key=len, default="")
            name = key.removeprefix(f"{dataset}/") if dataset else key
            only = names[0] if len(names) == 1 else dataset
            found.setdefault(key, Column(key, only, name, entry["unit"], entry["higher_is_better"]))
    return sorted(found.values(), key=lambda column: names.index(column.dataset) if column.dataset in names else 0)


def scores_grid(report: Report, chosen: Sequence[Column]) -> Grid:
    """Every model on the metrics of one dataset, and below them what answers without a model score."""
    marks = dict(_marks(report))
    header = (Cell("model"), *(Cell(column.name, column.facts) for column in chosen))
    rows = tuple(
        (
            _model_cell(report, name),
            *(_score_cell(model["metrics"].get(c.key), marks.get((name, c.key))) for c in chosen),
        )
        for name, model in report["models"].items()
    )
    foot = tuple(
        (
            Cell(name, BASELINES.get(name, "no model"), "quiet"),
            *(_score_cell(entry["metrics"].get(c.key), None) for c in chosen),
        )
        for name, entry in report.get("baselines", {}).items()
        if any(column.key in entry["metrics"] for column in chosen)
    )
    total = report["datasets"].get(chosen[0].dataset, {}).get("n")
    title = f"{chosen[0].dataset}, {_counted(total, 'example')}" if total else chosen[0].dataset
    return Grid(title, header, rows, foot)


def _model_cell(report: Report, name: str) -> Cell:
    roles = report["roles"]
    words = [role for role in ("teacher", "baseline") if roles[role] == name]
    words += ["reference"] if roles["reference"] == name and roles["reference"] != roles["baseline"] else []
    return Cell(name, ", ".join(words), "quiet")


def _score_cell(entry: Mapping[str, Any] | None, mark: tuple[str, Tone] | None) -> Cell:
    if entry is None:
        return Cell(MISSING)
    words, tone = mark or ("", "")
    return Cell(measured(entry["value"], entry["ci95"]), words, tone, entry["value"])


def _marks(report: Report) -> Iterator[tuple[tuple[str, str], tuple[str, Tone]]]:
    """``(model, metric)`` to the words on its difference from the reference, after Holm's correction."""
    reference = report["roles"]["reference"]
    higher = {column.key: column.higher_is_better for column in columns(report)}
    for row in report["pairs"]:
        if reference not in (row["a"], row["b"]) or row["p_holm"] is None:
            continue
        other = row["b"] if row["a"] == reference else row["a"]
        delta = row["difference"] if other == row["a"] else -row["difference"]
        if row["p_holm"] > ALPHA:
            mark: tuple[str, Tone] = ("= no significant difference", "same")
        elif (delta > 0) == higher[row["metric"]]:
            mark = (f"▲ better than {reference}", "better")
        else:
            mark = (f"▼ worse than {reference}", "worse")
        yield (other, row["metric"]), mark


def pair_grids(report: Report) -> Iterator[Grid]:
    """One table of paired differences per metric."""
    several = len(report["datasets"]) > 1
    for column in columns(report):
        rows = tuple(_pair_cells(row, column) for row in report["pairs"] if row["metric"] == column.key)
        if rows:
            where = f" on {column.dataset}" if several else ""
            header = (
                Cell("pair"),
                Cell("difference", column.unit),
                Cell("95 % interval"),
                Cell("p"),
                Cell("p", "Holm"),
                Cell("n"),
                Cell("verdict"),
            )
            yield Grid(f"{column.name}{where} ({column.direction})", header, rows, text=(0, 6))


def _pair_cells(row: Mapping[str, Any], column: Column) -> tuple[Cell, ...]:
    ci95, verdict = row["ci95"], views.verdict(row, higher_is_better=bool(column.higher_is_better))
    return (
        Cell(f"{row['a']} − {row['b']}"),
        Cell(measured(row["difference"], ci95, sign=True), sort=row["difference"]),
        Cell(_bounds(row), sort=ci95[0] if ci95 else None),
        Cell(p_value(row["p"]), sort=row["p"]),
        Cell(p_value(row["p_holm"]), sort=row["p_holm"]),
        Cell(f"{row['n']:,}", sort=row["n"]),
        Cell(verdict),
    )


def _bounds(row: Mapping[str, Any]) -> str:
    """Both ends of a difference's interval, rounded as the difference is."""
    if row["ci95"] is None:
        return MISSING
    low, high = row["ci95"]
    arm = max(high - row["difference"], row["difference"] - low)
    texts = (measured(end, (end - arm, end + arm), sign=True).partition(" ")[0] for end in (low, high))
    return " to ".join(texts)


def share_grid(report: Report, entries: Sequence[Mapping[str, Any]], title: str) -> Grid | None:
    """Shares (retention, the closed gap) by model and metric; None when there is none."""
    several = len(report["datasets"]) > 1
    chosen = [column for column in columns(report) if any(entry["metric"] == column.key for entry in entries)]
    found = {(entry["model"], entry["metric"]): entry for entry in entries}
    rows = tuple(
        (Cell(name), *(_share_cell(found.get((name, column.key))) for column in chosen))
        for name in report["models"]
        if any((name, column.key) in found for column in chosen)
    )
    header = (Cell("model"), *(Cell(c.name, f"on {c.dataset}" if several else "") for c in chosen))
    return Grid(title, header, rows) if rows else None


def _share_cell(entry: Mapping[str, Any] | None) -> Cell:
    return Cell(percent(entry["value"], entry["ci95"]), sort=entry["value"]) if entry else Cell(MISSING)


def sizes_grid(report: Report, history: History) -> Grid:
    """Origin, size, training and speed of every model."""
    models = report["models"]
    shown = [key for key in _SPEEDS if any(model["speed"].get(key) is not None for model in models.values())]
    header = [Cell("model"), Cell("parameters"), Cell("on disk"), Cell("trained tokens"), Cell("made in")]
    header += [Cell(_SPEEDS[key][0]) for key in shown]
    named = bool(shown) and views.has_kernels(report)
    header += [Cell("kernel")] if named else []
    rows = []
    for name, model in models.items():
        stage = history.stages.get(history.made_by.get(name, ""))
        seconds = stage.seconds if stage else None
        facts = [Cell(amount(model["parameters"]), sort=model["parameters"])]
        facts += [Cell(size(model["bytes"]), sort=model["bytes"])]
        facts += [Cell(amount(model["trained_tokens"]), sort=model["trained_tokens"])]
        facts += [Cell(_duration(seconds), sort=seconds)]
        facts += [Cell(_SPEEDS[key][1](model["speed"].get(key)), sort=model["speed"].get(key)) for key in shown]
        source = f"stage {stage.name} ({stage.kind})" if stage else model["path"]
        facts += [Cell(model.get("kernel") or MISSING)] if named else []
        rows.append((Cell(name, source, "quiet"), *facts))
    return Grid("Sizes and speeds", tuple(header), tuple(rows), text=(0, len(header) - 1) if named else (0,))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def plain_grid(table: views.Table | None) -> Grid | None:
    """A table of the Markdown report as it is."""
    if table is None:
        return None
    header = (name.partition("\n") for name in table.header)
    cells = tuple(Cell(name, note.strip("()")) for name, _, note in header)
    rows = tuple(tuple(Cell(text) for text in row) for row in table.rows)
    return Grid(table.title, cells, rows, text=table.text_columns)


def sentence(report: Report) -> str:
    """What was compared, in one line."""
    models, datasets = len(report["models"]), report["datasets"]
    n = sum(facts["n"] for facts in datasets.values())
    where = next(iter(datasets)) if len(datasets) == 1 else f"{len(datasets)} datasets"
    return f"{_counted(models, 'model')} on {where}: {_counted(n, 'example')}, seed {report['seed']}"


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")
