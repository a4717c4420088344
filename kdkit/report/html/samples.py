"""Answers side by side: the examples that a model did best and worst on, and some drawn at random."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kdkit.api.errors import DataError
from kdkit.report.html.text import Clipped, clip, shorten
from kdkit.report.scores import MergedScores, MetricScores, read_scores

__all__ = ["Answer", "Sample", "SampleSet", "read_samples"]

_EACH: Final = {"best": 4, "worst": 4, "random": 8}
_MODELS: Final = 12
_DATASETS: Final = 10
_CHARACTERS: Final = 1200
"""Of one text; fewer when there are very many texts."""
_BUDGET: Final = 1_000_000
"""Characters of all texts together, so that the file stays one that a browser and a mail can carry."""
_ID: Final = 80


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model said; ``score`` is None where the metric has none for it."""

    model: str
    text: Clipped
    score: float | None
    truncated: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """One example with all answers; ``group`` is why it was picked: best, worst or random."""

    group: str
    id: str
    category: str
    opening: str
    prompt: Clipped
    reference: Clipped
    more_references: int
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class SampleSet:
    """Samples of one dataset.

    Attributes:
        metric: What best and worst go by; empty when no metric scores single answers, and all samples are random.
        model: Whose scores they go by.
        total: Examples of the dataset.
    """

    dataset: str
    metric: str
    model: str
    total: int
    samples: tuple[Sample, ...]


