"""Running one decoder block over the calibration rows as often as needed, and no more of it than needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from kdkit.plugins.quantizers.calls import Batch, Call, Enough, replaced
from kdkit.plugins.quantizers.hessian import Hessian

__all__ = ["BlockPass"]

KEPT_BYTES: Final = 2**30
"""Most memory for outputs of finished layers; what does not fit is computed again."""


class BlockPass:
    """A block, its inputs, and what its finished layers put out.

    Once layers are quantised, what they make of the same inputs does not change any more, nor does the output of a
    module all of whose layers are: it is kept for the later passes.

    Args:
        block: On its device.
        linears: Its layers that are quantised, by name.
        hidden: Hidden states [B, T, D] of every batch before the block.
        calls: How the block is called on every batch.
        batches: The batches, for their padding.
    """

    def __init__(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Linear],
        hidden: list[Tensor],
        calls: Sequence[Call],
        batches: Sequence[Batch],
    ) -> None:
        self._block, self._linears = block, linears
        self._hidden, self._calls, self._batches = hidden, calls, batches
        self._finished: set[nn.Module] = set()
        self._kept: dict[nn.Module, list[_Kept]] = {}
        self._changing: set[nn.Module] = set()
        self._at = 0

    def finish(self, names: Collection[str]) -> None:
        """These layers are quantised and stay as they are now."""
        self._finished.update(self._linears[name] for name in names)

    @torch.no_grad()
    def second_moments(self, names: Sequence[str]) -> dict[str, Hessian]:
        """Those of the inputs of these layers, over real tokens; the pass ends at the last of them."""
        sums: dict[str, Hessian] = {}
        waiting: set[str] = set()
        hooks = [self._linears[n].register_forward_pre_hook(self._adds(n, sums, waiting)) for n in names]
        try:
            with self._keeping():
                for index in range(len(self._batches)):
                    waiting.update(names)
                    with contextlib.suppress(Enough):
                        self._run(index)
        finally:
            for hook in hooks:
                hook.remove()
        return sums

    @torch.no_grad()
    def advance(self) -> None:
        """Replace the hidden states before the block by those after it."""
        with self._replaying():
            for index in range(len(self._batches)):
                self._hidden[index] = self._run(index)

    def _run(self, index: int) -> Tensor:
        self._at = index
        return self._calls[index].on(self._block, self._hidden[index])

    def _adds(self, name: str, sums: dict[str, Hessian], waiting: set[str]) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs, real = args[0].flatten(0, -2), self._batches[self._at].real
            moments = sums.setdefault(name, Hessian.like(inputs))
            moments.add(inputs if real is None else inputs[real])
            waiting.discard(name)
            if not waiting:
                raise Enough

        return hook

    @contextlib.contextmanager
    def _keeping(self) -> Iterator[None]:
        """Inside, finished modules do not work twice, and those that finished since the last pass are kept."""
        found: dict[nn.Module, list[_Kept]] = {}
        room = KEPT_BYTES - sum(kept.bytes for outputs in self._kept.values() for kept in outputs)

        def keep(module: nn.Module, _args: Any, output: Any) -> None:
            nonlocal room
            kept = _Kept.of(output)
            room -= kept.bytes
            if room >= 0:
                found.setdefault(module, []).append(kept)

        new = [module for module in self._whole() if module not in self._kept and module not in self._changing]
        hooks = [module.register_forward_hook(keep) for module in new]
        try:
            with self._replaying():
                yield
        finally:
            for hook in hooks:
                hook.remove()
        self._kept |= {module: outputs for module, outputs in found.items() if len(outputs) == len(self._batches)}
        # What is written to after it was put out differs from what the module put out.
        self._changing |= {m for m, outputs in self._kept.items() if not all(kept.unchanged() for kept in outputs)}
        inside = {child for module in self._kept for child in module.modules() if child is not module}
        self._kept = {m: outputs for m, outputs in self._kept.items() if m not in inside | self._changing}

    def _replaying(self) -> contextlib.AbstractContextManager[None]:
        return replaced({module: self._replay(outputs) for module, outputs in self._kept.items()})

    def _replay(self, outputs: Sequence[_Kept]) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: outputs[self._at].output

    def _whole(self) -> list[nn.Module]:
        """The largest modules inside the block with quantised layers only, of which there is at least one."""
        own = set(self._linears.values())
        whole: list[nn.Module] = []
        for module in self._block.modules():
            inside = own.intersection(module.modules())
            nested = any(module in outer.modules() for outer in whole)
            if module is not self._block and inside and inside <= self._finished and not nested:
                whole.append(module)
        return whole


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """What a module returned, the size of its tensors, and how often they had been written to by then."""

    output: Any
    bytes: int
    version: int

    @classmethod
    def of(cls, output: Any) -> _Kept:
        tensors = _tensors(output)
        return cls(output, sum(t.numel() * t.element_size() for t in tensors), sum(t._version for t in tensors))  # noqa: SLF001

    def unchanged(self) -> bool:
        """Whether nobody has written to the tensors since."""
        return self.version == _Kept.of(self.output).version


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [tensor for value in output for tensor in _tensors(value)] if isinstance(output, tuple | list) else []
