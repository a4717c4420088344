"""Exposure bias: how much worse a model gets because it continues its own text (Arora et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from kdkit.api.data import MetricResult, Prediction
from kdkit.api.errors import DataError
from kdkit.plugins.metrics.results import named, occurred

__all__ = ["ExposureBias"]

# Nats per answer below which a divergence is the rounding of the logits and not a difference between models.
_NOTHING: Final = 1e-6
# Relative to the mean error on the teacher's answers: what an answer without any error there weighs. Not so little that
# its value, which is divided by the weight, drowns the others in rounding.
_FLOOR: Final = 1e-6


class _Pair(NamedTuple):
    own: float
    teachers: float
    short: bool  # fewer tokens than asked for


class ExposureBias:
    """ExAccErr: excess of the divergence accumulated over the first tokens of own answers, in per cent.

    ``(R / eps - 1) * 100``, where R is the mean over predictions of the KL divergences from the teacher, added up over
    the first tokens of the model's own answer, and eps is the same on the teacher's answers. Both sides of a pair are
    added up over as many tokens: ``tokens``, or the length of the shorter of the two answers when that is less.
    Otherwise a model would look better for stopping sooner.
    """

    def __init__(self, *, tokens: int) -> None:
        self._tokens = tokens

    def score(self, predictions: Sequence[Prediction]) -> MetricResult:
        """A ratio of means: a prediction's weight is its error on the teacher's answer.

        The sums start at the first token of an answer and include the end token. ``counts`` says how often an answer
        was shorter than ``tokens``. Predictions without both traces, or with an empty one, are left out and counted. A
        model that differs from the teacher on neither kind of answers has 0.

        Raises:
            DataError: No prediction has the traces, a value in them is not finite, or the model differs from the
                teacher on its own answers only, so that the ratio is infinite.
        """
        scored = [(key, pair) for key, item in named(predictions) if (pair := self._pair(key, item)) is not None]
        if not scored:
            raise DataError(
                f"exposure-bias: none of {len(predictions)} predictions has traces on own and on the teacher's answers",
                hint="give the evaluation a teacher that generates text",
            )
        weights = _weights([pair for _, pair in scored])
        values = tuple(
            100.0 * (pair.own - pair.teachers) / weight for (_, pair), weight in zip(scored, weights, strict=True)
        )
        return MetricResult(
            value=math.fsum(w * x for w, x in zip(weights, values, strict=True)) / math.fsum(weights),
            per_example=values,
            n=len(scored),
            weights=weights,
            ids=tuple(key for key, _ in scored),
            counts=occurred(
                {
                    "predictions without traces": len(predictions) - len(scored),
                    f"pairs with an answer shorter than {self._tokens} tokens": sum(pair.short for _, pair in scored),
                }
            ),
        )

    def _pair(self, key: str, prediction: Prediction) -> _Pair | None:
        traces = [prediction.traces.get(name) for name in ("own_kl", "teacher_answer_kl")]
        length = min(self._tokens, *(len(trace or ()) for trace in traces))
        if length == 0:
            return None
        own, teachers = ((trace or ())[:length] for trace in traces)
        if not all(map(math.isfinite, (*own, *teachers))):
            raise DataError("a divergence in the traces is not finite", where=f"example {key}")
        return _Pair(math.fsum(own), math.fsum(teachers), length < self._tokens)


def _weights(pairs: Sequence[_Pair]) -> tuple[float, ...]:
    """The errors on the teacher's answers, none of them zero: a value is divided by its weight."""
    own, teachers = (math.fsum(side) / len(pairs) for side in ([p.own for p in pairs], [p.teachers for p in pairs]))
    if teachers > _NOTHING:
        return tuple(max(pair.teachers, _FLOOR * teachers) for pair in pairs)
    if own > _NOTHING:
        raise DataError(
            f"exposure-bias: the model differs from the teacher on its own answers ({own:.3g} nats) and not at all on "
            "the teacher's: the ratio is infinite",
            hint="evaluate on more rows",
        )
    return (1.0,) * len(pairs)
