"""Deliberately wrong losses of hidden states: each fails the suite for its own reason, and every check catches one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import wrong_hidden_losses as wrong
from suites import check, checks_of, variant

from kdkit.api import DataError
from kdkit.testing.conformance import RepresentationLossConformance


def formula(student, teacher):
    return sum(((own - its) ** 2).sum(-1) / own.shape[-1] for own, its in zip(student, teacher, strict=True))


LAYERS, MAPS = "test_layers_are_pairs_of_whole_numbers", "test_a_projector_maps_the_students_width_to_the_teachers"
SEED, LEARNS = "test_projectors_start_from_the_seed", "test_every_parameter_of_a_projector_learns"
REFUSED, FORMULA = "test_widths_that_cannot_be_compared_are_refused", "test_value_and_gradient_are_those_of_the_formula"
WIDTHS, SLOPE = "test_pairs_of_layers_may_have_other_widths_than_the_next", "test_the_gradient_is_that_of_the_value"
MANY, SHAPE = "test_many_tokens_with_and_without_gradients", "test_one_value_per_token_in_the_dtype_of_the_states"
ZERO, SIGN = "test_zero_with_zero_gradient_where_the_states_agree", "test_never_negative_where_zero_is_equality"
ITSELF, OTHERS = "test_every_token_counts_for_itself", "test_a_token_has_no_gradient_in_the_value_of_another"
ZEROS, TWICE = "test_a_state_of_zeros_spoils_nothing", "test_the_same_twice_whatever_came_before"
STAY, TEACHER = "test_the_states_stay_as_they_are", "test_no_gradient_reaches_the_teacher"
FLOAT32, BF16 = "test_float32_is_near_float64_at_a_real_width", "test_bf16_products_stay_near_float64"
CUTS = "test_the_gradient_is_that_of_whole_rows_however_they_are_cut"
WRONG = [
    (wrong.OneList, LAYERS, r"layers are pairs of whole numbers \(student, teacher\), got 1"),
    (wrong.LayersAsText, LAYERS, r"pairs of whole numbers \(student, teacher\), got \('1', '2'\)"),
    (wrong.Twice, LAYERS, "a pair of layers appears twice"),
    (wrong.OtherLayersEachTime, LAYERS, "another instance asks for other layers"),
    (wrong.TheOtherWay, MAPS, "mat1 and mat2"),
    (wrong.ToAThirdWidth, MAPS, r"from 6 to 9: it gives \(6, 10\)"),
    (wrong.AFunction, MAPS, "a projector is a module or None, got function"),
    (wrong.CentresTokens, MAPS, "a state that is projected alone: off"),
    (wrong.DropsOut, MAPS, "a state that is projected alone: off"),
    (wrong.OneForAllPairs, SEED, "pairs of layers share a projector"),
    (wrong.ASeedOfItsOwn, SEED, "the same seed gives another projector"),
    (wrong.Frozen, LEARNS, "the projector's weight has no gradient"),
    (wrong.NotRegistered, LEARNS, "a projector has no parameters"),
    (wrong.Unused, LEARNS, "the projector's scale has no gradient"),
    (wrong.CutToTheSmaller, REFUSED, "not refused with ModelError"),
    (wrong.AnotherError, REFUSED, "the data have other widths"),
    (wrong.TwoLines, REFUSED, "more than one line"),
    (wrong.SumOverTheWidth, FORMULA, "^value: off"),
    (wrong.MeanOfThePairs, FORMULA, "^value: off"),
    (wrong.FirstPairOnly, FORMULA, "^value: off"),
    (wrong.TwiceTheGradient, FORMULA, "^gradient of the value: off"),
    (wrong.NoGradient, FORMULA, "the value has no gradient"),
    (wrong.Stacked, WIDTHS, "stack expects each tensor to be equal size"),
    (wrong.WidthOfTheFirstPair, WIDTHS, "^value of pairs of several widths: off"),
    (wrong.TwiceTheGradient, SLOPE, "the slope is .*, not"),
    (wrong.LastBlockLost, MANY, "value of 1,021 tokens: off"),
    (wrong.NothingWithoutGradients, MANY, "value without gradients: off"),
    (wrong.OneNumber, SHAPE, r"one value per token: \(1,\), got \(\)"),
    (wrong.OnePerPair, SHAPE, r"one value per token: \(1,\), got \(1, 3\)"),
    (wrong.AlwaysDouble, SHAPE, "torch.float32 states gave torch.float64"),
    (wrong.AFloor, ZERO, "not zero where the states agree"),
    (wrong.PullsAtEquality, ZERO, "a gradient where they agree"),
    (wrong.SignedDifference, SIGN, "a distance is not negative"),
    (wrong.MeanOfTheBlock, ITSELF, "value of two blocks: off"),
    (wrong.AfterTheFirst, ITSELF, "after a permutation of the tokens: off"),
    (wrong.CentredOverTokens, ITSELF, "value of two blocks: off"),
    (wrong.ScaledByTheBlock, ITSELF, "value of two blocks: off"),
    (wrong.OnlyAmongOthers, ITSELF, "value of a token alone: off"),
    (wrong.GradientToNeighbours, OTHERS, "a token has a gradient in the value of another"),
    (wrong.DividedByTheLength, ZEROS, r"not finite for a state of zeros \(student\)"),
    (wrong.RootOfTheSquares, ZEROS, r"gradient not finite for a state of zeros \(student\)"),
    (wrong.ZerosAreLeftOut, ZEROS, r"value beside a state of zeros \(student\): off"),
    (wrong.RunningMean, TWICE, "two calls give different values"),
    (wrong.Noisy, TWICE, "two calls give different values"),
    (wrong.NoisyGradient, TWICE, "two calls give different gradients"),
    (wrong.WritesIntoTheStudent, STAY, "the loss wrote into the student's states in place"),
    (wrong.WritesIntoTheTeacher, STAY, "the loss wrote into the teacher's states in place"),
    (wrong.GradientToTheTeacher, TEACHER, "the teacher has a gradient"),
    (wrong.RoundedValue, FLOAT32, "^float32 value: off"),
    (wrong.InHalfPrecision, FLOAT32, "^float32 value: off"),
    (wrong.GradientInHalfPrecision, FLOAT32, "float32 gradient is off"),
    (wrong.BoundedEntries, FLOAT32, "float64 value of a real width: off"),
    (wrong.WrongForSevenTokens, CUTS, "blocks of 7 tokens: loss"),
    (wrong.GradientLostForSevenTokens, CUTS, "blocks of 7 tokens: gradient of"),
    (wrong.LostInBf16, BF16, "the gradient points elsewhere"),
]


def suite(loss):
    return variant(
        RepresentationLossConformance,
        build=loss,
        reference=formula,
        widths_differ=not issubclass(loss, wrong.NoProjector),
    )


@pytest.mark.parametrize(("loss", "test", "reason"), WRONG)
def test_a_wrong_loss_fails_for_its_own_reason(loss, test, reason, tmp_path):
    with pytest.raises((AssertionError, RuntimeError, DataError), match=reason):
        check(suite(loss), test, tmp_path)


@pytest.mark.parametrize("test", checks_of(RepresentationLossConformance))
def test_right_losses_pass_and_no_check_is_idle(test, tmp_path):
    assert test in {caught for _, caught, _ in WRONG}
    passed = 0
    for loss in (wrong.Right, wrong.NoProjector):
        try:
            check(suite(loss), test, tmp_path)
        except pytest.skip.Exception:
            continue
        passed += 1
    assert passed, "neither loss was checked"


def test_a_loss_that_is_not_zero_where_the_states_agree_says_so(tmp_path):
    """Its value there is below what it is elsewhere, or it is no distance: the suite asks for neither."""
    for test in (ZERO, SIGN):
        with pytest.raises(pytest.skip.Exception, match="not zero at equality"):
            check(variant(suite(wrong.SignedDifference), zero_at_equality=False), test, tmp_path)
