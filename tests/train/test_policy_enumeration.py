"""The expectation of every estimator, summed over all completions there are, next to the exact gradient."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import pytest
import torch

import kdkit
from kdkit.api import Dense, PolicyLossInputs, TokenLossInputs
from kdkit.train.policy.advantages import group_advantages
from kdkit.train.policy.returns import Estimator

END = 0  # a completion ends with this token, or at the greatest length


@dataclass(frozen=True)
class World:
    """Every completion of a small vocabulary. A policy is a table of logits, one row per unfinished prefix.

    ids, states, mask: [B, T]; a token at t is drawn from the row states[b, t].
    """

    ids: torch.Tensor
    states: torch.Tensor
    mask: torch.Tensor
    prefixes: int

    def logprobs(self, table):
        """[B, T] of the tokens of every completion; 0 after its end."""
        return torch.where(self.mask, torch.log_softmax(table, -1)[self.states, self.ids], 0.0)


@cache
def world(vocabulary, length, ends=True):
    finished, open_ = [], [()]
    for _ in range(length):
        grown = [(*prefix, token) for prefix in open_ for token in range(vocabulary)]
        finished += [y for y in grown if ends and y[-1] == END]
        open_ = [y for y in grown if not (ends and y[-1] == END)]
    completions = finished + open_
    rows = {prefix: i for i, prefix in enumerate(sorted({y[:t] for y in completions for t in range(len(y))}))}
    ids, states = torch.zeros(2, len(completions), length, dtype=torch.int64)
    mask = torch.zeros(len(completions), length, dtype=torch.bool)
    for b, y in enumerate(completions):
        for t, token in enumerate(y):
            ids[b, t], states[b, t], mask[b, t] = token, rows[y[:t]], True
    return World(ids, states, mask, len(rows))


def table(seed, places, vocabulary, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(places.prefixes, vocabulary, generator=generator, dtype=torch.float64)


def inputs(places, logprobs, advantages, **more):
    return PolicyLossInputs(
        logprobs=logprobs,
        old_logprobs=logprobs.detach(),
        advantages=advantages,
        mask=places.mask,
        completion_ids=places.ids,
        lengths=places.mask.sum(1),
        group_ids=torch.arange(len(places.ids)),
        **more,
    )


def exact(places, student, teacher):
    """Gradient of KL(q || p) of whole completions."""
    leaf = student.clone().requires_grad_()
    log_q, log_p = places.logprobs(leaf).sum(1), places.logprobs(teacher).sum(1)
    return torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), leaf)[0]


def single_step(places, leaf, teacher, weights):
    """[B] sum of the exact reverse KL of every visited state, by the token loss beside the policy term."""
    kept = places.mask
    x = TokenLossInputs(leaf[places.states[kept]], Dense(teacher[places.states[kept]]), places.ids[kept])
    values = torch.zeros(kept.shape, dtype=torch.float64).masked_scatter(kept, kdkit.build("loss", "reverse-kl")(x))
    return (values if weights is None else values * weights).sum(1)


def expected(places, student, teacher, estimator, **params):
    """Expectation of the gradient over completions drawn from the estimator's mixture, losses summed over tokens."""
    leaf = student.clone().requires_grad_()
    log_q, log_p = places.logprobs(leaf), places.logprobs(teacher)
    with torch.no_grad():
        drawn = ((1 - estimator.alpha) * log_q.exp() + estimator.alpha * log_p.exp()).prod(1)
    assert float(drawn.sum()) == pytest.approx(1.0, abs=1e-12)
    found = estimator(log_p, log_q, places.mask)
    loss = kdkit.build("loss", "minillm", **{"cliprange": None, **params})
    out = loss(inputs(places, log_q, found.advantages, importance_weights=found.importance_weights))
    assert out.aggregation == "token-mean"  # the sums here leave out its denominator
    values = torch.where(places.mask, out.per_token, 0.0).sum(1)
    if estimator.single_step_decomposition:
        values = values + single_step(places, leaf, teacher, found.token_weights)
    return torch.autograd.grad((drawn * values).sum(), leaf)[0]


def plain(**changes):
    return Estimator(
        **{"gamma": 1.0, "length_normalization": False, "whiten": "none", "single_step_decomposition": False, **changes}
    )


def gap(estimator, *, seed=0, vocabulary=5, length=3, spread=1.0, ends=True, **params):
    """Relative error of the expected gradient."""
    places = world(vocabulary, length, ends)
    student, teacher = (table(seed + i, places, vocabulary, spread) for i in (0, 100))
    wanted = exact(places, student, teacher)
    got = expected(places, student, teacher, estimator, **params)
    return float((got - wanted).norm() / wanted.norm())


