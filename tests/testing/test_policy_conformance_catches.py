"""Deliberately wrong policy losses: each must fail the suite, and every test of the suite must catch one."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache

import pytest
import torch

from kdkit.api import ConformanceError, KdkitError, PolicyLossOutput
from kdkit.testing.conformance.policy import PolicyLossConformance


def parts(x):
    weights = torch.ones_like(x.logprobs) if x.importance_weights is None else x.importance_weights.detach()
    values = x.logprobs, x.old_logprobs.detach(), x.advantages.detach(), weights
    return [torch.where(x.mask, v, 0.0) for v in values]


def surrogate(ratio, advantages):
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))


def finish(x, per_token, aggregation="token-mean", **more):
    ratio = torch.where(x.mask, (x.logprobs - x.old_logprobs).exp(), 0.0).sum().detach()
    return PolicyLossOutput(per_token=per_token, aggregation=aggregation, metrics={"ratio": ratio}, **more)


def right(x):
    """A PPO loss that needs a teacher, to show what happens without one."""
    if x.teacher_logprobs is None:
        raise ConformanceError("no teacher")
    new, old, advantages, weights = parts(x)
    return finish(x, weights * surrogate((new - old).exp(), advantages))


def unmasked_mean(x):
    out = right(x)
    mean = out.per_token.sum() / out.per_token.numel()
    return replace(out, per_token=mean.expand_as(out.per_token))


def mean_over_the_completion(x):
    return replace(right(x), aggregation="sequence-mean")


def divided_by_the_padded_width(x):
    return replace(right(x), aggregation="constant-length", constant_length=x.mask.shape[1])


def divided_by_the_batch(x):
    out = right(x)
    return replace(out, per_token=out.per_token / len(x.lengths))


def padding_leaks(x):
    """Baseline over all positions, padding included."""
    return right(replace(x, advantages=x.advantages - x.advantages.mean(dim=1, keepdim=True)))


def silent_completions_leak(x):
    real = torch.arange(x.mask.shape[1]) < x.lengths[:, None]
    return right(replace(x, advantages=x.advantages - x.advantages[real].mean()))


def gradient_through_padding(x):
    out = right(x)
    return replace(out, per_token=out.per_token + (x.logprobs - x.logprobs.detach()).sum(1, keepdim=True))


def ratio_of_the_wrong_sign(x):
    new, old, advantages, weights = parts(x)
    return finish(x, weights * surrogate((old - new).exp(), advantages))


def advantage_of_the_wrong_sign(x):
    return right(replace(x, advantages=-x.advantages))


def clip_on_the_wrong_side(x):
    new, old, advantages, weights = parts(x)
    ratio = (new - old).exp()
    return finish(x, weights * torch.minimum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)))


def always_clipped(x):
    new, old, advantages, weights = parts(x)
    return finish(x, -weights * advantages * (new - old).exp().clamp(0.8, 1.2))


def never_clipped(x):
    new, old, advantages, weights = parts(x)
    return finish(x, -weights * advantages * (new - old).exp())


def clip_in_log_space(x):
    new, old, advantages, weights = parts(x)
    log_rho = new - old
    bounded = log_rho.clamp(-0.2, 0.2).exp()
    return finish(x, weights * torch.maximum(-advantages * log_rho.exp(), -advantages * bounded))


def reinforce_without_a_ratio(x):
    new, _, advantages, weights = parts(x)
    return finish(x, -weights * advantages * new)


def ratio_has_no_gradient(x):
    new, old, advantages, weights = parts(x)
    return finish(x, -weights * advantages * (new - old).exp().detach() * new)


def weights_are_ignored(x):
    return right(replace(x, importance_weights=None))


def weights_are_wanted(x):
    return right(x) if x.importance_weights is not None else finish(x, right(x).per_token * 0.8)


def gradient_to_the_old_policy(x):
    new, _, advantages, weights = parts(x)
    old = torch.where(x.mask, x.old_logprobs, 0.0)
    return finish(x, weights * surrogate((new - old).exp(), advantages))


def gradient_to_the_advantages(x):
    new, old, _, weights = parts(x)
    return finish(x, weights * surrogate((new - old).exp(), torch.where(x.mask, x.advantages, 0.0)))


def penalty_without_advantages(x):
    new, old, *_ = parts(x)
    out = right(x)
    return replace(out, per_token=out.per_token + 0.01 * (new - old).square())


def advantages_whitened_here(x):
    """The mean of a micro-batch is not that of the step."""
    kept = x.advantages[x.mask]
    return right(replace(x, advantages=x.advantages - kept.mean()))


def the_first_completion_is_special(x):
    out = right(x)
    return replace(out, per_token=out.per_token * torch.tensor([2.0] + [1.0] * (len(x.lengths) - 1))[:, None])


def noisy(x):
    out = right(x)
    return replace(out, per_token=out.per_token * (1 + 1e-9 * torch.rand_like(out.per_token)))


def in_place(x):
    out = right(x)
    x.advantages.mul_(0.5)
    return out


def nothing_without_gradients(x):
    out = right(x)
    return out if torch.is_grad_enabled() else replace(out, per_token=out.per_token * 0)


def one_number(x):
    out = right(x)
    return replace(out, per_token=out.per_token.sum())


def always_double(x):
    out = right(x)
    return replace(out, per_token=out.per_token.double())


def in_half_precision(x):
    if x.logprobs.dtype is torch.float64:
        return right(x)
    return right(replace(x, logprobs=x.logprobs + (x.logprobs.bfloat16().float() - x.logprobs).detach()))


def unknown_aggregation(x):
    return replace(right(x), aggregation="mean")


def no_constant_length(x):
    return replace(right(x), constant_length=3)


def metric_of_the_mean(x):
    out = right(x)
    return replace(out, metrics={"ratio": out.metrics["ratio"] / x.mask.sum()})


def metric_over_padding(x):
    return replace(right(x), metrics={"ratio": (x.logprobs - x.old_logprobs).exp().sum().detach()})


def metric_with_a_gradient(x):
    return replace(right(x), metrics={"ratio": right(x).per_token[x.mask].sum()})


def metric_per_token(x):
    return replace(right(x), metrics={"ratio": right(x).per_token.detach()})


def zero_without_a_teacher(x):
    if x.teacher_logprobs is None:
        return finish(x, x.logprobs * 0)
    return right(x)


def last_token_lost(x):
    last = torch.arange(x.mask.shape[1]) == x.lengths[:, None] - 1
    out = right(x)
    return replace(out, per_token=torch.where(last, 0.0, out.per_token))


def shifted(x):
    return right(replace(x, advantages=x.advantages.roll(1, dims=1)))


def entropy_for_nothing(x):
    return right(x)


entropy_for_nothing.wants_entropy = True


def padding_told_by_an_id(x):
    return right(replace(x, mask=x.mask & (x.completion_ids != 0)))


FAULTS = (
    unmasked_mean,
    mean_over_the_completion,
    divided_by_the_padded_width,
    divided_by_the_batch,
    padding_leaks,
    silent_completions_leak,
    gradient_through_padding,
    ratio_of_the_wrong_sign,
    advantage_of_the_wrong_sign,
    clip_on_the_wrong_side,
    always_clipped,
    never_clipped,
    clip_in_log_space,
    reinforce_without_a_ratio,
    ratio_has_no_gradient,
    weights_are_ignored,
    weights_are_wanted,
    gradient_to_the_old_policy,
    gradient_to_the_advantages,
    penalty_without_advantages,
    advantages_whitened_here,
    the_first_completion_is_special,
    noisy,
    in_place,
    nothing_without_gradients,
    one_number,
    always_double,
    in_half_precision,
    unknown_aggregation,
    no_constant_length,
    metric_of_the_mean,
    metric_over_padding,
    metric_with_a_gradient,
    metric_per_token,
    zero_without_a_teacher,
    last_token_lost,
    shifted,
    padding_told_by_an_id,
    entropy_for_nothing,
)


def suite_of(fault):
    class Suite(PolicyLossConformance):
        needs = frozenset({"teacher"})
        clip = (0.8, 1.2)

        def build(self):
            return fault

        def reference(self, c):
            return c.weights * surrogate((c.logprobs - c.old_logprobs).exp(), c.advantages)

    return Suite()


@cache
def failures(fault):
    suite, names = suite_of(fault), []
    for name, test in inspect.getmembers(suite, inspect.ismethod):
        if name.startswith("test_"):
            try:
                test()
            except (AssertionError, KdkitError, RuntimeError, AttributeError, TypeError, pytest.fail.Exception):
                names.append(name)
            except pytest.skip.Exception:
                pass
    return names


def test_the_right_loss_passes_everything():
    assert failures(right) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_the_suite_catches(fault):
    assert failures(fault)


@pytest.mark.parametrize(
    ("fault", "test"),
    [
        (padding_leaks, "test_padding_changes_nothing_whatever_it_holds"),
        (silent_completions_leak, "test_a_completion_that_does_not_count_is_not_there"),
        (advantages_whitened_here, "test_any_cut_into_micro_batches_gives_the_same_gradient"),
        (clip_on_the_wrong_side, "test_clipping_stops_the_token_that_would_move_further_out_and_no_other"),
        (ratio_has_no_gradient, "test_the_gradient_is_that_of_the_value"),
        (penalty_without_advantages, "test_without_advantages_nothing_is_learned"),
        (reinforce_without_a_ratio, "test_where_nothing_was_learned_yet_the_ratio_is_one"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_the_fault_is_named_even_without_a_reference(fault, test):
    assert test in failures(fault)


def test_no_test_of_the_suite_is_idle():
    """Every test must be the reason of at least one failure."""
    caught = {name for fault in FAULTS for name in failures(fault)}
    own = {
        name for name, _ in inspect.getmembers(PolicyLossConformance, inspect.isfunction) if name.startswith("test_")
    }
    assert own <= caught, own - caught
