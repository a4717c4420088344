from __future__ import annotations

import math

import pytest
import torch

from kdkit.api import StageError
from kdkit.train.policy.returns import (
    Estimator,
    cumulative_weights,
    discounted_returns,
    mixture_weights,
    rewards,
    whiten,
)

LENGTHS = (4, 1, 6, 2)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def sample(seed=0, width=6):
    """Log-probabilities of teacher and student, and the mask of completions of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    teacher, old = (
        torch.nn.functional.pad(-2 * torch.rand(4, 6, generator=generator, dtype=torch.float64), (0, width - 6)) * mask
        for _ in range(2)
    )
    return teacher, old, mask


def close(got, wanted, tolerance=1e-12):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_the_golden_vector_of_the_original():
    values, mask = tensor([1, 2, 3, 0]), torch.tensor([[True, True, True, False]])
    close(discounted_returns(values, mask, gamma=0.95), tensor([5.6075, 4.85, 3, 0]), 1e-6)
    advantages = discounted_returns(values, mask, gamma=0.95, normalize=True)
    close(advantages, tensor([1.869167, 2.425, 3, 0]), 1e-6)
    close(whiten(advantages, mask, "paper"), tensor([0.040513, 0.534066, 1.044638, -1.619217]), 1e-6)


def test_returns_by_hand():
    values, mask = tensor([1, 2, 4, 0], [3, 0, 0, 0]), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    own = discounted_returns(values, mask, gamma=0.5)
    close(own, tensor([1 + 1 + 1, 2 + 2, 4, 0], [3, 0, 0, 0]))
    later = discounted_returns(values, mask, gamma=0.5, first="next")
    close(later, tensor([4, 4, 0, 0], [0, 0, 0, 0]))
    close(discounted_returns(values, mask, gamma=0.5, normalize=True), own / tensor([3, 2, 1, 1], [1, 1, 1, 1]))
    close(
        discounted_returns(values, mask, gamma=0.5, first="next", normalize=True),
        later / tensor([2, 1, 1, 1], [1, 1, 1, 1]),
    )
    close(discounted_returns(values, mask, gamma=0.0), values)


def test_rewards_are_scaled_and_then_clipped():
    teacher, old = tensor([-1.0, -3.0, -9.0]), tensor([-2.0, -2.5, -1.0])
    mask = torch.tensor([[True, True, False]])
    close(rewards(teacher, old, mask), tensor([1.0, -0.5, 0.0]))
    close(rewards(teacher, old, mask, scaling=0.5), tensor([2.0, -1.0, 0.0]))
    close(rewards(teacher, old, mask, scaling=0.5, clip=1.5), tensor([1.5, -1.0, 0.0]))
    close(rewards(teacher, old, mask, clip=0.75, scaling=2.0), tensor([0.5, -0.25, 0.0]))


def test_weights_are_the_students_share_of_the_mixture():
    teacher, old, mask = sample()
    weights = mixture_weights(teacher, old, mask, 0.2)
    close(weights, torch.where(mask, old.exp() / (0.8 * old.exp() + 0.2 * teacher.exp()), 1.0))
    close(mixture_weights(teacher, old, mask, 0.0), torch.ones_like(old))


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.99])
def test_weights_stay_in_their_bound_where_a_model_is_certain(alpha):
    teacher, old = tensor([-5000.0, 0.0, -math.inf, -3000.0]), tensor([0.0, -5000.0, -1.0, -3001.0])
    weights = mixture_weights(teacher, old, torch.ones(1, 4, dtype=torch.bool), alpha)
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
    assert (weights <= 1 / (1 - alpha) * (1 + 1e-15)).all()
    close(weights[:, [0, 1, 2]], tensor([1 / (1 - alpha), 0.0, 1 / (1 - alpha)]))
    close(weights[:, 3], tensor(1 / (1 - alpha + alpha * math.e)))


def test_cumulative_weights():
    weights = tensor([0.5, 1.25, 0.0, 2.0])
    close(cumulative_weights(weights), tensor([0.5, 0.625, 0.0, 0.0]))
    close(cumulative_weights(weights, inclusive=False), tensor([1.0, 0.5, 0.625, 0.0]))


def test_whitening_counts_what_it_says():
    values, mask = tensor([1, 5, 3], [7, 0, 0]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    kept = tensor(1, 5, 3, 7)
    deviation = math.sqrt(kept.var(correction=0) + 1e-8)
    close(whiten(values, mask)[mask], (kept - 4) / deviation)
    assert not whiten(values, mask)[~mask].any()
    everywhere = tensor(1, 5, 3, 7, 0, 0, 0, 0, 0, 0)
    wanted = (kept - everywhere.mean()) / math.sqrt(everywhere.var(correction=0) + 1e-8)
    close(whiten(values, mask, "paper", width=5)[mask], wanted)
    assert whiten(values, mask, "none") is values


@pytest.mark.parametrize("mode", ["valid", "paper"])
def test_whitening_is_over_all_ranks(mode):
    teacher, old, mask = sample()
    values = torch.where(mask, teacher - old, 0.0)
    wanted = whiten(values, mask, mode)
    shares = [slice(0, 1), slice(1, 4)]
    sent = []
    for share in shares:
        whiten(values[share], mask[share], mode, sum_ranks=lambda s: sent.append(s) or s)
    total = torch.stack(sent).sum(0)
    assert total.shape == (3,)
    got = torch.cat([whiten(values[s], mask[s], mode, sum_ranks=lambda _: total) for s in shares])
    close(got, wanted)


def test_whitening_of_equal_or_no_advantages_is_zero():
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert whiten(torch.full((2, 3), 0.1, dtype=torch.float64), mask).abs().max() < 1e-3
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert not whiten(torch.zeros(2, 3, dtype=torch.float64), nothing).any()


SETTINGS = [
    {},
    {"alpha": 0.2, "reward_scaling": 0.5, "cliprange_reward": 1.0},
    {"alpha": 0.2, "importance": "per-decision", "length_normalization": False},
    {"alpha": 0.2, "parity": "code", "single_step_decomposition": False, "whiten": "none"},
    {"whiten": "paper", "width": 9, "parity": "code"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_padding_changes_nothing_whatever_it_holds(settings):
    narrow, wide = sample(), sample(width=9)
    wanted = Estimator(**settings)(*narrow)
    teacher, old, mask = wide
    for fill in (-3.0, math.inf, math.nan):
        got = Estimator(**settings)(torch.where(mask, teacher, fill), torch.where(mask, old, -fill), mask)
        for name in ("advantages", "importance_weights", "token_weights", "rewards"):
            mine, its = getattr(got, name), getattr(wanted, name)
            assert (mine is None) == (its is None)
            if mine is not None:
                close(mine[mask], its[narrow[2]])
                assert name == "advantages" or (mine[~mask] == float("weights" in name)).all()


@pytest.mark.parametrize("settings", SETTINGS)
def test_completions_do_not_see_each_other_but_for_whitening(settings):
    chosen = Estimator(**{**settings, "whiten": "none"})
    teacher, old, mask = sample()
    together = chosen(teacher, old, mask)
    for row, length in enumerate(LENGTHS):
        alone = chosen(teacher[row : row + 1, :length], old[row : row + 1, :length], mask[row : row + 1, :length])
        close(together.advantages[row : row + 1, :length], alone.advantages)


def test_results_are_float64_without_gradient():
    teacher, old, mask = sample()
    found = Estimator(alpha=0.2)(teacher.float().requires_grad_(), old.float().requires_grad_(), mask)
    for values in (found.advantages, found.importance_weights, found.token_weights, found.rewards):
        assert values.dtype is torch.float64
        assert not values.requires_grad


def test_what_each_setting_gives_the_losses():
    x = sample()
    weights = mixture_weights(*x, 0.2)
    assert Estimator()(*x).importance_weights is None
    assert Estimator()(*x).token_weights is None
    paper, code = (Estimator(alpha=0.2, parity=p)(*x) for p in ("paper", "code"))
    close(paper.importance_weights, weights)
    close(code.importance_weights, weights)
    close(paper.token_weights, weights)
    assert code.token_weights is None
    plain = {"alpha": 0.2, "gamma": 1.0, "length_normalization": False, "whiten": "none"}
    exact = Estimator(**plain, importance="per-decision")(*x)
    products = torch.where(x[2], weights, 1.0).cumprod(1)
    assert exact.importance_weights is None
    close(exact.token_weights[:, 1:], torch.where(x[2], products.roll(1, 1), 1.0)[:, 1:])
    assert (exact.token_weights[:, 0] == 1).all()
    credited = torch.where(x[2], products * (x[0] - x[1]), 0.0)
    close(exact.advantages, discounted_returns(credited, x[2], first="next"))
    undivided = Estimator(**plain, importance="per-decision", single_step_decomposition=False)(*x)
    assert undivided.token_weights is None
    close(undivided.advantages, discounted_returns(credited, x[2]))


def test_parity_is_about_the_single_step_only():
    x = sample()
    found = [Estimator(alpha=0.2, parity=p, single_step_decomposition=False)(*x) for p in ("paper", "code")]
    close(found[0].advantages, found[1].advantages)
    assert found[0].token_weights is None
    assert found[1].token_weights is None


def test_what_is_not_finite_is_refused():
    teacher, old, mask = sample()
    teacher[0, 1] = -math.inf
    with pytest.raises(
        StageError, match=r"rules out a token that was sampled; set cliprange_reward and single_step: false$"
    ):
        Estimator()(teacher, old, mask)
    with pytest.raises(StageError, match=r"rules out a token that was sampled; set cliprange_reward$"):
        Estimator(single_step_decomposition=False)(teacher, old, mask)
    assert torch.isfinite(Estimator(cliprange_reward=100.0)(teacher, old, mask).advantages).all()


def test_products_of_weights_that_overflow_are_refused():
    """A hundredfold per token, 200 times."""
    old, teacher = torch.zeros(1, 200, dtype=torch.float64), torch.full((1, 200), -1000.0, dtype=torch.float64)
    mask = torch.ones(1, 200, dtype=torch.bool)
    with pytest.raises(StageError, match=r"products of importance weights overflow; use importance: token$"):
        Estimator(alpha=0.99, importance="per-decision")(teacher, old, mask)
    assert torch.isfinite(Estimator(alpha=0.99)(teacher, old, mask).advantages).all()
