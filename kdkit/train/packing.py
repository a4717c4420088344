"""Rows laid end to end instead of padded.

Documents of one packed row are kept apart by position ids that start again at 0: transformers builds the attention
mask from them when it gets no other mask. Not every architecture does, so :func:`isolates` asks the model itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from kdkit.api.data import TokenBatch

if TYPE_CHECKING:
    from torch import nn

    from kdkit.models.chat import Encoded

__all__ = ["isolates", "pack", "unpack"]

_ATTENTION: Final = 4096
"""Row length at which attention costs about as much as all other matrices: six hidden sizes, of a small model."""
_LEAK: Final = {torch.float64: 1e-9, torch.float32: 1e-3}
_LEAK_HALF: Final = 0.03
"""Relative difference from which hidden states count as others; half precision rounds by about a percent."""


def pack(rows: Sequence[Encoded], *, device: torch.device | str = "cpu") -> TokenBatch:
    """Lay rows end to end, in as many rows of equal width as cost the least; the result has no attention mask."""
    bins = _bins([len(row.ids) for row in rows])
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
    spans = [slice(a, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    spans = [span for span in spans if bool(learned[span].any())] or spans[:1]
    shape = (len(spans), max(span.stop - span.start for span in spans))
    new_ids, mask, positions = (torch.zeros(shape, dtype=torch.int64, device=ids.device) for _ in range(3))
    new_learned = torch.zeros(shape, dtype=torch.bool, device=ids.device)
    for index, span in enumerate(spans):
        length = span.stop - span.start
        new_ids[index, :length], new_learned[index, :length] = ids[span], learned[span]
        mask[index, :length] = 1
        positions[index, :length] = torch.arange(length, device=ids.device)
    return TokenBatch(new_ids, mask, positions, new_learned)


@torch.no_grad()
def isolates(trunk: nn.Module) -> bool:
    """Whether the trunk keeps the documents of packed rows apart, measured on two rows of two documents each."""
    embedding = trunk.get_input_embeddings().weight  # type: ignore[operator]
    rows, training = embedding.shape[0], trunk.training
    ids = (torch.arange(24, device=embedding.device) * 7 % rows).view(2, 12)
    positions = torch.tensor([*range(5), *range(7)], device=embedding.device).repeat(2, 1)
    trunk.eval()
    try:
        packed = _hidden(trunk, ids, positions)
        alone = torch.cat([_hidden(trunk, ids[:, a:b], positions[:, a:b]) for a, b in ((0, 5), (5, 12))], dim=1)
    except (TypeError, ValueError, RuntimeError):
        # An architecture that takes no position ids, or none that start again.
        return False
    finally:
        trunk.train(training)
    gap = (packed - alone).norm() / alone.norm()
    return bool(gap < _LEAK.get(embedding.dtype, _LEAK_HALF))


def _hidden(trunk: nn.Module, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = trunk(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    return hidden.double()


def _bins(lengths: Sequence[int]) -> list[list[int]]:
    """Places of the rows of every packed row: the number of rows whose padding and attention cost the least."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best: tuple[float, list[list[int]]] | None = None
    for count in range(1, len(lengths) + 1):
        bins: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for place in order:
            lightest = filled.index(min(filled))
            bins[lightest].append(place)
            filled[lightest] += lengths[place]
        width = max(filled)
        cost = count * width * (1 + width / _ATTENTION)
        if best is None or cost < best[0]:
            best = cost, bins
    if best is None:
        raise ValueError("nothing to pack")
    return best[1]
