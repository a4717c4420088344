"""Several rewards as one: a weighted sum, with every component kept for the log and for the person who reads rollouts.

How statuses are combined, for each completion:

1. One infra-error makes the whole an infra-error: the completion is masked, never scored 0.
2. A component that can judge no completion of a prompt (no tests, no reference) is left out for that prompt.
3. A component that can judge some completions of a prompt makes the others unscorable: within a group all totals are
   sums of the same components.
4. Without any component left the completion is unscorable.

Only ``ok`` totals enter a group's baseline.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kdkit.api.data import RewardScore, Rollout
from kdkit.api.errors import ConformanceError, EnvironmentUnmet, StageError
from kdkit.api.protocols import BuildContext, Reward
from kdkit.api.slots import Component, Scheduled, Weighted, walk

__all__ = ["RewardSet", "RewardTerm", "Rewarded", "reward_names"]

_WINDOW: Final = 500
_MOST_ERRORS: Final = 10
"""Of the last 500 completions; more than 2 % stop the run."""
_STATUSES: Final = frozenset({"ok", "unscorable", "infra-error"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTerm:
    """One reward of the sum.

    Attributes:
        name: As in logs; a reward that stands twice in the list is ``length`` and ``length-2``.
        reward: The component.
        weight: Its weight.
        range: Values outside are clamped and counted.
        from_step: The first optimiser step, from 0, in which it counts. Before it is not run.
    """

    name: str
    reward: Reward
    weight: float = 1.0
    range: tuple[float, float] = (-math.inf, math.inf)
    from_step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewarded:
    """Scores of a batch of completions.

    Attributes:
        totals: One per completion, in order.
        components: The scores by name of the reward, of those that counted in this step.
        clamped: How many values of a reward lay outside the range it declares; only what occurred.
    """

    totals: tuple[RewardScore, ...]
    components: Mapping[str, tuple[RewardScore, ...]]
    clamped: Mapping[str, int] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Scalars for the log: mean and standard deviation of every component and of the total, and shares of statuses.

        Means are over ``ok`` scores; one that has none is left out.
        """
        values: dict[str, float] = {}
        for name, scores in {**self.components, "total": self.totals}.items():
            usable = [score.value for score in scores if score.value is not None]
            if usable:
                mean = math.fsum(usable) / len(usable)
                values[f"reward/{name}/mean"] = mean
                values[f"reward/{name}/std"] = math.sqrt(math.fsum((x - mean) ** 2 for x in usable) / len(usable))
            counts = Counter(score.status for score in scores)
            for status in ("unscorable", "infra-error"):
                if counts[status]:
                    values[f"reward/{name}/{status}"] = counts[status] / len(scores)
        return values


class RewardSet:
    """Built rewards. Watches the share of infrastructure errors over calls.

    Args:
        terms: The rewards, with distinct names.
    """

    def __init__(self, terms: Sequence[RewardTerm]) -> None:
        self.terms = tuple(terms)
        self._recent: deque[bool] = deque(maxlen=_WINDOW)

    @classmethod
    def build(cls, components: Sequence[Weighted[Reward]], ctx: BuildContext) -> RewardSet:
        """Build all rewards of a list.

        Every sandbox that a reward names is probed first, unless it remembers that it was: without one the work must
        not begin.

        Raises:
            EnvironmentUnmet: A sandbox does not work on this machine.
        """
        for _, slot in walk(list(components)):
            if isinstance(slot, Component) and slot.kind == "sandbox":
                _require(slot, ctx)
        terms = []
        for name, component in zip(reward_names(components), components, strict=True):
            spec: Any = component.found.spec
            terms.append(
                RewardTerm(
                    name=name,
                    reward=ctx.build(component),
                    weight=component.weight,
                    range=spec.range,
                    from_step=component.from_step if isinstance(component, Scheduled) else 0,
                )
            )
        return cls(terms)

    def __call__(self, rollouts: Sequence[Rollout], *, step: int | None = None) -> Rewarded:
        """Score completions; all those of a prompt must be in one call.

        Args:
            rollouts: The completions.
            step: The optimiser step, from 0, for schedules; None when all rewards count.

        Raises:
            ConformanceError: A reward broke its contract (count, status, not a number).
            StageError: More than 2 % of the last 500 completions could not be judged because of the judge.
        """
        active = [term for term in self.terms if step is None or step >= term.from_step]
        clamped: Counter[str] = Counter()
        components = {term.name: _scores(term, rollouts, clamped) for term in active}
        weights = {term.name: term.weight for term in active}
        totals = _totals(rollouts, components, weights)
        self._watch(totals)
        return Rewarded(totals=totals, components=components, clamped=dict(clamped))

    def close(self) -> None:
        """Close the rewards that hold something: sandboxes, models."""
        for term in self.terms:
            close = getattr(term.reward, "close", None)
            if close is not None:
                close()

    def _watch(self, totals: Sequence[RewardScore]) -> None:
        self._recent.extend(total.status == "infra-error" for total in totals)
        if (errors := sum(self._recent)) > _MOST_ERRORS:
            last = next(total.reason for total in reversed(totals) if total.status == "infra-error")
            raise StageError(
                f"{errors} of the last {len(self._recent)} completions could not be judged: {last}",
                where="rewards",
                allowed=f"{_MOST_ERRORS} of {_WINDOW}",
                hint="a judge that fails so often would decide what is learned",
            )


