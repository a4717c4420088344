"""Does a token loss compute what it says, and can the engine cut it into blocks?

Subclass :class:`TokenLossConformance` in a test file, say how the loss is built and what it should be, and run pytest:

    class TestForwardKL(TokenLossConformance):
        def build(self, temperature=1.0):
            return kdkit.build("loss", "forward-kl", temperature=temperature)

        def reference(self, teacher, student, labels):
            p, q = teacher.softmax(-1), student.softmax(-1)
            return (p * (p.log() - q.log())).sum(-1)

The reference is the textbook formula at temperature 1, without blocks, masks or care for small numbers; everything is
compared in float64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Final

import pytest
import torch

from kdkit.api.data import Dense, TokenLossInputs, TopK
from kdkit.api.errors import ConformanceError
from kdkit.testing.conformance.engine import EngineInvariance

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.api import TokenLoss

__all__ = ["TokenLossConformance"]

_V: Final = 29
_TEMPERATURES: Final = (0.5, 1.0, 2.0)


def logits(seed: int, rows: int = 6, width: int = _V, *, spread: float = 3.0) -> Tensor:
    """[rows, width] float64 logits, different in every row."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(rows, width, generator=generator, dtype=torch.float64)


def target_ids(rows: int = 6, width: int = _V) -> Tensor:
    """[rows] ids, among them the first and the last of the vocabulary: no id means "not here"."""
    ids = torch.randint(0, width, (rows,), generator=torch.Generator().manual_seed(9))
    ids[0], ids[-1] = 0, width - 1
    return ids


def top_k(teacher: Tensor, k: int, temperature: float) -> TopK:
    """The exact top-k signal of ``teacher``."""
    logprobs, ids = torch.log_softmax(teacher / temperature, -1).topk(k)
    return TopK(ids, logprobs, temperature=temperature)


