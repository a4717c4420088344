"""The built-in policy losses fulfil the suite, against formulas written a second time."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

import kdkit
from kdkit.api import ConformanceError, KdkitError, PolicyLossOutput
from kdkit.testing.conformance.completions import completions
from kdkit.testing.conformance.policy import PolicyLossConformance


def pessimistic(ratio, advantages, low, high, cap=None):
    """One token at a time, by cases."""
    values = []
    for r, a in zip(ratio, advantages, strict=True):
        if a >= 0:
            values.append(-a * (r if r <= high else torch.full_like(r, high)))
        else:
            bounded = r if cap is None or r <= cap else torch.full_like(r, cap)
            values.append(-a * (bounded if r >= low else torch.full_like(r, low)))
    return torch.stack(values)


class Builtin(PolicyLossConformance):
    name = ""
    params: ClassVar = {}

    def build(self):
        return kdkit.build("loss", self.name, **self.params)


class TestMiniLLM(Builtin):
    name = "minillm"
    clip = (0.8, 1.2)

    def reference(self, c):
        return pessimistic(c.weights * c.logprobs.exp() / c.old_logprobs.exp(), c.advantages, 0.8, 1.2)


class TestMiniLLMWithTheWeightOutside(Builtin):
    name = "minillm"
    params: ClassVar = {"is_in_clip": False, "cliprange": 0.1}
    clip = (0.9, 1.1)

    def reference(self, c):
        return c.weights * pessimistic((c.logprobs - c.old_logprobs).exp(), c.advantages, 0.9, 1.1)


class TestMiniLLMWithoutClipping(Builtin):
    name = "minillm"
    params: ClassVar = {"cliprange": None}

    def reference(self, c):
        return -c.advantages * c.weights * (c.logprobs - c.old_logprobs).exp()


class TestOnPolicyReverseKL(Builtin):
    name = "on-policy-reverse-kl"
    needs = frozenset({"teacher"})
    own_advantages = True
    params: ClassVar = {"coefficient": 0.5}

    def reference(self, c):
        advantage = 0.5 * (c.teacher_logprobs - c.old_logprobs)
        return -advantage * c.weights * (c.logprobs - c.old_logprobs).exp()


class TestOnPolicyReverseKLWithClipping(Builtin):
    name = "on-policy-reverse-kl"
    needs = frozenset({"teacher"})
    own_advantages = True
    params: ClassVar = {"clip": 0.2}
    clip = (0.8, 1.2)

    def reference(self, c):
        ratio = (c.logprobs - c.old_logprobs).exp()
        return c.weights * pessimistic(ratio, c.teacher_logprobs - c.old_logprobs, 0.8, 1.2)


class Grpo(Builtin):
    name = "grpo"
    clip = (0.8, 1.28)
    delta = None

    def reference(self, c):
        ratio = (c.logprobs - c.old_logprobs).exp()
        return c.weights * pessimistic(ratio, c.advantages, 0.8, 1.28, self.delta)


class TestGRPO(Grpo):
    params: ClassVar = {"loss_type": "grpo", "epsilon_high": 0.28}
    reduction = "sequence-mean"


class TestDAPO(Grpo):
    params: ClassVar = {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.4}
    delta = 1.4

    def test_delta_bounds_the_ratio_where_the_advantage_is_negative(self):
        x = self._at(1.5, -1)
        _, (gradient, *_) = self._gradients(x)
        assert not gradient.any()


class TestDrGRPO(Grpo):
    params: ClassVar = {"loss_type": "dr_grpo", "epsilon_high": 0.28, "constant_length": 16}
    reduction = "constant-length"
    constant_length = 16


class TestBNPO(Grpo):
    params: ClassVar = {"loss_type": "bnpo", "epsilon_high": 0.28}
    split_invariant = False


class TestGRPOWithAReference(Grpo):
    params: ClassVar = {"loss_type": "grpo", "epsilon_high": 0.28, "beta": 0.3}
    needs = frozenset({"reference"})
    reduction = "sequence-mean"
    zero_without_advantage = False

    def reference(self, c):
        log_gap = c.ref_logprobs - c.logprobs
        return super().reference(c) + 0.3 * (log_gap.exp() - log_gap - 1)


class TestGSPO(Builtin):
    name = "grpo"
    params: ClassVar = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    reduction = "sequence-mean"
    clip = (0.8, 1.2)

    def reference(self, c):
        ratio = (c.logprobs - c.old_logprobs).mean().exp().expand(len(c.advantages))
        return c.weights * pessimistic(ratio, c.advantages, 0.8, 1.2)


class EntropyBonus:
    """What a plugin with two gradients looks like."""

    wants_entropy = True

    def __call__(self, x):
        if x.entropy is None:
            raise ConformanceError("this loss needs the entropy")
        out = kdkit.build("loss", "minillm", cliprange=None)(x)
        return PolicyLossOutput(per_token=out.per_token - 0.1 * x.entropy, aggregation="token-mean")


class TestEntropyBonus(PolicyLossConformance):
    needs = frozenset({"entropy"})
    zero_without_advantage = False

    def build(self):
        return EntropyBonus()

    def reference(self, c):
        return -c.advantages * c.weights * (c.logprobs - c.old_logprobs).exp() - 0.1 * c.entropy


def test_metrics_by_hand():
    x = completions()
    out = kdkit.build("loss", "minillm")(x)
    ratio = [float(v) for v in (x.logprobs - x.old_logprobs)[x.mask].exp()]
    weighted = [r * float(w) for r, w in zip(ratio, x.importance_weights[x.mask], strict=True)]
    clipped = [
        (r > 1.2 and a > 0) or (r < 0.8 and a < 0) for r, a in zip(weighted, x.advantages[x.mask].tolist(), strict=True)
    ]
    assert 0 < sum(clipped) < len(clipped)
    assert float(out.metrics["clip_fraction"]) == sum(clipped)
    assert float(out.metrics["ratio"]) == pytest.approx(sum(ratio), rel=1e-12)
    wanted = sum(r - 1 - float(torch.tensor(r, dtype=torch.float64).log()) for r in ratio)
    assert float(out.metrics["approx_kl"]) == pytest.approx(wanted, rel=1e-10)


def test_an_importance_weight_can_silence_a_token_from_the_start():
    """In the original's way: w = 1.25 is outside the range before anything was learned."""
    suite = TestMiniLLM()
    x = suite._at(1.0, 1)
    x = type(x)(**{f: getattr(x, f) for f in x.__dataclass_fields__} | {"importance_weights": 1.25 * x.mask})
    assert not suite._gradients(x)[1][0].any()
    assert TestMiniLLMWithTheWeightOutside()._gradients(x)[1][0][x.mask].all()


