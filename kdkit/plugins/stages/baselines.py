"""Answers that need no model: what a score is worth shows beside what they get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from kdkit.api.data import Prediction

if TYPE_CHECKING:
    from kdkit.api import Example

__all__ = ["BASELINES", "baseline_predictions"]

BASELINES: Final = ("identity", "empty", "majority", "reference")
"""In the order of reports: three trivial answers, and what a reference gets itself."""


def baseline_predictions(rows: Sequence[Example]) -> dict[str, list[Prediction]]:
    """Baseline to one prediction per row.

    * ``identity`` answers with the example's ``echo``, or with the last user text of the prompt;
    * ``empty`` says nothing;
    * ``majority`` gives the most common first reference of these rows everywhere; absent where none occurs twice;
    * ``reference`` gives the first reference: for metrics that compare with references, the most they can give.

    Rows without references have the first two only.
    """
    texts = {"identity": [row.echo or _last_user_text(row) for row in rows], "empty": [""] * len(rows)}
    if all(row.targets for row in rows):
        common, count = Counter(row.targets[0] for row in rows).most_common(1)[0]
        if count > 1:
            texts["majority"] = [common] * len(rows)
        texts["reference"] = [row.targets[0] for row in rows]
    return {name: [_prediction(*pair) for pair in zip(rows, answers, strict=True)] for name, answers in texts.items()}


def _last_user_text(row: Example) -> str:
    if isinstance(row.prompt, str):
        return row.prompt
    return next((message.content for message in reversed(row.prompt) if message.role == "user"), "")


def _prediction(row: Example, text: str) -> Prediction:
    return Prediction(
        prompt=row.prompt if isinstance(row.prompt, str) else "\n\n".join(message.content for message in row.prompt),
        text=text,
        references=row.targets,
        id=row.id,
        category=row.category,
        extra=row.extra,
    )
