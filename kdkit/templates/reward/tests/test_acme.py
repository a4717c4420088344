from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest
from kdkit.api import Example, Reward, Rollout
from kdkit.testing.conformance import RewardConformance
from kdkit.testing.fakes import FakeBuildContext

from kdkit_acme import plugin

(SPEC,) = plugin.kdkit_rewards()
PROMPT = "What is 6 times 7?"
EXAMPLE = Example(id="1", prompt=PROMPT, references=("42",))
VALUES = {
    "Answer: 42": 1.0,
    "6 times 7 is 42.\nAnswer:  42. \n": 1.0,
    "Answer: 41": 0.1,
    "Answer:": 0.1,
    "42": 0.0,
    "Answer: 42\nor so": 0.0,
    "": 0.0,
}


def build() -> Reward:
    reward: Reward = SPEC.build(SPEC.params(), FakeBuildContext())
    return reward


def rollout(text: str) -> Rollout:
    return Rollout(PROMPT, text, tuple(text.encode()), EXAMPLE)


class TestReward(RewardConformance):
    range: ClassVar[tuple[float, float]] = SPEC.range

    def build(self) -> Reward:
        return build()

    def rollouts(self) -> Sequence[Rollout]:
        return [rollout(text) for text in VALUES]


@pytest.mark.parametrize("text", VALUES)
def test_values(text: str) -> None:
    (score,) = build()([rollout(text)])
    assert score.value == VALUES[text]
