"""The hooks. One per component kind, each yielding specs, and three notifications.

A plugin implements any of them as plain functions of a light module (no torch at import) and names that module under
the entry-point group ``kdkit.plugins``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import pluggy

from kdkit.api.specs import (
    DatasetSpec,
    LossSpec,
    MetricSpec,
    QuantizerSpec,
    RewardSpec,
    RolloutSpec,
    SandboxSpec,
    StageSpec,
    TeacherSpec,
    TrackerSpec,
)

__all__ = [
    "COMPONENT_HOOKS",
    "HookSpecs",
    "RunFinished",
    "StageFinished",
    "StageStarted",
    "deprecated",
    "hookimpl",
    "hookspec",
]

PROJECT: Final = "kdkit"
ENTRY_POINT_GROUP: Final = "kdkit.plugins"
hookspec: Final = pluggy.HookspecMarker(PROJECT)
hookimpl: Final = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a plugin as an implementation of the hook that has its name."""


def deprecated(what: str, *, since: str, until: str, instead: str) -> DeprecationWarning:
    """The warning for the author of a plugin, for ``warn_on_impl`` and ``warn_on_impl_args`` of a hook specification.

    A deprecated argument stays in the specification and is filled from the field of the event of that name::

        @hookspec(warn_on_impl_args={"key": deprecated("the argument 'key' of kdkit_stage_started", since="1.2",
                                                       until="2.0", instead="event.key")})
        def kdkit_stage_started(self, event: StageStarted, key: str) -> None: ...

    Args:
        what: The argument or hook.
        since: The first version of kdkit that warns.
        until: The first version without it.
        instead: What to write.
    """
    return DeprecationWarning(f"{what} is deprecated since kdkit {since} and goes with {until}; use {instead}")


COMPONENT_HOOKS: Final[Mapping[str, str]] = {
    "loss": "kdkit_losses",
    "reward": "kdkit_rewards",
    "dataset": "kdkit_datasets",
    "teacher": "kdkit_teachers",
    "quantizer": "kdkit_quantizers",
    "metric": "kdkit_metrics",
    "stage": "kdkit_stages",
    "rollout": "kdkit_rollouts",
    "tracker": "kdkit_trackers",
    "sandbox": "kdkit_sandboxes",
}
"""Component kind to the hook that yields its specs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStarted:
    """A stage is about to run; cached stages raise no event."""

    recipe: str
    stage: str
    kind: str
    key: str
    run_dir: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFinished:
    """A stage ended. ``entry`` is its store directory when ``status`` is ``ok``."""

    recipe: str
    stage: str
    kind: str
    key: str
    run_dir: Path
    status: Literal["ok", "failed", "stopped"]
    seconds: float
    entry: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished:
    """The whole run ended."""

    recipe: str
    run_dir: Path
    status: Literal["ok", "failed", "stopped"]
    seconds: float


class HookSpecs:
    """All hooks of kdkit."""

    @hookspec
    def kdkit_losses(self) -> Iterable[LossSpec[Any]]:
        """Losses: divergences, policy-gradient objectives, hidden-state matching.

        Example::

            @hookimpl
            def kdkit_losses():
                yield LossSpec(
                    name="focal-kl",
                    summary="Forward KL weighted by student error",
                    params=FocalParams,
                    build=build_focal,
                    needs=frozenset({"logits"}),
                )
        """
        raise AssertionError("hook specification")

    @hookspec
    def kdkit_rewards(self) -> Iterable[RewardSpec[Any]]:
        """Rewards for reinforcement learning; each declares the range of its values."""
        raise AssertionError("hook specification")

    @hookspec
    def kdkit_datasets(self) -> Iterable[DatasetSpec[Any]]:
        """Dataset loaders."""
        raise AssertionError("hook specification")

    @hookspec
    def kdkit_teachers(self) -> Iterable[TeacherSpec[Any]]:
        """Teachers: local models, servers, caches."""
        raise AssertionError("hook specification")

    @hookspec
    def kdkit_quantizers(self) -> Iterable[QuantizerSpec[Any]]:
        """Quantizers."""
        raise AssertionError("hook specification")

    @hookspec
    def kdkit_metrics(self) -> Iterable[MetricSpec[Any]]:
        """Metrics over predictions."""
        raise AssertionError("hook specification")

    @hookspec
    def kdkit_stages(self) -> Iterable[StageSpec[Any]]:
        """Pipeline stages, named by ``kind:`` in a recipe."""
        raise AssertionError("hook specification")

    @hookspec
    def kdkit_rollouts(self) -> Iterable[RolloutSpec[Any]]:
        """Engines that generate completions."""
        raise AssertionError("hook specification")

    @hookspec
    def kdkit_trackers(self) -> Iterable[TrackerSpec[Any]]:
        """Experiment trackers, named under ``track:`` in a recipe."""
        raise AssertionError("hook specification")

    @hookspec
    def kdkit_sandboxes(self) -> Iterable[SandboxSpec[Any]]:
        """Sandboxes for generated programs."""
        raise AssertionError("hook specification")

    @hookspec
    def kdkit_stage_started(self, event: StageStarted) -> None:
        """Called before a stage runs. Errors raised here are logged and do not stop the run."""

    @hookspec
    def kdkit_stage_finished(self, event: StageFinished) -> None:
        """Called after a stage ran, well or not."""

    @hookspec
    def kdkit_run_finished(self, event: RunFinished) -> None:
        """Called once at the end of ``kdkit run``."""
