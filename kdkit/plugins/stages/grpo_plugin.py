"""Parameters of the grpo stage. Light: no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kdkit.api import Component, Model, OneOrMore, Ref, Sampling, StageContext, StageSpec, Weighted
from kdkit.api.protocols import DatasetLoader, Loss, Reward, RolloutEngine, StageOutputs
from kdkit.api.slots import Scheduled
from kdkit.train.params import TrainParams

if TYPE_CHECKING:
    from kdkit.plugins.stages.checks import Problem

__all__ = ["GRPO", "GRPOStageParams"]


class GRPOStageParams(TrainParams):
    """GRPO: the student answers every prompt several times, and learns from the answers that rewards like better.

    docs/methods/grpo.md has the formulas, what is logged, and what each parameter trades.
    """

    model: Ref[Model]
    """The student; it should solve some of the problems already, so start from an sft or distill stage."""
    data: OneOrMore[Weighted[DatasetLoader]]
    """Prompts: one dataset, or a list mixed by ``weight``. Answers that rows have are not read; what rewards need, such
    as tests, stands in the rows."""
    overlong: Literal["drop", "truncate"] = "drop"
    """Prompts that leave less than ``max_completion_length`` of ``max_length``: leave them out, or allow shorter
    completions."""
    rewards: list[Scheduled[Reward]] = Field(min_length=1)
    """Weighted sum of rewards. One with ``from_step`` joins at that optimiser step, counted from 0; all completions of
    an iteration are judged by the rewards of its first step. Completions that could not be judged are masked."""
    losses: list[Weighted[Loss]] = Field(default=[{"use": "grpo"}], validate_default=True, min_length=1)  # type: ignore[list-item]
    """Policy losses. Clipping, normalisation and the weight ``beta`` of the KL to the model that the stage started from
    are parameters of the loss ``grpo``; that model is kept in memory only when ``beta`` is above 0."""
    num_generations: int = Field(8, ge=2)
    """Completions of a prompt, which are compared with one another: a group."""
    num_rollouts: int = Field(64, ge=1)
    """Completions of an iteration, on all devices together; a multiple of the rows of a step and of
    ``num_generations``."""
    num_iterations: int = Field(1, ge=1)
    """Passes over the completions of an iteration before new ones are sampled."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """A completion's advantage is its reward minus the mean of its group, divided by the standard deviation of the
    ``group``, of all completions of the iteration (``batch``), or not at all: ``none`` does not favour prompts whose
    rewards differ little."""
    mask_truncated_completions: bool = False
    """Learn nothing from completions that hit ``max_completion_length``. They count in the mean of their group."""
    resample_groups: int = Field(0, ge=0, le=16)
    """Dynamic sampling: how often groups whose rewards are all alike, or whose completions are all masked, are replaced
    by those of other prompts, in an iteration. The former are counted in the log; those that are left teach nothing."""
    max_completion_length: int = Field(256, ge=1)
    """Longest completion in tokens, its end token included."""
    temperature: float = Field(1.0, gt=0)
    """Softmax temperature of sampling, and of every log-probability that is compared."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling; log-probabilities are then those over the kept tokens. 1 keeps all."""
    top_k: int = Field(0, ge=0)
    """Keep only the k most probable tokens, in the same way; 0 keeps all."""
    rollout: Component[RolloutEngine] = Field(default={"use": "transformers"}, validate_default=True)  # type: ignore[assignment]
    """Engine that decodes. Another one than ``transformers`` takes neither top_k nor top_p."""

    @property
    def sampling(self) -> Sampling:
        """How the student answers."""
        return Sampling(
            do_sample=True,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_completion_length,
        )

    @property
    def needs_reference(self) -> bool:
        """Whether a loss compares with the model that the stage started from."""
        specs: list[tuple[Any, Any]] = [(loss.found.spec, loss.params) for loss in self.losses]
        return any("reference" in spec.policy_needs_of(params) for spec, params in specs)


def _check(params: GRPOStageParams) -> list[Problem]:
    return [*_losses(params), *_sizes(params), *_rewards(params), *_others(params)]


def _losses(params: GRPOStageParams) -> Iterator[Problem]:
    names = [loss.name for loss in params.losses]
    for index, loss in enumerate(params.losses):
        spec: Any = loss.found.spec
        where = ("losses", index, "use")
        if spec.loss_kind != "policy":
            yield where, f"'{loss.name}' is a {spec.loss_kind} loss; this stage takes policy losses, such as grpo"
        elif "teacher" in spec.policy_needs_of(loss.params):
            yield where, f"'{loss.name}' needs a teacher, which this stage has not; use a minillm stage"
        if loss.name in names[:index]:
            yield where, f"'{loss.name}' appears twice"


def _sizes(params: GRPOStageParams) -> Iterator[Problem]:
    batch = params.per_device_train_batch_size * params.gradient_accumulation_steps
    where, count = ("num_rollouts",), params.num_rollouts
    if count % batch:
        rows = "per_device_train_batch_size * gradient_accumulation_steps"
        yield where, f"{count} is no multiple of the {batch} rows of a step ({rows})"
    if count % params.num_generations:
        yield where, f"{count} is no multiple of num_generations={params.num_generations}"
    if params.max_completion_length >= params.max_length:
        room = f"max_length={params.max_length} holds prompt and completion"
        yield ("max_completion_length",), f"{params.max_completion_length} leaves no room for a prompt; {room}"


def _rewards(params: GRPOStageParams) -> Iterator[Problem]:
    if min(reward.from_step for reward in params.rewards) > 0:
        yield ("rewards",), "no reward counts at the first step; one of them needs from_step: 0"
    if params.max_steps is None:
        return
    batch = params.per_device_train_batch_size * params.gradient_accumulation_steps
    steps = max(1, params.num_rollouts // batch) * params.num_iterations
    last = (params.max_steps - 1) // steps * steps
    for index, reward in enumerate(params.rewards):
        where = ("rewards", index, "from_step")
        if reward.from_step >= params.max_steps:
            yield where, f"'{reward.name}' would never count: training has {params.max_steps} steps"
        elif reward.from_step > last:
            # Rewards join at the first step of an iteration.
            yield where, f"'{reward.name}' would never count: the last completions are sampled at step {last}"


def _others(params: GRPOStageParams) -> Iterator[Problem]:
    if params.eval_data is not None:
        yield (
            ("eval_data",),
            "policy losses need the student's own completions; score held-out rows in an evaluate stage",
        )
    engine: Any = params.rollout
    if not engine.found.spec.mixes and (params.top_k > 0 or params.top_p < 1.0):
        yield ("rollout", "use"), f"'{engine.name}' does not say what top_k and top_p kept; use transformers"


def _run(params: GRPOStageParams, ctx: StageContext) -> StageOutputs:
    from kdkit.plugins.stages.grpo import run

    return run(params, ctx)


GRPO: StageSpec[Any] = StageSpec(
    name="grpo",
    summary="Train a student on its own answers by rewards (GRPO)",
    params=GRPOStageParams,
    run=_run,
    outputs={"model": Model},
    check=_check,
)
