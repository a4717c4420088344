"""The suite is worth what it catches: every classic fault of published trainers must fail at least one of its tests."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn.functional import cross_entropy

from kdkit.api import Dense, KdkitError, TokenLossInputs, TopK
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


def in_place(x, t):
    if dense_only(x) and not x.student_logits.requires_grad:
        x.teacher.logits.sub_(x.teacher.logits.mean(-1, keepdim=True))
    return right(x, t)


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
        x.teacher.logprobs.add_(1e-3)
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


FAULTS = (
    only_the_top_300,
    last_chunk_lost,
    nothing_without_gradients,
    clamped_far_away,
    tail_mass_as_a_log,
    any_temperature,
    view_of_the_logits,
    another_width_is_cut,
    zero_without_a_teacher,
    seven_is_padding,
    top_k_in_place,
    infinities_meet,
    zero_times_infinity,
    mean_of_the_block,
    divided_by_the_block,
    one_number,
    no_temperature_squared,
    temperature_squared_in_the_value_only,
    temperature_of_the_student_only,
    no_teacher_entropy,
    the_other_direction,
    with_half_a_cross_entropy,
    shifted_again,
    one_id_is_padding,
    gradient_to_the_teacher,
    top_k_renormalised,
    top_k_cut_off,
    top_k_teacher_renormalised,
    clamped,
    in_half_precision,
    through_probabilities,
    with_dropout,
    in_place,
    divided_in_place,
    softmax_over_tokens,
    scaled_by_the_vocabulary,
)


def suite_of(fault):
    class Suite(TokenLossConformance):
        def build(self, temperature=1.0):
            return lambda x: fault(x, temperature)

        def reference(self, teacher, student, labels):
            p, q = teacher.softmax(-1), student.softmax(-1)
            return (p * (p.log() - q.log())).sum(-1)

    return Suite()


@cache
def failures(fault):
    suite, names = suite_of(fault), []
    for name, test in inspect.getmembers(suite, inspect.ismethod):
        if name.startswith("test_"):
            try:
                test()
            except (AssertionError, KdkitError, RuntimeError, AttributeError, pytest.fail.Exception):
                names.append(name)
            except pytest.skip.Exception:
                pass
    return names


def test_the_right_loss_passes_everything():
    assert failures(right) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_the_suite_catches(fault):
    assert failures(fault)


def test_a_loss_that_writes_in_place_is_told_so():
    with pytest.raises(AssertionError, match="the loss wrote into the student's logits in place"):
        suite_of(divided_in_place).test_nothing_is_written_in_place_in_float32()


def test_a_value_that_is_no_number_is_told_so():
    told = "entries of -inf in both models, which count 0: NaN in 6 of 6 places"
    with pytest.raises(AssertionError, match=told):
        suite_of(zero_times_infinity).test_entries_that_are_impossible_in_both_models()


def test_no_test_of_the_suite_is_idle():
    """Every test must be the reason of at least one failure."""
    caught = {name for fault in FAULTS for name in failures(fault)}
    own = {name for name, _ in inspect.getmembers(TokenLossConformance, inspect.isfunction) if name.startswith("test_")}
    assert own <= caught, own - caught
