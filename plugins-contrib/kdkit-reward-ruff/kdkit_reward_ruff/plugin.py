"""What kdkit sees of this package. Light: the implementation is imported when the reward is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import Field

from kdkit.api import Params, RewardSpec, Runtime, hookimpl

if TYPE_CHECKING:
    from kdkit.api import BuildContext, Reward

Rule: TypeAlias = Annotated[str, Field(pattern=r"^[A-Z]+[0-9]*$")]


class RuffParams(Params):
    """One minus a penalty for every finding of ruff in the answer's Python program, and at least 0.

    The program is the last fenced block in Python after the thought, else the last one without a language. Without one,
    with one that is no Python, has no statement or more than 20,000 characters the score is 0. Comments such as
    `# noqa` silence nothing, and configuration files do not count. Ruff reads the program and never runs it, so that
    `pass` scores 1: use it beside a reward that asks for the right answer.
    """

    select: list[Rule] = Field(["E4", "E7", "E9", "F"], min_length=1)
    """Rules that count, by code or prefix; those that ruff itself had by default for years, unless given."""
    ignore: list[Rule] = Field(default_factory=list)
    """Rules that do not, of those."""
    penalty: float = Field(0.1, gt=0, le=1)
    """What a finding costs; 1 asks for a program without any."""
    target_version: str = Field("py311", pattern=r"^py3\d+$")
    """The Python that programs are written for."""
    time_limit: Annotated[float, Runtime(), Field(gt=0)] = 10.0
    """Seconds for one program, after which its score counts as failed on our side, not the program's."""


def _build(params: RuffParams, ctx: BuildContext) -> Reward:
    from kdkit_reward_ruff.reward import RuffReward

    del ctx
    return RuffReward(params)


@hookimpl
def kdkit_rewards() -> Iterator[RewardSpec[RuffParams]]:
    """The reward of this package."""
    yield RewardSpec(
        name="ruff",
        summary="One minus a penalty for each of ruff's findings in the answer's program",
        params=RuffParams,
        build=_build,
        range=(0.0, 1.0),
    )
