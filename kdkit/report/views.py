"""What a report shows, as titled tables of text: shared by the Markdown and the terminal rendering.

Everything is derived from ``report.json``, so an old report can be shown again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kdkit.report import ALPHA
from kdkit.report.figures import MISSING, amount, measured, number, p_value, percent, share, size

__all__ = [
    "Table",
    "answers_table",
    "baseline_tables",
    "baselines_line",
    "bytes_per_parameter",
    "decoding_lines",
    "direction_line",
    "gap_table",
    "has_kernels",
    "legend",
    "limits",
    "models_table",
    "pair_tables",
    "quantization",
    "quantization_table",
    "retention_table",
    "scores_tables",
    "speed_table",
    "verdict",
]

Report = Mapping[str, Any]

_SAMPLING_ONLY: Final = ("temperature", "top_p", "top_k", "num_samples")
_SAME: Final = "no significant difference"
_FEW: Final = 50
"""Examples from which the intervals of skewed scores hold what they promise, within 2 % (simulated)."""
_RARE: Final = 10
"""Passes or failures from which a 95 % interval of pass or fail holds the truth 91 times in 100 or more (computed)."""
_SPEED: Final = {
    "generated_tokens_per_s": ("tokens/s", number),
    "prompts_per_s": ("prompts/s", number),
    "prefill_tokens_per_s": ("prefill\n(tokens/s)", number),
    "decode_tokens_per_s": ("decode\n(tokens/s)", number),
    "load_seconds": ("load\n(s)", number),
    "peak_memory_bytes": ("peak memory", size),
}
_BASELINES: Final = {
    "identity": "identity echoes the input",
    "empty": "empty says nothing",
    "majority": "majority gives the most common reference to every prompt",
    "reference": "reference gives the first reference, the most that metrics which compare with references can give",
}
_CAVEATS: Final = {
    "rouge-l": "ROUGE-L counts shared words, not correctness; where answers resemble prompts, copying scores high.",
    "exact-match": "Exact match gives no credit to a right answer in other words.",
    "perplexity": "Perplexity compares only models with the same tokenizer, and says nothing about generated answers.",
    "teacher-kl": "Closeness to the teacher is not quality: it rewards the teacher's mistakes as well.",
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
    marks = dict(_marks(report))
    for dataset, keys in _by_dataset(report).items():
        entries = [
            model["metrics"][key] for model in report["models"].values() for key in keys if key in model["metrics"]
        ]
        # A score that is undefined has no examples, which says nothing about the others.
        ns = [entry["n"] for entry in entries if entry["n"]] or [0]
        n = f"n = {min(ns):,}" + (f" to {max(ns):,}" if min(ns) < max(ns) else "")
        header = ("model", *(_header(key, dataset, _metrics(report)[key]["unit"]) for key in keys))
        rows = tuple((name, *(_score(report, name, key, marks) for key in keys)) for name in report["models"])
        yield Table(f"Scores on {dataset} ({n})" if dataset else f"Scores ({n})", header, rows)


def baseline_tables(report: Report) -> Iterator[Table]:
    """One table per dataset: what answers score that need no model."""
    entries = {name: baseline["metrics"] for name, baseline in report.get("baselines", {}).items()}
    for dataset, keys in _by_dataset(report).items():
        known = [key for key in keys if any(key in metrics for metrics in entries.values())]
        header = ("baseline", *(_header(key, dataset, _metrics(report)[key]["unit"]) for key in known))
        rows = tuple((name, *(_plain_score(metrics.get(key)) for key in known)) for name, metrics in entries.items())
        if known:
            yield Table(f"Baselines on {dataset}" if dataset else "Baselines", header, rows)


def baselines_line(report: Report) -> str:
    """What the baselines are; empty without any."""
    texts = [text for name, text in _BASELINES.items() if report.get("baselines", {}).get(name, {}).get("metrics")]
    return f"Baselines: {'; '.join(texts)}." if texts else ""


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
    for key, first in _metrics(report).items():
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


def quantization(model: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a model's quantizer says; None for a model that is not quantised, or a report of an earlier version."""
    facts: Mapping[str, Any] | None = model.get("quantization")
    return facts


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
        return _SAME
    winner = row["a"] if (row["difference"] > 0) == higher_is_better else row["b"]
    corrected = row["p_holm"] is None or row["p_holm"] <= ALPHA
    return f"{winner} better" if corrected else f"{winner} better, not after correction"


