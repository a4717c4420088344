"""Does an answer pass its problem's tests? Three steps in the sandbox, of which a program sees only the second."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from weakref import finalize

from kdkit.api import EnvironmentUnmet, KdkitError, RewardScore, Rollout, SandboxJob, SandboxLimits
from kdkit_humaneval import inside
from kdkit_humaneval.answers import continuation, last_block
from kdkit_humaneval.dataset import COLUMN

if TYPE_CHECKING:
    from kdkit.api import Sandbox, SandboxOutcome, SandboxSession
    from kdkit_humaneval.plugin import HumanEvalTestsParams

__all__ = ["HumanEvalTests"]

_Order: TypeAlias = Mapping[str, Any]
"""What the steps are told about a program and its problem."""
_MIB: Final = 2**20
_OUTPUT: Final = 4 * _MIB
_NO_RESULTS: Final = "it wrote something else than results"
_TEXTS: Final = ("entry_point", "before", "solved", "test")
_TOLD: Final[Mapping[str, tuple[str, ...]]] = {
    "record": ("entry_point", "solved", "test"),
    "answer": ("entry_point", "before", "program", "calls"),
    "check": ("entry_point", "solved", "test", "calls", "results"),
}
"""What each step is told. Where a program runs there are neither tests nor solutions."""


@dataclass(frozen=True, slots=True)
class _Failed:
    """A step that gave no result: why, and whether the sandbox is to blame."""

    reason: str
    sandbox: bool


class HumanEvalTests:
    """See :class:`kdkit_humaneval.plugin.HumanEvalTestsParams`."""

    def __init__(self, params: HumanEvalTestsParams, sandbox: Sandbox) -> None:
        self._chunk = params.chunk
        self._sandbox = sandbox
        self._limits = SandboxLimits(
            wall_s=2 * params.time_limit + 1,
            cpu_s=params.time_limit,
            memory_bytes=params.memory_mb * _MIB,
            output_bytes=_OUTPUT,
        )
        self._sessions: list[SandboxSession] = []
        self._calls: dict[str, list[str] | RewardScore] = {}
        finalize(self, _close, self._sessions)

    def __call__(self, rollouts: Sequence[Rollout], /) -> list[RewardScore]:
        """See :class:`kdkit.api.Reward`.

        Raises:
            EnvironmentUnmet: The sandbox does not work on this machine.
        """
        scores: list[RewardScore] = []
        for start in range(0, len(rollouts), self._chunk):
            scores += self._some(rollouts[start : start + self._chunk])
        return scores

    def close(self) -> None:
        """End the sandbox; the next call opens it again."""
        _close(self._sessions)

    def _some(self, rollouts: Sequence[Rollout]) -> list[RewardScore]:
        problems = [_problem(rollout) for rollout in rollouts]
        calls = self._recorded([problem for problem in problems if problem is not None])
        found: list[_Order | RewardScore] = [
            RewardScore.unscorable("no problem of HumanEval")
            if problem is None
            else _order(rollout, problem, calls[_key(problem)])
            for rollout, problem in zip(rollouts, problems, strict=True)
        ]
        self._step("answer", found, _with_results)
        self._step("check", found, _verdict)
        return [score for score in found if isinstance(score, RewardScore)]

    def _step(
        self, step: str, found: list[_Order | RewardScore], after: Callable[[_Order, Any], _Order | RewardScore]
    ) -> None:
        """Do ``step`` for all that have no score yet, and put what comes ``after`` in their places."""
        orders = {index: order for index, order in enumerate(found) if not isinstance(order, RewardScore)}
        said = self._run(step, list(orders.values()))
        for (index, order), result in zip(orders.items(), said, strict=True):
            found[index] = _of_failure(result) if isinstance(result, _Failed) else after(order, result)

    def _recorded(self, problems: Sequence[_Order]) -> dict[str, list[str] | RewardScore]:
        """The calls that the tests of each problem make, or why it cannot be judged; what was learnt is remembered."""
        new = {key: problem for problem in problems if (key := _key(problem)) not in self._calls}
        found: list[_Order | RewardScore] = list(new.values())
        self._step("record", found, _with_calls)
        # The same results in another process: what is refused then would be refused of every program.
        self._step("check", found, _with_verdict)
        made = {key: _usable(calls) for key, calls in zip(new, found, strict=True)}
        self._calls.update({key: calls for key, calls in made.items() if getattr(calls, "status", "") != "infra-error"})
        return {**self._calls, **made}

    def _run(self, step: str, orders: Sequence[_Order]) -> list[Any]:
        """What each order came to, or why it came to nothing."""
        if not orders:
            return []
        if not self._sessions:
            self._sessions.append(self._sandbox.open(self._limits))
        words = [secrets.token_hex(16) for _ in orders]
        program = Path(inside.__file__).read_text(encoding="utf-8")
        jobs = []
        for word, order in zip(words, orders, strict=True):
            told = {"step": step, **{name: order[name] for name in _TOLD[step]}}
            jobs.append(SandboxJob(program=program, stdin=f"{word}\n{json.dumps(told)}"))
        try:
            outcomes = self._sessions[0].run(jobs)
        except EnvironmentUnmet:
            raise
        except (KdkitError, OSError) as error:
            self.close()
            return [_Failed(str(error), sandbox=True)] * len(jobs)
        return [_said(word, outcome) for word, outcome in zip(words, outcomes, strict=True)]


def _order(rollout: Rollout, problem: _Order, calls: list[str] | RewardScore) -> _Order | RewardScore:
    """The problem with the answer's program and the calls that are made of it, or the score without any."""
    if isinstance(calls, RewardScore):
        return calls
    if problem.get("continues"):
        # Prompt and continuation are one text: the body belongs to the prompt's last lines.
        program = problem["before"] + continuation(rollout.text)
        return {**problem, "before": "", "program": program, "calls": calls}
    block = last_block(rollout.prompt, rollout.text)
    if block is None:
        return RewardScore("ok", 0.0, "no program in the answer")
    return {**problem, "program": block, "calls": calls}


