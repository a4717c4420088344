"""Is the program right? It is run on the example's tests, in a sandbox."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal
from weakref import WeakKeyDictionary

from kdkit.api.data import RewardScore, Rollout
from kdkit.plugins.rewards.judge import Judge, Judgement, Submission
from kdkit.plugins.rewards.problems import Limiting, Problem, problem_of
from kdkit.plugins.rewards.programs import last_program
from kdkit.plugins.rewards.scores import scored
from kdkit.plugins.rewards.tags import answer_part, opened_by_prompt
from kdkit.plugins.rewards.verdicts import Verdict

if TYPE_CHECKING:
    from kdkit.api import BuildContext
    from kdkit.plugins.rewards.params import CorrectnessParams

__all__ = ["PASSED", "Correctness", "shared_judge"]

PASSED: Final = 1.0
"""The value of a program that passes all its tests, with any scoring, and of no other."""
_JUDGES: Final[WeakKeyDictionary[Any, dict[str, Judge]]] = WeakKeyDictionary()


class Correctness:
    """Runs the last program of every answer; see ``CorrectnessParams``."""

    def __init__(self, params: CorrectnessParams, judge: Judge) -> None:
        self._params = params
        self._judge = judge
        self._limiting = Limiting(
            time_limit=params.time_limit,
            time_factor=None if params.time_factor == "auto" else params.time_factor,
            max_time=params.max_time,
            memory_mb=params.memory_mb,
            max_memory_mb=params.max_memory_mb,
        )

    def __call__(self, rollouts: Sequence[Rollout], /) -> list[RewardScore]:
        """See :class:`kdkit.api.protocols.Reward`.

        Raises:
            EnvironmentUnmet: The sandbox does not work on this machine.
        """
        scores: dict[int, RewardScore] = {}
        submissions: dict[int, Submission] = {}
        problems = _once_per_example(self._problem)
        for index, rollout in enumerate(rollouts):
            found = self._submission(rollout, problems(rollout))
            if isinstance(found, Submission):
                submissions[index] = found
            else:
                scores[index] = found
        judged = self._judge.judge(list(submissions.values()))
        scores.update(zip(submissions, map(self._score, judged), strict=True))
        return [scores[index] for index in range(len(rollouts))]

    def close(self) -> None:
        """End the sandboxes."""
        self._judge.close()

    def _problem(self, rollout: Rollout) -> Problem | str:
        params = self._params
        return problem_of(
            rollout.example,
            choice=params.tests,
            language=None if params.language == "auto" else params.language,
            limiting=self._limiting,
            max_tests=params.max_tests,
        )

    def _submission(self, rollout: Rollout, problem: Problem | str) -> Submission | RewardScore:
        if isinstance(problem, str):
            return RewardScore.unscorable(problem)
        answer = answer_part(rollout.text, opened=opened_by_prompt(rollout))
        program = last_program(answer, problem.language)
        if program is None:
            return scored(0.0, 0.0, PASSED, "no program in the answer")
        return Submission(program, problem, stop_early=self._params.scoring == "pass_fail")

    def _score(self, judged: Judgement) -> RewardScore:
        if judged.verdict is Verdict.IE:
            return RewardScore.infra_error(judged.reason)
        passed = judged.verdict is Verdict.AC
        # Tests passed before a forbidden system call earn nothing.
        share = 0.0 if judged.verdict is Verdict.SV else judged.passed / judged.total
        weight = self._params.partial_weight
        value = {
            "pass_fail": float(passed),
            "partial": share,
            "weighted_sum": (float(passed) + weight * share) / (1.0 + weight),
        }[self._params.scoring]
        early = self._params.scoring == "pass_fail"
        tests = "" if passed or early else f", {judged.passed} of {judged.total} tests passed"
        return scored(value, 0.0, PASSED, f"{judged.verdict.name} {judged.verdict}{tests}")


def _once_per_example(find: Callable[[Rollout], Problem | str]) -> Callable[[Rollout], Problem | str]:
    """``find``, called once for all completions of the same example: hashing megabytes of tests takes its time."""
    known: dict[int, Problem | str] = {}

    def found(rollout: Rollout) -> Problem | str:
        key = id(rollout.example)
        if key not in known:
            known[key] = find(rollout)
        return known[key]

    return found


def shared_judge(params: CorrectnessParams, ctx: BuildContext) -> Judge:
    """The judge for a sandbox and a way to compare; all rewards that are built in one context share it.

    So `length` may have a `correctness` of its own beside that of the recipe, and no program runs twice.
    """
    mode: Literal["tokens", "exact"] = params.comparison
    key = f"{params.sandbox!r} {mode} {params.float_tolerance!r}"
    judges = _JUDGES.setdefault(ctx, {})
    if key not in judges:
        judges[key] = Judge(ctx.build(params.sandbox), mode=mode, tolerance=params.float_tolerance)
    return judges[key]