@pytest.mark.parametrize(
    "params",
    [
        {"loss_type": "dr_grpo"},
        {"loss_type": "grpo", "constant_length": 8},
        {"delta": 1.1},
        {"epsilon_high": 0.5, "delta": 1.4},
        {"epsilon": 0.0},
        {"beta": -0.1},
    ],
)
def test_parameters_of_grpo_that_make_no_sense_are_refused(params):
    with pytest.raises(KdkitError):
        kdkit.build("loss", "grpo", **params)


def test_dr_grpo_without_its_length_is_refused():
    from kdkit.plugins.losses.grpo import GRPO

    with pytest.raises(ConformanceError, match="constant_length"):
        GRPO(loss_type="dr_grpo")(completions())


def test_specs_say_what_they_need():
    from kdkit.plugins.losses.plugin import GRPOParams, kdkit_losses

    specs = {spec.name: spec for spec in kdkit_losses() if spec.loss_kind == "policy"}
    assert set(specs) == {"minillm", "on-policy-reverse-kl", "grpo"}
    needs = {name: spec.policy_needs_of(spec.params()) for name, spec in specs.items()}
    assert needs == {"minillm": set(), "on-policy-reverse-kl": {"teacher"}, "grpo": set()}
    assert specs["grpo"].policy_needs_of(GRPOParams(beta=0.1)) == {"reference"}
