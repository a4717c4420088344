"""Comparisons between models on one metric: paired differences, retention and the share of the gap closed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Final

import numpy as np

from kdkit.report.statistics import Bootstrap, Difference, Sample, bounds, difference, holm, interval, paired, ratio

__all__ = ["Column", "Notes", "Roles", "gap_closed", "note_trivial", "ordered_pairs", "pair_rows", "retention"]

Row = dict[str, Any]

NO_COMMON: Final = "not compared, for want of common example ids"
NO_SHARE: Final = "not given, because the common examples leave no score of the teacher to take a share of"
PARTLY: Final = "compared only on the examples that both models have"
OTHER_TOKENS: Final = "not compared, because the numbers are per token and the models have different tokens"
NO_SPREAD: Final = "no interval, because every resample gives the same number"
ONE_EXAMPLE: Final = "no interval, because there is only one example"
BEATS_NOTHING: Final = "not clearly better than copying the input (the identity baseline)"
TRIVIAL: Final = ("identity", "empty", "majority")
"""Baselines that a score must clearly beat before it says anything; ``reference`` is the upper bound instead."""
NO_RATIO: Final = "no interval, because the teacher's score is too uncertain for a ratio"


@dataclass(frozen=True, slots=True)
class Roles:
    """Which evaluated model is what; None where a recipe has no such model.

    Attributes:
        teacher: The model that the students learned from.
        baseline: The untrained student.
        reference: The model that the marks in the table compare with.
    """

    teacher: str | None = None
    baseline: str | None = None
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """A metric on a dataset, as a column of the table.

    Attributes:
        key: ``METRIC``, or ``DATASET/METRIC`` when the report has several datasets.
        higher_is_better: The metric's direction; None where neither is better, and nothing is compared.
        samples: Model to its scores; models without usable per-example scores are absent.
        baselines: Trivial baseline to its scores on the same examples.
        vocabularies: For numbers per token, model to what its tokens are; models of which that is not known are absent.
    """

    key: str
    higher_is_better: bool | None
    samples: Mapping[str, Sample]
    baselines: Mapping[str, Sample] = field(default_factory=dict)
    vocabularies: Mapping[str, str] = field(default_factory=dict)

    def comparable(self, *models: str | None) -> bool:
        """Whether the models' numbers are about the same tokens, as far as that is known."""
        known = {self.vocabularies.get(name) for name in models if name is not None} - {None}
        return len(known) < 2


@dataclass(slots=True)
class Notes:
    """Remarks, grouped by reason so that one reason is one line."""

    _by_reason: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, about: str) -> None:
        """Record that ``reason`` holds for ``about``."""
        self._by_reason.setdefault(reason, []).append(about)

    def lines(self) -> list[str]:
        """``reason: about, about``."""
        return [f"{reason}: {', '.join(dict.fromkeys(about))}" for reason, about in self._by_reason.items()]


def ordered_pairs(models: Sequence[str], roles: Roles) -> list[tuple[str, str]]:
    """Pairs ``(a, b)`` that are reported as ``a - b``, the most asked-for first.

    Students against the baseline, students against each other (the later against the earlier, every one against the
    reference), students against the teacher, the teacher against the baseline.
    """
    students = [name for name in models if name not in (roles.teacher, roles.baseline)]
    among = [(a, b) if a != roles.reference else (b, a) for b, a in combinations(students, 2)]
    pairs: list[tuple[str | None, str | None]] = [(name, roles.baseline) for name in students]
    pairs += among
    pairs += [(name, roles.teacher) for name in students]
    pairs.append((roles.teacher, roles.baseline))
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def pair_rows(column: Column, pairs: Sequence[tuple[str, str]], bootstrap: Bootstrap, notes: Notes) -> list[Row]:
    """The ``pairs`` entries of one metric, with p-values adjusted for all comparisons on this metric."""
    rows = []
    for a, b in pairs if column.higher_is_better is not None else ():
        if a not in column.samples or b not in column.samples:
            continue
        about = f"{column.key} of {a} and {b}"
        if not column.comparable(a, b):
            notes.add(OTHER_TOKENS, about)
            continue
        found = difference(column.samples[a], column.samples[b], bootstrap)
        if found is None:
            notes.add(NO_COMMON, about)
            continue
        _note_limits(found, column.samples[a].n, column.samples[b].n, about, notes)
        rows.append(_pair_row(a, b, column.key, found))
    tested = [row for row in rows if row["p"] is not None]
    for row, adjusted in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = adjusted
    return rows


def retention(column: Column, roles: Roles, bootstrap: Bootstrap, notes: Notes) -> Iterator[Row]:
    """Score over teacher's score, for metrics where a ratio says something.

    Higher must be better, and the teacher clearly above zero, above the untrained student and above the best of the
    trivial baselines, all on the examples of the row: those that the model and the teacher have in common. A floor that
    has none of these examples is no floor.
    """
    teacher = column.samples.get(roles.teacher or "")
    if teacher is None or not column.higher_is_better:
        return
    for name, sample in column.samples.items():
        if name == roles.teacher:
            continue
        about = f"retention of {name} on {column.key}"
        mine, its = paired(sample, teacher)
        problem = _no_retention(column, roles, name, its, bootstrap)
        if problem:
            notes.add(problem, about if its.n < teacher.n or problem == OTHER_TOKENS else column.key)
            continue
        draws = ratio(bootstrap(mine), bootstrap(its))
        row = {"model": name, "of": roles.teacher, "metric": column.key}
        yield row | _ratio_fields(mine.value / its.value, draws, mine.n, about, notes)


