"""Build the built-in rewards around a sandbox that runs nothing, and score single completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kdkit.api import Example, Params, Rollout, SandboxOutcome, SandboxSpec
from kdkit.api.errors import RecipeError
from kdkit.api.slots import LOOKUP, Component, Found
from kdkit.plugins.metrics import plugin as metrics
from kdkit.plugins.rewards import plugin
from kdkit.testing.fakes import FakeBuildContext, FakeSandbox


class NoParams(Params):
    """None."""


@dataclass
class Lookup:
    """The built-in rewards and metrics, and ``auto``: a fake sandbox."""

    sandbox: FakeSandbox = field(default_factory=FakeSandbox)

    def find(self, kind: str, name: str, /) -> Found:
        sandbox = SandboxSpec(name="auto", summary="Fake", params=NoParams, build=lambda params: self.sandbox)
        for spec in (*plugin.kdkit_rewards(), *metrics.kdkit_metrics(), sandbox):
            if (spec.kind, spec.name) == (kind, name):
                return Found(spec, f"kdkit/{name}", "v1", __file__)
        raise RecipeError(f"no {kind} {name!r}")


class Workshop:
    """Builds rewards that share one context and one fake sandbox."""

    def __init__(self, programs: Any = None, *, usable: bool = True) -> None:
        self.sandbox = FakeSandbox(programs, usable=usable)
        self.ctx = FakeBuildContext()
        self.lookup = Lookup(self.sandbox)

    def component(self, name: str, slot: type[Component[Any]] = Component, **given: Any) -> Any:
        return slot._from_mapping("reward", {"use": name, **given}, {LOOKUP: self.lookup})

    def build(self, name: str, **given: Any) -> Any:
        return self.ctx.build(self.component(name, **given))

    def score(self, name: str, text: str, *, example: Example | None = None, tokens: int = 0, **given: Any) -> Any:
        (score,) = self.build(name, **given)([rollout(text, example=example, tokens=tokens)])
        return score

    def value(self, name: str, text: str, **given: Any) -> float:
        score = self.score(name, text, **given)
        assert score.status == "ok", score
        return score.value


def rollout(text: str, *, prompt: str = "Q", example: Example | None = None, tokens: int = 0) -> Rollout:
    return Rollout(prompt, text, tuple(range(tokens)), example)


def problem(*tests: tuple[str, str], id: str = "p", **extra: Any) -> Example:  # noqa: A002
    official = [{"input": given, "output": expected} for given, expected in tests]
    return Example(id=id, prompt="Q", extra={"language": "python", "official_tests": official, **extra})


def answer(code: str, language: str = "python", thought: str = "Step 1: read two numbers") -> str:
    return f"<think>\n{thought}\n</think>\nHere it is.\n```{language}\n{code}\n```\n"


def failed(status: str, **given: Any) -> SandboxOutcome:
    return SandboxOutcome(status=status, **given)  # type: ignore[arg-type]
