"""The engine's promise, tested through a loss of hidden states: no cut, padding or block changes the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch

from kdkit.models.heads import split
from kdkit.testing.conformance.engine import CUTS, engine_rows, flat, gradients_of, laid, same_gradients
from kdkit.testing.tiny import tiny_model
from kdkit.train.batching import micro_batches
from kdkit.train.objective import CausalObjective, LossTerm, valid_hidden
from kdkit.train.representation import HiddenStates, Match

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM

    from kdkit.api import RepresentationLoss, TeacherSignals, TokenBatch
    from kdkit.models.chat import Encoded

__all__ = ["HiddenEngineInvariance"]


class HiddenEngineInvariance:
    """Runs a loss of hidden states through the training engine on tiny random Llamas."""

    widths_differ: ClassVar[bool] = True

    def build(self) -> RepresentationLoss:
        """See :class:`kdkit.testing.conformance.representation.RepresentationLossConformance`."""
        raise NotImplementedError

    def reference(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
        """See :class:`kdkit.testing.conformance.representation.RepresentationLossConformance`."""
        raise NotImplementedError

    def test_the_gradient_is_that_of_whole_rows_however_they_are_cut(self) -> None:
        student, teacher = (model.double() for model in self._models())
        wanted = self._one_row_at_a_time(student, teacher)
        for size, side, block in CUTS:
            got = self._through_the_engine(student, teacher, size, side, block)
            same_gradients(got, wanted, 1e-8, f"micro-batches of {size}, {side}, blocks of {block} tokens")

    def test_bf16_products_stay_near_float64(self) -> None:
        wanted = self._one_row_at_a_time(*(model.double() for model in self._models()))
        _, got = self._through_the_engine(*self._models(), 4, "right", 16, torch.bfloat16)
        cosine = torch.nn.functional.cosine_similarity(flat(got), flat(wanted[1]), dim=0)
        assert cosine > 0.98, f"with bf16 products the gradient points elsewhere (cosine {float(cosine):.3f})"

    def _models(self) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
        """Student and teacher, deep enough for the layers that the loss asks for."""
        layers = self.build().layers
        student = tiny_model(layers=_depth([own for own, _ in layers], 2)).train()
        width = 48 if self.widths_differ else 32
        teacher = tiny_model(layers=_depth([its for _, its in layers], 4), hidden=width, seed=1)
        for model in (student, teacher):
            # The state of the id that fills is zero, where formulas may have no value.
            embedding = model.get_input_embeddings().weight.data
            embedding[-1] = embedding[0].flip(0)
        return student, teacher

    def _match(self, student: LlamaForCausalLM, teacher: LlamaForCausalLM, block: int = 1) -> Match:
        sizes = HiddenStates(student).sizes, HiddenStates(teacher).sizes
        return Match(self.build(), *sizes, seed=0, name="loss", block=block)

    def _one_row_at_a_time(
        self, student: LlamaForCausalLM, teacher: LlamaForCausalLM
    ) -> tuple[float, dict[str, Tensor]]:
        student.zero_grad()
        rows, match = engine_rows(), self._match(student, teacher).double()
        tokens, total = sum(row.targets for row in rows), torch.zeros((), dtype=torch.float64)
        for row in rows:
            with torch.no_grad():
                its = _states(teacher, row)
            own = _states(student, row)
            mine = tuple(project(own[s]) for project, (s, _) in zip(match.projectors, match.pairs, strict=True))
            total = total + self.reference(mine, tuple(its[t] for _, t in match.pairs)).sum() / tokens
        total.backward()
        return float(total.detach()), gradients_of(student) | gradients_of(match)

    def _through_the_engine(
        self,
        student: LlamaForCausalLM,
        teacher: LlamaForCausalLM,
        size: int,
        side: str,
        block: int,
        compute: torch.dtype | None = None,
    ) -> tuple[float, dict[str, Tensor]]:
        student.zero_grad()
        match, rows = self._match(student, teacher, block), engine_rows()
        term = LossTerm("loss", 1.0, match.loss, kind="representation", match=match)
        objective = CausalObjective(student, [term], compute=compute)
        tokens, loss = sum(row.targets for row in rows), 0.0
        for part in micro_batches(rows, size):
            batch = laid(part, side)
            signals = _Signals.of(teacher, batch, [its for _, its in match.pairs])
            measured = objective(batch, cast("TeacherSignals", signals), 1 / tokens)
            measured.loss.backward()
            loss += float(measured.loss.detach())
        return loss, gradients_of(student) | gradients_of(match)


@dataclass(frozen=True, slots=True)
class _Signals:
    layers: dict[int, Tensor]

    @classmethod
    def of(cls, model: LlamaForCausalLM, batch: TokenBatch, layers: Sequence[int]) -> _Signals:
        states = HiddenStates(model)
        with torch.no_grad(), states.keep(layers) as kept:
            last = valid_hidden(split(model).trunk, batch)
        return cls(states.of_tokens(kept, last, batch, layers))

    def hidden(self, layers: Sequence[int], /) -> tuple[Tensor, ...]:
        return tuple(self.layers[layer] for layer in layers)


def _states(model: LlamaForCausalLM, row: Encoded) -> list[Tensor]:
    """[N, D] of every layer at the positions that predict the row's learned tokens."""
    out = model(input_ids=torch.tensor([row.ids]), output_hidden_states=True)
    return [state[0, :-1][torch.tensor(row.learned)[1:]] for state in out.hidden_states]


def _depth(asked: Sequence[int], least: int) -> int:
    """Layers of a model in which all these exist, and none is another one counted from the end."""
    return max([least, *(2 * abs(layer) for layer in asked)])