def direction_line(report: Report) -> str:
    """Which metrics are better high, which low, and which neither."""
    datasets = {key: dataset for dataset, keys in _by_dataset(report).items() for key in keys}
    parts = []
    for words, wanted in (("Higher is better", True), ("Lower is better", False), ("Neither is better", None)):
        keys = [key for key, first in _metrics(report).items() if first["higher_is_better"] is wanted]
        names = dict.fromkeys(_bare(key, datasets[key]) for key in keys)
        if names:
            parts.append(f"{words}: {', '.join(names)}.")
    return " ".join(parts)


def legend(report: Report) -> str:
    """How to read a score."""
    text = "± is the longer arm of the 95 % interval over examples: bootstrap, or exact where all scores are 0 or 100."
    if any(True for _ in _marks(report)):
        text += (
            f" (+) better, (-) worse than {report['roles']['reference']}, (=) {_SAME}"
            f" (paired permutation test, p <= {ALPHA} after Holm's correction)."
        )
    return text


def decoding_lines(report: Report) -> list[str]:
    """The decoding of each dataset as ``name = value``, without settings that greedy decoding ignores."""
    lines = []
    for dataset, settings in report["decoding"].items():
        idle = _SAMPLING_ONLY if settings.get("do_sample") is False else ()
        texts = [f"{key} = {_setting(value)}" for key, value in settings.items() if key not in idle]
        if texts:
            lines.append(f"{dataset}: {', '.join(texts)}")
    return lines


def limits(report: Report) -> list[str]:
    """What the numbers do not say."""
    once = f"Every model was trained once (seed {report['seed']})"
    unseen = "the spread between training seeds, which can be as large as the differences shown"
    lines = [f"{once}: the intervals cover the choice of test examples, not {unseen}."]
    lines.append("Trained tokens are those of kdkit's own stages; what a model saw before is not counted.")
    lines += _sampling_limits(report)
    if any(e["ci95"] and e["n"] < _FEW for m in report["models"].values() for e in m["metrics"].values()):
        lines.append(
            f"Intervals from fewer than {_FEW} examples tend to be too narrow: from 20 examples of skewed scores, a 95 "
            "% interval holds the truth about 90 times in 100."
        )
    if any(_is_rare(entry) for model in report["models"].values() for entry in model["metrics"].values()):
        lines.append(
            "Where few answers pass, or few fail, intervals of pass or fail tend to be too narrow: with 3 to "
            f"{_RARE} to be expected, a 95 % interval holds the truth between 85 and 97 times in 100."
        )
    if report["pairs"]:
        chance = f"one in 20 falls below {ALPHA} where no model differs"
        removed = 'the verdict "not after correction" marks those that Holm\'s correction per metric removes'
        lines.append(f"p is not corrected for the {len(report['pairs'])} comparisons here: {chance}; {removed}.")
        lines.append('"No significant difference" is not "equal": the interval says how large it may be.')
    names = {key.rpartition("/")[2] for key in _metrics(report)}
    if any(quantization(model) for model in report["models"].values()):
        lines.append(
            "Quantised models were dequantised and ran as ordinary ones: their speed and memory are not those of an "
            "integer kernel; bytes on disk are their own."
        )
    return lines + [
        text for about, text in _CAVEATS.items() if any(name == about or name.startswith(f"{about}-") for name in names)
    ]


