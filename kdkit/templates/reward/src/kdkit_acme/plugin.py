"""What kdkit reads of this package. Keep it light: what lists or checks components imports it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kdkit.api import Params, RewardSpec, hookimpl
from pydantic import Field

if TYPE_CHECKING:
    from kdkit.api import BuildContext, Reward


class AcmeParams(Params):
    """The last line of the answer is the marker and one of the example's references."""

    marker: str = Field("Answer:", min_length=1)
    """What the last line starts with."""
    wrong: float = Field(0.1, ge=0, le=1)
    """Value of a wrong answer in the right form; 1 is a right one."""


def _build(params: AcmeParams, ctx: BuildContext) -> Reward:
    from kdkit_acme import reward

    del ctx  # it resolves references and builds other components, where parameters name some
    return reward.AcmeReward(marker=params.marker, wrong=params.wrong)


@hookimpl
def kdkit_rewards() -> Iterator[RewardSpec[Any]]:
    """The rewards of this package."""
    yield RewardSpec(
        name="acme",
        summary="The last line is Answer: and one of the references",
        params=AcmeParams,
        build=_build,
        range=(0.0, 1.0),
    )