def test_there_are_as_many_completions_as_there_should_be():
    places = world(5, 3)
    assert len(places.ids) == 1 + 4 + 16 * 5
    assert places.prefixes == 1 + 4 + 16
    total = places.logprobs(table(3, places, 5)).sum(1).exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("decomposed", [False, True])
def test_the_policy_gradient_is_that_of_the_reverse_kl_of_whole_completions(decomposed, seed):
    assert gap(plain(single_step_decomposition=decomposed), seed=seed) < 1e-12


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("decomposed", [False, True])
def test_it_is_that_of_what_is_sampled_from(temperature, cut, decomposed):
    """At a temperature, and over the tokens that a cut kept: the exact gradient of those policies, without T^2."""
    places = world(5, 3)
    student, teacher = table(0, places, 5), table(100, places, 5)
    kept = torch.ones_like(student, dtype=torch.bool)
    if cut:  # the student's three most probable tokens
        kept = torch.zeros_like(kept).scatter(1, student.topk(3).indices, True)

    def sampled(raw):
        return (raw / temperature).masked_fill(~kept, -1e4)

    leaf = student.clone().requires_grad_()
    log_q, log_p = places.logprobs(sampled(leaf)).sum(1), places.logprobs(sampled(teacher)).sum(1)
    possible = log_q > -1e3
    gaps = torch.where(possible, log_q.exp() * (log_q - log_p), 0.0)
    wanted = torch.autograd.grad(gaps.sum(), leaf)[0]
    leaf = student.clone().requires_grad_()
    settings = plain(single_step_decomposition=decomposed)
    table_grad = expected(places, sampled(student), sampled(teacher), settings)
    got = torch.autograd.grad(sampled(leaf), leaf, table_grad)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("alpha", [0.2, 0.7])
def test_with_a_mixture_it_still_is_under_per_decision_weights(alpha, decomposed, seed):
    settings = plain(alpha=alpha, importance="per-decision", single_step_decomposition=decomposed)
    assert gap(settings, seed=seed) < 1e-12


@pytest.mark.parametrize(("vocabulary", "ends"), [(3, True), (3, False), (5, True)])
def test_with_a_mixture_and_a_weight_per_token_it_is_not(vocabulary, ends):
    """The method's approximation, whose bias docs/methods/minillm.md states: more, the more the teacher writes."""
    seeds = 20
    means = {}
    for alpha in (1e-6, 0.2, 0.5):
        settings = plain(alpha=alpha)
        found = [gap(settings, seed=seed, vocabulary=vocabulary, ends=ends) for seed in range(seeds)]
        means[alpha] = sum(found) / seeds
        assert alpha < 0.1 or min(found) > 0.01
    assert means[1e-6] < 1e-5
    assert 0.1 < means[0.2] < 0.4
    assert means[0.5] > 2 * means[0.2]


@pytest.mark.parametrize("is_in_clip", [False, True])
def test_that_bias_is_the_same_however_the_weight_and_the_single_step_enter(is_in_clip):
    """The weight of a token is exact for its own reward: what is missing are the weights of the others."""
    plainly = gap(plain(alpha=0.2))
    decomposed = plain(alpha=0.2, single_step_decomposition=True)
    assert gap(decomposed, is_in_clip=is_in_clip) == pytest.approx(plainly, rel=1e-9)


def test_a_mixture_that_is_ignored_is_worse_than_a_weight_per_token():
    places = world(5, 3)
    ignored, weighted = [], []
    for seed in range(10):
        student, teacher = table(seed, places, 5), table(seed + 100, places, 5)
        wanted = exact(places, student, teacher)
        settings = plain(alpha=0.5)
        drop = kdkit.build("loss", "minillm", cliprange=None)
        leaf = student.clone().requires_grad_()
        log_q, log_p = places.logprobs(leaf), places.logprobs(teacher)
        drawn = (0.5 * log_q.exp() + 0.5 * log_p.exp()).detach().prod(1)
        out = drop(inputs(places, log_q, settings(log_p, log_q, places.mask).advantages))
        got = torch.autograd.grad((drawn * torch.where(places.mask, out.per_token, 0.0).sum(1)).sum(), leaf)[0]
        ignored.append(float((got - wanted).norm() / wanted.norm()))
        weighted.append(gap(settings, seed=seed))
    assert sum(weighted) < sum(ignored)


