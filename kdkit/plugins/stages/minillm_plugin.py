"""Parameters of the minillm stage. Light: no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kdkit.api import Component, Model, OneOrMore, Ref, Sampling, StageContext, StageSpec, Weighted
from kdkit.api.protocols import DatasetLoader, Loss, RolloutEngine, StageOutputs, Teacher
from kdkit.train.params import TrainParams

if TYPE_CHECKING:
    from kdkit.plugins.stages.checks import Problem

__all__ = ["MINILLM", "MiniLLMStageParams", "StudentRollouts"]

_METHOD = "minillm"


class StudentRollouts(Sampling):
    """How the student answers. Temperature, top_k and top_p hold for every log-probability that is compared."""

    do_sample: bool = True
    """Sample; a policy gradient learns nothing from greedy answers, which are refused."""
    temperature: float = Field(1.0, gt=0)
    """Softmax temperature of student and teacher."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling by the student's probabilities; the teacher is restricted to the same tokens. 1 keeps all, and
    only then is the reverse KL that of the whole vocabulary."""
    top_k: int = Field(0, ge=0)
    """Keep the student's k most probable tokens, the teacher restricted to the same; 0 keeps all."""
    max_new_tokens: int = Field(128, ge=1)
    """Longest answer in tokens, its end token included. A longer one is cut, and learned without an end token."""


class MiniLLMStageParams(TrainParams):
    """MiniLLM: the reverse KL of whole answers, by policy gradient on answers that the student samples itself.

    docs/methods/minillm.md derives every term, and says what each parameter trades. The student trains without dropout,
    whatever its configuration says: ratios compare forward passes.
    """

    model: Ref[Model]
    """The student; it should answer sensibly already, so start from an sft stage."""
    teacher: Component[Teacher]
    """What answers are judged by; it must share the student's vocabulary. ``local`` is exact. A server that gives the
    log-probability of every sampled token and its top k (``openai``) has exact rewards; the single-step term then
    compares k + 1 classes, which is a lower bound. It takes ``teacher_mixed_alpha: 0`` and plain sampling."""
    data: OneOrMore[Weighted[DatasetLoader]]
    """Prompts: one dataset, or a list mixed by ``weight``. Answers that rows have are not read."""
    overlong: Literal["drop", "truncate"] = "drop"
    """Prompts that leave less than ``sampling.max_new_tokens`` of ``max_length``: leave them out, or allow shorter
    answers. Rows of ``lm_data`` and ``eval_data`` over ``max_length``: leave them out, or cut the answer."""
    losses: list[Weighted[Loss]] = Field(default=[{"use": "minillm"}], validate_default=True, min_length=1)  # type: ignore[list-item]
    """Policy losses: ``minillm``, or ``on-policy-reverse-kl``, which credits a token with its own reward only."""
    single_step: bool | None = None
    """Add the exact reverse KL of every visited distribution (logged as ``single-step``), and let returns start one
    token later. By default on with the loss ``minillm`` and off without, where it would count a token's own reward
    twice. Its weight is that of ``minillm``."""
    teacher_mixed_alpha: float | None = Field(None, ge=0, lt=1)
    """The teacher's share of the mixture that answers are sampled from; importance weights correct for it, at most
    1 / (1 - alpha) a token. By default 0.2 with the loss ``minillm`` and 0 without."""
    sampling: StudentRollouts = StudentRollouts()
    """Decoding of the student's answers."""
    num_rollouts: int = Field(64, ge=1)
    """Answers of an iteration, on all devices together; a multiple of the rows of a step."""
    ppo_epochs: int = Field(4, ge=1)
    """Passes over the answers of an iteration before new ones are sampled."""
    gamma: float = Field(0.95, ge=0, le=1)
    """Discount of later rewards per token: 1 is the reverse KL of whole answers."""
    length_norm: bool = True
    """Divide every return by the number of tokens it sums over; without it short answers are the cheapest."""
    whiten: Literal["valid", "paper", "none"] = "valid"
    """Shift and scale advantages to mean 0 and variance 1 over the tokens of an iteration (``valid``), with padding
    counted as in the original (``paper``), or not at all."""
    reward_scaling: float | None = Field(None, gt=0)
    """Rewards are divided by it; the original has 0.5."""
    cliprange_reward: float | None = Field(None, gt=0)
    """Rewards are cut to plus and minus this afterwards; the original has 100."""
    importance: Literal["token", "per-decision"] = "token"
    """Weights that correct for the mixture: of a token alone, as published, which is biased, or the products that make
    the gradient exact, whose variance grows with the length."""
    parity: Literal["paper", "code"] = "paper"
    """Beside the single-step term, returns leave a token's own reward to it (``paper``), or count it again as the
    authors' code does, where the term has no importance weight (``code``)."""
    lm_data: OneOrMore[Weighted[DatasetLoader]] | None = None
    """Rows with answers for a second loss in every step, as many as rollouts: it keeps the student from forgetting."""
    lm_coef: float = Field(1.0, gt=0)
    """Weight of the losses of ``lm_data``."""
    kd_ratio: float = Field(0.5, ge=0, le=1)
    """Of them, the share of the forward KL to the teacher; the rest is the likelihood of the answers."""
    rollout: Component[RolloutEngine] = Field(default={"use": "transformers"}, validate_default=True)  # type: ignore[assignment]
    """Engine that decodes. Another one than ``transformers`` takes ``teacher_mixed_alpha: 0`` and neither top_k nor
    top_p."""

    @property
    def alpha(self) -> float:
        """The teacher's share, with its default."""
        default = 0.2 if self.minillm_weight else 0.0
        return default if self.teacher_mixed_alpha is None else self.teacher_mixed_alpha

    @property
    def decomposes(self) -> bool:
        """Whether there is a single-step term."""
        return bool(self.minillm_weight) if self.single_step is None else self.single_step

    @property
    def minillm_weight(self) -> float:
        """Weight of the loss ``minillm``; 0 without it."""
        return sum(loss.weight for loss in self.losses if loss.name == _METHOD)

    @property
    def cuts(self) -> bool:
        """Whether the sampling leaves tokens out."""
        return self.sampling.top_k > 0 or self.sampling.top_p < 1.0


