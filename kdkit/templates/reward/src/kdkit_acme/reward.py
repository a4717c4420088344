"""What a completion earns."""

from __future__ import annotations

from collections.abc import Sequence

from kdkit.api import RewardScore, Rollout


class AcmeReward:
    """1 for a right answer behind the marker on the last line, ``wrong`` for another one, else 0.

    Args:
        marker: What the last line starts with.
        wrong: Value of a wrong answer in the right form.
    """

    def __init__(self, marker: str, wrong: float) -> None:
        self._marker = marker
        self._wrong = wrong

    def __call__(self, rollouts: Sequence[Rollout], /) -> Sequence[RewardScore]:
        """One score per rollout, in order. No text of a completion may make it raise."""
        return [self.score(rollout) for rollout in rollouts]

    def score(self, rollout: Rollout) -> RewardScore:
        """The score of one completion."""
        targets = rollout.example.targets if rollout.example else ()
        if not targets:
            # Not 0: that would tell the model that its answer is bad.
            return RewardScore.unscorable("the example has no reference")
        found = self._answer(rollout.text)
        if found is None:
            return RewardScore.of(0.0)
        # A reference may be a whole answer itself.
        right = {_plain(self._answer(target) or target) for target in targets}
        return RewardScore.of(1.0 if _plain(found) in right else self._wrong)

    def _answer(self, text: str) -> str | None:
        """What stands behind the marker on the last line; None without a marker."""
        last = text.strip().rpartition("\n")[2].strip()
        return last.removeprefix(self._marker) if last.startswith(self._marker) else None


def _plain(answer: str) -> str:
    """Without differences that do not matter."""
    return " ".join(answer.casefold().split()).rstrip(".")
