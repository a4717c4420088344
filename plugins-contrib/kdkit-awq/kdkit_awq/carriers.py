"""What can divide the inputs of a layer by a scale for nothing: the norm or the linear layer that makes them.

Nothing here knows an architecture. A candidate is tried: its outputs are divided by random factors, the columns of the
layers that are said to read them multiplied by the same, and the block has to put out what it did before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdkit.api import ModelError

__all__ = ["Carrier", "Group", "groups_of"]

_PROBE: Final = 8
_EXACT: Final = 1e-4
_SMALLEST: Final = 2.0**-14
"""Smallest normal float16."""


@dataclass(frozen=True, slots=True, eq=False)
class Carrier:
    """A module whose outputs can be divided by a scale.

    Attributes:
        name: As in ``named_modules``.
        module: With a weight and perhaps a bias.
        form: ``rows`` of a linear layer's weight, the ``factor`` of a norm, or its factor less one (``offset``).
    """

    name: str
    module: nn.Module
    form: Literal["rows", "factor", "offset"]

    def exact(self, scale: Tensor) -> Tensor:
        """The scale [width] nearby by which it can be divided without rounding, since norms are stored as float16.

        1 where nothing else would do: a factor of 0, or one that has no float16.
        """
        if self.form == "rows":
            return scale
        one = 1.0 if self.form == "offset" else 0.0
        factor = self.module.weight.detach().float() + one
        stored = (factor / scale - one).half().float() + one
        usable = (factor != 0) & stored.isfinite() & (stored.abs() >= _SMALLEST)
        found = torch.where(usable, factor / stored, torch.ones_like(scale))
        # Far away means that the rounding took over.
        return torch.where(((found / scale).log2().abs() < 0.1) & usable, found, torch.ones_like(scale))

    def divided(self, scale: Tensor) -> dict[str, Tensor]:
        """Its parameters by their own names, after its outputs were divided by ``scale`` [width]; in float32."""
        weight = self.module.weight.detach().float()
        if self.form == "rows":
            found = {"weight": weight / scale.unsqueeze(1)}
        elif self.form == "offset":
            found = {"weight": (weight + 1) / scale - 1}
        else:
            found = {"weight": weight / scale}
        bias = getattr(self.module, "bias", None)
        return found if bias is None else {**found, "bias": bias.detach().float() / scale}


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Linear layers of a block that read the same input, and what can scale it, if anything can."""

    names: tuple[str, ...]
    carrier: Carrier | None


def groups_of(
    model: PreTrainedModel,
    blocks: Sequence[tuple[str, nn.Module]],
    linears: Mapping[str, nn.Linear],
    stored: Collection[str],
) -> list[list[Group]]:
    """The groups of every block, in the order in which they work.

    Args:
        model: In float32 and evaluation mode.
        blocks: Names and decoder blocks, in order.
        linears: Their linear layers by name.
        stored: Names of the tensors in the model's files; what has another name there cannot be a carrier.

    Raises:
        ModelError: A layer is not called exactly once for every token, as experts are not.
    """
    calls = _watch(model, blocks, linears)
    found: list[list[Group]] = []
    # Blocks are alike: what carries in one of them is tried first in the next, what nothing carries is left.
    known: dict[tuple[str, ...], str | None] = {}
    for (prefix, block), call in zip(blocks, calls, strict=True):
        groups = []
        for names in call.groups:
            key = tuple(name.removeprefix(prefix) for name in names)
            width = linears[names[0]].in_features
            candidates = [c for c in _candidates(prefix, block, width, stored) if c.name not in names]
            if key in known:
                candidates = [c for c in candidates if c.name.removeprefix(prefix) == known[key]]
            readers = [linears[name] for name in names]
            carrier = next((c for c in candidates if call.unchanged(block, c, readers)), None)
            known.setdefault(key, None if carrier is None else carrier.name.removeprefix(prefix))
            groups.append(Group(names, carrier))
        found.append(groups)
    return found


