"""Does a policy loss compute what it says, whatever the batch around a completion looks like?

Subclass :class:`PolicyLossConformance` in a test file, say how the loss is built and what it should be, and run pytest:

    class TestReinforce(PolicyLossConformance):
        def build(self):
            return kdkit.build("loss", "my-plugin/reinforce")

        def reference(self, c):
            return -c.weights * c.advantages * torch.exp(c.logprobs - c.old_logprobs)

The reference is the textbook formula for one completion alone: no batch, no padding, no mask. Everything is compared in
float64, aggregated as the training engine does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import pytest
import torch

from kdkit.api.errors import ConformanceError
from kdkit.testing.conformance.completions import (
    OF_NEED,
    PER_TOKEN,
    OneCompletion,
    aggregate,
    alone,
    cast,
    close,
    completions,
    differentiated,
    filled,
    narrow,
    same,
    take,
    tensors,
)

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.api import PolicyLoss
    from kdkit.api.data import PolicyLossInputs

__all__ = ["OneCompletion", "PolicyLossConformance"]

_CUTS: Final = (
    ((0, 1, 2, 3, 4, 5),),
    ((4, 0), (3, 5), (1, 2)),
    ((2,), (1, 5, 0, 3), (4,)),
    ((0,), (1,), (2,), (3,), (4,), (5,)),
)


class PolicyLossConformance:
    """What every policy loss must fulfil.

    Attributes:
        needs: What the loss declares in ``LossSpec.policy_needs``, and ``entropy`` if it has ``wants_entropy``.
        reduction: How the values of a step become one number.
        constant_length: Of the reduction ``constant-length``.
        split_invariant: The loss of a step does not depend on how it is cut into micro-batches. False only for a loss
            that says so of itself.
        own_advantages: The loss makes its own advantages and does not read those that are given.
        zero_without_advantage: Where all advantages are 0 there is no gradient. False with a penalty beside the policy
            gradient, and with ``own_advantages``.
        clip: Bounds (low, high) of the ratio beyond which a token that would move further has no gradient, at
            importance weight 1; None does not clip.
    """

    needs: ClassVar[frozenset[Literal["teacher", "reference", "entropy"]]] = frozenset()
    reduction: ClassVar[Literal["token-mean", "sequence-mean", "constant-length"]] = "token-mean"
    constant_length: ClassVar[int] = 1
    split_invariant: ClassVar[bool] = True
    own_advantages: ClassVar[bool] = False
    zero_without_advantage: ClassVar[bool] = True
    clip: ClassVar[tuple[float, float] | None] = None

    def build(self) -> PolicyLoss:
        """The loss."""
        raise NotImplementedError

    def reference(self, c: OneCompletion) -> Tensor:
        """[T] values of one completion by the textbook formula, before any reduction."""
        raise NotImplementedError

    # -- helpers

    def _value(self, x: PolicyLossInputs) -> Tensor:
        return aggregate([self.build()(x)], [x.mask])

    def _gradients(self, x: PolicyLossInputs) -> tuple[Tensor, list[Tensor]]:
        """Loss of the step, and its gradient with respect to logprobs and entropy."""
        return differentiated(self._value, x)

    def _expected(self, x: PolicyLossInputs) -> Tensor:
        return self._reduced(x, self.reference)

    def _reduced(self, x: PolicyLossInputs, of: Callable[[OneCompletion], Tensor]) -> Tensor:
        """The step's loss from values of each completion alone."""
        rows = [of(alone(x, row)) for row, counts in enumerate(x.mask.any(dim=1).tolist()) if counts]
        if self.reduction == "token-mean":
            return torch.cat(rows).mean()
        if self.reduction == "sequence-mean":
            return torch.stack([row.mean() for row in rows]).mean()
        return torch.stack([row.sum() for row in rows]).mean() / self.constant_length

    # -- the formula

    def test_value_and_gradient_are_those_of_the_formula(self) -> None:
        for seed in range(3):
            x = completions(self.needs, seed=seed)
            same(self._gradients(x), differentiated(self._expected, x), 1e-10, "the step's loss")

    def test_without_importance_weights_they_arealone(self) -> None:
        x = replace(completions(self.needs), importance_weights=None)
        ones = replace(x, importance_weights=torch.ones_like(x.logprobs))
        same(self._gradients(x), differentiated(self._expected, ones), 1e-10, "the loss without importance weights")

    def test_where_nothing_was_learned_yet_the_ratio_is_one(self) -> None:
        if self.own_advantages or not self.zero_without_advantage:
            pytest.skip("the value is not made of the given advantages alone")
        x = completions(self.needs)
        x = replace(x, logprobs=x.old_logprobs.clone(), importance_weights=None)
        close(self._value(x), self._reduced(x, lambda c: -c.advantages), 1e-12, "at ratio 1 the mean of -A")

    def test_the_gradient_is_that_of_the_value(self) -> None:
        x, step = completions(self.needs), 1e-6
        _, gradients = self._gradients(x)
        for name, gradient in zip(("logprobs", "entropy"), gradients, strict=False):
            for row, column in x.mask.nonzero().tolist():
                moved = []
                for sign in (1, -1):
                    changed = getattr(x, name).clone()
                    changed[row, column] += sign * step
                    moved.append(float(self._value(replace(x, **{name: changed}))))
                slope = (moved[0] - moved[1]) / (2 * step)
                assert abs(slope - float(gradient[row, column])) < 1e-6, f"gradient of {name} at {row}, {column}"

    def test_without_advantages_nothing_is_learned(self) -> None:
        if not self.zero_without_advantage or self.own_advantages:
            pytest.skip("there is a gradient without advantages")
        x = completions(self.needs)
        value, gradients = self._gradients(replace(x, advantages=torch.zeros_like(x.advantages)))
        assert not value.any(), "a loss without advantages"
        assert not any(gradient.any() for gradient in gradients), "a gradient without advantages"

    def test_clipping_stops_the_token_that_would_move_further_out_and_no_other(self) -> None:
        if self.clip is None:
            pytest.skip("does not clip")
        low, high = self.clip
        for ratio, sign, learns in (
            (high * 1.05, 1, False), (high * 1.05, -1, True), (high * 0.98, 1, True), (1.0, 1, True),
            (low * 0.95, -1, False), (low * 0.95, 1, True), (low * 1.02, -1, True), (1.0, -1, True),
        ):  # fmt: skip
            x = self._at(ratio, sign)
            _, (gradient, *_) = self._gradients(x)
            what = f"at ratio {ratio:.3f} with {'a positive' if sign > 0 else 'a negative'} advantage"
            assert bool((gradient[x.mask] != 0).all()) == learns, f"{what} there is {'no' if learns else 'a'} gradient"
            assert not learns or (gradient[x.mask].sign() == -sign).all(), f"{what} the token moves the wrong way"

    def _at(self, ratio: float, sign: int) -> PolicyLossInputs:
        """Completions whose tokens all have this ratio, and an advantage of 0.5 with this sign."""
        x = replace(completions(self.needs), importance_weights=None)
        logprobs = x.old_logprobs + torch.tensor(ratio, dtype=torch.float64).log() * x.mask
        changes: dict[str, Any] = {"advantages": 0.5 * sign * x.mask}
        if x.teacher_logprobs is not None:
            changes["teacher_logprobs"] = x.old_logprobs + 0.5 * sign * x.mask
        if x.ref_logprobs is not None:
            changes["ref_logprobs"] = logprobs  # a penalty has no slope here
        return replace(x, logprobs=logprobs, **changes)

    # -- the batch around a completion

    def test_padding_changes_nothing_whatever_it_holds(self) -> None:
        x = completions(self.needs)
        wanted = self._gradients(x)
        for width, fill in ((8, 3.0), (11, 0.0), (11, -7.0), (11, 1e4), (11, float("inf")), (11, float("nan"))):
            wide = filled(completions(self.needs, width=width), fill)
            value, gradients = self._gradients(wide)
            if abs(fill) < 100:
                assert not any(g[~wide.mask].any() for g in gradients), f"padding of {fill} has a gradient"
            # Where the mask is False the engine drops whatever the gradient is.
            kept = [torch.where(wide.mask, g, 0.0)[:, :8] for g in gradients]
            same((value, kept), wanted, 1e-12, f"the loss with padding of {fill}")

    def test_a_completion_that_does_not_count_is_not_there(self) -> None:
        x = completions(self.needs)
        silent = replace(x, mask=x.mask & torch.tensor([True, False, True, True, False, True])[:, None])
        value, gradients = self._gradients(silent)
        assert not any(g[~silent.mask].any() for g in gradients), "a completion that does not count has a gradient"
        rows = torch.tensor([0, 2, 3, 5])
        what = "the loss beside completions that do not count"
        same((value, [g[rows] for g in gradients]), self._gradients(take(x, rows)), 1e-12, what)

    def test_any_cut_into_micro_batches_gives_the_same_gradient(self) -> None:
        if not self.split_invariant:
            pytest.skip("depends on how a step is cut, and says so")
        x = completions(self.needs)
        wanted = self._gradients(x)
        for cut in _CUTS:
            got = differentiated(partial(self._cut, cut), x)
            same(got, wanted, 1e-12, f"the loss of micro-batches {cut}")

    def _cut(self, cut: tuple[tuple[int, ...], ...], x: PolicyLossInputs) -> Tensor:
        """The step's loss from micro-batches, each as wide as the longest of its completions."""
        parts = [narrow(take(x, torch.tensor(rows)), int(x.lengths[list(rows)].max())) for rows in cut]
        return aggregate([self.build()(part) for part in parts], [part.mask for part in parts])

    def test_completions_may_stand_in_any_order(self) -> None:
        x, order = completions(self.needs), torch.tensor([3, 0, 5, 1, 4, 2])
        value, gradients = self._gradients(x)
        moved = self._gradients(take(x, order))
        same(moved, (value, [g[order] for g in gradients]), 1e-12, "the loss of completions in another order")

    def test_the_same_twice_and_the_inputs_stay_as_they_are(self) -> None:
        x = completions(self.needs)
        kept = {name: tensor.clone() for name, tensor in tensors(x).items()}
        first, second = self._gradients(x), self._gradients(x)
        with torch.no_grad():
            close(self._value(x), first[0], 0.0, "the value without gradients")
        for a, b in zip([first[0], *first[1]], [second[0], *second[1]], strict=True):
            assert torch.equal(a, b), "two calls give different values"
        for name, tensor in tensors(x).items():
            assert torch.equal(tensor, kept[name]), f"{name} was changed in place"

    def test_no_gradient_reaches_what_was_sampled(self) -> None:
        x = completions(self.needs)
        leaves = {name: getattr(x, name).clone().requires_grad_() for name in PER_TOKEN if getattr(x, name) is not None}
        self._value(replace(x, **leaves)).backward()
        for name, leaf in leaves.items():
            learned = name in {"logprobs", "entropy"}
            assert learned or leaf.grad is None or not leaf.grad.any(), f"{name} has a gradient"

    # -- what comes out

    def test_one_value_per_token_in_the_dtype_of_the_logprobs(self) -> None:
        for dtype in (torch.float32, torch.float64):
            x = cast(completions(self.needs), dtype)
            out = self.build()(x)
            assert out.per_token.shape == x.logprobs.shape, f"one value per token, got {tuple(out.per_token.shape)}"
            assert out.per_token.dtype is dtype, f"{dtype} gave {out.per_token.dtype}"
            assert out.aggregation in {"token-mean", "sequence-mean", "constant-length"}, out.aggregation
            has_length = (out.constant_length or 0) > 0
            assert has_length == (out.aggregation == "constant-length"), "constant_length goes with constant-length"

    def test_float32_is_near_float64(self) -> None:
        x = completions(self.needs)
        value, gradients = self._gradients(x)
        small, rough = self._gradients(cast(x, torch.float32))
        close(small.double(), value, 1e-4, "the value in float32")
        for a, b in zip(rough, gradients, strict=True):
            close(a.double(), b, 1e-4, "the gradient in float32")

    def test_metrics_are_sums_over_tokens_that_count(self) -> None:
        x = completions(self.needs)
        whole = self.build()(replace(x, logprobs=x.logprobs.clone().requires_grad_())).metrics
        parts = [self.build()(take(x, torch.tensor(rows))).metrics for rows in ([0, 4], [1, 2, 3], [5])]
        padded = self.build()(filled(completions(self.needs, width=11), 3.0)).metrics
        for name, total in whole.items():
            assert total.shape == (), f"metric {name} is not a scalar"
            assert not total.requires_grad, f"metric {name} has a gradient"
            close(torch.stack([part[name] for part in parts]).sum(), total, 1e-10, f"metric {name} of parts")
            close(padded[name], total, 1e-10, f"metric {name} with padding")

    def test_what_it_needs_is_declared_and_refused_when_missing(self) -> None:
        x = completions(self.needs)
        wants = bool(getattr(self.build(), "wants_entropy", False))
        assert wants == ("entropy" in self.needs), f"wants_entropy of the loss is {wants}"
        for need in self.needs:
            with pytest.raises(ConformanceError):
                self.build()(replace(x, **{OF_NEED[need]: None}))
