"""What a component must be able to do. Structural types: nothing has to inherit from them.

Heavy types appear only in annotations, so importing this module costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

from kdkit.api.artifacts import Artifact
from kdkit.api.sandboxes import Sandbox

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kdkit.api.data import (
        AlignedLossInputs,
        Completion,
        Example,
        MetricResult,
        PolicyLossInputs,
        PolicyLossOutput,
        Prediction,
        QuantizedInfo,
        RepresentationLossInputs,
        RewardScore,
        Rollout,
        Rows,
        TeacherSignal,
        TokenBatch,
        TokenLossInputs,
    )
    from kdkit.api.params import Sampling
    from kdkit.api.slots import Component, Ref

A = TypeVar("A", bound=Artifact)
T = TypeVar("T")


# --- losses -----------------------------------------------------------------------------------------------------------


class TokenLoss(Protocol):
    """A divergence or likelihood over a block of valid tokens.

    The engine alone owns shift, mask, denominators, blocks and precision: a plugin cannot get them wrong.
    """

    def __call__(self, x: TokenLossInputs, /) -> Tensor:
        """[N] unreduced values, one per token, differentiable with respect to the student's logits only."""


class PolicyLoss(Protocol):
    """A policy-gradient objective over rollouts (GRPO, MiniLLM).

    A loss that reads ``x.entropy`` has an attribute ``wants_entropy`` that is true; others are not made to pay for it.
    """

    def __call__(self, x: PolicyLossInputs, /) -> PolicyLossOutput:
        """Per-token losses and the aggregation the engine applies globally."""


class RepresentationLoss(Protocol):
    """Matching of hidden states.

    ``layers`` pairs (student, teacher) layer indices, counted as ``output_hidden_states`` of transformers does: 0 is
    the embedding, i what layer i put out, and the last one comes after the final norm; -1 is the last one. Without any
    pair, every layer of the student meets the teacher's at the same relative depth. ``projector`` gives a trainable map
    for one pair, or None; it is initialised from the recipe's seed.
    """

    layers: Sequence[tuple[int, int]]

    def projector(self, student_dim: int, teacher_dim: int, /) -> Module | None:
        """A module from student width to teacher width; the engine owns its parameters.

        Raises:
            ModelError: The loss cannot compare these widths.
        """

    def __call__(self, x: RepresentationLossInputs, /) -> Tensor:
        """[N] unreduced values, one per token; no token's value depends on another token."""


class AlignedLoss(Protocol):
    """A loss between models with different tokenizers."""

    def __call__(self, x: AlignedLossInputs, /) -> Tensor:
        """[G] unreduced values, one per aligned group."""


class Loss(Protocol):
    """Any of the four kinds; ``LossSpec.kind`` says which."""

    def __call__(self, x: Any, /) -> Any:
        """See :class:`TokenLoss`, :class:`PolicyLoss`, :class:`RepresentationLoss`, :class:`AlignedLoss`."""


# --- rewards, data, metrics -------------------------------------------------------------------------------------------


class Reward(Protocol):
    """Scores completions."""

    def __call__(self, rollouts: Sequence[Rollout], /) -> Sequence[RewardScore]:
        """One score per rollout, in order; never raises because of a completion's text."""


class LoadContext(Protocol):
    """What a dataset loader may use."""

    seed: int
    offline: bool

    def resolve(self, ref: Ref[A], /) -> A:
        """The local file or directory behind a reference."""

    def build(self, component: Component[T], /, *args: Any) -> T:
        """Build a nested component, such as a dataset to compare with; errors name its plugin."""

    def log(self, message: str, /) -> None:
        """One line for the person who runs the recipe."""


class DatasetLoader(Protocol):
    """Reads rows and turns them into examples."""

    def load(self, ctx: LoadContext, /) -> Rows:
        """The rows of the chosen split. Raises ``DataError`` naming file and line for rows it cannot read."""

    def sample(self) -> Rows:
        """At least eight rows shipped with the plugin, for dry runs and tests; no files, no network."""


class Metric(Protocol):
    """Scores predictions."""

    def score(self, predictions: Sequence[Prediction], /) -> MetricResult:
        """Value, per-example values and n."""


# --- models -----------------------------------------------------------------------------------------------------------


class TeacherSignals(Protocol):
    """The teacher's view of all valid tokens of a batch, produced block by block."""

    def block(self, start: int, stop: int, /) -> TeacherSignal:
        """The signal for valid tokens ``start`` to ``stop``, in the batch's row-major order."""


class Teacher(Protocol):
    """A model to learn from. What it can give is declared in ``TeacherSpec.gives``.

    ``vocabulary`` identifies the token ids its signals are about (a ``kdkit.models.load.Vocabulary``). A teacher that
    also has ``tokenizer`` (a ``PreTrainedTokenizerBase``) serves aligned losses: ``signals`` then sees batches of its
    own tokens, whatever the student's are. One that has ``model`` (a ``PreTrainedModel`` on the student's device) can
    take part in the student's sampling, as MiniLLM wants.
    A teacher whose weights the content key cannot see may have ``identity() -> str | None``: what it says about them,
    which has to stay the same while a stage is resumed.
    """

    @property
    def vocabulary(self) -> Any:
        """Fingerprint and size; the engine refuses a student with another one."""

    def signals(self, batch: TokenBatch, /) -> TeacherSignals:
        """Signals for the valid tokens of a batch (teachers that give ``logits`` or ``topk``)."""

    def generate(self, prompts: Sequence[Example], sampling: Sampling, seed: int, /) -> Sequence[Completion]:
        """Completions for prompts (teachers that give ``text``)."""

    def close(self) -> None:
        """Release memory and connections; may be called twice."""


