"""Representation losses: hidden states of both models at the positions that predict the learned tokens.

Layers are counted as transformers does in ``output_hidden_states``: 0 is the embedding, i what layer i put out, and the
last one comes after the final norm. Only layers that a loss asked for are kept, and of these only the learned tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kdkit.api.data import RepresentationLossInputs
from kdkit.api.errors import ConformanceError, ModelError
from kdkit.api.hidden import HiddenTeacher
from kdkit.models.heads import split
from kdkit.models.prune import decoder
from kdkit.train.divergences import upcast

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kdkit.api.data import TokenBatch
    from kdkit.api.hidden import HiddenSignals
    from kdkit.api.protocols import RepresentationLoss
    from kdkit.train.objective import LossTerm, Measured

__all__ = [
    "HiddenStates",
    "Match",
    "add_matches",
    "layer_pairs",
    "matched",
    "student_layers",
    "teacher_layers",
]

_PROBE_TOKENS: Final = 8
_BLOCK_BYTES: Final = 2**28
"""Memory for one block of hidden states in float32 and what a distance keeps of them."""
_COPIES: Final = 4
"""Tensors of a block's size that are alive at once: both states, their difference and its gradient."""


class HiddenStates:
    """The hidden states of a model that can be asked for.

    Args:
        model: A causal language model with one list of decoder layers.

    Attributes:
        sizes: Width of each, the embedding first; measured on 8 tokens.

    Raises:
        ModelError: The layers cannot be found, or do not read hidden states of tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        trunk, depth = split(model).trunk, model.config.get_text_config().num_hidden_layers
        owner, name = decoder(cast("PreTrainedModel", trunk), depth)
        self._layers: nn.ModuleList = getattr(owner, name)
        self.sizes = self._measured(model, trunk)

    @contextmanager
    def keep(self, layers: Collection[int]) -> Iterator[dict[int, Tensor]]:
        """Collects [B, T, D] of these layers from the passes inside; the last one is what the pass itself returns."""
        kept: dict[int, Tensor] = {}

        def hook(index: int) -> Callable[..., None]:
            # It computes nothing: a checkpointed layer runs again in the backward pass, without the hook.
            def before(_layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
                kept[index] = args[0] if args else kwargs["hidden_states"]

            return before

        wanted = [index for index in layers if index < len(self._layers)]
        handles = [self._layers[index].register_forward_pre_hook(hook(index), with_kwargs=True) for index in wanted]
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()

    def of_tokens(
        self, kept: Mapping[int, Tensor], last: Tensor, batch: TokenBatch, layers: Sequence[int]
    ) -> dict[int, Tensor]:
        """[N, D] of each layer, row-major as ``kdkit.train.objective.valid_hidden``, whose result is ``last``."""
        learned = batch.labels_mask[:, 1:]
        return {i: kept[i][:, :-1][learned] if i < len(self._layers) else last for i in layers}

    @torch.no_grad()
    def _measured(self, model: PreTrainedModel, trunk: nn.Module) -> tuple[int, ...]:
        training = model.training
        model.eval()
        ids = (torch.arange(_PROBE_TOKENS, device=model.device) % model.config.get_text_config().vocab_size)[None]
        depth = len(self._layers)
        try:
            with self.keep(range(depth)) as kept:
                last = trunk(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            model.train(training)
        states = [kept.get(index) for index in range(depth)] + [last]
        for index, state in enumerate(states):
            if state is None or state.ndim != 3 or state.shape[:2] != (1, _PROBE_TOKENS):
                raise ModelError(
                    f"has no hidden states of tokens at layer {index}",
                    where=type(model).__name__,
                    hint="representation losses need layers that hand one state per token to the next one",
                )
        return tuple(int(state.shape[2]) for state in states if state is not None)


def layer_pairs(asked: Sequence[tuple[int, int]], student: int, teacher: int, *, where: str) -> list[tuple[int, int]]:
    """Pairs of layers, counted from 0.

    Args:
        asked: Those of the loss, negative ones counted from the end. None: layer i of the student with layer
            i * teacher / student of the teacher, rounded, for i from 1 on (Jiao et al. 2020, TinyBERT: the uniform
            strategy; its depths divide each other).
        student: Layers of the student; it has one hidden state more.
        teacher: Layers of the teacher.
        where: For errors.

    Raises:
        ModelError: A model has no such layer, or a pair appears twice.
    """
    if not asked:
        return [(i, (2 * i * teacher + student) // (2 * student)) for i in range(1, student + 1)]
    pairs = [(_layer(s, student, "student", where), _layer(t, teacher, "teacher", where)) for s, t in asked]
    for index, pair in enumerate(pairs):
        if pair in pairs[:index]:
            raise ModelError(f"the pair of layers {list(pair)} appears twice", where=where)
    return pairs


def _layer(asked: int, depth: int, whose: str, where: str) -> int:
    if not -depth - 1 <= asked <= depth:
        raise ModelError(
            f"the {whose} has no layer {asked}",
            where=where,
            allowed=f"0 (the embedding) to {depth} (the last), or -1 (the last) to {-depth - 1}",
        )
    return asked % (depth + 1)


class Match(nn.Module):
    """A representation loss with its layers in both models and its projectors, which are trained with the student.

    Args:
        loss: The loss.
        student: Widths of the student's hidden states.
        teacher: Widths of the teacher's.
        seed: Projectors start from it.
        name: The loss's name, for errors.
        block: Tokens at once; chosen from the widths by default.

    Raises:
        ModelError: A layer does not exist, or the loss cannot compare two widths.
    """

    def __init__(
        self,
        loss: RepresentationLoss,
        student: Sequence[int],
        teacher: Sequence[int],
        *,
        seed: int,
        name: str,
        block: int | None = None,
    ) -> None:
        super().__init__()
        self.loss, self.name = loss, name
        self.pairs = layer_pairs(loss.layers, len(student) - 1, len(teacher) - 1, where=f"loss {name}")
        self._widths = [(student[s], teacher[t]) for s, t in self.pairs]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = [loss.projector(*widths) for widths in self._widths]
        self.projectors = nn.ModuleList(nn.Identity() if module is None else module for module in made)
        room = _BLOCK_BYTES // (4 * _COPIES * sum(sum(widths) for widths in self._widths))
        self._block = block or max(16, min(4096, room))

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        weights: Tensor | None,
        compute: torch.dtype | None,
    ) -> Tensor:
        """Scalar sum over the N tokens, in float32 at least.

        Args:
            student: [N, D] of every pair, with gradient.
            teacher: [N, D] of every pair.
            weights: [N] factors of the tokens; None when all are 1.
            compute: Half precision of the projectors' matrix products; None or another one: that of their parameters.
        """
        self._check(student, teacher)
        spans = range(0, int(student[0].shape[0]), self._block)
        total = torch.stack([upcast(state[:0]).sum() for state in student]).sum()
        for start in spans:
            part = slice(start, start + self._block)
            factors = None if weights is None else weights[part]
            states = [state[part] for state in (*student, *teacher)]
            if torch.is_grad_enabled():
                # Made again in the backward pass: what a distance keeps of all layers would be many times the states.
                total = total + checkpoint(self._sum, factors, compute, *states, use_reentrant=False)
            else:
                total = total + self._sum(factors, compute, *states)
        return total

    def _sum(self, weights: Tensor | None, compute: torch.dtype | None, *states: Tensor) -> Tensor:
        own, its = states[: len(self.pairs)], states[len(self.pairs) :]
        half = compute in {torch.bfloat16, torch.float16}
        with torch.autocast(own[0].device.type, compute, enabled=half):
            projected = [project(state) for project, state in zip(self.projectors, own, strict=True)]
        with torch.autocast(own[0].device.type, enabled=False):
            values = self.loss(
                RepresentationLossInputs(
                    tuple(upcast(state) for state in projected), tuple(upcast(state.detach()) for state in its)
                )
            )
            if values.shape != own[0].shape[:1]:
                raise ConformanceError(
                    f"a representation loss returns one value per token {tuple(own[0].shape[:1])}, "
                    f"got {tuple(values.shape)}",
                    where=f"loss {self.name}",
                )
            return values.sum() if weights is None else (weights.to(values) * values).sum()

    def _check(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        for (mine, its), own, other in zip(self._widths, student, teacher, strict=True):
            if own.shape[1:] != (mine,) or other.shape != (own.shape[0], its):
                raise ConformanceError(
                    f"hidden states of {tuple(own.shape)} and {tuple(other.shape)} instead of widths {mine} and {its}",
                    where=f"loss {self.name}",
                )


def matched(
    terms: Sequence[LossTerm], model: PreTrainedModel, teacher: Any, *, seed_for: Callable[[str], int]
) -> list[LossTerm]:
    """The terms, representation losses among them with their layers and projectors.

    Args:
        terms: Weighted losses.
        model: The student.
        teacher: The teacher.
        seed_for: A seed for a purpose.

    Raises:
        ModelError: The teacher has no hidden states, a layer does not exist, or widths cannot be compared.
    """
    if all(term.kind != "representation" for term in terms):
        return list(terms)
    if not isinstance(teacher, HiddenTeacher):
        raise ModelError("the teacher gives no hidden states", hint="representation losses need the teacher 'local'")
    own = HiddenStates(model).sizes
    return [
        replace(
            term,
            match=Match(
                cast("RepresentationLoss", term.loss),
                own,
                teacher.hidden_sizes,
                seed=seed_for(f"projectors of {term.name}"),
                name=term.name,
            ),
        )
        if term.kind == "representation"
        else term
        for term in terms
    ]


def student_layers(terms: Sequence[LossTerm]) -> list[int]:
    """Layers of the student that the terms compare, each once."""
    return sorted({s for term in terms if term.match is not None for s, _ in term.match.pairs})


def teacher_layers(terms: Sequence[LossTerm]) -> list[int]:
    """Layers of the teacher that the terms compare, each once."""
    return sorted({t for term in terms if term.match is not None for _, t in term.match.pairs})


def add_matches(
    measured: Measured,
    terms: Sequence[LossTerm],
    states: Mapping[int, Tensor],
    signals: Any,
    scale: float,
    *,
    weights: Tensor | None,
    compute: torch.dtype | None,
) -> Measured:
    """``measured`` with the values of the representation losses.

    Args:
        measured: What the other losses gave, zero for these.
        terms: The losses.
        states: [N, D] of every layer of the student that they compare.
        signals: The teacher's view of the same tokens.
        scale: As in :class:`kdkit.train.objective.CausalObjective`.
        weights: [N] factors of the tokens; None when all are 1.
        compute: Dtype of matrix products.

    Raises:
        ConformanceError: The signals have no hidden states.
    """
    loss, sums = measured.loss, measured.sums.clone()
    for index, term in enumerate(terms):
        if term.match is None:
            continue
        if not hasattr(signals, "hidden"):
            raise ConformanceError("a representation loss needs the teacher's hidden states", where=f"loss {term.name}")
        given = cast("HiddenSignals", signals).hidden([t for _, t in term.match.pairs])
        value = term.match([states[s] for s, _ in term.match.pairs], given, weights, compute)
        loss = loss + term.weight * scale * value
        sums[index] = value.detach()
    return replace(measured, loss=loss, sums=sums)