def test_the_single_steps_weight_changes_the_variance_and_not_the_expectation():
    """E[w_t | y_<t] = 1 under the mixture, and the exact term does not depend on y_t."""
    places, leaf = world(5, 3), None
    student, teacher = table(0, places, 5), table(100, places, 5)
    log_q, log_p = places.logprobs(student), places.logprobs(teacher)
    drawn = (0.8 * log_q.exp() + 0.2 * log_p.exp()).prod(1)
    found = {p: plain(alpha=0.2, single_step_decomposition=True, parity=p) for p in ("paper", "code")}
    grads = []
    for settings in found.values():
        leaf = student.clone().requires_grad_()
        weights = settings(log_p, log_q, places.mask).token_weights
        assert (weights is None) == (settings.parity == "code")
        grads.append(torch.autograd.grad((drawn * single_step(places, leaf, teacher, weights)).sum(), leaf)[0])
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)


def test_the_codes_return_counts_the_single_step_twice():
    places = world(5, 3)
    student, teacher = table(0, places, 5), table(100, places, 5)
    twice = expected(places, student, teacher, plain(single_step_decomposition=True, parity="code"))
    leaf = student.clone().requires_grad_()
    drawn = places.logprobs(student).sum(1).exp()
    once = torch.autograd.grad((drawn * single_step(places, leaf, teacher, None)).sum(), leaf)[0]
    torch.testing.assert_close(twice - exact(places, student, teacher), once, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "changes",
    [{"gamma": 0.95}, {"length_normalization": True}, {"whiten": "valid"}, {"cliprange_reward": 0.5}],
    ids=lambda c: next(iter(c)),
)
def test_what_else_biases_the_gradient_does(changes):
    assert gap(plain(**changes)) > 1e-3


def test_scaled_rewards_scale_the_gradient():
    places = world(5, 3)
    student, teacher = table(0, places, 5), table(100, places, 5)
    got = expected(places, student, teacher, plain(reward_scaling=0.5))
    torch.testing.assert_close(got, 2 * exact(places, student, teacher), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_on_policy_reverse_kl_is_the_gradient_of_the_visited_states(alpha):
    """A weight per token is exact here but for which states the mixture visits."""
    places = world(5, 3)
    student, teacher = table(0, places, 5), table(100, places, 5)
    leaf = student.clone().requires_grad_()
    log_q, log_p = places.logprobs(leaf), places.logprobs(teacher)
    drawn = ((1 - alpha) * log_q.exp() + alpha * log_p.exp()).detach().prod(1)
    weights = Estimator(alpha=alpha)(log_p, log_q, places.mask).importance_weights
    loss = kdkit.build("loss", "on-policy-reverse-kl", coefficient=3.0)
    out = loss(inputs(places, log_q, torch.zeros_like(log_q), teacher_logprobs=log_p, importance_weights=weights))
    got = torch.autograd.grad((drawn * torch.where(places.mask, out.per_token, 0.0).sum(1)).sum(), leaf)[0]
    wanted = torch.autograd.grad((drawn * single_step(places, leaf, teacher, None)).sum(), leaf)[0]
    torch.testing.assert_close(got, 3 * wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_grpo_is_the_gradient_of_the_expected_reward_but_for_g_minus_one_over_g(loss_type, size):
    vocabulary, length = 3, 2
    places = world(vocabulary, length, ends=False)
    student = table(5, places, vocabulary)
    reward = torch.randn(len(places.ids), generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    leaf = student.clone().requires_grad_()
    wanted = torch.autograd.grad((places.logprobs(leaf).sum(1).exp() * reward).sum(), leaf)[0]
    log_q = places.logprobs(leaf)

    groups = torch.tensor(list(itertools.product(range(len(places.ids)), repeat=size)))
    drawn = log_q.detach().sum(1).exp()[groups].prod(1)
    numbers = torch.arange(len(groups)).repeat_interleave(size)
    found = group_advantages(reward[groups].flatten(), numbers, "none")
    member = groups.flatten()
    repeated = World(places.ids[member], places.states[member], places.mask[member], places.prefixes)
    advantages = found.values[:, None].expand(-1, length)
    extra = {"constant_length": length} if loss_type == "dr_grpo" else {}
    loss = kdkit.build("loss", "grpo", loss_type=loss_type, **extra)
    out = loss(inputs(repeated, log_q[member], advantages))
    # Every completion has the same length, so that all aggregations are sums over tokens but for a constant.
    scale = {"grpo": 1.0, "dapo": 1.0, "bnpo": float(length), "dr_grpo": 1.0}[loss_type]
    per_group = scale * out.per_token.sum(1).view(-1, size).mean(1)
    got = torch.autograd.grad((drawn * per_group).sum(), leaf)[0]
    torch.testing.assert_close(got, -(size - 1) / size * wanted, rtol=1e-10, atol=1e-13)
