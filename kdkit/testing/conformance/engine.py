"""The engine's promise, tested through a loss: the gradient of a batch does not depend on how it is cut or padded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from kdkit.api.data import Dense
from kdkit.models.chat import Encoded
from kdkit.models.heads import CausalParts, split
from kdkit.testing.tiny import tiny_model
from kdkit.train.batching import collate, micro_batches
from kdkit.train.objective import CausalObjective, LossTerm, valid_hidden
from kdkit.train.packing import pack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from transformers import LlamaForCausalLM

    from kdkit.api import TokenBatch, TokenLoss

__all__ = ["CUTS", "EngineInvariance", "Signals", "engine_rows", "flat", "gradients_of", "laid", "same_gradients"]

_VOCABULARY = 259
CUTS = (  # micro-batch size, padding side or rows laid end to end, tokens of a block
    (1, "right", 1),
    (2, "left", 3),
    (4, "packed", 7),
    (8, "packed", 10_000),
)


class EngineInvariance:
    """Runs a loss through the training engine on a tiny random Llama, in float64."""

    teacher: ClassVar[bool] = True

    def build(self, temperature: float = 1.0) -> TokenLoss:
        """See :class:`kdkit.testing.conformance.loss.TokenLossConformance`."""
        raise NotImplementedError

    def reference(self, teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
        """See :class:`kdkit.testing.conformance.loss.TokenLossConformance`."""
        raise NotImplementedError

    def test_the_gradient_is_that_of_whole_rows_however_they_are_cut(self) -> None:
        student, teacher, rows = tiny_model().double().train(), tiny_model(seed=1).double(), engine_rows()
        wanted = self._one_row_at_a_time(student, teacher, rows)
        for size, side, block in CUTS:
            got = self._through_the_engine(student, teacher, rows, size, side, block)
            same_gradients(got, wanted, 1e-8, f"micro-batches of {size}, {side}, blocks of {block} tokens")

    def test_bf16_products_stay_near_float64(self) -> None:
        rows, weights = engine_rows(), tiny_model(seed=1)
        wanted = self._one_row_at_a_time(tiny_model().double().train(), tiny_model(seed=1).double(), rows)
        student = tiny_model().train()
        _, got = self._through_the_engine(student, weights, rows, 4, "right", 16, torch.bfloat16)
        cosine = torch.nn.functional.cosine_similarity(flat(got), flat(wanted[1]), dim=0)
        assert cosine > 0.98, f"with bf16 products the gradient points elsewhere (cosine {float(cosine):.3f})"

    def _one_row_at_a_time(
        self, student: LlamaForCausalLM, teacher: LlamaForCausalLM, rows: Sequence[Encoded]
    ) -> tuple[float, dict[str, Tensor]]:
        student.zero_grad()
        tokens = sum(row.targets for row in rows)
        total = torch.zeros((), dtype=torch.float64)
        for row in rows:
            ids, learned = torch.tensor([row.ids]), torch.tensor(row.learned)[1:]
            with torch.no_grad():
                wanted = teacher(input_ids=ids).logits[0, :-1][learned]
            mine = student(input_ids=ids).logits[0, :-1][learned]
            total = total + self.reference(wanted, mine, ids[0, 1:][learned]).sum() / tokens
        total.backward()
        return float(total.detach()), gradients_of(student)

    def _through_the_engine(
        self,
        student: LlamaForCausalLM,
        teacher: LlamaForCausalLM,
        rows: Sequence[Encoded],
        size: int,
        side: str,
        block: int,
        compute: torch.dtype | None = None,
    ) -> tuple[float, dict[str, Tensor]]:
        student.zero_grad()
        objective = CausalObjective(student, [LossTerm("loss", 1.0, self.build())], block=block, compute=compute)
        tokens, loss = sum(row.targets for row in rows), 0.0
        for part in micro_batches(rows, size):
            batch = laid(part, side)
            signals = Signals.of(teacher, batch) if self.teacher else None
            measured = objective(batch, signals, 1 / tokens)
            measured.loss.backward()
            loss += float(measured.loss.detach())
        return loss, gradients_of(student)


@dataclass(frozen=True, slots=True)
class Signals:
    """A model's logits for the learned tokens of a batch, as a teacher in this process gives them."""

    parts: CausalParts
    hidden: Tensor

    @classmethod
    def of(cls, model: LlamaForCausalLM, batch: TokenBatch) -> Signals:
        """Those of this model."""
        parts = split(model)
        with torch.no_grad():
            return cls(parts, valid_hidden(parts.trunk, batch))

    def block(self, start: int, stop: int, /) -> Dense:
        """Of tokens ``start`` to ``stop``."""
        with torch.no_grad():
            return Dense(self.parts.project(self.hidden[start:stop]))


def engine_rows() -> list[Encoded]:
    """Rows of unequal length whose ids include the one that fills."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index, (length, prompt) in enumerate([(4, 1), (15, 3), (9, 2), (5, 3), (12, 1), (7, 2), (15, 1), (4, 3)]):
        ids = torch.randint(0, _VOCABULARY, (length,), generator=generator)
        ids[torch.rand(length, generator=generator) < 0.4] = _VOCABULARY - 1
        rows.append(Encoded(f"row-{index}", tuple(ids.tolist()), tuple(t >= prompt for t in range(length))))
    return rows


def laid(rows: Sequence[Encoded], layout: str) -> TokenBatch:
    """The rows padded on one side, or end to end."""
    if layout == "packed":
        return pack(rows)
    batch = collate(rows, side="left" if layout == "left" else "right")
    # Whatever fills the rows must not matter.
    batch.input_ids[batch.attention_mask == 0] = _VOCABULARY - 1
    return batch


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Of the parameters that have one, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    """All of them as one vector in float64."""
    return torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])


def same_gradients(
    got: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]], rtol: float, what: str
) -> None:
    """Fails unless loss and gradients agree, each relative to its largest element."""
    assert abs(got[0] - wanted[0]) <= rtol * abs(wanted[0]), f"{what}: loss {got[0]}, wanted {wanted[0]}"
    for name, gradient in wanted[1].items():
        error = (got[1][name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-12)
        assert error <= rtol, f"{what}: gradient of {name} is off by {float(error):.1e}"
