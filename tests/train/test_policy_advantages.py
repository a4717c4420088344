from __future__ import annotations

import math
import statistics

import pytest
import torch

from kdkit.train.policy.advantages import group_advantages

REWARDS = [1.0, 3.0, 0.5, 2.0, 2.0, 4.0, math.nan, 1.0, 7.0, math.nan, math.nan, 0.1 + 0.2, 0.3]
GROUPS = [5, 5, 5, 2, 2, 9, 9, 9, 4, 4, 8, 1, 1]


def advantages(scale="group", rewards=REWARDS, groups=GROUPS):
    return group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), scale)


def by_hand(scale):
    everything = [r for r in REWARDS if not math.isnan(r)]
    values = []
    for reward, group in zip(REWARDS, GROUPS, strict=True):
        members = [r for r, g in zip(REWARDS, GROUPS, strict=True) if g == group and not math.isnan(r)]
        if math.isnan(reward) or len(members) < 2:
            values.append(0.0)
            continue
        divisor = {"group": statistics.stdev(members), "batch": statistics.stdev(everything), "none": 1 - 1e-4}[scale]
        values.append((reward - statistics.mean(members)) / (divisor + 1e-4))
    return values


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_by_hand(scale):
    assert advantages(scale).values.tolist() == pytest.approx(by_hand(scale), rel=1e-12, abs=1e-11)


def test_groups_that_teach_nothing_are_counted():
    found = advantages()
    assert found.group_ids.tolist() == [1, 2, 4, 5, 8, 9]
    assert found.zero_variance.tolist() == [True, True, False, False, False, False]
    assert found.too_few.tolist() == [False, False, True, False, True, False]
    assert found.unscorable == 3
    assert found.means.tolist()[:4] == pytest.approx([0.3, 2.0, 7.0, 1.5])
    assert math.isnan(found.means.tolist()[4])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_nothing(scale):
    assert advantages(scale).values[-2:].tolist() == [0.0, 0.0]


def test_the_order_of_completions_does_not_matter():
    order = torch.randperm(len(REWARDS), generator=torch.Generator().manual_seed(0)).tolist()
    moved = advantages(rewards=[REWARDS[i] for i in order], groups=[GROUPS[i] for i in order])
    torch.testing.assert_close(moved.values, advantages().values[order], rtol=1e-12, atol=1e-14)


def test_one_that_cannot_be_judged_changes_nothing_for_the_others():
    with_it = advantages(rewards=[1.0, math.nan, 3.0], groups=[0, 0, 0]).values
    without = advantages(rewards=[1.0, 3.0], groups=[0, 0]).values
    assert with_it.tolist() == [without[0], 0.0, without[1]]


def test_a_single_reward_of_a_batch():
    assert advantages("batch", [2.0], [0]).values.tolist() == [0.0]
