"""The rollouts of an iteration, learned from for several epochs and kept in checkpoints.

Which rollouts a step sees is arithmetic: a step belongs to an iteration, to an epoch over its rollouts, and to a batch
of that epoch. Only the rollouts themselves are state: the policy that sampled them is gone when they are learned from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdkit.api.errors import StageError
from kdkit.train.batching import derived_rng
from kdkit.train.checkpoint import State
from kdkit.train.policy.rows import OPTIONAL, KeptIds, PolicyRow, all_have

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.models.chat import Encoded
    from kdkit.train.streams import Share

__all__ = ["RolloutBuffer"]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a step is: ``first`` is the place of its first row among the rows of the epoch."""

    iteration: int
    epoch: int
    first: int


class RolloutBuffer:
    """A source of rows (``kdkit.train.streams.RowSource``) that are sampled an iteration at a time.

    Args:
        make: Samples the rollouts of the iteration with this index (from 0) with the student as it is then: on every
            rank all of ``num_rollouts``, the same ones in the same order.
        num_rollouts: Rollouts of an iteration on all ranks, a multiple of the rows of a step.
        ppo_epochs: How often each is learned from.
        seed: Seed of their order.
        per_pass: Rollouts of one pass over the prompts, from which the length of an epoch of the training follows.
        facts: What there is to log about the rollouts made since it was last called, beside the time they took.
    """

    def __init__(
        self,
        make: Callable[[int], Sequence[PolicyRow]],
        *,
        num_rollouts: int,
        ppo_epochs: int,
        seed: int,
        per_pass: int,
        facts: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self._make, self._num_rollouts, self._ppo_epochs = make, num_rollouts, ppo_epochs
        self._seed, self._per_pass, self._facts = seed, per_pass, facts
        self._held: int | None = None
        self._rollouts: list[PolicyRow] = []
        self._seconds = 0.0

    @property
    def size(self) -> int:
        """Rows learned in one pass over the prompts."""
        return self._per_pass * self._ppo_epochs

    def rows(self, step: int, share: Share, /) -> list[Encoded]:
        """This rank's rollouts of a step. They are made when the step is the first of its iteration.

        Raises:
            StageError: An iteration is no multiple of the step's rows, or ``make`` gave another number of rollouts.
        """
        place = self._place(step, share)
        if self._held != place.iteration:
            started = time.monotonic()
            self._hold(place.iteration, self._make(place.iteration))
            self._seconds += time.monotonic() - started
        order = derived_rng(self._seed, "rollouts", place.iteration, place.epoch).permutation(self._num_rollouts)
        return [self._rollouts[order[place.first + row]] for row in share.places]

    def metrics(self, _all_ranks: Callable[[int], int], /) -> dict[str, float]:
        """Seconds spent on making rollouts since the last call, and what else there is to say about them."""
        seconds, self._seconds = self._seconds, 0.0
        return {"rollout_s": seconds, **self._facts()}

    def state(self, step: int, share: Share, /) -> State | None:
        """The rollouts, unless the iteration ends before ``step``: the next one's are made from the weights then."""
        if self._held != self._place(step, share).iteration:
            return None
        return State(_as_tensors(self._rollouts), {"iteration": self._held, "ids": [row.id for row in self._rollouts]})

    def restore(self, state: State | None, step: int, share: Share, /) -> None:
        """Take back the rollouts of the iteration that ``step`` is in the middle of.

        Raises:
            StageError: There are none, or they are those of another iteration.
        """
        place = self._place(step, share)
        held = None if state is None else state.facts["iteration"]
        if held is None and not place.epoch and not place.first:
            return
        if state is None or held != place.iteration:
            raise StageError(
                f"the checkpoint does not hold the rollouts of iteration {place.iteration + 1}",
                hint="run with --fresh",
            )
        self._hold(place.iteration, _as_rows(state.tensors, state.facts["ids"]))

    def _place(self, step: int, share: Share) -> _Place:
        steps = self._num_rollouts // share.batch
        if steps * share.batch != self._num_rollouts:
            raise StageError(
                f"{self._num_rollouts} rollouts are no multiple of the {share.batch} rows of a step",
                hint="per_device_train_batch_size * gradient_accumulation_steps * processes has to divide them",
            )
        iteration, rest = divmod(step, steps * self._ppo_epochs)
        epoch, batch = divmod(rest, steps)
        return _Place(iteration, epoch, batch * share.batch)

    def _hold(self, iteration: int, rollouts: Sequence[PolicyRow]) -> None:
        if len(rollouts) != self._num_rollouts:
            raise StageError(f"iteration {iteration + 1} has {len(rollouts)} rollouts, not {self._num_rollouts}")
        for name in (*OPTIONAL, "support"):
            all_have(name, rollouts)
        self._held, self._rollouts = iteration, list(rollouts)


def _as_tensors(rows: Sequence[PolicyRow]) -> dict[str, Tensor]:
    """Everything but the ids, end to end; optional fields as far as the rows have them. Floats stay what they are."""
    tensors = {
        "lengths": torch.tensor([len(row.ids) for row in rows]),
        "tokens": torch.tensor([*chain.from_iterable(row.ids for row in rows)]),
        "learned": torch.tensor([*chain.from_iterable(row.learned for row in rows)]),
        "group": torch.tensor([row.group for row in rows]),
        "counts": torch.tensor([row.counts for row in rows]),
    }
    for name in ("old_logprobs", "advantages", *OPTIONAL):
        if all_have(name, rows):
            values = chain.from_iterable(getattr(row, name) for row in rows)
            tensors[name] = torch.tensor([*values], dtype=torch.float64)
    supports = [row.support for row in rows if row.support is not None]
    if all_have("support", rows):
        sizes = [np.diff(kept.offsets) for kept in supports]
        tensors["support_sizes"] = torch.from_numpy(np.concatenate(sizes).astype(np.int32))
        tensors["support"] = torch.from_numpy(np.concatenate([kept.ids for kept in supports]))
    return tensors


def _as_rows(tensors: dict[str, Tensor] | Any, ids: Sequence[str]) -> list[PolicyRow]:
    """The rows that :func:`_as_tensors` was given."""
    tokens = _cut(tensors["tokens"].tolist(), tensors["lengths"].tolist())
    learned = _cut(tensors["learned"].tolist(), tensors["lengths"].tolist())
    targets = [sum(flags) for flags in learned]
    fields: dict[str, list[Any]] = {"group": tensors["group"].tolist(), "counts": tensors["counts"].tolist()}
    for name in ("old_logprobs", "advantages", *OPTIONAL):
        if name in tensors:
            fields[name] = _cut(tensors[name].tolist(), targets)
    if "support" in tensors:
        sizes = tensors["support_sizes"].numpy()
        kept = np.split(tensors["support"].numpy(), np.cumsum(sizes[:-1], dtype=np.int64))
        fields["support"] = [KeptIds.of(kept[start:stop]) for start, stop in pairwise(accumulate(targets, initial=0))]
    return [
        PolicyRow(id=ids[i], ids=tokens[i], learned=learned[i], **{name: values[i] for name, values in fields.items()})
        for i in range(len(ids))
    ]


def _cut(values: Sequence[Any], sizes: Sequence[int]) -> list[tuple[Any, ...]]:
    """Consecutive pieces of these sizes."""
    return [tuple(values[start:stop]) for start, stop in pairwise(accumulate(sizes, initial=0))]
