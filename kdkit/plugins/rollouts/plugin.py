"""Built-in rollout engines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from kdkit.api import Params, Precision, RolloutSpec, hookimpl

if TYPE_CHECKING:
    from kdkit.api import BuildContext, RolloutEngine, RolloutModel


class TransformersRolloutParams(Params):
    """Generation with transformers in this process."""

    batch_size: int = Field(32, ge=1)
    """Prompts decoded together, where one that ends makes room for the next; in bf16 the rounding, and so an answer,
    can depend on it."""
    precision: Precision = "auto"
    """Matrix products in bf16 or fp32 when the engine loads the model itself."""


def _transformers(params: TransformersRolloutParams, ctx: BuildContext, model: RolloutModel) -> RolloutEngine:
    from kdkit.plugins.rollouts.transformers_engine import TransformersRollouts

    return TransformersRollouts(params, ctx, model)


@hookimpl
def kdkit_rollouts() -> Iterator[RolloutSpec[Any]]:
    """The rollout engines."""
    yield RolloutSpec(
        name="transformers",
        summary="Batched decoding with a KV cache in this process, finished rows refilled",
        params=TransformersRolloutParams,
        build=_transformers,
        mixes=True,
    )