def _is_rare(entry: Mapping[str, Any]) -> bool:
    """Whether a score of 0 to 100 is so near an end that few examples can have moved it; not at the end itself."""
    if entry["unit"] != "0-100" or entry["value"] is None or not entry["ci95"]:
        return False
    return bool(0 < min(entry["value"], 100 - entry["value"]) * entry["n"] / 100 < _RARE)


def _sampling_limits(report: Report) -> Iterator[str]:
    """One line where answers were sampled: what of it the intervals cover."""
    sampled = [s for m in report["models"].values() for s in m["decoding"].values() if s.get("do_sample")]
    if any(settings.get("num_samples", 1) == 1 for settings in sampled):
        yield "Answers were sampled once; another draw gives other scores, and no score averages over draws."
    elif sampled:
        counts = sorted({settings["num_samples"] for settings in sampled})
        yield (
            f"Answers were sampled {' or '.join(map(str, counts))} times per prompt; a prompt's answers count as one "
            "example, and perplexity and distances to the teacher are measured once per prompt."
        )


def _metrics(report: Report) -> dict[str, Mapping[str, Any]]:
    """Metric to the first model's entry, in the order of the report."""
    found: dict[str, Mapping[str, Any]] = {}
    for model in report["models"].values():
        for key, entry in model["metrics"].items():
            found.setdefault(key, entry)
    return found


def _by_dataset(report: Report) -> dict[str, list[str]]:
    """Dataset to its metric keys; the one dataset of a report is called ``""``, as keys do not name it."""
    found: dict[str, list[str]] = {}
    for key in _metrics(report):
        fitting = [name for name in report["datasets"] if len(report["datasets"]) > 1 and key.startswith(f"{name}/")]
        found.setdefault(max(fitting, key=len, default=""), []).append(key)
    return found


def _bare(key: str, dataset: str) -> str:
    return key.removeprefix(f"{dataset}/") if dataset else key


def _header(key: str, dataset: str, unit: str) -> str:
    name = _bare(key, dataset)
    return f"{name}\n({unit})" if unit else name


def _plain_score(entry: Mapping[str, Any] | None) -> str:
    return measured(entry["value"], entry["ci95"]) if entry else MISSING


def _score(report: Report, name: str, key: str, marks: Mapping[tuple[str, str], str]) -> str:
    entry = report["models"][name]["metrics"].get(key)
    text = _plain_score(entry)
    return f"{text} {marks[name, key]}" if (name, key) in marks else text


def _marks(report: Report) -> Iterator[tuple[tuple[str, str], str]]:
    """``(model, metric)`` to its mark against the reference."""
    reference, metrics = report["roles"]["reference"], _metrics(report)
    for row in report["pairs"]:
        if reference not in (row["a"], row["b"]) or row["p_holm"] is None:
            continue
        other = row["b"] if row["a"] == reference else row["a"]
        delta = row["difference"] if other == row["a"] else -row["difference"]
        if row["p_holm"] > ALPHA:
            mark = "(=)"
        else:
            mark = "(+)" if (delta > 0) == metrics[row["metric"]]["higher_is_better"] else "(-)"
        yield (other, row["metric"]), mark


def _share_table(report: Report, entries: Sequence[Mapping[str, Any]], title: str) -> Table | None:
    keys = list(dict.fromkeys(entry["metric"] for entry in entries))
    datasets = {key: dataset for dataset, known in _by_dataset(report).items() for key in known if key in keys}
    cells = {(entry["model"], entry["metric"]): percent(entry["value"], entry["ci95"]) for entry in entries}
    models = [name for name in report["models"] if any((name, key) in cells for key in keys)]
    rows = tuple((name, *(cells.get((name, key), MISSING) for key in keys)) for name in models)
    header = (f"{dataset}/\n{_bare(key, dataset)}" if dataset else key for key, dataset in datasets.items())
    return Table(title, ("model", *header), rows) if rows else None


def _setting(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
