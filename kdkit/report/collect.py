"""Builds ``report.json`` from scores directories."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from kdkit.api.errors import DataError
from kdkit.report.categories import by_category, category_entries
from kdkit.report.compare import (
    ONE_EXAMPLE,
    Column,
    Notes,
    Roles,
    gap_closed,
    note_trivial,
    ordered_pairs,
    pair_rows,
    retention,
)
from kdkit.report.scores import MergedModel, MergedScores, MetricScores, read_scores
from kdkit.report.statistics import Bootstrap, Sample, interval, score_interval

__all__ = ["collect", "write_report"]

_TOLERANCE: Final = 1e-6
"""Relative; a metric may have summed in another order or in float32."""
_UNEQUAL: Final = 1.05
"""Ratio of trained tokens from which two students count as trained on unequal amounts."""


def collect(
    directories: Sequence[Path],
    *,
    recipe: str,
    seed: int,
    bootstrap_seed: int = 0,
    teacher: str | None = None,
    baseline: str | None = None,
    reference: str | None = None,
) -> dict[str, Any]:
    """The report as plain JSON data (finite numbers and null only).

    Args:
        directories: Outputs of evaluate stages.
        recipe: The recipe's name.
        seed: The recipe's seed, for the record.
        bootstrap_seed: Seed of resamples and permutations; not negative.
        teacher: Name of the teacher among the models; the model called ``teacher`` when None.
        baseline: Name of the untrained student; the model called ``base`` or ``baseline`` when None.
        reference: Model that the table's marks compare with; the baseline when None.

    Raises:
        DataError: Scores are missing, malformed or contradict each other, or a role names no model.
    """
    scores = read_scores(directories)
    roles = _roles(scores, teacher, baseline, reference)
    bootstrap, notes = Bootstrap(bootstrap_seed), Notes()
    models = {name: _model_entry(model) for name, model in scores.models.items()}
    baselines: dict[str, dict[str, Any]] = {name: {"metrics": {}} for name in scores.baselines}
    groups = {name: by_category(facts.categories, name, notes) for name, facts in scores.datasets.items()}
    columns = []
    for key, dataset, metric in _keys(scores):
        column = _column(scores, key, dataset, metric, notes)
        columns.append(column)
        for name, result in _results(scores, dataset, metric):
            sample = column.samples.get(name)
            for reason, count in result.counts.items():
                notes.add(reason, f"{key} of {name} ({count:,})")
            models[name]["metrics"][key] = _metric_entry(result, sample, bootstrap, f"{key} of {name}", notes)
            if groups[dataset] and sample:
                entries = category_entries(sample, groups[dataset], seed=bootstrap_seed, unit=result.unit)
                models[name]["categories"][key] = entries
        for name, sample in column.baselines.items():
            baselines[name]["metrics"][key] = _baseline_entry(sample, bootstrap)
    pairs = ordered_pairs(list(scores.models), roles)
    return {
        "recipe": recipe,
        "seed": seed,
        "roles": {"teacher": roles.teacher, "baseline": roles.baseline, "reference": roles.reference},
        "datasets": {
            name: {"n": facts.n, "overlong": facts.overlong, "unreferenced": facts.unreferenced}
            for name, facts in scores.datasets.items()
        },
        "models": models,
        "baselines": baselines,
        "pairs": [row for column in columns for row in pair_rows(column, pairs, bootstrap, notes)],
        "retention": [row for column in columns for row in retention(column, roles, bootstrap, notes)],
        "gap_closed": [row for column in columns for row in gap_closed(column, roles, bootstrap, notes)],
        "decoding": _decoding(scores, notes),
        "notes": _all_notes(scores, roles, columns, bootstrap, notes),
    }


def write_report(report: Mapping[str, Any], directory: Path, scores: Sequence[Path] = ()) -> None:
    """Write ``report.json``, ``report.md`` and ``report.html`` into ``directory``, which is created.

    Args:
        report: What :func:`collect` made.
        directory: Where the files go.
        scores: The directories it was made from, for the samples and loss curves of the HTML page.
    """
    from kdkit.report.html import render_html
    from kdkit.report.markdown import render_markdown

    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (directory / "report.json").write_text(text + "\n", encoding="utf-8")
    (directory / "report.md").write_text(render_markdown(report), encoding="utf-8")
    (directory / "report.html").write_text(render_html(report, scores), encoding="utf-8")


def _roles(scores: MergedScores, teacher: str | None, baseline: str | None, reference: str | None) -> Roles:
    for role, name in (("teacher", teacher), ("baseline", baseline), ("reference", reference)):
        if name is not None and name not in scores.models:
            close = get_close_matches(name, scores.models, n=1)
            raise DataError(
                f"no evaluated model is called {name!r}",
                where=f"report.{role}",
                allowed=", ".join(scores.models),
                hint=f"did you mean {close[0]!r}?" if close else None,
            )
    if teacher is not None and teacher == baseline:
        raise DataError(f"{teacher!r} cannot be both teacher and baseline", where="report.baseline")
    teacher = teacher or next((name for name in ("teacher",) if name in scores.models and name != baseline), None)
    usual = (name for name in ("base", "baseline") if name in scores.models and name != teacher)
    baseline = baseline or next(usual, None)
    return Roles(teacher, baseline, reference or baseline)


def _keys(scores: MergedScores) -> Iterator[tuple[str, str, str]]:
    """``(key, dataset, metric)`` of every column, in the order of the scores."""
    found = {
        (dataset, metric): None
        for dataset in scores.datasets
        for model in scores.models.values()
        for metric in model.results.get(dataset, {})
    }
    several = len({dataset for dataset, _ in found}) > 1
    for dataset, metric in found:
        yield f"{dataset}/{metric}" if several else metric, dataset, metric


def _results(scores: MergedScores, dataset: str, metric: str) -> Iterator[tuple[str, MetricScores]]:
    for name, model in scores.models.items():
        if metric in model.results.get(dataset, {}):
            yield name, model.results[dataset][metric]


def _column(scores: MergedScores, key: str, dataset: str, metric: str, notes: Notes) -> Column:
    samples, kinds, links = {}, set(), set()
    vocabularies: dict[str, str] = {}
    for name, result in _results(scores, dataset, metric):
        kinds.add((result.higher_is_better, result.unit))
        if result.n:
            links.add(result.link)
        # Weights are tokens: what a token is differs between vocabularies.
        if result.weights is not None and result.of_tokens and (known := scores.models[name].vocabulary):
            vocabularies[name] = known
        sample = _sample(result, f"{key} of {name}", notes)
        if sample is not None:
            samples[name] = sample
    if len(kinds) > 1 or len(links) > 1:
        raise DataError(
            f"{metric} on {dataset!r} has another direction, unit or link for some models",
            where="scores",
            hint="evaluate all models with one version of the metric",
        )
    baselines = {
        name: sample
        for name, results in scores.baselines.items()
        if metric in results.get(dataset, {})
        and (sample := _sample(results[dataset][metric], f"{key} of the {name} baseline", notes))
    }
    return Column(key, kinds.pop()[0], samples, baselines, vocabularies)


def _sample(result: MetricScores, about: str, notes: Notes) -> Sample | None:
    """The scores to resample; None with a note when they do not add up to the value."""
    scores = [score for score in result.per_example if score is not None]
    reason = None
    if result.reason:
        reason = f"undefined ({result.reason})"
    elif not result.n:
        reason = "no example was scored"
    elif not result.per_example:
        lacks = "comparison" if result.ci95 else "interval nor comparison"
        reason = f"no per-example scores, so {'no' if result.ci95 else 'neither'} {lacks}"
    elif len(scores) < len(result.per_example):
        reason = "undefined for some examples, so neither interval nor comparison"
    if reason:
        notes.add(reason, about)
        return None
    sample = Sample.of(scores, result.weights, result.link, result.ids)
    examples = len(set(result.ids)) or len(scores)
    if sample.n < examples:
        notes.add("examples without a token to score are left out", f"{about} ({examples - sample.n})")
    if not sample.n or not math.isfinite(sample.value):
        notes.add("the mean is undefined or too large", about)
        return None
    if not _close(sample.value, result.value):
        if examples == len(scores) or not _close(Sample.of(scores, result.weights, result.link).value, result.value):
            notes.add("not the mean of its per-example scores, so neither interval nor comparison", about)
            return None
        # The metric averaged over answers; a table whose intervals resample examples averages over examples.
        notes.add("examples have unequal numbers of answers, and each example counts the same", about)
    return sample


def _close(found: float, stated: float | None) -> bool:
    return stated is not None and math.isclose(found, stated, rel_tol=_TOLERANCE, abs_tol=1e-9)


def _metric_entry(
    result: MetricScores, sample: Sample | None, bootstrap: Bootstrap, about: str, notes: Notes
) -> dict[str, Any]:
    ci95 = score_interval(sample, bootstrap, unit=result.unit) if sample else result.ci95
    if sample and sample.n == 1:
        notes.add(ONE_EXAMPLE, about)
    elif sample and ci95 is None:
        notes.add("no interval, because every example has the same score", about)
    return {
        "value": _value(result, sample),
        "n": sample.n if sample else result.n,
        "ci95": list(ci95) if ci95 else None,
        "higher_is_better": result.higher_is_better,
        "unit": result.unit,
    }


def _value(result: MetricScores, sample: Sample | None) -> float | None:
    if sample is None:
        return result.value if result.n else None
    return result.value if _close(sample.value, result.value) else sample.value


def _baseline_entry(sample: Sample, bootstrap: Bootstrap) -> dict[str, Any]:
    # What the reference itself scores is no estimate, so that it has no interval where all of them have full marks.
    ci95 = interval(bootstrap(sample)) if sample.n > 1 else None
    return {"value": sample.value, "n": sample.n, "ci95": list(ci95) if ci95 else None}


def _model_entry(model: MergedModel) -> dict[str, Any]:
    return {
        "path": model.path,
        "parameters": model.parameters,
        "bytes": model.bytes,
        "trained_tokens": model.trained_tokens,
        "kernel": model.kernel,
        "quantization": model.quantization.model_dump() if model.quantization else None,
        "metrics": {},
        "categories": {},
        "speed": dict(model.speed),
        "counts": {dataset: counts.model_dump() for dataset, counts in model.counts.items()},
        "decoding": {dataset: dict(settings) for dataset, settings in model.decoding.items()},
    }


def _decoding(scores: MergedScores, notes: Notes) -> dict[str, dict[str, Any]]:
    """Dataset to the settings that all its models share; settings that differ are left out and noted."""
    shared: dict[str, dict[str, Any]] = {}
    for dataset in scores.datasets:
        used = [model.decoding[dataset] for model in scores.models.values() if model.decoding.get(dataset)]
        keys = list(dict.fromkeys(key for settings in used for key in settings))
        differ = [key for key in keys if any(s.get(key) != used[0].get(key) or key not in s for s in used)]
        shared[dataset] = {key: used[0][key] for key in keys if key not in differ}
        for key in differ:
            notes.add(
                "decoding differs between models, so their generated answers do not compare", f"{key} ({dataset})"
            )
    return shared


def _all_notes(
    scores: MergedScores, roles: Roles, columns: Sequence[Column], bootstrap: Bootstrap, notes: Notes
) -> list[str]:
    for column in columns:
        note_trivial(column, bootstrap, notes)
    left_out = [
        f"{name}: {count} {what}"
        for name, facts in scores.datasets.items()
        for count, what in (
            (facts.overlong, "prompts were too long and are not asked"),
            (facts.unreferenced, "rows have no reference and are not asked"),
        )
        if count
    ]
    quantized = [note for name, model in scores.models.items() for note in _quantization_notes(name, model)]
    return [*scores.notes, *left_out, *_training_notes(scores, roles), *quantized, *notes.lines()]


def _quantization_notes(name: str, model: MergedModel) -> Iterator[str]:
    """Layers that are rounded to nearest, and what the quantizer said."""
    facts = model.quantization
    if facts is None:
        return
    if facts.kept_rtn:
        layers = ", ".join(facts.kept_rtn)
        yield f"{name}: {len(facts.kept_rtn)} of {len(facts.layer_errors)} layers are rounded to nearest: {layers}"
    yield from (f"{name}: {note}" for note in facts.notes)


def _training_notes(scores: MergedScores, roles: Roles) -> list[str]:
    """Says so when students saw unequal amounts of training data."""
    tokens = {
        name: model.trained_tokens
        for name, model in scores.models.items()
        if name not in (roles.teacher, roles.baseline) and model.trained_tokens
    }
    if not tokens:
        return []
    least, most = min(tokens, key=tokens.__getitem__), max(tokens, key=tokens.__getitem__)
    factor = tokens[most] / tokens[least]
    if factor < _UNEQUAL:
        return []
    warning = "a difference between such models is not due to the objective alone"
    return [f"{most} was trained on {factor:.3g} times the tokens of {least}: {warning}"]
