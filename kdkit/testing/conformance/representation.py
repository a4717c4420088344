"""Does a loss of hidden states compute what it says, one token at a time?

Subclass :class:`RepresentationLossConformance` in a test file, say how the loss is built and what it should be, and run
pytest:

    class TestHiddenMSE(RepresentationLossConformance):
        def build(self):
            return kdkit.build("loss", "hidden-mse")

        def reference(self, student, teacher):
            return sum(((own - its) ** 2).mean(-1) for own, its in zip(student, teacher))

The reference is the textbook formula for states that are projected already, in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

import pytest
import torch
from torch import nn

from kdkit.api.data import RepresentationLossInputs
from kdkit.api.errors import ModelError
from kdkit.testing.conformance.checks import one_line
from kdkit.testing.conformance.completions import close
from kdkit.testing.conformance.hidden_engine import HiddenEngineInvariance
from kdkit.testing.conformance.states import States, drawn, projectors

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.api import RepresentationLoss

__all__ = ["RepresentationLossConformance"]

_PAIRS: Final = 3
"""Pairs of layers for a loss that takes those of any model."""
_WEIGHTS: Final = torch.arange(1.0, 7.0, dtype=torch.float64)
"""Unequal ones: a mean over the block, or a value shared between tokens, has another gradient."""
_ORDER: Final = torch.tensor([3, 0, 5, 1, 4, 2])
_STEP: Final = 1e-5


class RepresentationLossConformance(HiddenEngineInvariance):
    """What every loss of hidden states must fulfil.

    Attributes:
        widths_differ: The loss compares a student with a teacher of another width. Without it, ``projector`` raises
            ``ModelError`` for them.
        zero_at_equality: The value is 0, its least, where the projected states equal the teacher's.
    """

    widths_differ: ClassVar[bool] = True
    zero_at_equality: ClassVar[bool] = True

    def build(self) -> RepresentationLoss:
        """The loss."""
        raise NotImplementedError

    def reference(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
        """[N] values of the formula for float64 states, [N, D] for each pair of layers, differentiable in the first."""
        raise NotImplementedError

    # -- helpers

    def _states(self, *widths: tuple[int, int], rows: int = 6, seed: int = 0) -> States:
        """States for the pairs that the loss asked for; ``widths`` are taken in turn."""
        loss, given = self.build(), widths or self._widths()[:1]
        pairs = [given[i % len(given)] for i in range(len(loss.layers) or _PAIRS)]
        return States.of(loss, pairs, rows=rows, seed=seed)

    def _widths(self) -> tuple[tuple[int, int], ...]:
        """Of student and teacher."""
        return ((6, 9), (8, 8), (9, 6)) if self.widths_differ else ((6, 6), (9, 9))

    def _value(self, states: States) -> Tensor:
        value = self.build()(states.inputs())
        rows = states.teacher[0].shape[:1]
        assert value.shape == rows, f"one value per token: {tuple(rows)}, got {tuple(value.shape)}"
        return value

    def _expected(self, states: States) -> Tensor:
        return self.reference(states.projected(), states.teacher)

    # -- layers and projectors

    def test_layers_are_pairs_of_whole_numbers(self) -> None:
        asked = list(self.build().layers)
        for pair in asked:
            whole = isinstance(pair, tuple | list) and len(pair) == 2 and all(type(layer) is int for layer in pair)
            assert whole, f"layers are pairs of whole numbers (student, teacher), got {pair}"
        assert len({*map(tuple, asked)}) == len(asked), "a pair of layers appears twice"
        assert asked == list(self.build().layers), "another instance asks for other layers"

    def test_a_projector_maps_the_students_width_to_the_teachers(self) -> None:
        for widths in self._widths():
            (module,) = projectors(self.build(), [widths])
            if module is None:
                continue
            assert isinstance(module, nn.Module), f"a projector is a module or None, got {type(module).__name__}"
            states = drawn(0, 6, widths[0])
            whole = module.double()(states)
            assert whole.shape == (6, widths[1]), f"from {widths[0]} to {widths[1]}: it gives {tuple(whole.shape)}"
            alone = torch.cat([module(states[row : row + 1]) for row in range(6)])
            close(alone, whole, 1e-12, "a state that is projected alone")

    def test_projectors_start_from_the_seed(self) -> None:
        widths = self._widths()[0]
        one, two = (_parameters(module) for module in projectors(self.build(), [widths] * 2))
        if not one:
            pytest.skip("no projector")
        assert not {*map(id, one)} & {*map(id, two)}, "pairs of layers share a projector"
        again = _parameters(projectors(self.build(), [widths])[0])
        same = len(one) == len(again) and all(map(torch.equal, one, again))
        assert same, "the same seed gives another projector"

    def test_every_parameter_of_a_projector_learns(self) -> None:
        states = self._states()
        made = [module for module in states.maps if not isinstance(module, nn.Identity)]
        if not made:
            pytest.skip("no projector")
        self._value(states).sum().backward()
        assert all(any(True for _ in module.parameters()) for module in made), "a projector has no parameters"
        for module in made:
            for name, parameter in module.named_parameters():
                learns = parameter.grad is not None and bool(parameter.grad.any())
                assert learns, f"the projector's {name} has no gradient"

    def test_widths_that_cannot_be_compared_are_refused(self) -> None:
        if self.widths_differ:
            pytest.skip("compares any widths")
        what = "states of 6 and 9 numbers"
        try:
            self.build().projector(6, 9)
        except ModelError as error:
            one_line(error, what)
            return
        raise AssertionError(f"{what}: not refused with ModelError")

    # -- the formula

    def test_value_and_gradient_are_those_of_the_formula(self) -> None:
        for seed in range(3):
            self._same_as_the_formula(self._states(seed=seed), "value")

    def test_pairs_of_layers_may_have_other_widths_than_the_next(self) -> None:
        self._same_as_the_formula(self._states(*self._widths()), "value of pairs of several widths")

    def _same_as_the_formula(self, states: States, what: str) -> None:
        value, wanted = self._value(states), self._expected(states)
        close(value, wanted, 1e-10, what)
        pairs = zip(states.gradients(value, _WEIGHTS), states.gradients(wanted, _WEIGHTS), strict=True)
        for mine, its in pairs:
            close(mine, its, 1e-9, f"gradient of the {what}")

    def test_the_gradient_is_that_of_the_value(self) -> None:
        states = self._states()
        gradients = states.gradients(self._value(states))
        for index, gradient in enumerate(gradients):
            toward = drawn(50 + index, 1, gradient.numel()).view_as(gradient)
            ends = [self._moved(states, index, sign * _STEP * toward) for sign in (1, -1)]
            slope, wanted = (ends[0] - ends[1]) / (2 * _STEP), float((gradient * toward).sum())
            assert abs(slope - wanted) <= 1e-5 * max(1.0, abs(wanted)), f"the slope is {slope:.6g}, not {wanted:.6g}"

    def _moved(self, states: States, index: int, step: Tensor) -> float:
        """The sum of the values where one of the learned tensors is moved."""
        leaf = states.learned()[index]
        with torch.no_grad():
            kept = leaf.clone()
            leaf += step
        value = float(self._value(states).detach().sum())
        with torch.no_grad():
            leaf.copy_(kept)
        return value

    def test_many_tokens_with_and_without_gradients(self) -> None:
        states = self._states(rows=1021)
        wanted = self._expected(states)
        close(self._value(states), wanted, 1e-10, "value of 1,021 tokens")
        with torch.no_grad():
            close(self._value(states), wanted, 1e-10, "value without gradients")

    def test_one_value_per_token_in_the_dtype_of_the_states(self) -> None:
        for rows in (1, 6):
            for dtype in (torch.float32, torch.float64):
                states = self._states(rows=rows)
                value = self.build()(_cast(states, dtype))
                assert value.shape == (rows,), f"one value per token: {(rows,)}, got {tuple(value.shape)}"
                assert value.dtype is dtype, f"{dtype} states gave {value.dtype}"

    # -- where the models agree

    def _agreeing(self, seed: int) -> States:
        """States that the projectors map to the teacher's."""
        states = self._states((6, 6), seed=seed)
        return States(states.student, tuple(state.detach().clone() for state in states.projected()), states.maps)

    def test_zero_with_zero_gradient_where_the_states_agree(self) -> None:
        if not self.zero_at_equality:
            pytest.skip("not zero at equality")
        states = self._agreeing(1)
        value = self._value(states)
        assert value.abs().max() < 1e-12, "not zero where the states agree"
        assert all(gradient.abs().max() < 1e-7 for gradient in states.gradients(value)), "a gradient where they agree"

    def test_never_negative_where_zero_is_equality(self) -> None:
        if not self.zero_at_equality:
            pytest.skip("not zero at equality")
        for seed in range(20):
            assert (self._value(self._states(seed=seed)) >= 0).all(), "a distance is not negative"

    # -- tokens are independent of each other

    def test_every_token_counts_for_itself(self) -> None:
        states = self._states()
        whole = self._value(states)
        close(self._value(states.at(_ORDER)), whole[_ORDER], 1e-12, "value after a permutation of the tokens")
        halves = [self._value(states.at(rows)) for rows in (torch.arange(2), torch.arange(2, 6))]
        close(torch.cat(halves), whole, 1e-12, "value of two blocks")
        for row in range(6):
            alone = self._value(states.at(torch.tensor([row])))
            close(alone, whole[row : row + 1], 1e-12, "value of a token alone")

    def test_a_token_has_no_gradient_in_the_value_of_another(self) -> None:
        states = self._states()
        value = self._value(states)
        for row in range(6):
            own = states.gradients(value[row])[: len(states.student)]
            others = torch.arange(6) != row
            assert not any(gradient[others].any() for gradient in own), "a token has a gradient in the value of another"

    def test_a_state_of_zeros_spoils_nothing(self) -> None:
        """The embedding of an id that fills is zero, and so is the state of a row that begins with it."""
        wanted = self.build()(_cast(self._states(), torch.float64))[1:]
        for whose in ("student", "teacher", "both"):
            x = _cast(self._states(), torch.float64)
            kept = (torch.arange(6) > 0)[:, None]
            own = tuple(torch.where(kept, state, 0.0) for state in x.student) if whose != "teacher" else x.student
            its = tuple(torch.where(kept, state, 0.0) for state in x.teacher) if whose != "student" else x.teacher
            x = RepresentationLossInputs(own, its)
            value = self.build()(x)
            assert torch.isfinite(value).all(), f"not finite for a state of zeros ({whose})"
            close(value[1:], wanted, 1e-12, f"value beside a state of zeros ({whose})")
            finite = all(torch.isfinite(gradient).all() for gradient in _gradients(value, x))
            assert finite, f"gradient not finite for a state of zeros ({whose})"

    # -- what it leaves alone

    def test_the_same_twice_whatever_came_before(self) -> None:
        loss, states = self.build(), self._states()
        first = loss(states.inputs())
        loss(self._states(seed=1).inputs())
        second = loss(states.inputs())
        assert torch.equal(first, second), "two calls give different values"
        for mine, its in zip(states.gradients(first), states.gradients(second), strict=True):
            assert torch.equal(mine, its), "two calls give different gradients"

    def test_the_states_stay_as_they_are(self) -> None:
        """What comes here may be what the model or another loss still reads."""
        for dtype in (torch.float32, torch.float64):
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    x = _cast(self._states(), dtype)
                    kept = [state.detach().clone() for state in (*x.student, *x.teacher)]
                    self.build()(x)
                names = ["student"] * len(x.student) + ["teacher"] * len(x.teacher)
                for name, now, before in zip(names, (*x.student, *x.teacher), kept, strict=True):
                    assert torch.equal(now.detach(), before), f"the loss wrote into the {name}'s states in place"

    def test_no_gradient_reaches_the_teacher(self) -> None:
        states = self._states()
        leaves = tuple(state.clone().requires_grad_() for state in states.teacher)
        self._value(States(states.student, leaves, states.maps)).sum().backward()
        assert all(leaf.grad is None or not leaf.grad.any() for leaf in leaves), "the teacher has a gradient"

    # -- numbers

    def test_float32_is_near_float64_at_a_real_width(self) -> None:
        states = self._states((2048, 3072) if self.widths_differ else (2048, 2048), rows=3)
        # A few entries of a trained model's states are a thousand times as large as the others.
        scales = torch.ones(3072, dtype=torch.float64)
        scales[[5, 700]] = 1000.0
        states = states.changed(lambda state: state * scales[: state.shape[1]])
        wide, narrow = (_cast(states, dtype) for dtype in (torch.float64, torch.float32))
        exact, rough = self.build()(wide), self.build()(narrow)
        close(exact, self._expected(states), 1e-9, "float64 value of a real width")
        close(rough.double(), exact, 1e-5, "float32 value")
        pairs = zip(_gradients(rough, narrow), _gradients(exact, wide), strict=True)
        for mine, its in pairs:
            error = float((mine.double() - its).norm() / its.norm())
            assert error < 1e-4, f"float32 gradient is off by {error:.1e}"


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())


def _cast(states: States, dtype: torch.dtype) -> RepresentationLossInputs:
    """What the loss is called with, in another dtype; the student's states are no leaves, as in training."""
    own, its = states.projected(), states.teacher
    return RepresentationLossInputs(*(tuple(state.to(dtype) for state in side) for side in (own, its)))


def _gradients(value: Tensor, x: RepresentationLossInputs) -> tuple[Tensor, ...]:
    """With respect to the projected states."""
    gradients: tuple[Tensor, ...] = torch.autograd.grad(value.sum(), x.student)
    return gradients
