"""Rows laid end to end instead of padded.

Documents of one packed row are kept apart by position ids that start again at 0: transformers builds the attention
mask from them when it gets no other mask. Not every architecture does, so :func:`isolates` asks the model itself.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import nn

from kdkit.api.data import TokenBatch

if TYPE_CHECKING:
    from kdkit.models.chat import Encoded

__all__ = ["isolates", "pack", "unpack"]

_ATTENTION: Final = 4096
"""Row length at which attention costs about as much as all other matrices: six hidden sizes, of a small model."""
_LEAK: Final = {torch.float64: 1e-6, torch.float32: 1e-6}
_LEAK_HALF: Final = 5e-4
"""Change of a document relative to the change of its neighbour that caused it. Measured: exactly 0 for models that keep
documents apart (up to 3e-8 with routed experts), from 1.7e-4 in float32 and 1.8e-3 in bf16 for models that do not."""
_SMALL: Final = 16


def pack(rows: Sequence[Encoded], *, limit: int | None = None, device: torch.device | str = "cpu") -> TokenBatch:
    """Lay rows end to end, in as many rows of equal width as cost the least; the result has no attention mask.

    Args:
        rows: Encoded rows, each with a learned token.
        limit: Width that packed rows do not exceed, unless a single row does.
        device: Where the batch goes.
    """
    bins = _bins([len(row.ids) for row in rows], limit)
    width = max(sum(len(rows[i].ids) for i in places) for places in bins)
    shape = (len(bins), width)
    # What is left of a row is filled with documents of one token, which nothing is learned from.
    ids, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    learned = np.zeros(shape, dtype=bool)
    for index, places in enumerate(bins):
        start = 0
        for place in places:
            row = rows[place]
            span = slice(start, start + len(row.ids))
            ids[index, span], positions[index, span] = row.ids, np.arange(len(row.ids))
            learned[index, span] = row.learned
            start = span.stop
    # The first token of a document has no position to be predicted from; its neighbour belongs to another document.
    learned &= positions > 0
    tensors = [torch.from_numpy(array).to(device) for array in (ids, positions, learned)]
    order = tuple(rows[place].id for places in bins for place in places)
    return TokenBatch(tensors[0], None, tensors[1], tensors[2], example_ids=order)


def unpack(batch: TokenBatch) -> TokenBatch:
    """One row per document, padded on the right, in the order of the packed batch: its learned tokens stay in order.

    Documents without a learned token are left out; a batch that is not packed is returned as it is.
    """
    if batch.attention_mask is not None:
        return batch
    starts = (batch.position_ids == 0).flatten().nonzero()[:, 0]
    ends = torch.cat([starts[1:], starts.new_tensor([batch.position_ids.numel()])])
    ids, learned = batch.input_ids.flatten(), batch.labels_mask.flatten()
    counts = torch.cat([learned.new_zeros(1, dtype=torch.int64), learned.cumsum(0)])
    targets = (counts[ends] - counts[starts]).tolist()
    every = [slice(a, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    spans = [span for span, count in zip(every, targets, strict=True) if count] or every[:1]
    shape = (len(spans), max(span.stop - span.start for span in spans))
    new_ids, mask, positions = (torch.zeros(shape, dtype=torch.int64, device=ids.device) for _ in range(3))
    new_learned = torch.zeros(shape, dtype=torch.bool, device=ids.device)
    for index, span in enumerate(spans):
        length = span.stop - span.start
        new_ids[index, :length], new_learned[index, :length] = ids[span], learned[span]
        mask[index, :length] = 1
        positions[index, :length] = torch.arange(length, device=ids.device)
    names = batch.example_ids if len(batch.example_ids) == len(spans) else ()
    return TokenBatch(new_ids, mask, positions, new_learned, example_ids=names)


@torch.no_grad()
def isolates(trunk: nn.Module) -> bool:
    """Whether the trunk keeps the documents of packed rows apart.

    Measured on two rows of two documents each: another first document must not change the second one. What weights
    that are close to zero hide today, training can bring out, so convolutions over tokens and layers that are no
    attention count as not keeping apart.
    """
    if _mixes_by_design(trunk):
        return False
    embedding = trunk.get_input_embeddings().weight  # type: ignore[operator]
    ids = (torch.arange(24, device=embedding.device) * 7 % embedding.shape[0]).view(2, 12)
    other = ids.clone()
    other[:, :5] = (other[:, :5] + 3) % embedding.shape[0]
    positions = torch.tensor([*range(5), *range(7)], device=embedding.device).repeat(2, 1)
    modes = [(module, module.training) for module in trunk.modules()]
    trunk.eval()
    try:
        change = (_hidden(trunk, ids, positions) - _hidden(trunk, other, positions)).norm(dim=(0, 2))
        alone = _hidden(trunk, ids[:, 5:], positions[:, 5:])
        gap = (_hidden(trunk, ids, positions)[:, 5:] - alone).norm() / alone.norm()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError):
        # An architecture that takes no position ids, or none that start again.
        return False
    finally:
        for module, mode in modes:
            module.training = mode
    leak = change[5:].norm() / change[:5].norm()
    # The gap also sees positions that do not start again; it rounds, as the two ways multiply other shapes.
    return bool(leak < _LEAK.get(embedding.dtype, _LEAK_HALF)) and bool(gap < 0.1)


def _mixes_by_design(trunk: nn.Module) -> bool:
    kinds = set(getattr(getattr(trunk, "config", None), "layer_types", None) or ())
    if any(not kind.endswith("attention") or kind.startswith("linear") for kind in kinds):
        return True
    return any(isinstance(module, nn.Conv1d) for module in trunk.modules())


def _hidden(trunk: nn.Module, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = trunk(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    return hidden.double()


def _bins(lengths: Sequence[int], limit: int | None = None) -> list[list[int]]:
    """Places of the rows of every packed row: the number of rows whose padding and attention cost the least."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    longest = lengths[order[0]]
    best: tuple[float, list[list[int]]] | None = None
    for count in _counts(len(lengths)):
        if best is not None and _cost(count, longest) >= best[0]:
            break
        bins, width = _balanced(lengths, order, count)
        if limit is not None and width > max(limit, longest):
            continue
        if best is None or _cost(count, width) < best[0]:
            best = _cost(count, width), bins
    # One row each is always tried before the loop can end without a layout.
    return best[1] if best is not None else [[place] for place in order]


def _counts(rows: int) -> list[int]:
    """Numbers of packed rows worth trying: all small ones, then doublings, and one row each."""
    doubled = [_SMALL << power for power in range(1, rows.bit_length()) if _SMALL << power < rows]
    return [*range(1, min(rows, _SMALL) + 1), *doubled, *([rows] if rows > _SMALL else [])]


def _cost(count: int, width: int) -> float:
    return count * width * (1 + width / _ATTENTION)


def _balanced(lengths: Sequence[int], order: Sequence[int], count: int) -> tuple[list[list[int]], int]:
    """The longest row first, each into the lightest bin; the places of every bin, and the largest one's width."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, index) for index in range(count)]
    for place in order:
        filled, index = heapq.heappop(heap)
        bins[index].append(place)
        heapq.heappush(heap, (filled + lengths[place], index))
    return bins, max(heap)[0]
