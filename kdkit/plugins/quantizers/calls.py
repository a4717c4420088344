"""How a model calls its decoder blocks, found by watching it: which arguments a block gets besides the hidden states,
and which of its linear layers read the same input. Nothing here knows an architecture.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdkit.api.errors import ModelError

__all__ = ["Batch", "Call", "Enough", "Plan", "batches", "head_inputs", "hidden_of", "plan_of", "replaced", "trace"]

BATCH_TOKENS: Final = 2048
"""Tokens of a forward pass, unless a single row has more."""
_PROBE: Final = 8
_TOLERANCE: Final = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Calibration rows, padded on the right with id 0, which no real token can see.

    Attributes:
        ids: [B, T] token ids.
        real: [B * T] bool, False where padded; None when nothing is.
    """

    ids: Tensor
    real: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The arguments of a block on a batch, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def on(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """What ``block`` makes of hidden states [B, T, D]."""
        if "hidden_states" in self.kwargs:
            return hidden_of(block(*self.args, **{**self.kwargs, "hidden_states": hidden}))
        return hidden_of(block(hidden, *self.args, **self.kwargs))


@dataclass(frozen=True, slots=True)
class Plan:
    """The linear layers of a block, in the order in which they work.

    Attributes:
        groups: Names of layers that read the same input, for every input.
        outputs: How many values the block returns; 0 when it is one tensor instead of a tuple.
    """

    groups: tuple[tuple[str, ...], ...]
    outputs: int


def batches(rows: Sequence[Sequence[int]], device: torch.device | str) -> list[Batch]:
    """All rows, those of similar length together."""
    ordered = sorted(rows, key=len, reverse=True)
    result, start = [], 0
    while start < len(ordered):
        width = len(ordered[start])
        part = ordered[start : start + max(1, BATCH_TOKENS // width)]
        ids, real = torch.zeros(len(part), width, dtype=torch.int64), torch.zeros(len(part), width, dtype=torch.bool)
        for index, row in enumerate(part):
            ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
            real[index, : len(row)] = True
        whole = bool(real.all())
        result.append(Batch(ids.to(device), None if whole else real.flatten().to(device)))
        start += len(part)
    return result


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returned."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


class Enough(Exception):
    """Ends a forward pass that has shown what it was for."""


@torch.no_grad()
def trace(
    model: PreTrainedModel, blocks: Sequence[nn.Module], plans: Sequence[Plan], ids: Tensor
) -> tuple[Tensor, list[Call]]:
    """The hidden states [B, T, D] before the first block, and how every block is called, without running any block."""
    calls: list[Call] = []
    first: list[Tensor] = []

    def stand_in(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = _split(args, kwargs)
            first.append(hidden)
            calls.append(call)
            if index == len(blocks) - 1:
                raise Enough
            return _as_returned(hidden, plans[index].outputs)

        return forward

    stand_ins = {block: stand_in(index) for index, block in enumerate(blocks)}
    with replaced(stand_ins), contextlib.suppress(Enough):
        model.base_model(input_ids=ids, use_cache=False)
    return first[0], calls


@torch.no_grad()
def head_inputs(
    model: PreTrainedModel,
    head: nn.Module,
    blocks: Sequence[nn.Module],
    plans: Sequence[Plan],
    ids: Tensor,
    hidden: Tensor,
) -> Tensor:
    """What the output projection ``head`` reads when the last block puts out ``hidden`` [B, T, D]; no block is run."""
    found: list[Tensor] = []

    def reached(_module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise Enough

    hook = head.register_forward_pre_hook(reached)
    stand_ins = {
        block: (lambda *_args, _count=plan.outputs, **_kwargs: _as_returned(hidden, _count))
        for block, plan in zip(blocks, plans, strict=True)
    }
    try:
        with replaced(stand_ins), contextlib.suppress(Enough):
            model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    return found[0]


def _as_returned(hidden: Tensor, outputs: int) -> Any:
    """Hidden states in the form in which a block returns them."""
    return (hidden, *(None for _ in range(outputs - 1))) if outputs else hidden


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"], Call(args, {**kwargs, "hidden_states": None})
    return args[0], Call(args[1:], kwargs)


@contextlib.contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules do something else than they do."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


@torch.no_grad()
def plan_of(
    model: PreTrainedModel, blocks: Sequence[tuple[str, nn.Module]], linears: Mapping[str, nn.Linear]
) -> list[Plan]:
    """Watch the model on a few tokens.

    Args:
        model: In evaluation mode, in the memory of the host.
        blocks: Names and decoder blocks, in order.
        linears: The layers that are quantised, by name; those outside of the blocks are passed over.

    Raises:
        ModelError: A layer is not called exactly once for every token, as experts are not; or a block depends on more
            than the hidden states that the one before it hands over.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(_PROBE) % rows).unsqueeze(0)
    seen: list[tuple[str, Tensor]] = []
    outputs: list[Any] = []
    hooks = [module.register_forward_pre_hook(_note(name, seen)) for name, module in linears.items()]
    hooks += [block.register_forward_hook(lambda _m, _args, output: outputs.append(output)) for _, block in blocks]
    try:
        model.base_model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if len(outputs) != len(blocks):
        raise _unsupported(model)
    plans = []
    for (prefix, _), output in zip(blocks, outputs, strict=True):
        names = [name for name in linears if name.startswith(f"{prefix}.")]
        events = [(name, inputs) for name, inputs in seen if name.startswith(f"{prefix}.")]
        plans.append(Plan(_groups(names, events), len(output) if isinstance(output, tuple) else 0))
    _verify(model, [block for _, block in blocks], plans, ids, hidden_of(outputs[-1]))
    return plans


def _note(name: str, seen: list[tuple[str, Tensor]]) -> Callable[..., None]:
    return lambda _module, args: seen.append((name, args[0]))


def _groups(names: Sequence[str], events: Sequence[tuple[str, Tensor]]) -> tuple[tuple[str, ...], ...]:
    """Names by the input they read, in the order of their calls; inputs are told apart by being other objects."""
    called = Counter(name for name, _ in events)
    for name in names:
        whole = all(inputs.numel() == _PROBE * inputs.shape[-1] for other, inputs in events if other == name)
        if called[name] != 1 or not whole:
            raise ModelError(
                f"does not see every token exactly once (called {called[name]} times) and cannot be quantised",
                where=name,
                allowed="layers that every token goes through; experts are none",
            )
    groups: dict[int, list[str]] = {}
    for name, inputs in events:
        groups.setdefault(id(inputs), []).append(name)
    return tuple(tuple(group) for group in groups.values())


def _verify(
    model: PreTrainedModel, blocks: Sequence[nn.Module], plans: Sequence[Plan], ids: Tensor, want: Tensor
) -> None:
    """Check that blocks run one after another give what the model gives; values that are not finite tell nothing."""
    if not bool(want.isfinite().all()):
        return
    try:
        hidden, calls = trace(model, blocks, plans, ids)
        for block, call in zip(blocks, calls, strict=True):
            hidden = call.on(block, hidden)
        gap = float((hidden.float() - want.float()).norm() / want.float().norm().clamp_min(1e-30))
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise _unsupported(model) from error
    if not gap <= _TOLERANCE:
        raise _unsupported(model)


def _unsupported(model: PreTrainedModel) -> ModelError:
    return ModelError(
        "cannot be quantised block by block: a block depends on more than the hidden states of the one before",
        where=type(model).__name__,
    )
