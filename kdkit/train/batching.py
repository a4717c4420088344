"""Which rows a step sees, and how they become padded tensors.

The rows of step s are a function of (seed, s): nothing has to be saved to resume, and how a step is cut into
micro-batches or spread over ranks cannot change what it learns from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import torch

from kdkit.api.data import TokenBatch

if TYPE_CHECKING:
    from kdkit.models.chat import Encoded

__all__ = ["DataOrder", "collate", "derived_rng", "micro_batches"]

_MIX_BLOCK: Final = 4096


def derived_rng(*parts: object) -> np.random.Generator:
    """A generator that follows from ``parts``, however often and in which order others are made."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


class DataOrder:
    """An endless, seeded order over one dataset or a weighted mixture of several.

    Each dataset is walked in a new permutation every epoch; in a mixture the dataset of every position is drawn with
    probability proportional to its weight.

    Args:
        sizes: Rows of each dataset, all positive.
        weights: Relative weight of each dataset.
        seed: Seed of the order.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.sizes = tuple(sizes)
        self._share = np.asarray(weights, dtype=np.float64) / float(np.sum(weights))
        self._seed = seed
        self._permutations: dict[tuple[int, int], np.ndarray] = {}
        self._drawn_before: list[np.ndarray] = [np.zeros(len(self.sizes), dtype=np.int64)]

    @property
    def rows(self) -> int:
        """Rows in one epoch: of all datasets together."""
        return sum(self.sizes)

    def rows_of_step(self, step: int, batch: int) -> list[tuple[int, int]]:
        """``batch`` pairs (dataset, row) of the step with index ``step`` (from 0)."""
        return [self._at(position) for position in range(step * batch, (step + 1) * batch)]

    def _at(self, position: int) -> tuple[int, int]:
        dataset, place = (0, position) if len(self.sizes) == 1 else self._draw(position)
        epoch, offset = divmod(place, self.sizes[dataset])
        return dataset, int(self._permutation(dataset, epoch)[offset])

    def _draw(self, position: int) -> tuple[int, int]:
        block, offset = divmod(position, _MIX_BLOCK)
        while len(self._drawn_before) <= block:
            last = len(self._drawn_before) - 1
            counts = np.bincount(self._choices(last), minlength=len(self.sizes))
            self._drawn_before.append(self._drawn_before[-1] + counts)
        choices = self._choices(block)
        dataset = int(choices[offset])
        return dataset, int(self._drawn_before[block][dataset] + np.count_nonzero(choices[:offset] == dataset))

    def _choices(self, block: int) -> np.ndarray:
        return derived_rng(self._seed, "mixture", block).choice(len(self.sizes), size=_MIX_BLOCK, p=self._share)

    def _permutation(self, dataset: int, epoch: int) -> np.ndarray:
        key = (dataset, epoch)
        if key not in self._permutations:
            # Two epochs of a dataset can meet in one step; older ones are never asked for again.
            self._permutations = {k: v for k, v in self._permutations.items() if k[0] != dataset or k[1] >= epoch - 1}
            self._permutations[key] = derived_rng(self._seed, "order", dataset, epoch).permutation(self.sizes[dataset])
        return self._permutations[key]


def micro_batches(rows: Sequence[Encoded], size: int) -> Iterator[list[Encoded]]:
    """Cut the rows of one optimiser step into micro-batches of similar length, longest first.

    Grouping by length saves padding; the step's sum does not depend on it.
    """
    ordered = sorted(rows, key=lambda row: (-len(row.ids), row.id))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def collate(
    rows: Sequence[Encoded],
    *,
    side: Literal["left", "right"] = "right",
    device: torch.device | str = "cpu",
) -> TokenBatch:
    """Pad rows to their longest. Masks come from lengths: the id that fills is an ordinary token inside a row."""
    width = max(len(row.ids) for row in rows)
    shape = (len(rows), width)
    # Padding is id 0, which every embedding has; a tokenizer's pad id may lie outside it.
    ids = np.zeros(shape, dtype=np.int64)
    real, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    learned = np.zeros(shape, dtype=bool)
    for index, row in enumerate(rows):
        length = len(row.ids)
        span = slice(0, length) if side == "right" else slice(width - length, width)
        ids[index, span] = row.ids
        real[index, span] = 1
        positions[index, span] = np.arange(length)
        learned[index, span] = row.learned
    # The first token of a row has no position to be predicted from, wherever the row starts.
    learned &= positions > 0
    tensors = (torch.from_numpy(array).to(device) for array in (ids, real, positions, learned))
    return TokenBatch(*tensors, example_ids=tuple(row.id for row in rows))
