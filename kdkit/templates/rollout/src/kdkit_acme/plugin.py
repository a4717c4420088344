"""What kdkit reads of this package. Keep it light: what lists or checks components imports it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kdkit.api import Params, Precision, RolloutSpec, hookimpl

if TYPE_CHECKING:
    from kdkit.api import BuildContext, RolloutEngine, RolloutModel


class AcmeParams(Params):
    """Answers by ``generate`` of transformers, one prompt at a time."""

    precision: Precision = "auto"
    """Of the weights where the engine loads the model itself."""


def _build(
    params: AcmeParams,
    ctx: BuildContext,
    model: RolloutModel,
) -> RolloutEngine:
    from kdkit_acme import rollout

    precision = ctx.precision(params.precision)
    return rollout.AcmeRollouts(model, ctx, precision)


@hookimpl
def kdkit_rollouts() -> Iterator[RolloutSpec[Any]]:
    """The rollout engines of this package."""
    yield RolloutSpec(
        name="acme",
        summary="generate of transformers, one prompt at a time",
        params=AcmeParams,
        build=_build,
    )