class TokenLossConformance(EngineInvariance):
    """What every token loss must fulfil.

    Attributes:
        teacher: The loss compares with a teacher. Without one, and with signals that do not fit, it raises
            ``ConformanceError``; :func:`kdkit.train.divergences.log_classes` does that for you.
        temperature_power: The value at temperature T is T to this power times the divergence of logits / T; 2 for the
            KL family, 0 for bounded distances, None for a loss without temperature.
        zero_at_equality: The value is 0 where teacher and student agree.
        top_k: The loss takes top-k signals.
        smooth: The gradient has no jump where the models agree.
        top_k_lower_bound: A coarser signal gives no larger value: true of every f-divergence, false for mixtures whose
            weights depend on the signal, and for losses that read labels.
    """

    temperature_power: ClassVar[int | None] = 2
    zero_at_equality: ClassVar[bool] = True
    smooth: ClassVar[bool] = True
    top_k: ClassVar[bool] = True
    top_k_lower_bound: ClassVar[bool] = True

    def build(self, temperature: float = 1.0) -> TokenLoss:
        """The loss; a loss without temperature ignores the argument."""
        raise NotImplementedError

    def reference(self, teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
        """[N] values of the formula for float64 logits [N, V] at temperature 1, differentiable in ``student``.

        For top-k signals it is asked for K + 1 classes, the last one the rest, with labels that count in them.
        """
        raise NotImplementedError

    # -- helpers

    def _temperatures(self) -> tuple[float, ...]:
        return (1.0,) if self.temperature_power is None else _TEMPERATURES

    def _value(self, student: Tensor, signal: Tensor | TopK, labels: Tensor, temperature: float = 1.0) -> Tensor:
        teacher = Dense(signal) if isinstance(signal, torch.Tensor) else signal
        value = self.build(temperature)(TokenLossInputs(student, teacher if self.teacher else None, labels))
        assert value.shape == labels.shape, f"one value per token: {tuple(labels.shape)}, got {tuple(value.shape)}"
        return value

    def _expected(self, teacher: Tensor, student: Tensor, labels: Tensor, temperature: float) -> Tensor:
        value = self.reference(teacher / temperature, student / temperature, labels)
        return value * temperature ** (self.temperature_power or 0)

    # -- the formula

    def test_value_and_gradient_are_those_of_the_formula(self) -> None:
        for temperature in self._temperatures():
            teacher, labels = logits(0), target_ids()
            mine, its = logits(1).requires_grad_(), logits(1).requires_grad_()
            value = self._value(mine, teacher, labels, temperature)
            wanted = self._expected(teacher, its, labels, temperature)
            _close(value, wanted, 1e-9, f"value at temperature {temperature}")
            # Unequal weights: a mean over the block, or a value shared between rows, has another gradient.
            weights = torch.arange(1.0, len(labels) + 1, dtype=torch.float64)
            _close(_gradient(value, mine, weights), _gradient(wanted, its, weights), 1e-8, "gradient")

    def test_many_tokens_of_every_id_with_and_without_gradients(self) -> None:
        rows = 1021
        labels = torch.arange(rows) % _V
        teacher, student = logits(0, rows, _V + 3)[:, :_V], logits(1, rows, _V + 3)[:, :_V]
        wanted = self._expected(teacher, student, labels, 1.0)
        _close(self._value(student, teacher, labels), wanted, 1e-9, "value of 1,021 tokens, of logits cut to a width")
        with torch.no_grad():
            _close(self._value(student, teacher, labels), wanted, 1e-9, "value without gradients")

    def test_one_value_per_token_in_the_dtype_of_the_logits(self) -> None:
        for rows in (1, 6):
            for dtype in (torch.float32, torch.float64):
                student, teacher = logits(1, rows).to(dtype), logits(0, rows).to(dtype)
                value = self._value(student, teacher, target_ids(rows))
                assert value.dtype is dtype, f"{dtype} logits gave {value.dtype}"

    def test_zero_with_zero_gradient_where_the_models_agree(self) -> None:
        if not (self.teacher and self.zero_at_equality):
            pytest.skip("not zero at equality")
        for temperature in self._temperatures():
            student = logits(2).requires_grad_()
            # A constant added to all logits of a row changes no probability.
            teacher = student.detach() + torch.arange(6.0, dtype=torch.float64)[:, None]
            value = self._value(student, teacher, target_ids(), temperature)
            assert value.abs().max() < 1e-12, "not zero where the models agree"
            gradient = _gradient(value, student)
            assert not self.smooth or gradient.abs().max() < 1e-7, "a gradient where the models agree"

    def test_never_negative_where_zero_is_equality(self) -> None:
        if not (self.teacher and self.zero_at_equality):
            pytest.skip("not zero at equality")
        for seed in range(20):
            value = self._value(logits(seed), logits(seed + 100), target_ids())
            assert (value >= 0).all(), "a divergence is not negative"

    # -- tokens are independent of each other

    def test_every_token_counts_for_itself(self) -> None:
        student, teacher, labels = logits(1), logits(0), target_ids()
        whole = self._value(student, teacher, labels)
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        moved = self._value(student[order], teacher[order], labels[order])
        _close(moved, whole[order], 1e-12, "value after a permutation of the tokens")
        for row in range(len(labels)):
            alone = slice(row, row + 1)
            single = self._value(student[alone], teacher[alone], labels[alone])
            _close(single, whole[alone], 1e-12, "value of a token alone")

    def test_the_same_twice_and_the_inputs_stay_as_they_are(self) -> None:
        student, teacher, labels = logits(1), logits(0), target_ids()
        kept = student.clone(), teacher.clone(), labels.clone()
        first, second = (self._value(student, teacher, labels) for _ in range(2))
        with torch.no_grad():
            self._value(student, teacher, labels)
        assert torch.equal(first, second), "two calls give different values"
        for now, before in zip((student, teacher, labels), kept, strict=True):
            assert torch.equal(now, before), "an input was changed in place"

    def test_nothing_is_written_in_place_in_float32(self) -> None:
        """In float32 an upcast is no copy, so that what follows it in place writes into what other losses read."""
        for temperature in self._temperatures():
            for grad in (False, True):
                # Not a leaf, which torch would guard by an error of its own.
                student, teacher = (1.0 * logits(seed).float().requires_grad_(grad) for seed in (1, 0))
                kept = student.detach().clone(), teacher.detach().clone()
                self._value(student, teacher.detach(), target_ids(), temperature)
                for name, now, before in zip(("student", "teacher"), (student, teacher), kept, strict=True):
                    assert torch.equal(now.detach(), before), f"the loss wrote into the {name}'s logits in place"

    def test_no_gradient_reaches_the_teacher(self) -> None:
        if not self.teacher:
            pytest.skip("no teacher")
        student, teacher = logits(1).requires_grad_(), logits(0).requires_grad_()
        self._value(student, teacher, target_ids()).sum().backward()
        assert teacher.grad is None or not teacher.grad.any(), "the teacher has a gradient"

    # -- numbers

    def test_float32_is_near_float64_in_a_real_vocabulary(self) -> None:
        # Models that half agree: where they do not at all, bounded losses have next to no gradient to compare.
        teacher = logits(0, 3, 50_000, spread=4.0)
        student = teacher + logits(1, 3, 50_000, spread=1.0)
        labels, values, gradients = target_ids(3, 50_000), [], []
        for dtype in (torch.float64, torch.float32):
            z = student.to(dtype).requires_grad_()
            value = self._value(z, teacher.to(dtype), labels)
            values.append(value.detach().double())
            gradients.append(_gradient(value, z).double())
        wanted = self._expected(teacher, student, labels, 1.0)
        _close(values[0], wanted, 1e-9, "float64 value of a real vocabulary")
        _close(values[1], values[0], 1e-4, "float32 value")
        error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
        assert error < 1e-4, f"float32 gradient is off by {float(error):.1e}"

    def test_half_precision_logits_are_computed_in_float32(self) -> None:
        student, teacher = (logits(seed).to(torch.bfloat16) for seed in (1, 0))
        wanted = self._value(student.float(), teacher.float(), target_ids())
        got = self._value(student, teacher, target_ids())
        assert torch.equal(got, wanted), "bf16 logits are not upcast before the first operation"

    def test_certain_models_give_the_right_value(self) -> None:
        student = (30 * logits(1)).float().requires_grad_()
        signals: list[Tensor | TopK] = [(30 * logits(0)).float()]
        if self.teacher and self.top_k:
            signals.append(top_k(30 * logits(0).float(), 3, 1.0))
        for signal in signals:
            value = self._value(student, signal, target_ids())
            assert torch.isfinite(value).all(), "not finite for models that are certain"
            assert torch.isfinite(_gradient(value, student)).all(), "gradient not finite for models that are certain"
            if isinstance(signal, torch.Tensor):
                exact = self._expected(signal.double(), student.detach().double(), target_ids(), 1.0)
                _close(value.double(), exact, 1e-4, "float32 value for models that are certain")

    def test_entries_that_are_impossible_in_both_models(self) -> None:
        student, teacher = logits(1), logits(0)
        labels = target_ids().clamp(max=_V - 3)
        wanted = self._value(student[:, :-2], teacher[:, :-2], labels)
        student[:, -2:] = teacher[:, -2:] = -torch.inf
        student.requires_grad_()
        value = self._value(student, teacher, labels)
        _close(value, wanted, 1e-9, "value with entries of -inf in both models, which count 0")
        assert torch.isfinite(_gradient(value, student)).all(), "entries of -inf spoil the gradient"

    def test_signals_that_do_not_fit_are_refused(self) -> None:
        if not self.teacher:
            pytest.skip("no teacher")
        unfit: dict[str, Dense | TopK | None] = {"no teacher": None, "another width": Dense(logits(0)[:, :-1])}
        if self.top_k:
            unfit["ids beyond the student's"] = TopK(torch.full((6, 1), _V), torch.zeros(6, 1, dtype=torch.float64))
            if self.temperature_power is not None:
                unfit["another temperature"] = top_k(logits(0), 3, 1.5)
        for what, signal in unfit.items():
            try:
                self.build()(TokenLossInputs(logits(1), signal, target_ids()))
            except ConformanceError:
                continue
            raise AssertionError(f"{what}: not refused with ConformanceError")

    # -- top-k signals

    def test_top_k_of_everything_is_the_dense_value(self) -> None:
        self._wants_top_k()
        for temperature in self._temperatures():
            results = []
            for signal in (logits(0), top_k(logits(0), _V, temperature)):
                student = logits(1).requires_grad_()
                value = self._value(student, signal, target_ids(), temperature)
                results.append((value, _gradient(value, student)))
            _close(results[1][0], results[0][0], 1e-9, "top-k value with k = V")
            _close(results[1][1], results[0][1], 1e-8, "top-k gradient with k = V")

    def test_top_k_is_the_formula_on_k_classes_and_the_rest(self) -> None:
        self._wants_top_k()
        for temperature in self._temperatures():
            teacher, labels, signal = logits(0), target_ids(), top_k(logits(0), 5, temperature)
            mine, its = (self._leaking(signal.ids).requires_grad_() for _ in range(2))
            value = self._value(mine, signal, labels, temperature)
            classes = (_classes(z / temperature, signal.ids) for z in (teacher, its))
            places = _places(labels, signal.ids)
            wanted = self.reference(next(classes), next(classes), places) * temperature ** (self.temperature_power or 0)
            _close(value, wanted, 1e-7, "top-k value: k classes and one for the rest, nothing renormalised")
            _close(_gradient(value, mine), _gradient(wanted, its), 1e-6, "top-k gradient")

    def test_a_tail_mass_that_is_stated_is_the_one_that_is_used(self) -> None:
        self._wants_top_k()
        signal = top_k(logits(0), 5, 1.0)
        kept = signal.ids.clone(), signal.logprobs.clone()
        rest = 1 - signal.logprobs.exp().sum(-1)
        plain = self._value(logits(1), signal, target_ids())
        stated = TopK(signal.ids, signal.logprobs, tail_mass=rest)
        _close(self._value(logits(1), stated, target_ids()), plain, 1e-7, "value with the tail mass stated")
        student = logits(1).requires_grad_()
        # What rounding leaves of 1 - sum(p) can lie below zero.
        rounded = TopK(signal.ids, signal.logprobs, tail_mass=torch.full_like(rest, -1e-12))
        value = self._value(student, rounded, target_ids())
        assert torch.isfinite(value).all(), "a tail mass just below zero gives no number"
        assert torch.isfinite(_gradient(value, student)).all(), "a tail mass just below zero has no gradient"
        for now, before in zip((signal.ids, signal.logprobs), kept, strict=True):
            assert torch.equal(now, before), "a top-k signal was changed in place"

    def test_top_k_is_a_lower_bound(self) -> None:
        self._wants_top_k()
        if not self.top_k_lower_bound:
            pytest.skip("no lower bound")
        dense = self._value(logits(1), logits(0), target_ids())
        values = [self._value(logits(1), top_k(logits(0), k, 1.0), target_ids()) for k in (1, 4, 12, _V)]
        for coarse, fine in zip(values, [*values[1:], dense], strict=True):
            assert (coarse <= fine + 1e-9).all(), "a coarser signal gives a larger value"

    def _wants_top_k(self) -> None:
        if not (self.teacher and self.top_k):
            pytest.skip("takes no top-k signal")

    @staticmethod
    def _leaking(ids: Tensor) -> Tensor:
        """A student that puts much of its mass outside the teacher's top-k, which a renormalised loss cannot see."""
        return logits(1).scatter_add(-1, ids, torch.full(ids.shape, -3.0, dtype=torch.float64))


def _classes(z: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the ids and of everything else, [N, K + 1]: logits of the coarse distribution."""
    probabilities = z.softmax(-1)
    kept = probabilities.gather(-1, ids)
    return torch.cat([kept, (1 - kept.sum(-1, keepdim=True)).clamp_min(math.ulp(0.0))], -1).log()


def _places(labels: Tensor, ids: Tensor) -> Tensor:
    """Where the labels stand among the K + 1 classes: at their place in ``ids``, or last."""
    found = ids == labels[:, None]
    return torch.where(found.any(-1), found.int().argmax(-1), torch.full_like(labels, ids.shape[-1]))


def _gradient(value: Tensor, student: Tensor, weights: Tensor | None = None) -> Tensor:
    total = value.sum() if weights is None else (weights.to(value.dtype) * value).sum()
    (gradient,) = torch.autograd.grad(total, student)
    return gradient


def _close(got: Tensor, wanted: Tensor, rtol: float, what: str) -> None:
    got, wanted = got.detach(), wanted.detach()
    assert got.shape == wanted.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    nan = got.isnan() & ~wanted.isnan()
    assert not nan.any(), f"{what}: NaN in {int(nan.sum())} of {nan.numel()} places"
    error = (got - wanted).abs() - rtol * (wanted.abs() + wanted.abs().max() * 1e-3)
    assert (error <= 1e-14).all(), f"{what}: off by up to {float((got - wanted).abs().max()):.2e}"
