"""Does a loss between models with different tokenizers compute what it says, one group at a time?

Subclass :class:`AlignedLossConformance` in a test file, say how the loss is built and what it should be, and run
pytest:

    class TestULD(AlignedLossConformance):
        def build(self):
            return kdkit.build("loss", "uld", merge="first")

        def reference(self, student, teacher, student_labels, teacher_labels):
            p, q = (z[0].softmax(-1).sort(descending=True).values for z in (student, teacher))
            width = max(len(p), len(q))
            p, q = (torch.nn.functional.pad(x, (0, width - len(x))) for x in (p, q))
            return (p - q).abs().sum()

The reference is the textbook formula for one group alone, in float64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Final

import pytest
import torch

from kdkit.testing.conformance.aligned_engine import AlignedEngineInvariance
from kdkit.testing.conformance.completions import close
from kdkit.testing.conformance.groups import SIZES, cast, group, groups, leaves, take

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.api import AlignedLoss
    from kdkit.api.data import AlignedLossInputs

__all__ = ["AlignedLossConformance"]

_WIDTHS: Final = ((23, 17), (17, 23), (20, 20))
_ORDER: Final = (3, 0, 4, 1, 2)
_STEP: Final = 1e-6


class AlignedLossConformance(AlignedEngineInvariance):
    """What every aligned loss must fulfil.

    Attributes:
        zero_at_equality: The value is 0, its least, where both models have the same tokens and predict the same.
    """

    zero_at_equality: ClassVar[bool] = True

    def build(self) -> AlignedLoss:
        """The loss."""
        raise NotImplementedError

    def reference(self, student: Tensor, teacher: Tensor, student_labels: Tensor, teacher_labels: Tensor) -> Tensor:
        """The value of one group by the formula, a scalar that is differentiable in ``student``.

        Args:
            student: [n, V_student] float64 logits, of which row i predicts the i-th token of the group.
            teacher: [m, V_teacher].
            student_labels: [n] the student's tokens.
            teacher_labels: [m] the teacher's tokens of the same text.
        """
        raise NotImplementedError

    # -- helpers

    def _value(self, x: AlignedLossInputs) -> Tensor:
        value = self.build()(x)
        assert value.shape == (x.groups,), f"one value per group: {(x.groups,)}, got {tuple(value.shape)}"
        return value

    def _expected(self, x: AlignedLossInputs) -> Tensor:
        return torch.stack([self.reference(*group(x, number)) for number in range(x.groups)])

    # -- the formula

    def test_value_and_gradient_are_those_of_the_formula(self) -> None:
        for seed, widths in enumerate(_WIDTHS):
            x = leaves(groups(seed=seed, widths=widths))
            value, wanted = self._value(x), self._expected(x)
            what = f"of {widths[0]} tokens against {widths[1]}"
            close(value, wanted, 1e-10, f"value {what}")
            # Unequal weights: a mean over the block, or a value shared between groups, has another gradient.
            weights = torch.arange(1.0, x.groups + 1, dtype=torch.float64)
            pair = (_gradient(v, x, weights) for v in (value, wanted))
            close(next(pair), next(pair), 1e-9, f"gradient {what}")

    def test_the_gradient_is_that_of_the_value(self) -> None:
        x = leaves(groups())
        gradient = _gradient(self._value(x), x)
        for seed in range(5):
            toward = groups(seed=50 + seed).student_logits
            ends = [self._total(replace(x, student_logits=x.student_logits + s * _STEP * toward)) for s in (1, -1)]
            slope, wanted = (ends[0] - ends[1]) / (2 * _STEP), float((gradient * toward).sum())
            assert abs(slope - wanted) <= 1e-6 * max(1.0, abs(wanted)), f"the slope is {slope:.6g}, not {wanted:.6g}"

    def _total(self, x: AlignedLossInputs) -> float:
        return float(self._value(x).detach().sum())

    def test_many_groups_with_and_without_gradients(self) -> None:
        for sizes in (SIZES * 100, ((1, 1),) * 500):
            x = leaves(groups(sizes))
            wanted = self._expected(x)
            close(self._value(x), wanted, 1e-10, "value of 500 groups")
            with torch.no_grad():
                close(self._value(x), wanted, 1e-10, "value without gradients")

    def test_one_value_per_group_in_the_dtype_of_the_logits(self) -> None:
        for sizes in (SIZES[:1], SIZES):
            for dtype in (torch.float32, torch.float64):
                value = self._value(cast(groups(sizes), dtype))
                assert value.dtype is dtype, f"{dtype} logits gave {value.dtype}"

    # -- where the models agree

    def test_zero_with_zero_gradient_where_the_models_agree(self) -> None:
        if not self.zero_at_equality:
            pytest.skip("not zero at equality")
        x = leaves(groups())
        # A constant added to all logits of a row changes no probability.
        its = x.student_logits.detach() + 3.0
        same = replace(x, teacher_logits=its, teacher_labels=x.student_labels, teacher_groups=x.student_groups)
        value = self._value(same)
        assert value.abs().max() < 1e-12, "not zero where the models agree"
        exact = self._value(replace(same, teacher_logits=x.student_logits.detach().clone()))
        assert _gradient(exact, x).abs().max() < 1e-7, "a gradient where the models agree"

    def test_never_negative_where_zero_is_equality(self) -> None:
        if not self.zero_at_equality:
            pytest.skip("not zero at equality")
        for seed in range(20):
            assert (self._value(groups(seed=seed)) >= 0).all(), "a distance is not negative"

    # -- groups are independent of each other

    def test_every_group_counts_for_itself(self) -> None:
        x = groups()
        whole = self._value(x)
        close(self._value(take(x, _ORDER)), whole[list(_ORDER)], 1e-12, "value of groups in another order")
        halves = torch.cat([self._value(take(x, part)) for part in ((0, 1), (2, 3, 4))])
        close(halves, whole, 1e-12, "value of two blocks")
        for number in range(x.groups):
            close(self._value(take(x, [number])), whole[[number]], 1e-12, "value of a group alone")

    def test_a_group_has_no_gradient_in_the_value_of_another(self) -> None:
        x = leaves(groups())
        value = self._value(x)
        for number in range(x.groups):
            others = _gradient(value[number], x)[x.student_groups != number]
            assert not others.any(), "a group has a gradient in the value of another"

    # -- what it leaves alone

    def test_the_same_twice_whatever_came_before(self) -> None:
        loss, x = self.build(), leaves(groups())
        first = loss(x)
        loss(groups(seed=1))
        second = loss(x)
        assert torch.equal(first, second), "two calls give different values"
        assert torch.equal(_gradient(first, x), _gradient(second, x)), "two calls give different gradients"

    def test_the_inputs_stay_as_they_are(self) -> None:
        """In float32 an upcast is no copy, so that what follows it in place writes into what other losses read."""
        names = [f"{side}_{what}" for side in ("student", "teacher") for what in ("logits", "labels", "groups")]
        for dtype in (torch.float32, torch.float64):
            for grad in (False, True):
                x = cast(groups(), dtype)
                # Not a leaf, which torch would guard by an error of its own.
                x = replace(x, student_logits=1.0 * x.student_logits.requires_grad_(grad))
                kept = {name: getattr(x, name).detach().clone() for name in names}
                self._value(x)
                for name, before in kept.items():
                    assert torch.equal(getattr(x, name).detach(), before), f"the loss wrote into {name} in place"

    def test_no_gradient_reaches_the_teacher(self) -> None:
        x = leaves(groups())
        its = x.teacher_logits.clone().requires_grad_()
        self._value(replace(x, teacher_logits=its)).sum().backward()
        assert its.grad is None or not its.grad.any(), "the teacher has a gradient"

    # -- numbers

    def test_float32_is_near_float64_in_real_vocabularies(self) -> None:
        x = groups(SIZES[:3], widths=(20_000, 30_000), spread=4.0)
        wide, narrow = leaves(x), leaves(cast(x, torch.float32))
        exact, rough = self._value(wide), self._value(narrow)
        close(exact, self._expected(wide), 1e-9, "float64 value of real vocabularies")
        close(rough.double(), exact, 1e-4, "float32 value")
        wanted = _gradient(exact, wide)
        error = float((_gradient(rough, narrow).double() - wanted).norm() / wanted.norm())
        assert error < 1e-3, f"float32 gradient is off by {error:.1e}"

    def test_certain_models_give_the_right_value(self) -> None:
        x = leaves(cast(groups(spread=60.0), torch.float32))
        value = self._value(x)
        assert torch.isfinite(value).all(), "not finite for models that are certain"
        assert torch.isfinite(_gradient(value, x)).all(), "gradient not finite for models that are certain"
        close(value.double(), self._expected(cast(x, torch.float64)), 1e-4, "float32 value for models that are certain")


def _gradient(value: Tensor, x: AlignedLossInputs, weights: Tensor | None = None) -> Tensor:
    """Of the weighted sum of a value, with respect to the student's logits."""
    assert value.requires_grad, "the value has no gradient"
    total = value.sum() if weights is None else (weights * value).sum()
    gradient: Tensor = torch.autograd.grad(total, x.student_logits, retain_graph=True)[0]
    return gradient