def _no_retention(column: Column, roles: Roles, name: str, its: Sample, bootstrap: Bootstrap) -> str:
    """Why there is no share of the teacher's scores ``its``; empty when there is one."""
    if not column.comparable(name, roles.teacher):
        return OTHER_TOKENS
    if not its.n or (its.n < column.samples[roles.teacher or ""].n and not its.value > 0):
        return NO_SHARE
    if its.n < 2 or bounds(bootstrap(its))[0] <= 0:
        return "no retention, because the teacher's score is not clearly above zero"
    for floor, sample in _floors(column, roles, its):
        if not _clearly_better(column, its, sample, bootstrap):
            return f"no retention, because the teacher is not clearly better than {floor}"
    return ""


def gap_closed(column: Column, roles: Roles, bootstrap: Bootstrap, notes: Notes) -> Iterator[Row]:
    """``(base - x) / (base - teacher)``: 0 is the untrained student, 1 the teacher.

    Only where the teacher is clearly better than the base, in the metric's direction, on the examples of the row: those
    that all three have.
    """
    teacher, base = column.samples.get(roles.teacher or ""), column.samples.get(roles.baseline or "")
    if teacher is None or base is None or column.higher_is_better is None:
        return
    for name, sample in column.samples.items():
        if name in (roles.teacher, roles.baseline):
            continue
        about = f"gap closed by {name} on {column.key}"
        x, b, t = paired(sample, base, teacher)
        problem = _no_gap(column, roles, name, (b, t), bootstrap)
        if problem:
            whole = t.n == teacher.n and problem != OTHER_TOKENS
            notes.add(problem, column.key if whole else about)
            continue
        sign = 1.0 if column.higher_is_better else -1.0
        with np.errstate(invalid="ignore"):
            draws = ratio(sign * (bootstrap(x) - bootstrap(b)), sign * (bootstrap(t) - bootstrap(b)))
        row = {"model": name, "metric": column.key, "base": roles.baseline, "teacher": roles.teacher}
        yield row | _ratio_fields((x.value - b.value) / (t.value - b.value), draws, x.n, about, notes)


def _no_gap(column: Column, roles: Roles, name: str, ends: tuple[Sample, Sample], bootstrap: Bootstrap) -> str:
    """Why there is no gap between the base's and the teacher's scores; empty when there is one."""
    base, teacher = ends
    if not column.comparable(name, roles.baseline, roles.teacher):
        return OTHER_TOKENS
    cut = teacher.n < column.samples[roles.teacher or ""].n
    if not teacher.n or (cut and (teacher.value > base.value) != column.higher_is_better):
        return NO_SHARE
    if not _clearly_better(column, teacher, base, bootstrap):
        return f"no gap to close, because the teacher is not clearly better than {roles.baseline}"
    return ""


def note_trivial(column: Column, bootstrap: Bootstrap, notes: Notes) -> None:
    """Say in words which models are not clearly better than echoing the input."""
    identity = column.baselines.get("identity")
    if identity is None or column.higher_is_better is None:
        return
    for name, sample in column.samples.items():
        if not _clearly_better(column, sample, identity, bootstrap):
            notes.add(BEATS_NOTHING, f"{name} on {column.key}")


def _floors(column: Column, roles: Roles, its: Sample) -> Iterator[tuple[str, Sample]]:
    """What the teacher must beat on its examples ``its``, with its name.

    The untrained student, and the best of the trivial baselines; without those that have none of these examples.
    """
    base = column.samples.get(roles.baseline or "")
    if base is not None and roles.baseline is not None and paired(base, its)[0].n:
        yield roles.baseline, base
    common = {name: paired(column.baselines[name], its)[0] for name in TRIVIAL if name in column.baselines}
    known = {name: sample for name, sample in common.items() if sample.n}
    if known:
        best = max(known, key=lambda name: known[name].value)
        yield f"the {best} baseline", column.baselines[best]


def _clearly_better(column: Column, sample: Sample, floor: Sample, bootstrap: Bootstrap) -> bool:
    """Whether ``sample`` beats ``floor``: p at most 0.05, and an interval on the right side of 0."""
    found = difference(sample, floor, bootstrap)
    return found is not None and found.clear and (found.value > 0) == column.higher_is_better


def _ratio_fields(value: float, draws: np.ndarray, n: int, about: str, notes: Notes) -> Row:
    ci95 = interval(draws)
    if ci95 is None:
        notes.add(ONE_EXAMPLE if n == 1 else NO_SPREAD if draws.min() == draws.max() else NO_RATIO, about)
    return {"value": value, "ci95": list(ci95) if ci95 else None, "n": n}


def _pair_row(a: str, b: str, metric: str, found: Difference) -> Row:
    ci95 = list(found.ci95) if found.ci95 else None
    return {
        "a": a,
        "b": b,
        "metric": metric,
        "difference": found.value,
        "ci95": ci95,
        "p": found.p,
        "p_holm": None,
        "n": found.n,
    }


def _note_limits(found: Difference, n_a: int, n_b: int, about: str, notes: Notes) -> None:
    if found.n < max(n_a, n_b):
        notes.add(PARTLY, f"{about} (n = {found.n})")
    if found.n == 1:
        notes.add(ONE_EXAMPLE, about)
    elif found.ci95 is None:
        notes.add(NO_SPREAD, about)
