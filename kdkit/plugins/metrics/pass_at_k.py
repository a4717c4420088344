"""pass@k: how often at least one of k answers passes its tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kdkit.api.data import MetricResult, Prediction
from kdkit.api.errors import DataError
from kdkit.plugins.metrics.results import by_example, plain_mean

__all__ = ["PassAtK", "pass_at_k"]


class PassAtK:
    """The unbiased estimate of pass@k (Chen et al. 2021) from the verdicts on n >= k answers, times 100."""

    def __init__(self, *, k: int) -> None:
        self._k = k

    def score(self, predictions: Sequence[Prediction]) -> MetricResult:
        """The mean over examples.

        Answers without a verdict do not count; examples with fewer than k verdicts are left out. Both are counted.

        Raises:
            DataError: No example has k verdicts.
        """
        examples = by_example(predictions)
        verdicts = {key: [p.verdict for p in answers if p.verdict is not None] for key, answers in examples.items()}
        scored = [
            (key, 100.0 * pass_at_k(len(judged), sum(judged), self._k))
            for key, judged in verdicts.items()
            if len(judged) >= self._k
        ]
        unjudged = sum(prediction.verdict is None for prediction in predictions)
        if not scored:
            raise DataError(
                f"pass-at-{self._k}: none of {len(examples)} examples has {self._k} judged answers"
                f" ({len(predictions)} answers, {unjudged} without a verdict)",
                hint=f"sample at least {self._k} answers per example and give the evaluation a judge",
            )
        short = f"examples with fewer than {self._k} judged answers"
        return plain_mean(scored, {"answers without a verdict": unjudged, short: len(examples) - len(scored)})


def pass_at_k(n: int, passed: int, k: int) -> float:
    """1 - C(n - passed, k) / C(n, k): the chance that k of n answers, drawn without replacement, include a good one.

    The quotient of the binomials is a product of k factors, so that no large number is ever formed; one of
    them is zero when fewer than k answers failed.
    """
    return 1.0 - math.prod((n - passed - drawn) / (n - drawn) for drawn in range(k))
