"""Specs: what a plugin says about each component. Data, not call-backs: validating never builds one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Generic, Literal, TypeAlias, TypeVar

from kdkit.api.artifacts import Artifact
from kdkit.api.params import Params
from kdkit.api.protocols import (
    BuildContext,
    DatasetLoader,
    Metric,
    Quantizer,
    Reward,
    RolloutEngine,
    RolloutModel,
    RunInfo,
    StageContext,
    StageOutputs,
    Teacher,
    Tracker,
)
from kdkit.api.sandboxes import Sandbox

__all__ = [
    "KINDS",
    "DatasetSpec",
    "LossSpec",
    "MetricSpec",
    "QuantizerSpec",
    "RewardSpec",
    "RolloutSpec",
    "SandboxSpec",
    "Spec",
    "StageSpec",
    "TeacherSpec",
    "TrackerSpec",
]

P = TypeVar("P", bound=Params)
PolicyNeed: TypeAlias = Literal["teacher", "reference"]
NAME: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec(Generic[P]):
    """What every component declares.

    Attributes:
        name: kebab-case, unique within its kind and distribution.
        summary: One line of at most 80 characters for ``kdkit plugins list``.
        params: The parameter model; its module must not import torch.
        extras: pip extras of the plugin's distribution that the component needs.
        ready: Raises ``EnvironmentUnmet`` where this machine lacks what these parameters need beyond ``extras``: a
            program, a device. Asked before the first stage of a run; must not import torch.
        version: Raise it when the same parameters produce something else, so that cached results are not reused.
    """

    kind: ClassVar[str] = ""
    name: str
    summary: str
    params: type[P]
    extras: tuple[str, ...] = ()
    ready: Callable[[P], None] | None = None
    version: int = 1

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"component name {self.name!r} is not kebab-case")
        if not (isinstance(self.params, type) and issubclass(self.params, Params)):
            raise TypeError(f"params of {self.name!r} must be a subclass of kdkit.Params")
        if not 0 < len(self.summary) <= 80 or "\n" in self.summary:
            raise ValueError(f"summary of {self.name!r} must be one line of 1 to 80 characters")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec(Spec[P]):
    """A loss. ``build`` returns the protocol that ``loss_kind`` names.

    Attributes:
        loss_kind: ``token``, ``policy``, ``representation`` or ``aligned``.
        needs: Teacher signals the loss accepts; empty when it needs no teacher.
        policy_needs: What a policy loss must find in its inputs besides the student's log-probabilities, advantages and
            weights: ``teacher`` (``teacher_logprobs``) and ``reference`` (``ref_logprobs``), which take another model;
            or a function of the parameters that says it. What is not declared is None. (A loss that reads the entropy
            says so by its attribute ``wants_entropy``.) The stage ``minillm`` takes a loss that needs ``teacher`` to
            make its advantages of that, and to read no others.
    """

    kind: ClassVar[str] = "loss"
    build: Callable[[P], Any]
    loss_kind: Literal["token", "policy", "representation", "aligned"] = "token"
    needs: frozenset[Literal["logits", "topk", "hidden"]] = frozenset()
    policy_needs: frozenset[PolicyNeed] | Callable[[P], frozenset[PolicyNeed]] = frozenset()

    def policy_needs_of(self, params: P) -> frozenset[PolicyNeed]:
        """What the policy loss needs with these parameters."""
        return self.policy_needs(params) if callable(self.policy_needs) else self.policy_needs


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSpec(Spec[P]):
    """A reward with the range its values stay in."""

    kind: ClassVar[str] = "reward"
    build: Callable[[P, BuildContext], Reward]
    range: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec(Spec[P]):
    """A dataset loader; ``rows`` says what its examples carry."""

    kind: ClassVar[str] = "dataset"
    build: Callable[[P], DatasetLoader]
    rows: Literal["messages", "prompt-completion", "prompt-only"] = "prompt-completion"


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSpec(Spec[P]):
    """A teacher and what it can give.

    Attributes:
        gives: Kinds of signal. With ``hidden``, ``build`` returns a ``HiddenTeacher``.
        fixed_rows: It has signals only for the dataset's own answers (a cache), and is refused where the student writes
            answers of its own. ``build`` returns a ``RowTeacher``.
    """

    kind: ClassVar[str] = "teacher"
    build: Callable[[P, BuildContext], Teacher]
    gives: frozenset[Literal["logits", "topk", "text", "hidden"]]
    fixed_rows: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerSpec(Spec[P]):
    """A quantizer.

    Attributes:
        needs_calibration: It looks at rows of data; without, a recipe that gives some is refused.
    """

    kind: ClassVar[str] = "quantizer"
    build: Callable[[P], Quantizer]
    needs_calibration: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSpec(Spec[P]):
    """A metric.

    Attributes:
        higher_is_better: Direction, for reports; None where neither end is better. A function of the parameters where
            these decide it.
        needs: ``completion`` (generated answers), ``reference`` (answers to compare them with), ``nll`` and
            ``teacher-kl`` (teacher-forced passes), ``verdict`` (answers judged by a reward), ``exposure`` (traces on
            the model's own and on the teacher's answers), ``student-kl`` (a trace of the reverse KL on its own). At
            least one of them other than ``reference``, which alone says nothing about a model.
        key: The metric's key in reports, where it depends on the parameters (``pass-at-1``); the name otherwise.
        unit: Shown in the report's header, such as ``0-100`` or ``nats/token``.
    """

    kind: ClassVar[str] = "metric"
    build: Callable[[P], Metric]
    higher_is_better: bool | Callable[[P], bool | None] | None
    needs: frozenset[Literal["completion", "reference", "nll", "teacher-kl", "verdict", "exposure", "student-kl"]] = (
        frozenset({"completion", "reference"})
    )
    key: Callable[[P], str] | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        Spec.__post_init__(self)
        if not frozenset(self.needs) - {"reference"}:
            raise ValueError(f"metric {self.name!r} needs nothing that a model gives, such as 'completion'")

    def direction(self, params: P) -> bool | None:
        """``higher_is_better`` with these parameters."""
        return self.higher_is_better(params) if callable(self.higher_is_better) else self.higher_is_better


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec(Spec[P]):
    """A stage of the pipeline.

    Attributes:
        run: Does the work; imports what is heavy inside.
        outputs: Name to artifact type.
        launch: ``worker`` runs in a process of its own, so that memory is returned; ``inline`` in the parent.
        names_recipe: The output holds the recipe's name, which therefore belongs to the content key.
        check: Problems that parameters alone show, as ``(parameter path, message)``; must not import torch.
    """

    kind: ClassVar[str] = "stage"
    run: Callable[[P, StageContext], StageOutputs]
    outputs: Mapping[str, type[Artifact]] = field(default_factory=dict)
    launch: Literal["worker", "inline"] = "worker"
    names_recipe: bool = False
    check: Callable[[P], list[tuple[tuple[str | int, ...], str]]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSpec(Spec[P]):
    """A rollout engine.

    Attributes:
        mixes: The engine has ``decode`` beside ``generate``, a ``kdkit.train.rollout.decode`` of the live model: it can
            mix in a second model, and says what top-k and top-p kept.
    """

    kind: ClassVar[str] = "rollout"
    build: Callable[[P, BuildContext, RolloutModel], RolloutEngine]
    mixes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerSpec(Spec[P]):
    """A tracker."""

    kind: ClassVar[str] = "tracker"
    build: Callable[[P, RunInfo], Tracker]


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSpec(Spec[P]):
    """A sandbox."""

    kind: ClassVar[str] = "sandbox"
    build: Callable[[P], Sandbox]


KINDS: Final[Mapping[str, type[Spec[Any]]]] = {
    cls.kind: cls
    for cls in (
        LossSpec,
        RewardSpec,
        DatasetSpec,
        TeacherSpec,
        QuantizerSpec,
        MetricSpec,
        StageSpec,
        RolloutSpec,
        TrackerSpec,
        SandboxSpec,
    )
}
"""Component kind to its spec class, in the order of ``kdkit plugins list``."""
