"""Teacher-forced passes: likelihood of the references, and distance to the teacher on references and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kdkit.api.data import Example
from kdkit.api.errors import StageError
from kdkit.models.chat import Encoded
from kdkit.models.load import check_same_vocabulary, vocabulary
from kdkit.models.positions import positions
from kdkit.train.scoring import ExampleScore, score_examples, token_kl

if TYPE_CHECKING:
    from kdkit.api import Completion, StageContext, Teacher
    from kdkit.plugins.stages.plugin import EvaluateParams
    from kdkit.plugins.stages.subjects import Subject

__all__ = ["Forced", "Forcing"]


@dataclass(slots=True)
class Forced:
    """What teacher-forced passes measured on one dataset, by example id; rows that do not fit are absent."""

    scores: dict[str, ExampleScore] = field(default_factory=dict)
    traces: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)

    def add(self, traces: Mapping[str, Mapping[str, tuple[float, ...]]]) -> None:
        """Further traces of the rows."""
        for row, named in traces.items():
            self.traces.setdefault(row, {}).update(named)


class Forcing:
    """Teacher-forced passes of one model.

    No row is longer than the positions that the configurations of the model and the teacher name: what either says
    about later tokens is no measurement, and where positions are a table there is nothing to look up.

    Args:
        subject: The model.
        params: Lengths and batch size.
        ctx: Is told when rows are left out.
        teacher: For the divergences; it must share the model's vocabulary.

    Raises:
        ModelError: The teacher has another vocabulary.
    """

    def __init__(self, subject: Subject, params: EvaluateParams, ctx: StageContext, teacher: Teacher | None) -> None:
        self._subject, self._params, self._log = subject, params, ctx.log
        self._teacher = teacher
        limits = ((positions(subject.model.config), subject.name), (getattr(teacher, "positions", None), "the teacher"))
        self._readable = min(((limit, whose) for limit, whose in limits if limit is not None), default=None)
        self._shared: int | None = None
        if teacher is not None:
            self._shared = check_same_vocabulary(vocabulary(subject.tokenizer, subject.model), teacher.vocabulary)

    def references(self, dataset: str, rows: Sequence[Example]) -> dict[str, ExampleScore]:
        """Scores of the first reference of every row that has one and fits, by example id; the others are counted.

        A row fits within ``max_length`` and the positions of both models.
        """
        limit, name = self._params.max_length, f"max_length={self._params.max_length}"
        if self._readable is not None and self._readable[0] < limit:
            limit, name = self._readable[0], self._positions()
        encoded = [self._subject.encoder.training(_answered(row)) for row in rows if row.targets]
        fitting = [row for row in encoded if len(row.ids) <= limit and row.targets]
        if len(fitting) < len(encoded):
            self._log(f"{dataset}: {len(encoded) - len(fitting)} rows over {name} have no perplexity")
        scores = score_examples(
            self._subject.model,
            fitting,
            batch_size=self._params.per_device_eval_batch_size,
            signals=self._teacher.signals if self._teacher is not None else None,
            vocabulary=self._shared,
        )
        return {row.id: score for row, score in zip(fitting, scores, strict=True)}

    def exposure(
        self, teacher: Teacher, rows: Sequence[Example], own: Sequence[Completion], theirs: Sequence[Completion]
    ) -> dict[str, dict[str, tuple[float, ...]]]:
        """Traces of every row: KL(teacher || model) along the model's ``own`` answer and along the teacher's.

        Raises:
            StageError: The teacher gave another number of answers than it was asked for.
        """
        if len(theirs) != len(rows):
            raise StageError(f"{len(theirs)} answers to {len(rows)} prompts", where="teacher")
        measured = {
            "own_kl": self._traces(teacher, rows, own),
            "teacher_answer_kl": self._traces(teacher, rows, theirs),
        }
        return {row.id: {name: traces[i] for name, traces in measured.items()} for i, row in enumerate(rows)}

    def own(
        self, teacher: Teacher, rows: Sequence[Example], own: Sequence[Completion]
    ) -> dict[str, dict[str, tuple[float, ...]]]:
        """Trace of every row: KL(model || teacher) along the model's ``own`` answer."""
        traces = self._traces(teacher, rows, own, reverse=True)
        return {row.id: {"own_reverse_kl": trace} for row, trace in zip(rows, traces, strict=True)}

    def _traces(
        self, teacher: Teacher, rows: Sequence[Example], answers: Sequence[Completion], *, reverse: bool = False
    ) -> list[tuple[float, ...]]:
        encoder = self._subject.encoder
        encoded = [_followed(encoder.prompt(row), row.id, answer) for row, answer in zip(rows, answers, strict=True)]
        encoded = self._within(encoded)
        places = [place for place, row in enumerate(encoded) if row.targets]
        traces = token_kl(
            self._subject.model,
            [encoded[place] for place in places],
            batch_size=self._params.per_device_eval_batch_size,
            signals=teacher.signals,
            vocabulary=self._shared,
            reverse=reverse,
        )
        by_place = dict(zip(places, traces, strict=True))
        return [by_place.get(place, ()) for place in range(len(rows))]

    def _within(self, rows: Sequence[Encoded]) -> list[Encoded]:
        """The rows as far as both models read: a trace goes by what comes before, so that its start stays right."""
        if self._readable is None:
            return list(rows)
        limit = self._readable[0]
        if cut := sum(len(row.ids) > limit for row in rows):
            self._log(f"{cut} answer{'s'[: cut > 1]} measured only up to {self._positions()}")
        return [row.cut(limit) for row in rows]

    def _positions(self) -> str:
        """Which limit it is that rows stay within besides ``max_length``."""
        return "" if self._readable is None else f"the {self._readable[0]} positions of {self._readable[1]}"


def _followed(prompt: Sequence[int], name: str, answer: Completion) -> Encoded:
    """Prompt and generated answer, all of whose tokens count; the end token too, if the answer has one.

    A completion does not tell which end token it ended with. The last token's own id is never read (only what comes
    before it decides the distributions there), so any id stands for it.
    """
    generated = [*answer.token_ids, *(() if answer.truncated else (0,))]
    return Encoded(name, (*prompt, *generated), (False,) * len(prompt) + (True,) * len(generated))


def _answered(row: Example) -> Example:
    return Example(id=row.id, prompt=row.prompt, completion=row.targets[0])
