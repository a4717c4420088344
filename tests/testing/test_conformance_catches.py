"""The suite is worth what it catches: classic faults of published trainers, each named as what it is."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parent))

from suites import check, checks_of, variant

from kdkit.api import Dense, TokenLossInputs, TopK
from kdkit.testing.conformance.loss import TokenLossConformance
from kdkit.train.divergences import forward_kl, log_classes, reverse_kl


def right(x, t):
    return t**2 * forward_kl(*log_classes(x, t))


def log_probs(x, t):
    return torch.log_softmax(x.teacher.logits.detach() / t, -1), torch.log_softmax(x.student_logits / t, -1)


def dense_only(x):
    return isinstance(x.teacher, Dense)


def mean_of_the_block(x, t):
    return right(x, t).mean().expand(x.labels.shape[0])


def divided_by_the_block(x, t):
    return right(x, t) / x.labels.shape[0]


def one_number(x, t):
    return right(x, t).sum()


def no_temperature_squared(x, t):
    return right(x, t) / t**2


def temperature_squared_in_the_value_only(x, t):
    value = right(x, t) / t**2
    return value + (t**2 - 1) * value.detach()


def temperature_of_the_student_only(x, t):
    if not dense_only(x):
        return right(x, t)
    log_p, _ = log_probs(x, 1.0)
    return t**2 * forward_kl(log_p, torch.log_softmax(x.student_logits / t, -1))


def no_teacher_entropy(x, t):
    log_p, log_q = log_classes(x, t)
    return -(t**2) * torch.where(log_p.exp() > 0, log_p.exp() * log_q, 0.0).sum(-1)


def the_other_direction(x, t):
    return t**2 * reverse_kl(*log_classes(x, t))


def with_half_a_cross_entropy(x, t):
    return 0.5 * right(x, t) + 0.5 * cross_entropy(x.student_logits, x.labels, reduction="none")


def shifted_again(x, t):
    if not dense_only(x) or x.labels.shape[0] < 2:
        return right(x, t)
    return right(TokenLossInputs(x.student_logits, Dense(x.teacher.logits.roll(-1, 0)), x.labels.roll(-1)), t)


def one_id_is_padding(x, t):
    return right(x, t) * (x.labels != x.student_logits.shape[-1] - 1)


def gradient_to_the_teacher(x, t):
    if not dense_only(x):
        return right(x, t)
    log_p, log_q = (torch.log_softmax(z / t, -1) for z in (x.teacher.logits, x.student_logits))
    return t**2 * forward_kl(log_p, log_q)


def top_k_renormalised(x, t):
    if dense_only(x):
        return right(x, t)
    own = torch.log_softmax(x.student_logits.gather(-1, x.teacher.ids) / t, -1)
    return t**2 * forward_kl(torch.log_softmax(x.teacher.logprobs, -1), own)


def top_k_cut_off(x, t):
    if dense_only(x):
        return right(x, t)
    own = torch.log_softmax(x.student_logits / t, -1).gather(-1, x.teacher.ids)
    return t**2 * forward_kl(x.teacher.logprobs, own)


def top_k_teacher_renormalised(x, t):
    """The teacher's kept mass is scaled to one and the student's is not: it learns to drop the tail."""
    if dense_only(x):
        return right(x, t)
    own = torch.log_softmax(x.student_logits / t, -1).gather(-1, x.teacher.ids)
    return t**2 * forward_kl(torch.log_softmax(x.teacher.logprobs, -1), own)


def clamped(x, t):
    return right(x, t).clamp(max=2.0)


def in_half_precision(x, t):
    if not dense_only(x) or x.student_logits.dtype is torch.float64:
        return right(x, t)
    rounded = x.student_logits + (x.student_logits.bfloat16().to(x.student_logits.dtype) - x.student_logits).detach()
    return right(TokenLossInputs(rounded, x.teacher, x.labels), t)


def through_probabilities(x, t):
    """log(softmax) without log-sum-exp: infinite for tokens of probability zero."""
    if not dense_only(x):
        return right(x, t)
    p, q = (torch.softmax(z / t, -1) for z in (x.teacher.logits.detach(), x.student_logits))
    return t**2 * (p * (p.log() - q.log())).sum(-1)


def with_dropout(x, t):
    return right(TokenLossInputs(torch.nn.functional.dropout(x.student_logits, 0.1), x.teacher, x.labels), t)


def labels_in_place(x, t):
    value = right(x, t)
    x.labels.zero_()
    return value


def divided_in_place(x, t):
    if dense_only(x) and x.student_logits.dtype is torch.float32:
        x.student_logits.div_(t)
        return right(TokenLossInputs(x.student_logits * t, x.teacher, x.labels), t)
    return right(x, t)


def softmax_over_tokens(x, t):
    if not dense_only(x):
        return right(x, t)
    log_p, log_q = (torch.log_softmax(z / t, 0) for z in (x.teacher.logits.detach(), x.student_logits))
    return t**2 * forward_kl(log_p, log_q)


def scaled_by_the_vocabulary(x, t):
    return right(x, t) / x.student_logits.shape[-1]


def only_the_top_300(x, t):
    if not dense_only(x) or x.student_logits.shape[-1] < 1000:
        return right(x, t)
    kept = x.teacher.logits.topk(300).indices
    cut = torch.full_like(x.teacher.logits, -1e4).scatter(-1, kept, x.teacher.logits.gather(-1, kept))
    return right(TokenLossInputs(x.student_logits, Dense(cut), x.labels), t)


def last_chunk_lost(x, t):
    values = right(x, t)
    return torch.where(torch.arange(len(values)) < len(values) // 64 * 64, values, 0.0) if len(values) > 64 else values


def nothing_without_gradients(x, t):
    return right(x, t) * (1.0 if torch.is_grad_enabled() else 0.0)


def clamped_far_away(x, t):
    return right(x, t).clamp(max=100.0)


def tail_mass_as_a_log(x, t):
    if dense_only(x) or x.teacher.tail_mass is None:
        return right(x, t)
    return right(
        TokenLossInputs(x.student_logits, replace(x.teacher, tail_mass=x.teacher.tail_mass.exp()), x.labels), t
    )


def any_temperature(x, t):
    if isinstance(x.teacher, TopK):
        return right(TokenLossInputs(x.student_logits, replace(x.teacher, temperature=t), x.labels), t)
    return right(x, t)


def view_of_the_logits(x, t):
    x.student_logits.view(-1)
    return right(x, t)


def another_width_is_cut(x, t):
    if not dense_only(x):
        return right(x, t)
    width = min(x.student_logits.shape[-1], x.teacher.logits.shape[-1])
    cut = TokenLossInputs(x.student_logits[:, :width], Dense(x.teacher.logits[:, :width]), x.labels)
    return right(cut, t)


def zero_without_a_teacher(x, t):
    return x.student_logits.sum(-1) * 0 if x.teacher is None else right(x, t)


def seven_is_padding(x, t):
    return right(x, t) * (x.labels != 7)


def top_k_in_place(x, t):
    value = right(x, t)
    if isinstance(x.teacher, TopK):
        x.teacher.logprobs.add_(1e-9)
    return value


def zero_times_infinity(x, t):
    """The formula as it is written: a class that both models rule out is 0 times (-inf - -inf)."""
    log_p, log_q = log_classes(x, t)
    return t**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def infinities_meet(x, t):
    """The gap of two infinities, masked after the product."""
    if not dense_only(x):
        return right(x, t)
    log_p, log_q = log_probs(x, t)
    p = log_p.exp()
    return t**2 * torch.where(p > 0, p * (log_p - log_q), 0 * log_q).sum(-1)


def always_double(x, t):
    return right(x, t).double()


def a_gradient_of_nothing(x, t):
    return right(x, t) + 3 * (x.student_logits - x.student_logits.detach()).sum(-1)


def below_zero(x, t):
    return right(x, t) - 50


def gradient_in_half_precision(x, t):
    value = in_half_precision(x, t)
    return right(x, t).detach() + value - value.detach()


def rounded_to_half(x, t):
    value = right(x, t)
    return value.bfloat16().float() if x.student_logits.dtype is torch.bfloat16 else value


def no_gradient_where_nothing_is_left(x, t):
    """The logarithm of a probability that is 0 has been replaced, the slope of that logarithm has not."""
    if not dense_only(x):
        return right(x, t)
    log_p, log_q = log_probs(x, t)
    q = log_q.exp()
    return t**2 * (log_p.exp() * (log_p - torch.where(q > 0, q.log(), log_q.detach()))).sum(-1)


def impossible_entries_are_masked_too_late(x, t):
    if not dense_only(x):
        return right(x, t)
    p, q = (torch.softmax(z / t, -1) for z in (x.teacher.logits.detach(), x.student_logits))
    return t**2 * torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1)


def ids_are_clamped(x, t):
    if dense_only(x) or x.teacher is None:
        return right(x, t)
    width = x.student_logits.shape[-1]
    return right(
        TokenLossInputs(x.student_logits, replace(x.teacher, ids=x.teacher.ids.clamp(max=width - 1)), x.labels), t
    )


def top_k_on_another_scale(x, t):
    return right(x, t) * (1.0 if dense_only(x) else 1.1)


def top_k_gradient_on_another_scale(x, t):
    value = right(x, t)
    return value if dense_only(x) else value + 0.1 * (value - value.detach())


def top_k_counts_for_more(x, t):
    return right(x, t) + (0.0 if dense_only(x) else 100.0 / x.teacher.ids.shape[-1])


def logarithm_of_the_tail(x, t):
    if not isinstance(x.teacher, TopK) or x.teacher.tail_mass is None:
        return right(x, t)
    return right(x, t) + 0 * x.teacher.tail_mass.log()


def root_of_the_tail(x, t):
    if not isinstance(x.teacher, TopK) or x.teacher.tail_mass is None:
        return right(x, t)
    return right(x, t) + 0 * (x.teacher.tail_mass.clamp_min(0) + 0 * x.student_logits.sum(-1)).sqrt()


FORMULA, MANY = (
    "test_value_and_gradient_are_those_of_the_formula",
    "test_many_tokens_of_every_id_with_and_without_gradients",
)
DTYPE, EQUAL = (
    "test_one_value_per_token_in_the_dtype_of_the_logits",
    "test_zero_with_zero_gradient_where_the_models_agree",
)
POSITIVE, TOKENS = "test_never_negative_where_zero_is_equality", "test_every_token_counts_for_itself"
TWICE = "test_the_same_twice_and_the_inputs_stay_as_they_are"
PLACE, TEACHER = "test_nothing_is_written_in_place_in_float32", "test_no_gradient_reaches_the_teacher"
REAL, HALF = "test_float32_is_near_float64_in_a_real_vocabulary", "test_half_precision_logits_are_computed_in_float32"
CERTAIN, IMPOSSIBLE = "test_certain_models_give_the_right_value", "test_entries_that_are_impossible_in_both_models"
UNFIT, DENSE = "test_signals_that_do_not_fit_are_refused", "test_top_k_of_everything_is_the_dense_value"
REST, TAIL = (
    "test_top_k_is_the_formula_on_k_classes_and_the_rest",
    "test_a_tail_mass_that_is_stated_is_the_one_that_is_used",
)
BOUND, CUTS = "test_top_k_is_a_lower_bound", "test_the_gradient_is_that_of_whole_rows_however_they_are_cut"
BF16 = "test_bf16_products_stay_near_float64"
WRONG = [
    (no_temperature_squared, FORMULA, "value at temperature 0.5: off by"),
    (temperature_of_the_student_only, FORMULA, "value at temperature 0.5: off by"),
    (temperature_squared_in_the_value_only, FORMULA, "^gradient: off by"),
    (no_teacher_entropy, FORMULA, "value at temperature 0.5: off by"),
    (the_other_direction, FORMULA, "value at temperature 0.5: off by"),
    (with_half_a_cross_entropy, FORMULA, "value at temperature 0.5: off by"),
    (scaled_by_the_vocabulary, FORMULA, "value at temperature 0.5: off by"),
    (softmax_over_tokens, FORMULA, "value at temperature 0.5: off by"),
    (clamped, FORMULA, "value at temperature 0.5: off by"),
    (last_chunk_lost, MANY, "value of 1,021 tokens"),
    (seven_is_padding, MANY, "value of 1,021 tokens"),
    (view_of_the_logits, MANY, "view size is not compatible"),
    (nothing_without_gradients, MANY, "value without gradients"),
    (one_number, DTYPE, r"one value per token: \(1,\), got \(\)"),
    (always_double, DTYPE, "torch.float32 logits gave torch.float64"),
    (no_teacher_entropy, EQUAL, "not zero where the models agree"),
    (a_gradient_of_nothing, EQUAL, "a gradient where the models agree"),
    (below_zero, POSITIVE, "a divergence is not negative"),
    (shifted_again, TOKENS, "value after a permutation of the tokens"),
    (mean_of_the_block, TOKENS, "value of a token alone"),
    (with_dropout, TWICE, "two calls give different values"),
    (labels_in_place, TWICE, "an input was changed in place"),
    (divided_in_place, PLACE, "the loss wrote into the student's logits in place"),
    (gradient_to_the_teacher, TEACHER, "the teacher has a gradient"),
    (only_the_top_300, REAL, "float64 value of a real vocabulary"),
    (in_half_precision, REAL, "float32 value: off by"),
    (gradient_in_half_precision, REAL, "float32 gradient is off"),
    (rounded_to_half, HALF, "bf16 logits are not upcast"),
    (through_probabilities, CERTAIN, "^not finite for models that are certain"),
    (no_gradient_where_nothing_is_left, CERTAIN, "gradient not finite for models that are certain"),
    (clamped_far_away, CERTAIN, "float32 value for models that are certain"),
    (infinities_meet, IMPOSSIBLE, "value with entries of -inf in both models, which count 0: NaN in 6 of 6 places"),
    (zero_times_infinity, IMPOSSIBLE, "value with entries of -inf in both models, which count 0: NaN in 6 of 6 places"),
    (impossible_entries_are_masked_too_late, IMPOSSIBLE, "entries of -inf spoil the gradient"),
    (zero_without_a_teacher, UNFIT, "no teacher: not refused"),
    (another_width_is_cut, UNFIT, "another width: not refused"),
    (ids_are_clamped, UNFIT, "ids beyond the student's: not refused"),
    (any_temperature, UNFIT, "another temperature: not refused"),
    (top_k_on_another_scale, DENSE, "top-k value with k = V"),
    (top_k_gradient_on_another_scale, DENSE, "top-k gradient with k = V"),
    (top_k_renormalised, REST, "top-k value: k classes"),
    (top_k_cut_off, REST, "top-k value: k classes"),
    (top_k_teacher_renormalised, REST, "top-k value: k classes"),
    (top_k_gradient_on_another_scale, REST, "top-k gradient: off"),
    (tail_mass_as_a_log, TAIL, "value with the tail mass stated"),
    (logarithm_of_the_tail, TAIL, "a tail mass just below zero gives no number"),
    (root_of_the_tail, TAIL, "a tail mass just below zero has no gradient"),
    (top_k_in_place, TAIL, "a top-k signal was changed in place"),
    (top_k_counts_for_more, BOUND, "a coarser signal gives a larger value"),
    (divided_by_the_block, CUTS, "blocks of 3 tokens: loss"),
    (one_id_is_padding, CUTS, "blocks of 1 tokens: loss"),
    (a_gradient_of_nothing, CUTS, "blocks of 1 tokens: gradient of"),
    (a_gradient_of_nothing, BF16, "the gradient points elsewhere"),
]


def suite(fault):
    def reference(teacher, student, labels):
        p, q = teacher.softmax(-1), student.softmax(-1)
        return (p * (p.log() - q.log())).sum(-1)

    return variant(
        TokenLossConformance, build=lambda temperature=1.0: lambda x: fault(x, temperature), reference=reference
    )


@pytest.mark.parametrize(("loss", "test", "reason"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_loss_fails(loss, test, reason, tmp_path):
    with pytest.raises((AssertionError, RuntimeError), match=reason):
        check(suite(loss), test, tmp_path)


@pytest.mark.parametrize("test", checks_of(TokenLossConformance))
def test_a_right_loss_passes_and_no_test_is_idle(test, tmp_path):
    assert test in {caught for _, caught, _ in WRONG}
    check(suite(right), test, tmp_path)
