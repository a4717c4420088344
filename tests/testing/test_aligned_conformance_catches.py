"""Deliberately wrong aligned losses: each fails the suite for its own reason, and every check catches one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from suites import check, checks_of, variant

from kdkit.plugins.losses.aligned import ULD
from kdkit.testing.conformance import AlignedLossConformance
from kdkit.testing.conformance.groups import cast

right = ULD()


def formula(student, teacher, student_labels, teacher_labels):
    sides = []
    for logits, labels in ((student, student_labels), (teacher, teacher_labels)):
        p = logits.softmax(-1)
        sides.append(p[0] * p[1:].gather(1, labels[1:, None]).prod())
    width = max(map(len, sides))
    p, q = (torch.cat([x, x.new_zeros(width - len(x))]).sort().values for x in sides)
    return (p - q).abs().sum()


def with_gradient_of(value, other):
    return value.detach() + (other - other.detach())


def first_places(x):
    return [
        (groups[:, None] == torch.arange(x.groups)).int().argmax(0) for groups in (x.student_groups, x.teacher_groups)
    ]


def firsts(x):
    """[G, V] probabilities of the first tokens of both sides."""
    mine, its = first_places(x)
    return x.student_logits[mine].softmax(-1), x.teacher_logits[its].detach().softmax(-1)


# --- the formula


def first_tokens_only(x):
    return ULD(merge="first")(x)


def read_at_its_own_position(x):
    """The probability of a token from the row that predicts the next one."""
    return right(replace(x, student_logits=x.student_logits.roll(-1, 0)))


def not_sorted(x):
    p, q = firsts(x)
    width = min(p.shape[-1], q.shape[-1])
    return (p[:, :width] - q[:, :width]).abs().sum(-1)


def the_smaller_vocabulary_only(x):
    p, q = (values.sort(descending=True).values for values in firsts(x))
    width = min(p.shape[-1], q.shape[-1])
    return (p[:, :width] - q[:, :width]).abs().sum(-1)


def twice_the_gradient(x):
    return with_gradient_of(right(x), 2 * right(x))


def no_gradient(x):
    return right(x).detach()


def last_block_lost(x):
    value = right(x)
    return torch.where(torch.arange(x.groups) < x.groups // 64 * 64, value, 0.0) if x.groups > 64 else value


def nothing_without_gradients(x):
    return right(x) * (1.0 if torch.is_grad_enabled() else 0.0)


def one_number(x):
    return right(x).mean()


def one_per_token(x):
    return right(x)[x.student_groups]


def always_double(x):
    return right(cast(x, torch.float64))


# --- where the models agree


def a_floor(x):
    return right(x) + 1e-6


def pulls_at_equality(x):
    return right(x) + 0.01 * of_groups(x, x.student_logits - x.student_logits.detach())


def of_groups(x, values):
    """Sum of [N, V] over the tokens of every group and the vocabulary."""
    return values.new_zeros(x.groups).index_add(0, x.student_groups, values.sum(-1))


def below_zero(x):
    return right(x) - 0.3


# --- groups


def mean_of_the_block(x):
    value = right(x)
    return value.mean().expand(x.groups)


def the_first_is_special(x):
    value = right(x)
    return torch.cat([2 * value[:1], value[1:]])


def only_among_others(x):
    return right(x) * (x.groups > 1)


def gradient_to_neighbours(x):
    return right(x) + 0.1 * (x.student_logits - x.student_logits.detach()).sum()


# --- what it leaves alone


class RunningMean:
    def __init__(self):
        self.mean = None

    def __call__(self, x):
        value = right(x)
        now = value.detach().mean()
        self.mean = now if self.mean is None else 0.9 * self.mean + 0.1 * now
        return value / self.mean


def noisy_gradient(x):
    return with_gradient_of(right(x), right(x) * (1 + torch.rand(x.groups)))


def writes_into(name):
    def fault(x):
        value = right(x)
        getattr(x, name).mul_(0)
        return value

    return fault


def gradient_to_the_teacher(x):
    p, q = (
        values.sort(descending=True).values
        for values in (firsts(x)[0], x.teacher_logits[first_places(x)[1]].softmax(-1))
    )
    width = min(p.shape[-1], q.shape[-1])
    return (p[:, :width] - q[:, :width]).abs().sum(-1)


# --- numbers


def in_half_precision(x):
    return right(x) if x.student_logits.dtype is torch.float64 else right(cast(cast(x, torch.bfloat16), torch.float32))


def gradient_in_half_precision(x):
    return with_gradient_of(right(x), in_half_precision(x))


def only_the_top_50(x):
    kept = [
        z.scatter(-1, z.topk(max(0, z.shape[-1] - 50), largest=False).indices, -1e4)
        for z in (x.student_logits, x.teacher_logits)
    ]
    return right(replace(x, student_logits=kept[0], teacher_logits=kept[1]))


def without_the_largest(x):
    """A softmax that overflows."""
    p, q = (torch.exp(z) / torch.exp(z).sum(-1, keepdim=True) for z in (x.student_logits, x.teacher_logits.detach()))
    return right(replace(x, student_logits=p.log(), teacher_logits=q.log()))


def through_logarithms(x):
    return with_gradient_of(right(x), right(replace(x, student_logits=x.student_logits.softmax(-1).log())))


def clamped_far_away(x):
    return right(replace(x, student_logits=x.student_logits.clamp(-50, 50)))


# --- through the engine


def wrong_for_seven_tokens(x):
    """The engine cuts into blocks of any size, of which the direct checks try a few."""
    return right(x) * (2 if len(x.student_groups) == 7 else 1)


def divided_by_gaps(x):
    """Entries that are neighbours in rank are equal now and then, in bf16 far more often."""
    gaps = x.student_logits.sort(-1).values.diff(dim=-1)
    return right(x) + of_groups(x, 0 * (1 / gaps))


FORMULA, SLOPE = "test_value_and_gradient_are_those_of_the_formula", "test_the_gradient_is_that_of_the_value"
MANY, SHAPE = "test_many_groups_with_and_without_gradients", "test_one_value_per_group_in_the_dtype_of_the_logits"
ZERO, SIGN = "test_zero_with_zero_gradient_where_the_models_agree", "test_never_negative_where_zero_is_equality"
ITSELF, OTHERS = "test_every_group_counts_for_itself", "test_a_group_has_no_gradient_in_the_value_of_another"
TWICE, STAY = "test_the_same_twice_whatever_came_before", "test_the_inputs_stay_as_they_are"
TEACHER, FLOAT32 = "test_no_gradient_reaches_the_teacher", "test_float32_is_near_float64_in_real_vocabularies"
CERTAIN, BF16 = "test_certain_models_give_the_right_value", "test_bf16_products_stay_near_float64"
CUTS = "test_the_gradient_is_that_of_whole_rows_however_they_are_cut"
WRONG = [
    (first_tokens_only, FORMULA, "^value of 23 tokens against 17: off"),
    (read_at_its_own_position, FORMULA, "^value of 23 tokens against 17: off"),
    (not_sorted, FORMULA, "^value of 23 tokens against 17: off"),
    (the_smaller_vocabulary_only, FORMULA, "^value of 23 tokens against 17: off"),
    (twice_the_gradient, FORMULA, "^gradient of 23 tokens against 17: off"),
    (no_gradient, FORMULA, "the value has no gradient"),
    (twice_the_gradient, SLOPE, "the slope is .*, not"),
    (last_block_lost, MANY, "value of 500 groups: off"),
    (nothing_without_gradients, MANY, "value without gradients: off"),
    (one_number, SHAPE, r"one value per group: \(1,\), got \(\)"),
    (one_per_token, SHAPE, r"one value per group: \(5,\), got \(8,\)"),
    (always_double, SHAPE, "torch.float32 logits gave torch.float64"),
    (a_floor, ZERO, "not zero where the models agree"),
    (pulls_at_equality, ZERO, "a gradient where the models agree"),
    (below_zero, SIGN, "a distance is not negative"),
    (the_first_is_special, ITSELF, "value of groups in another order: off"),
    (mean_of_the_block, ITSELF, "value of two blocks: off"),
    (only_among_others, ITSELF, "value of a group alone: off"),
    (gradient_to_neighbours, OTHERS, "a group has a gradient in the value of another"),
    (RunningMean, TWICE, "two calls give different values"),
    (noisy_gradient, TWICE, "two calls give different gradients"),
    (writes_into("student_logits"), STAY, "the loss wrote into student_logits in place"),
    (writes_into("teacher_logits"), STAY, "the loss wrote into teacher_logits in place"),
    (writes_into("student_labels"), STAY, "the loss wrote into student_labels in place"),
    (writes_into("teacher_groups"), STAY, "the loss wrote into teacher_groups in place"),
    (gradient_to_the_teacher, TEACHER, "the teacher has a gradient"),
    (in_half_precision, FLOAT32, "^float32 value: off"),
    (gradient_in_half_precision, FLOAT32, "float32 gradient is off"),
    (only_the_top_50, FLOAT32, "float64 value of real vocabularies: off"),
    (without_the_largest, CERTAIN, "^not finite for models that are certain"),
    (through_logarithms, CERTAIN, "^gradient not finite for models that are certain"),
    (clamped_far_away, CERTAIN, "float32 value for models that are certain: off"),
    (wrong_for_seven_tokens, CUTS, "blocks of 7 tokens: loss"),
    (divided_by_gaps, BF16, r"the gradient points elsewhere \(cosine nan\)"),
]


def suite(loss):
    build = loss if isinstance(loss, type) else lambda: loss
    return variant(AlignedLossConformance, build=build, reference=formula)


@pytest.mark.parametrize(("loss", "test", "reason"), WRONG)
def test_a_wrong_loss_fails_for_its_own_reason(loss, test, reason, tmp_path):
    with pytest.raises(AssertionError, match=reason):
        check(suite(loss), test, tmp_path)


@pytest.mark.parametrize("test", checks_of(AlignedLossConformance))
def test_a_right_loss_passes_and_no_check_is_idle(test, tmp_path):
    assert test in {caught for _, caught, _ in WRONG}
    check(suite(right), test, tmp_path)


def test_a_loss_that_is_not_zero_where_the_models_agree_says_so(tmp_path):
    for test in (ZERO, SIGN):
        with pytest.raises(pytest.skip.Exception, match="not zero at equality"):
            check(variant(suite(below_zero), zero_at_equality=False), test, tmp_path)