def _check(params: MiniLLMStageParams) -> list[Problem]:
    return [*_losses(params), *_sampling(params), *_teacher(params), *_streams(params)]


def _losses(params: MiniLLMStageParams) -> Iterator[Problem]:
    names = [loss.name for loss in params.losses]
    for index, loss in enumerate(params.losses):
        spec: Any = loss.found.spec
        where = ("losses", index, "use")
        if spec.loss_kind != "policy":
            what = f"'{loss.name}' is a {spec.loss_kind} loss; this stage takes policy losses, such as minillm"
            yield where, f"{what} (single_step and lm_data add token losses)"
        elif "reference" in spec.policy_needs_of(loss.params):
            yield where, f"'{loss.name}' needs a reference model, which this stage has not"
        if loss.name in names[:index]:
            yield where, f"'{loss.name}' appears twice"
    if params.single_step and not params.minillm_weight:
        yield ("single_step",), "it goes with the loss minillm; others count a token's own reward already"


def _sampling(params: MiniLLMStageParams) -> Iterator[Problem]:
    batch = params.per_device_train_batch_size * params.gradient_accumulation_steps
    if params.num_rollouts % batch:
        rows = "per_device_train_batch_size * gradient_accumulation_steps"
        yield ("num_rollouts",), f"{params.num_rollouts} is no multiple of the {batch} rows of a step ({rows})"
    if not params.sampling.do_sample:
        yield ("sampling", "do_sample"), "a policy gradient needs sampled answers; greedy ones teach nothing"
    engine: Any = params.rollout
    if engine.found.spec.mixes:
        return
    if params.alpha:
        what = f"'{engine.name}' cannot sample from a mixture with the teacher"
        yield ("rollout", "use"), f"{what}; set teacher_mixed_alpha: 0, or use transformers"
    if params.cuts:
        yield ("rollout", "use"), f"'{engine.name}' does not say what top_k and top_p kept; use transformers"


def _teacher(params: MiniLLMStageParams) -> Iterator[Problem]:
    spec: Any = params.teacher.found.spec
    where, name = ("teacher", "use"), params.teacher.name
    if spec.fixed_rows:
        yield where, f"'{name}' knows only the data's answers, and this stage asks about the student's own"
    elif not spec.gives & {"logits", "topk"}:
        yield where, f"'{name}' gives neither logits nor topk"
    elif "logits" not in spec.gives:
        if params.alpha:
            yield where, f"'{name}' cannot take part in the sampling; set teacher_mixed_alpha: 0, or use local"
        if params.cuts or params.sampling.temperature != 1.0:
            what = f"'{name}' gives log-probabilities of the whole vocabulary at temperature 1"
            yield where, f"{what}; sample so, without top_k and top_p, or use local"


def _streams(params: MiniLLMStageParams) -> Iterator[Problem]:
    if params.lm_data is None:
        for name in ("lm_coef", "kd_ratio"):
            if name in params.model_fields_set:
                yield (name,), f"{name} needs lm_data"
    if params.eval_data is not None and params.lm_data is None and not params.decomposes:
        yield ("eval_data",), "held-out rows are measured by single_step or the losses of lm_data; add one of them"


def _run(params: MiniLLMStageParams, ctx: StageContext) -> StageOutputs:
    from kdkit.plugins.stages.minillm import run

    return run(params, ctx)


MINILLM: StageSpec[Any] = StageSpec(
    name=_METHOD,
    summary="Train a student on its own answers by the reverse KL to a teacher (MiniLLM)",
    params=MiniLLMStageParams,
    run=_run,
    outputs={"model": Model},
    check=_check,
)