def _candidates(prefix: str, block: nn.Module, width: int, stored: Collection[str]) -> Iterator[Carrier]:
    """Modules of the block that put out ``width`` values, in its order."""
    for path, module in block.named_modules():
        name = f"{prefix}.{path}"
        own = dict(module.named_parameters(recurse=False))
        known = all(f"{name}.{key}" in stored for key in own)
        if not own or not set(own) <= {"weight", "bias"} or not known or len(own.get("weight", ())) != width:
            continue
        if type(module) is nn.Linear:
            yield Carrier(name, module, "rows")
        elif own["weight"].dim() == 1:
            yield Carrier(name, module, "factor")
            yield Carrier(name, module, "offset")


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """How a block was called on a few tokens, what it put out, and which of its layers read the same input."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor
    groups: tuple[tuple[str, ...], ...]

    def unchanged(self, block: nn.Module, carrier: Carrier, readers: Sequence[nn.Linear]) -> bool:
        """Whether the block does the same with a scale between ``carrier`` and ``readers``."""
        width = readers[0].in_features
        scale = torch.linspace(0.5, 2.0, width, device=self.output.device)
        scale = scale[torch.randperm(width, generator=torch.Generator().manual_seed(width)).to(scale.device)]
        before = {(module, key): value.data for module in (carrier.module, *readers) for key, value in _own(module)}
        try:
            for key, value in carrier.divided(scale).items():
                getattr(carrier.module, key).data = value
            for reader in readers:
                reader.weight.data = reader.weight.data * scale
            with torch.no_grad():
                got = _hidden(block(*self.args, **self.kwargs))
        finally:
            for (module, key), value in before.items():
                getattr(module, key).data = value
        return bool((got - self.output).norm() <= _EXACT * self.output.norm())


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False))


def _watch(
    model: PreTrainedModel, blocks: Sequence[tuple[str, nn.Module]], linears: Mapping[str, nn.Linear]
) -> list[_Call]:
    rows = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(_PROBE, device=model.device) % rows).unsqueeze(0)
    made: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}
    # The inputs are kept until the end, so that two of them cannot have the same id.
    seen: list[tuple[str, Tensor]] = []

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        made[module] = (args, kwargs, _hidden(output))

    with _hooked() as hooks:
        hooks += [block.register_forward_hook(called, with_kwargs=True) for _, block in blocks]
        hooks += [linear.register_forward_pre_hook(_noting(name, seen)) for name, linear in linears.items()]
        with torch.no_grad():
            model.base_model(input_ids=ids, use_cache=False)
    calls = []
    for prefix, block in blocks:
        names = [name for name in linears if name.startswith(f"{prefix}.")]
        # First, because a block that was not called has layers that were not.
        groups = _shared(names, [(name, inputs) for name, inputs in seen if name in names])
        calls.append(_Call(*made[block], groups=groups))
    return calls


def _noting(name: str, seen: list[tuple[str, Tensor]]) -> Callable[..., None]:
    return lambda _module, args: seen.append((name, args[0]))


@contextmanager
def _hooked() -> Iterator[list[Any]]:
    hooks: list[Any] = []
    try:
        yield hooks
    finally:
        for hook in hooks:
            hook.remove()


def _shared(names: Sequence[str], seen: Sequence[tuple[str, Tensor]]) -> tuple[tuple[str, ...], ...]:
    """Names by the input that they read, told apart by being another object."""
    called = Counter(name for name, _ in seen)
    partly = {name for name, inputs in seen if inputs.numel() != _PROBE * inputs.shape[-1]}
    for name in names:
        if called[name] != 1 or name in partly:
            raise ModelError(
                f"does not see every token exactly once (called {called[name]} times) and cannot be quantised",
                where=name,
                allowed="layers that every token goes through; experts are none",
            )
    groups: dict[int, list[str]] = {}
    for name, inputs in seen:
        groups.setdefault(id(inputs), []).append(name)
    return tuple(tuple(group) for group in groups.values())


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
