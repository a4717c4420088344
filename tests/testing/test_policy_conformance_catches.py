"""Deliberately wrong policy losses: each must fail the suite for its own reason, and every check must catch one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from suites import check, checks_of, variant

from kdkit.api import ConformanceError, PolicyLossOutput
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


def ids_in_place(x):
    out = right(x)
    x.completion_ids.zero_()
    return out


def noisy_gradient(x):
    out = right(x)
    moved = torch.rand_like(out.per_token) * (out.per_token - out.per_token.detach())
    return replace(out, per_token=out.per_token + moved)


def twice_the_gradient(x):
    out = right(x)
    return replace(out, per_token=2 * out.per_token - out.per_token.detach())


def the_wrong_way(x):
    out = right(x)
    return replace(out, per_token=2 * out.per_token.detach() - out.per_token)


def gradient_without_advantages(x):
    new, *_ = parts(x)
    out = right(x)
    return replace(out, per_token=out.per_token + 0.01 * (new - new.detach()))


def gradient_to_neighbours(x):
    out = right(x)
    real = torch.arange(x.mask.shape[1]) < x.lengths[:, None]
    moved = torch.where(real, x.logprobs - x.logprobs.detach(), 0.0).sum()
    return replace(out, per_token=out.per_token + moved)


def gradient_in_half_precision(x):
    exact, rounded = right(x), in_half_precision(x).per_token
    return replace(exact, per_token=exact.per_token.detach() + rounded - rounded.detach())


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


FORMULA = "test_value_and_gradient_are_those_of_the_formula"
ALONE, ONE = "test_without_importance_weights_they_arealone", "test_where_nothing_was_learned_yet_the_ratio_is_one"
SLOPE, ZERO = "test_the_gradient_is_that_of_the_value", "test_without_advantages_nothing_is_learned"
CLIP = "test_clipping_stops_the_token_that_would_move_further_out_and_no_other"
PADDING, SILENT = (
    "test_padding_changes_nothing_whatever_it_holds",
    "test_a_completion_that_does_not_count_is_not_there",
)
CUTS, ORDER = (
    "test_any_cut_into_micro_batches_gives_the_same_gradient",
    "test_completions_may_stand_in_any_order",
)
TWICE, SAMPLED = (
    "test_the_same_twice_and_the_inputs_stay_as_they_are",
    "test_no_gradient_reaches_what_was_sampled",
)
OUTPUT, FLOAT32 = "test_one_value_per_token_in_the_dtype_of_the_logprobs", "test_float32_is_near_float64"
METRICS, NEEDS = (
    "test_metrics_are_sums_over_tokens_that_count",
    "test_what_it_needs_is_declared_and_refused_when_missing",
)
WRONG = [
    (unmasked_mean, FORMULA, "^the step's loss: off by"),
    (mean_over_the_completion, FORMULA, "^the step's loss: off by"),
    (divided_by_the_padded_width, FORMULA, "^the step's loss: off by"),
    (divided_by_the_batch, FORMULA, "^the step's loss: off by"),
    (ratio_of_the_wrong_sign, FORMULA, "^the step's loss: off by"),
    (always_clipped, FORMULA, "^the step's loss: off by"),
    (clip_in_log_space, FORMULA, "^the step's loss: off by"),
    (weights_are_ignored, FORMULA, "^the step's loss: off by"),
    (last_token_lost, FORMULA, "^the step's loss: off by"),
    (shifted, FORMULA, "^the step's loss: off by"),
    (padding_told_by_an_id, FORMULA, "^the step's loss: off by"),
    (twice_the_gradient, FORMULA, "^the gradient of the step's loss: off by"),
    (weights_are_wanted, ALONE, "^the loss without importance weights: off by"),
    (reinforce_without_a_ratio, ONE, "at ratio 1 the mean of -A: off by"),
    (twice_the_gradient, SLOPE, "gradient of logprobs at 0, "),
    (ratio_has_no_gradient, SLOPE, "gradient of logprobs at 0, "),
    (penalty_without_advantages, ZERO, "a loss without advantages"),
    (gradient_without_advantages, ZERO, "a gradient without advantages"),
    (never_clipped, CLIP, "at ratio 1.260 with a positive advantage there is a gradient"),
    (clip_on_the_wrong_side, CLIP, "there is (a|no) gradient"),
    (the_wrong_way, CLIP, "at ratio 1.260 with a negative advantage the token moves the wrong way"),
    (advantage_of_the_wrong_sign, CLIP, "at ratio 1.260 with a positive advantage there is a gradient"),
    (gradient_through_padding, PADDING, "padding of 3.0 has a gradient"),
    (padding_leaks, PADDING, "^the loss with padding of 3.0: off by"),
    (gradient_to_neighbours, SILENT, "a completion that does not count has a gradient"),
    (silent_completions_leak, SILENT, "^the loss beside completions that do not count: off by"),
    (advantages_whitened_here, CUTS, r"^the loss of micro-batches \(\(4, 0\), \(3, 5\), \(1, 2\)\): off by"),
    (the_first_completion_is_special, ORDER, "^the loss of completions in another order: off by"),
    (noisy_gradient, TWICE, "two calls give different values"),
    (noisy, TWICE, "the value without gradients: off by"),
    (nothing_without_gradients, TWICE, "the value without gradients: off by"),
    (ids_in_place, TWICE, "completion_ids was changed in place"),
    (gradient_to_the_old_policy, SAMPLED, "old_logprobs has a gradient"),
    (gradient_to_the_advantages, SAMPLED, "advantages has a gradient"),
    (one_number, OUTPUT, r"one value per token, got \(\)"),
    (always_double, OUTPUT, "torch.float32 gave torch.float64"),
    (unknown_aggregation, OUTPUT, "mean"),
    (no_constant_length, OUTPUT, "constant_length goes with constant-length"),
    (in_half_precision, FLOAT32, "the value in float32: off by"),
    (gradient_in_half_precision, FLOAT32, "the gradient in float32: off by"),
    (metric_per_token, METRICS, "metric ratio is not a scalar"),
    (metric_with_a_gradient, METRICS, "metric ratio has a gradient"),
    (metric_of_the_mean, METRICS, "metric ratio of parts: off by"),
    (metric_over_padding, METRICS, "metric ratio with padding: off by"),
    (entropy_for_nothing, NEEDS, "wants_entropy of the loss is True"),
    (zero_without_a_teacher, NEEDS, "DID NOT RAISE"),
]


def suite(loss):
    return variant(
        PolicyLossConformance,
        needs=frozenset({"teacher"}),
        clip=(0.8, 1.2),
        build=lambda: loss,
        reference=lambda c: c.weights * surrogate((c.logprobs - c.old_logprobs).exp(), c.advantages),
    )


@pytest.mark.parametrize(("loss", "test", "reason"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_loss_fails(loss, test, reason, tmp_path):
    with pytest.raises((AssertionError, pytest.fail.Exception), match=reason):
        check(suite(loss), test, tmp_path)


@pytest.mark.parametrize("test", checks_of(PolicyLossConformance))
def test_a_right_loss_passes_and_no_test_is_idle(test, tmp_path):
    assert test in {caught for _, caught, _ in WRONG}
    check(suite(right), test, tmp_path)