def _with_calls(order: _Order, said: Any) -> _Order | RewardScore:
    return {**order, **said} if isinstance(said, dict) else RewardScore("ok", 0.0, str(said))


def _with_verdict(order: _Order, said: Any) -> _Order | RewardScore:
    return order if said is True else RewardScore("ok", 0.0, "its tests do not accept its own solution again")


def _usable(found: _Order | RewardScore) -> list[str] | RewardScore:
    """The calls, or what a problem without them says of every program."""
    if not isinstance(found, RewardScore):
        calls: list[str] = found["calls"]
        return calls
    if found.status == "infra-error":
        return found
    return RewardScore.unscorable(f"the problem cannot be judged: {found.reason}")


def _with_results(order: _Order, said: Any) -> _Order | RewardScore:
    texts = isinstance(said, list) and all(result is None or isinstance(result, str) for result in said)
    if not texts or len(said) != len(order["calls"]):
        return RewardScore("ok", 0.0, _NO_RESULTS)
    return {**order, "results": said}


def _verdict(order: _Order, said: Any) -> RewardScore:
    del order
    return RewardScore("ok", 1.0, "passed") if said is True else RewardScore("ok", 0.0, "wrong")


def _problem(rollout: Rollout) -> _Order | None:
    found = rollout.example.extra.get(COLUMN) if rollout.example is not None else None
    usable = isinstance(found, Mapping) and all(isinstance(found.get(name), str) for name in _TEXTS)
    return found if usable else None


def _key(problem: _Order) -> str:
    return json.dumps([problem[name] for name in _TEXTS])


def _said(word: str, outcome: SandboxOutcome) -> Any:
    if outcome.status == "infra-error":
        return _Failed(outcome.reason or "the sandbox failed", sandbox=True)
    if outcome.status != "ok" or outcome.exit_code:
        return _Failed(outcome.status, sandbox=False)
    last = outcome.stdout.removesuffix("\n").rpartition("\n")[2]
    said, _, result = last.partition(" ")
    try:
        return json.loads(result) if said == word else _Failed("it ended before its calls", sandbox=False)
    except (ValueError, RecursionError):
        return _Failed(_NO_RESULTS, sandbox=False)


def _of_failure(failed: _Failed) -> RewardScore:
    return RewardScore.infra_error(failed.reason) if failed.sandbox else RewardScore("ok", 0.0, failed.reason)


def _close(sessions: list[SandboxSession]) -> None:
    while sessions:
        sessions.pop().close()