def reward_names(components: Sequence[Weighted[Reward]]) -> list[str]:
    """Distinct names for a list of rewards, in order."""
    names: list[str] = []
    for component in components:
        name, times = component.name, 1
        while name in names:
            times += 1
            name = f"{component.name}-{times}"
        names.append(name)
    return names


def _require(sandbox: Component[Any], ctx: BuildContext) -> None:
    built: Any = ctx.build(sandbox)
    # Canaries take seconds, and those of this boot may be remembered.
    report = getattr(built, "known", built.probe)()
    if not report.usable:
        raise EnvironmentUnmet(
            f"programs cannot be run safely here: {report.reason or 'the sandbox says no more'}",
            where=f"sandbox {sandbox.name}",
            hint=getattr(report, "hint", "") or None,
        )


def _scores(term: RewardTerm, rollouts: Sequence[Rollout], clamped: Counter[str]) -> tuple[RewardScore, ...]:
    """A reward's scores, held to its contract."""
    scores = tuple(term.reward(rollouts))
    where = f"reward {term.name}"
    if len(scores) != len(rollouts):
        raise ConformanceError(f"{len(scores)} scores for {len(rollouts)} completions", where=where)
    low, high = term.range
    kept = []
    for score in scores:
        if score.status not in _STATUSES or (score.value is None) == (score.status == "ok"):
            raise ConformanceError(f"a score of status {score.status!r} with the value {score.value!r}", where=where)
        if score.value is not None and not math.isfinite(score.value):
            raise ConformanceError(f"a value of {score.value}", where=where)
        if score.value is not None and not low <= score.value <= high:
            clamped[term.name] += 1
            score = RewardScore("ok", min(max(score.value, low), high), score.reason)  # noqa: PLW2901
        kept.append(score)
    return tuple(kept)


def _totals(
    rollouts: Sequence[Rollout], components: Mapping[str, Sequence[RewardScore]], weights: Mapping[str, float]
) -> tuple[RewardScore, ...]:
    totals: list[RewardScore] = [RewardScore.unscorable("no reward counts")] * len(rollouts)
    for members in _groups(rollouts):
        # Judging none of a prompt's completions: it does not apply. Judging some: the others cannot be compared.
        applying = [
            name for name, scores in components.items() if any(scores[i].status != "unscorable" for i in members)
        ]
        for index in members:
            scores = {name: components[name][index] for name in applying}
            totals[index] = _total(scores, weights, {name: components[name][index] for name in components})
    return tuple(totals)


def _groups(rollouts: Sequence[Rollout]) -> Iterator[list[int]]:
    """Indices of the completions of each prompt."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, rollout in enumerate(rollouts):
        key = (rollout.example.id if rollout.example is not None else "", rollout.prompt)
        groups.setdefault(key, []).append(index)
    yield from groups.values()


def _total(
    applying: Mapping[str, RewardScore], weights: Mapping[str, float], every: Mapping[str, RewardScore]
) -> RewardScore:
    for name, score in applying.items():
        if score.status == "infra-error":
            return RewardScore.infra_error(f"{name}: {score.reason}")
    for name, score in (applying or every).items():
        if score.status == "unscorable":
            return RewardScore.unscorable(f"{name}: {score.reason}")
    if not applying:
        return RewardScore.unscorable("no reward counts")
    return RewardScore.of(math.fsum(weights[name] * (score.value or 0.0) for name, score in applying.items()))
