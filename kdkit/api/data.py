"""The data that components see: examples, predictions, rollouts, and tensors grouped by meaning.

Shapes: B sequences, T tokens, N valid tokens of a block, V vocabulary entries, K kept entries, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "AlignedLossInputs",
    "Completion",
    "Dense",
    "Example",
    "Message",
    "MetricResult",
    "PolicyLossInputs",
    "PolicyLossOutput",
    "Prediction",
    "QuantizedInfo",
    "RepresentationLossInputs",
    "RewardScore",
    "Rollout",
    "Rows",
    "TeacherSignal",
    "TokenBatch",
    "TokenLossInputs",
    "TopK",
]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row of a dataset, in the one shape that all stages read.

    Attributes:
        id: Stable identity; splits, caches and paired statistics go by it.
        prompt: Raw text (used as it is) or messages (rendered with the tokenizer's chat template).
        completion: The answer to learn or compare with; None in prompt-only rows.
        every_turn: Train on every assistant turn of ``prompt`` as well, not only on ``completion``.
        references: Accepted answers for metrics; the completion when empty.
        category: Group for per-category results.
        echo: What the identity baseline answers (the buggy code, the context); the last user text when empty.
        extra: Columns kept for rewards and metrics (tests, time limits, ...), JSON values only.
    """

    id: str
    prompt: str | tuple[Message, ...]
    completion: str | None = None
    every_turn: bool = False
    references: tuple[str, ...] = ()
    category: str = ""
    echo: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def targets(self) -> tuple[str, ...]:
        """The references, or the completion when there are none."""
        return self.references or ((self.completion,) if self.completion is not None else ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What a dataset loader returns.

    Attributes:
        examples: The rows kept, in a stable order.
        counts: How many rows were read, and dropped for which reason.
    """

    examples: Sequence[Example]
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model generated for one prompt; ``truncated`` when it hit the token limit before an end token."""

    text: str
    token_ids: tuple[int, ...]
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Prediction:
    """A model's answer to one example, as metrics see it.

    Attributes:
        prompt: The prompt as text.
        text: The model's answer.
        references: Accepted answers.
        id: The example's id; paired comparisons join on it.
        category: The example's category.
        truncated: The answer hit the token limit.
        sample: Which of several sampled answers to the same example, from 0.
        verdict: Whether the answer passed its tests; None when nobody judged it.
        measures: Teacher-forced sums over the reference's tokens: ``nll`` (nats), ``teacher_kl`` (nats), ``tokens``.
        traces: Values per token: ``own_kl``, KL from teacher to model in nats at every token of the model's own answer;
            ``own_reverse_kl``, KL from the model to the teacher there; ``teacher_answer_kl``, KL from teacher to model
            at every token of the teacher's answer to this prompt.
        extra: The example's extra columns.
    """

    prompt: str
    text: str
    references: Sequence[str]
    id: str = ""
    category: str = ""
    truncated: bool = False
    sample: int = 0
    verdict: bool | None = None
    measures: Mapping[str, float] = field(default_factory=dict)
    traces: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricResult:
    """A metric's value with what is needed to resample it.

    ``value = link(sum(weights * per_example) / sum(weights))``; without weights every example counts the same.

    Attributes:
        value: The number for the table.
        per_example: One value per scored prediction, in the order of ``ids``; empty for a metric that has none, whose
            models are then not compared.
        n: How many predictions were scored.
        weights: Token counts for per-token means; None for plain means.
        link: ``exp`` for perplexity, else ``identity``.
        ids: Ids of the scored predictions; an example that was answered several times may stand there several times,
            and statistics then resample examples, not answers.
        counts: What a reader of the value must know, as words and a number: how many predictions were left out and why.
            Only what occurred; zero is not listed.
        ci95: Only for a metric of all answers together (BLEU of a corpus), which has no values per example: an interval
            that the metric made itself, by scoring resamples of the examples.
    """

    value: float
    per_example: tuple[float, ...]
    n: int
    weights: tuple[float, ...] | None = None
    link: Literal["identity", "exp"] = "identity"
    ids: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    ci95: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Token ids of sequences, padded or laid end to end, on the device of the model that reads them.

    Attributes:
        input_ids: [B, T] int64.
        attention_mask: [B, T] int64, 1 for real tokens, made from lengths and never from ``ids != pad``. None when
            several sequences share a row: each starts where ``position_ids`` is 0 and must not see the others, which a
            model of transformers takes from the position ids; ``kdkit.train.packing.unpack`` pads such a batch.
        position_ids: [B, T] int64, counting the tokens of a sequence from 0 whichever side is padded.
        labels_mask: [B, T] bool, True where the token at t is learned from position t - 1; never True at the first
            token of a sequence.
        example_ids: Ids of the sequences that have a learned token, row by row; what fills a packed row has neither.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    labels_mask: Tensor
    example_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dense:
    """The teacher's raw logits for a block: [N, V]. Losses get them in float32, a teacher may give its own dtype."""

    logits: Tensor


@dataclass(frozen=True, slots=True)
class TopK:
    """The teacher's K most probable tokens for a block; the rest is one bucket, never renormalised away.

    Attributes:
        ids: [N, K] int64.
        logprobs: [N, K] true log-probabilities at ``temperature`` (they sum to less than one). Rows with fewer than K
            tokens have -inf in the slots that are left, at any place and with any id.
        tail_mass: [N] probability outside the K tokens; computed from ``logprobs`` when None.
        temperature: The temperature the log-probabilities were taken at; a loss with another one refuses the signal.
        taken: [N] log-probabilities of the valid tokens themselves, among the K or not, at the same temperature; None
            when the teacher does not say. Rewards of sampled tokens need them.
    """

    ids: Tensor
    logprobs: Tensor
    tail_mass: Tensor | None = None
    temperature: float = 1.0
    taken: Tensor | None = None


TeacherSignal: TypeAlias = Dense | TopK


@dataclass(frozen=True, slots=True)
class TokenLossInputs:
    """A block of N valid tokens, already shifted: row i of the logits predicts ``labels[i]``.

    Do not write in place: the logits are shared with the other losses of the block.

    Attributes:
        student_logits: [N, V] float32 (float64 in reference tests), raw, no temperature applied.
        teacher: The teacher's signal for the same rows, or None.
        labels: [N] int64.
    """

    student_logits: Tensor
    teacher: TeacherSignal | None
    labels: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLossInputs:
    """Completions of a batch of rollouts. All tensors are [B, T] unless said otherwise.

    Attributes:
        logprobs: Of the taken tokens under the current policy, with gradient.
        old_logprobs: Under the policy that sampled, recomputed with the training forward.
        advantages: Per token.
        mask: Bool, True for completion tokens that count.
        completion_ids: Int64.
        lengths: [B] completion lengths in tokens.
        group_ids: [B] which prompt each completion belongs to.
        ref_logprobs: Under the frozen reference, when the loss needs it.
        teacher_logprobs: Under the teacher, when the loss needs it.
        importance_weights: Correction for sampling from another distribution.
        entropy: Of the current policy per token, when asked for.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    completion_ids: Tensor
    lengths: Tensor
    group_ids: Tensor
    ref_logprobs: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    importance_weights: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLossOutput:
    """Per-token losses [B, T] and how the engine reduces them over the whole optimiser step.

    ``token-mean`` divides by all tokens that count, ``sequence-mean`` takes the mean over each sequence and then over
    sequences, ``constant-length`` divides by sequences times ``constant_length``.

    Attributes:
        per_token: [B, T], differentiable with respect to ``logprobs`` and ``entropy``.
        aggregation: How it becomes one number.
        constant_length: Tokens.
        metrics: Sums over the tokens that count, logged as means over them; always of the same names.
    """

    per_token: Tensor
    aggregation: Literal["token-mean", "sequence-mean", "constant-length"]
    constant_length: int | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RepresentationLossInputs:
    """Hidden states for each pair of layers the loss asked for, at the positions that predict the block's tokens.

    ``student[i]`` is [N, D_student] (projected when the loss has a projector), ``teacher[i]`` is [N, D_teacher]; both
    in float32 (float64 in reference tests), differentiable with respect to the student's.
    """

    student: tuple[Tensor, ...]
    teacher: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class AlignedLossInputs:
    """Groups of student and teacher tokens that cover the same text span (teachers with another tokenizer).

    Attributes:
        student_logits: [N, V_student]; ``teacher_logits``: [M, V_teacher].
        student_labels: [N] int64; ``teacher_labels``: [M] int64.
        student_groups: [N] int64 group index of each student token, rising; ``teacher_groups``: [M].
        groups: Number of groups G; the loss returns [G].
    """

    student_logits: Tensor
    teacher_logits: Tensor
    student_labels: Tensor
    teacher_labels: Tensor
    student_groups: Tensor
    teacher_groups: Tensor
    groups: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion, as rewards see it."""

    prompt: str
    text: str
    token_ids: Sequence[int]
    example: Example | None = None
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class RewardScore:
    """A reward, or the reason there is none. Only ``ok`` scores enter a group's baseline.

    ``reason`` says why there is no value; beside a value it is a note for the person who reads rollouts.
    """

    status: Literal["ok", "unscorable", "infra-error"]
    value: float | None = None
    reason: str | None = None

    @classmethod
    def of(cls, value: float) -> RewardScore:
        """A real score."""
        return cls("ok", float(value))

    @classmethod
    def unscorable(cls, reason: str) -> RewardScore:
        """This completion cannot be judged (no reference, no tests)."""
        return cls("unscorable", None, reason)

    @classmethod
    def infra_error(cls, reason: str) -> RewardScore:
        """The judge failed, not the completion."""
        return cls("infra-error", None, reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedInfo:
    """What a quantizer made.

    Attributes:
        bits: Of a weight.
        group_size: Weights that share a scale; -1 is a whole row.
        bytes_on_disk: Of the weight files.
        layer_errors: Relative squared error by layer: of its outputs on the rows of calibration where ``rtn_errors``
            is given, else of its weights.
        rtn_errors: The same figures for rounding to nearest, where outputs were compared.
        kept_rtn: Layers among them that are rounded to nearest after all, because that was better or nothing else
            worked.
        notes: What the person who runs the recipe should know, one line each; never text of calibration.
    """

    bits: int
    group_size: int
    bytes_on_disk: int
    layer_errors: Mapping[str, float] = field(default_factory=dict)
    rtn_errors: Mapping[str, float] = field(default_factory=dict)
    kept_rtn: Sequence[str] = ()
    notes: Sequence[str] = ()
