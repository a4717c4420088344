from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdkit.models.chat import Encoded
from kdkit.train.batching import DataOrder, collate, micro_batches


@given(rows=st.integers(1, 40), batch=st.integers(1, 9), seed=st.integers(0, 2**40))
@settings(max_examples=50, deadline=None)
def test_every_epoch_is_a_permutation_whatever_the_batch(rows, batch, seed):
    order = DataOrder([rows], [1.0], seed)
    seen = [row for step in range(-(-3 * rows // batch)) for _, row in order.rows_of_step(step, batch)]
    for epoch in range(3):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_rows_of_a_step_do_not_depend_on_the_steps_before():
    straight = DataOrder([50, 9], [3.0, 1.0], 7)
    wanted = [straight.rows_of_step(step, 4) for step in range(30)]
    assert DataOrder([50, 9], [3.0, 1.0], 7).rows_of_step(29, 4) == wanted[29]
    assert DataOrder([50, 9], [3.0, 1.0], 8).rows_of_step(29, 4) != wanted[29]
    assert len({tuple(rows) for rows in wanted}) > 20


def test_epochs_differ():
    order = DataOrder([30], [1.0], 0)
    assert order.rows_of_step(0, 30) != order.rows_of_step(1, 30)


def test_a_mixture_follows_its_weights_and_walks_each_dataset_evenly():
    order = DataOrder([100, 10], [3.0, 1.0], 1)
    drawn = [pair for step in range(100) for pair in order.rows_of_step(step, 100)]
    share = sum(dataset == 0 for dataset, _ in drawn) / len(drawn)
    assert share == pytest.approx(0.75, abs=0.02)
    for dataset in (0, 1):
        counts = Counter(row for d, row in drawn if d == dataset)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_padding_never_touches_masks_or_positions():
    rows = [
        Encoded("a", (0, 0, 0), (False, True, True)),
        Encoded("b", (0, 1, 2, 3, 0), (False, False, True, True, True)),
    ]
    right, left = collate(rows), collate(rows, side="left")
    assert right.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert left.attention_mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert left.position_ids.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert right.labels_mask.tolist() == [[False, True, True, False, False], [False, False, True, True, True]]
    assert left.labels_mask.sum() == right.labels_mask.sum() == 5
    assert left.example_ids == ("a", "b")


def test_a_row_whose_first_token_is_marked_is_not_learned_from_padding():
    batch = collate([Encoded("a", (1, 2), (True, True)), Encoded("b", (1, 2, 3), (False, True, True))], side="left")
    assert batch.labels_mask.tolist() == [[False, False, True], [False, True, True]]


def test_micro_batches_keep_every_row_and_group_by_length():
    rows = [Encoded(str(i), tuple(range(n)), (False,) * n) for i, n in enumerate([3, 9, 4, 9, 2])]
    parts = list(micro_batches(rows, 2))
    assert [[len(r.ids) for r in part] for part in parts] == [[9, 9], [4, 3], [2]]


def test_collate_puts_tensors_on_the_device():
    assert collate([Encoded("a", (1, 2), (False, True))], device=torch.device("meta")).input_ids.is_meta
