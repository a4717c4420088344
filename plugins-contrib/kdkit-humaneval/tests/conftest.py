"""What the tests share: the sample as files and examples, answers, and a sandbox that works."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import kdkit
from kdkit.api import DatasetLoader, Example, Reward, RewardScore, Rollout

Judge = Callable[..., RewardScore]


def sample(**params: Any) -> dict[str, Example]:
    """The shipped problems by the names of their functions."""
    loader: DatasetLoader = kdkit.build("dataset", "humaneval", source="./unread.jsonl", **params)
    return {str(row.extra["humaneval"]["entry_point"]): row for row in loader.sample().examples}


def rollout(example: Example, text: str, prompt: str = "Write it.") -> Rollout:
    """An answer to a problem."""
    return Rollout(prompt, text, tuple(text.encode("utf-8", "replace")), example)


def block(code: str) -> str:
    """Code in the form that prompts ask for."""
    return f"Here:\n```python\n{code}\n```\n"


@pytest.fixture(scope="session")
def needs_sandbox() -> None:
    """Skips where programs cannot be run safely; in CI, which says that they must, that is a failure."""
    report = kdkit.build("sandbox", "auto").probe()
    if not report.usable:
        (pytest.fail if os.environ.get("KDKIT_REQUIRE_SANDBOX") else pytest.skip)(f"no sandbox: {report.reason}")


@pytest.fixture(scope="session")
def reward(needs_sandbox: None) -> Reward:
    """The judge, in the best sandbox of this machine."""
    built: Reward = kdkit.build("reward", "humaneval-tests", time_limit=2.0)
    return built


@pytest.fixture
def judge(reward: Reward) -> Judge:
    """Judges one answer to one problem of the sample."""

    def judge(name: str, text: str, prompt: str = "Write it.", **params: Any) -> RewardScore:
        (score,) = reward([rollout(sample(**params)[name], text, prompt)])
        return score

    return judge


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Sequence[str]], Path]:
    """Writes lines to a file of problems."""

    def written(lines: Sequence[str]) -> Path:
        path = tmp_path / "problems.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return written