@runtime_checkable
class RowTeacher(Protocol):
    """A teacher that knows only certain rows, such as a cache (``TeacherSpec.fixed_rows``).

    What it cannot serve is found before training starts. ``temperature`` is that of its distributions: losses with
    another one are refused.
    """

    temperature: float

    def check_student(self, vocabulary: Any, tokenizer: PreTrainedTokenizerBase, /) -> None:
        """Refuse a student that its signals do not fit.

        Args:
            vocabulary: The student's ``kdkit.models.load.Vocabulary``.
            tokenizer: The student's tokenizer, with its chat template.

        Raises:
            KdkitError: One line that says what does not fit.
        """

    def check_rows(self, rows: Sequence[Any], /) -> None:
        """Refuse rows that it does not know.

        Args:
            rows: Every row of training and evaluation, each a ``kdkit.models.chat.Encoded``.

        Raises:
            KdkitError: One line that names the first such row.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutModel:
    """The model that a rollout engine generates with: a directory, and the live module when training holds one."""

    path: Path
    tokenizer: PreTrainedTokenizerBase
    live: PreTrainedModel | None = None


class RolloutEngine(Protocol):
    """Generates completions in batches."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], /
    ) -> Sequence[Completion]:
        """One completion per prompt (token ids), in order; with sampling, each depends on its own seed only."""


class Quantizer(Protocol):
    """Makes a smaller copy of a model directory."""

    def quantize(
        self, model_dir: Path, calibration: Sequence[Example], out_dir: Path, ctx: StageContext, /
    ) -> QuantizedInfo:
        """Write a loadable directory to ``out_dir``."""


# --- trackers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What a tracker may know about the run: names, directory and the recipe without secrets."""

    recipe: str
    stage: str
    run_dir: Path
    config: Mapping[str, Any]


class Tracker(Protocol):
    """Receives metrics. Opened once per executed stage."""

    def log(self, metrics: Mapping[str, float], step: int, /) -> None:
        """Scalar metrics at a step."""

    def artifact(self, path: Path, /) -> None:
        """A finished file worth keeping with the run."""

    def finish(self, status: Literal["ok", "failed", "stopped"], /) -> None:
        """The stage ended."""


# --- contexts ---------------------------------------------------------------------------------------------------------


class BuildContext(Protocol):
    """What the builder of a teacher, reward or rollout engine may use."""

    seed: int
    offline: bool
    device: str

    def resolve(self, ref: Ref[A], /) -> A:
        """The local artifact behind a reference."""

    def build(self, component: Component[T], /, *args: Any) -> T:
        """Build a nested component; errors name its plugin."""

    def precision(self, requested: str, /) -> Literal["bf16", "fp32"]:
        """``auto`` resolved for this machine."""

    def log(self, message: str, /) -> None:
        """One line for the person who runs the recipe."""


class StageContext(BuildContext, Protocol):
    """What a stage may use. Everything it makes goes below ``out``; the engine publishes that directory when it ends.

    Attributes:
        name: The stage's name in the recipe.
        out: Directory that becomes the store entry; empty at the start except when resuming.
        checkpoints: Directory for checkpoints, removed when the stage ends well.
        run_dir: The run's directory.
        recipe: The recipe's name.
    """

    name: str
    recipe: str
    out: Path
    checkpoints: Path
    run_dir: Path

    def seed_for(self, purpose: str, /) -> int:
        """A seed derived from the recipe's seed and the purpose; the same for every stage."""

    def load(self, component: Component[DatasetLoader], /) -> Rows:
        """Rows of a dataset component; logs its counts. Raises ``DataError`` when no row is left."""

    def progress(self, step: int, total: int, /, **values: float) -> None:
        """Where the stage is; ``tokens_per_s`` and ``loss`` are shown live."""

    def metrics(self, values: Mapping[str, float], /, *, step: int) -> None:
        """Scalars for metrics.jsonl and all trackers."""

    def stopping(self) -> bool:
        """True once a signal asked for a checkpoint and an orderly end."""


StageOutputs: TypeAlias = Mapping[str, Artifact]
StageRun: TypeAlias = Callable[[Any, StageContext], StageOutputs]

KIND_OF_PROTOCOL: Final[dict[type, str]] = {
    Loss: "loss",
    Reward: "reward",
    DatasetLoader: "dataset",
    Teacher: "teacher",
    Quantizer: "quantizer",
    Metric: "metric",
    RolloutEngine: "rollout",
    Tracker: "tracker",
    Sandbox: "sandbox",
}
"""The component kind behind each protocol that can stand in a ``Component[...]`` slot."""