def read_samples(directories: Sequence[Path], report: Mapping[str, Any]) -> list[SampleSet]:
    """Samples from the predictions beside the scores; datasets without generated answers are left out.

    Raises:
        DataError: A predictions file cannot be read.
    """
    if not directories:
        return []
    scores = read_scores(directories)
    files = {file.name: file for d in dict.fromkeys(directories) for file in sorted(d.glob("predictions/*.jsonl"))}
    models = list(scores.models)[:_MODELS]
    found = [
        (dataset, {model: files[name] for model in models if (name := f"{model}--{dataset}.jsonl") in files})
        for dataset in list(scores.datasets)[:_DATASETS]
    ]
    found = [(dataset, of) for dataset, of in found if of]
    texts = sum((len(of) + 2) * sum(_EACH.values()) for _, of in found)
    characters = min(_CHARACTERS, _BUDGET // max(texts, 1))
    sets = (_Reader(scores, report, dataset, of, characters).read() for dataset, of in found)
    return [one for one in sets if one is not None]


class _Reader:
    def __init__(
        self, scores: MergedScores, report: Mapping[str, Any], dataset: str, files: Mapping[str, Path], characters: int
    ) -> None:
        self.scores, self.dataset, self.files, self.characters = scores, dataset, files, characters
        self.metric = _metric(scores, dataset, files)
        self.model = _focus(scores, dataset, self.metric, report["roles"], list(files))
        results = {name: scores.models[name].results.get(dataset, {}) for name in files}
        self.by_id = {name: _by_id(of.get(self.metric)) for name, of in results.items()}

    def read(self) -> SampleSet | None:
        ids, spoke = _ids_of(self.files[self.model])
        if not spoke and not any(_ids_of(file)[1] for file in self.files.values()):
            return None
        groups = self._pick(ids)
        rows = {name: _rows_of(file, groups) for name, file in self.files.items()}
        prompts = [str(row["prompt"]) for row in rows[self.model].values()]
        shared = _shared(prompts, ">"), _shared([prompt[::-1] for prompt in prompts], "<")
        samples = [self._sample(group, example, rows, shared) for example, group in groups.items()]
        ranked = self.metric if self.by_id[self.model] else ""
        return SampleSet(self.dataset, ranked, self.model, len(ids), tuple(samples))

    def _pick(self, ids: Sequence[str]) -> dict[str, str]:
        """Id to group. The same ids are always drawn; ties are broken by the draw and not by the order of the data."""
        drawn = sorted(ids, key=lambda example: hashlib.sha256(example.encode("utf-8", "replace")).digest())
        mine = self.by_id[self.model]
        higher = _higher(self.scores, self.dataset, self.metric)
        ranked = sorted((i for i in drawn if i in mine), key=lambda i: mine[i], reverse=higher)
        # With few examples, best and worst share them, the better half and the worse half.
        best = ranked[: min(_EACH["best"], (len(ranked) + 1) // 2)]
        worst = ranked[len(best) :][::-1][: _EACH["worst"]]
        picked = dict.fromkeys(best, "best") | dict.fromkeys(worst, "worst")
        others = [example for example in drawn if example not in picked]
        return picked | dict.fromkeys(others[: _EACH["random"]], "random")

    def _sample(
        self, group: str, example: str, rows: Mapping[str, Mapping[str, Mapping[str, Any]]], shared: tuple[int, int]
    ) -> Sample:
        first = rows[self.model][example]
        references = [str(text) for text in first.get("references") or ()]
        return Sample(
            group=group,
            id=shorten(example, _ID),
            category=shorten(str(first.get("category") or ""), _ID),
            opening=_opening(str(first["prompt"]), *shared),
            prompt=clip(str(first["prompt"]), self.characters),
            reference=clip(references[0] if references else "", self.characters),
            more_references=max(len(references) - 1, 0),
            answers=tuple(self._answer(name, example, rows[name]) for name in self.files if example in rows[name]),
        )

    def _answer(self, model: str, example: str, rows: Mapping[str, Mapping[str, Any]]) -> Answer:
        row = rows[example]
        text = clip(str(row["text"]), self.characters)
        return Answer(model, text, self.by_id[model].get(example), bool(row.get("truncated")))


def _shared(prompts: Sequence[str], bracket: str) -> int:
    """How many characters all prompts begin with: templates and system prompts, which tell none apart.

    It ends after white space or ``bracket``, so as not to cut into a word that begins alike.
    """
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)
    differ = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    common = first[: next(differ, min(len(first), len(last)))]
    return len(common) - len(re.split(rf"[\s{bracket}]", common)[-1])


def _opening(prompt: str, before: int, after: int) -> str:
    """One line of what is the prompt's own."""
    own = prompt[before : max(len(prompt) - after, before)].strip()
    return ("…" if before else "") + shorten(own, 160)


def _metric(scores: MergedScores, dataset: str, models: Mapping[str, Path]) -> str:
    """The metric to rank by: one that scores answers (per-token means score references) and tells them apart."""
    results = [(name, r) for model in models for name, r in scores.models[model].results.get(dataset, {}).items()]
    ranks = [(name, r) for name, r in results if r.higher_is_better is not None and r.ids]
    usable = [(name, r) for name, r in ranks if r.weights is None and r.link == "identity"]
    graded = [name for name, r in usable if len(set(r.per_example)) > 2]
    names = graded or [name for name, _ in usable]
    return names[0] if names else ""


def _focus(scores: MergedScores, dataset: str, metric: str, roles: Mapping[str, Any], models: Sequence[str]) -> str:
    """The best student by the metric; any model when there is no student."""
    students = [name for name in models if name not in (roles["teacher"], roles["baseline"])] or list(models)
    sign = 1 if _higher(scores, dataset, metric) else -1

    def value(name: str) -> float:
        result = scores.models[name].results.get(dataset, {}).get(metric)
        return sign * result.value if result is not None and result.value is not None else -float("inf")

    return max(students, key=value)


def _higher(scores: MergedScores, dataset: str, metric: str) -> bool:
    found = (model.results.get(dataset, {}).get(metric) for model in scores.models.values())
    return next((result.higher_is_better is not False for result in found if result is not None), True)


def _by_id(result: MetricScores | None) -> dict[str, float]:
    """Mean score by example; of several answers to an example, the mean of theirs."""
    values: dict[str, list[float]] = {}
    if result is not None:
        for example, score in zip(result.ids, result.per_example, strict=False):
            if score is not None:
                values.setdefault(example, []).append(score)
    return {example: sum(of) / len(of) for example, of in values.items()}


def _ids_of(file: Path) -> tuple[list[str], bool]:
    """The ids of a predictions file, and whether any answer in it has text."""
    ids: dict[str, None] = {}
    spoke = False
    for row in _rows(file):
        ids[str(row["id"])] = None
        spoke = spoke or bool(row["text"])
    return list(ids), spoke


def _rows_of(file: Path, wanted: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """The first answer to each wanted example."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in _rows(file):
        if str(row["id"]) in wanted:
            found.setdefault(str(row["id"]), row)
    return found


def _rows(file: Path) -> Iterator[Mapping[str, Any]]:
    """The rows one by one, as a file of predictions may be larger than memory."""
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                row = json.loads(line)
                if not isinstance(row, dict) or not {"id", "prompt", "text"} <= row.keys():
                    raise DataError("no prediction", where=f"{file}:{number}")
                yield row
    except OSError as error:
        raise DataError(f"cannot read the predictions: {error.strerror}", where=str(file)) from error
    except ValueError as error:
        raise DataError("not JSON lines", where=str(file), hint="evaluate again") from error
