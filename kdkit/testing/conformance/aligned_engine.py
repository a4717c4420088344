"""The engine's promise, tested through an aligned loss: no cut, padding or block changes the gradient."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import torch

from kdkit.api import Example
from kdkit.models.cuts import CutEncoder
from kdkit.testing.conformance.engine import CUTS, Signals, flat, gradients_of, laid, same_gradients
from kdkit.testing.tiny import tiny_model, tiny_piece_tokenizer, tiny_tokenizer
from kdkit.train.aligned import aligned_batch
from kdkit.train.alignment import AlignedRow, align, aligned_rows
from kdkit.train.batching import micro_batches
from kdkit.train.objective import CausalObjective, LossTerm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import LlamaForCausalLM

    from kdkit.api import AlignedLoss
    from kdkit.models.chat import Encoded

__all__ = ["AlignedEngineInvariance"]

_PIECES: Final = 387
"""Tokens of the teacher, which are pieces of several characters; the student's are bytes."""
_ANSWERS: Final = ("It is the 10.", "and 😀\n\n what  it is!", " in  ", "x", "What\nis it 20 20", "é")


class AlignedEngineInvariance:
    """Runs an aligned loss through the training engine on tiny random Llamas with two tokenizers."""

    def build(self) -> AlignedLoss:
        """See :class:`kdkit.testing.conformance.aligned.AlignedLossConformance`."""
        raise NotImplementedError

    def reference(self, student: Tensor, teacher: Tensor, student_labels: Tensor, teacher_labels: Tensor) -> Tensor:
        """See :class:`kdkit.testing.conformance.aligned.AlignedLossConformance`."""
        raise NotImplementedError

    def test_the_gradient_is_that_of_whole_rows_however_they_are_cut(self) -> None:
        student, teacher, rows = *(model.double() for model in _models()), _rows()
        wanted = self._one_group_at_a_time(student, teacher, rows)
        for size, side, block in CUTS:
            got = self._through_the_engine(student, teacher, rows, size, side, block)
            same_gradients(got, wanted, 1e-8, f"micro-batches of {size}, {side}, blocks of {block} tokens")

    def test_bf16_products_stay_near_float64(self) -> None:
        student, teacher, rows = *(model.double() for model in _models()), _rows()
        wanted = self._one_group_at_a_time(student, teacher, rows)
        _, got = self._through_the_engine(*_models(), rows, 4, "right", 16, torch.bfloat16)
        cosine = torch.nn.functional.cosine_similarity(flat(got), flat(wanted[1]), dim=0)
        assert cosine > 0.98, f"with bf16 products the gradient points elsewhere (cosine {float(cosine):.3f})"

    def _one_group_at_a_time(
        self, student: LlamaForCausalLM, teacher: LlamaForCausalLM, rows: Sequence[AlignedRow]
    ) -> tuple[float, dict[str, Tensor]]:
        student.zero_grad()
        count, total = sum(row.groups for row in rows), torch.zeros((), dtype=torch.float64)
        for row in rows:
            with torch.no_grad():
                its, theirs = _predictions(teacher, row.teacher)
            own, mine = _predictions(student, row)
            for group in range(row.groups):
                members, others = (torch.tensor(g) == group for g in (row.student_groups, row.teacher_groups))
                total = total + self.reference(own[members], its[others], mine[members], theirs[others]) / count
        total.backward()
        return float(total.detach()), gradients_of(student)

    def _through_the_engine(
        self,
        student: LlamaForCausalLM,
        teacher: LlamaForCausalLM,
        rows: Sequence[AlignedRow],
        size: int,
        side: str,
        block: int,
        compute: torch.dtype | None = None,
    ) -> tuple[float, dict[str, Tensor]]:
        student.zero_grad()
        term = LossTerm("loss", 1.0, self.build(), vocabulary=_PIECES, kind="aligned")
        objective = CausalObjective(student, [term], block=block, compute=compute)
        count, loss = sum(row.groups for row in rows), 0.0
        for part in micro_batches(rows, size):
            batch, signals = aligned_batch(
                aligned_rows(part), partial(laid, layout=side), lambda theirs: Signals.of(teacher, theirs)
            )
            # The scale of tokens, of which there is no loss here, must not matter.
            measured = objective(batch, signals, 1.0, 1 / count)
            measured.loss.backward()
            loss += float(measured.loss.detach())
        return loss, gradients_of(student)


def _models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    return tiny_model().train(), tiny_model(vocab=_PIECES, seed=1, layers=3)


def _rows() -> list[AlignedRow]:
    student, teacher = CutEncoder(tiny_tokenizer()), CutEncoder(tiny_piece_tokenizer())
    rows = []
    for number, text in enumerate(_ANSWERS):
        example = Example(id=f"row-{number}", prompt="Q: ", completion=text)
        own, its = student.cut_row(example), teacher.cut_row(example)
        assert own is not None
        assert its is not None
        rows.append(align(own, its))
    return rows


def _predictions(model: LlamaForCausalLM, row: Encoded) -> tuple[Tensor, Tensor]:
    """[N, V] logits that predict the row's learned tokens, and these tokens."""
    ids, learned = torch.tensor([row.ids]), torch.tensor(row.learned)[1:]
    return model(input_ids=ids).logits[0, :-1][learned], ids[0, 1:][learned]
