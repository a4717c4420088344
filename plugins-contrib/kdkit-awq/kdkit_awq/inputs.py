"""What every group of layers reads: the mean size of each input, and the inputs of some tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdkit.api import ModelError

__all__ = ["Inputs", "watch_inputs"]


class Inputs:
    """Of one layer.

    Args:
        width: Size of an input.
        places: Which tokens are kept, counted over all rows, in order.
    """

    def __init__(self, width: int, places: Tensor) -> None:
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._places = places
        self._kept: list[Tensor] = []
        self._tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add the inputs [N, width] of the next tokens."""
        values = inputs.detach().float()
        self._sum += values.abs().sum(0).double().cpu()
        first, last = torch.searchsorted(self._places, torch.tensor([self._tokens, self._tokens + len(values)]))
        self._kept.append(values[(self._places[first:last] - self._tokens).to(values.device)].cpu())
        self._tokens += len(values)

    @property
    def size(self) -> Tensor:
        """[width] float32: the mean of the absolute value of each input."""
        return (self._sum / max(self._tokens, 1)).float()

    @property
    def sample(self) -> Tensor:
        """[n, width] float32: the inputs of the kept tokens."""
        return torch.cat(self._kept)


def watch_inputs(
    model: PreTrainedModel,
    readers: Mapping[str, nn.Linear],
    rows: Sequence[Tensor],
    *,
    keep: int,
    seed: int,
    bf16: bool,
    after_row: Callable[[], None],
) -> dict[str, Inputs]:
    """Run all rows and note what the layers ``readers`` read.

    Args:
        model: In evaluation mode.
        readers: Layers by name, one for each distinct input.
        rows: Calibration rows, each [T].
        keep: How many tokens to keep, drawn from all of them.
        seed: Of the draw.
        bf16: Multiply in bfloat16.
        after_row: Called after every row.

    Raises:
        ModelError: The inputs of a layer are not finite; its name is said.
    """
    total = sum(map(len, rows))
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    places = order[:keep].sort().values
    found = {name: Inputs(linear.in_features, places) for name, linear in readers.items()}
    hooks = [linear.register_forward_pre_hook(_adding(found[name])) for name, linear in readers.items()]
    try:
        for row in rows:
            with torch.no_grad(), torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
                model.base_model(input_ids=row.to(model.device).unsqueeze(0), use_cache=False)
            after_row()
    finally:
        for hook in hooks:
            hook.remove()
    for name, inputs in found.items():
        if not bool(inputs.size.isfinite().all()):
            raise ModelError("has inputs that are not finite on the calibration rows", where=name)
    return found


def _adding(inputs: Inputs) -> Callable[..., None]:
    return lambda _module, args: inputs.add(args[0].flatten(0, -2))
