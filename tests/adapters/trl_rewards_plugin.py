"""Reward functions as people write them for TRL, and the plugin file that brings them into a recipe."""

from __future__ import annotations

from functools import partial

from kdkit import Params, RewardSpec, hookimpl
from kdkit.adapters import from_trl_reward


def contains(completions, solution, full=1.0, **kwargs):
    """Conversational: the share of the solution's words that the answer has; None where there is no solution."""
    texts = [completion[0]["content"] for completion in completions]
    return [
        None if not wanted else full * sum(word in text for word in wanted.split()) / len(wanted.split())
        for text, wanted in zip(texts, solution, strict=True)
    ]


class ContainsParams(Params):
    """A function of TRL with a parameter."""

    full: float = 1.0
    """What all words give."""


@hookimpl
def kdkit_rewards():
    yield RewardSpec(
        name="contains",
        summary="Share of the solution's words, by a function written for TRL",
        params=ContainsParams,
        build=lambda params, ctx: from_trl_reward(
            partial(contains, full=params.full), columns={"solution": "completion"}, format="conversational"
        ),
        range=(0.0, 1.0),
    )
