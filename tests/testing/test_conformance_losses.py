"""The built-in losses fulfil the suite, against formulas written a second time."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch

import kdkit
from kdkit.api import Dense, TokenLossInputs
from kdkit.testing.conformance.loss import TokenLossConformance, logits, target_ids, top_k


def kl(p, q):
    return torch.special.xlogy(p, p / q).sum(-1)


class Builtin(TokenLossConformance):
    name = ""
    params: ClassVar = {}

    def build(self, temperature=1.0):
        return kdkit.build("loss", self.name, **self.params, temperature=temperature)

    def reference(self, teacher, student, labels):
        return self.formula(teacher.softmax(-1), student.softmax(-1))

    def formula(self, p, q):
        raise NotImplementedError


class TestCrossEntropy(TokenLossConformance):
    teacher = False
    temperature_power = None

    def build(self, temperature=1.0):
        return kdkit.build("loss", "cross-entropy")

    def reference(self, teacher, student, labels):
        return -torch.stack([row.softmax(-1)[label].log() for row, label in zip(student, labels.tolist(), strict=True)])


class TestForwardKL(Builtin):
    name = "forward-kl"

    def formula(self, p, q):
        return kl(p, q)


class TestReverseKL(Builtin):
    name = "reverse-kl"

    def formula(self, p, q):
        return kl(q, p)


class TestJSD(Builtin):
    name = "jsd"
    params: ClassVar = {"beta": 0.3}

    def formula(self, p, q):
        m = 0.3 * p + 0.7 * q
        return 0.3 * kl(p, m) + 0.7 * kl(q, m)


class TestJSDTowardsForward(Builtin):
    name = "jsd"
    params: ClassVar = {"beta": 0.0}

    def formula(self, p, q):
        return kl(p, q)


class TestJSDTowardsReverse(Builtin):
    name = "jsd"
    params: ClassVar = {"beta": 1.0, "normalized": True}

    def formula(self, p, q):
        return kl(q, p)


class TestNormalizedJSD(Builtin):
    name = "jsd"
    params: ClassVar = {"beta": 0.9, "normalized": True}

    def formula(self, p, q):
        m = 0.9 * p + 0.1 * q
        return kl(p, m) / 0.1 + kl(q, m) / 0.9


class TestSkewKL(Builtin):
    name = "skew-kl"
    params: ClassVar = {"alpha": 0.2}

    def formula(self, p, q):
        return kl(p, 0.2 * p + 0.8 * q)


class TestSkewReverseKL(Builtin):
    name = "skew-reverse-kl"
    params: ClassVar = {"alpha": 0.2}

    def formula(self, p, q):
        return kl(q, 0.2 * q + 0.8 * p)


class TestAdaptiveKL(Builtin):
    name = "adaptive-kl"
    top_k_lower_bound = False

    def formula(self, p, q):
        shares = []
        for row_p, row_q in zip(p.tolist(), q.tolist(), strict=True):
            order, mass, head, tail = sorted(range(len(row_p)), key=lambda v: -row_p[v]), 0.0, 0.0, 0.0
            for v in order:
                gap = abs(row_p[v] - row_q[v])
                head, tail = (head + gap, tail) if mass < 0.5 else (head, tail + gap)
                mass += row_p[v]
            shares.append(head / (head + tail) if head + tail else 0.5)
        share = torch.tensor(shares, dtype=p.dtype)
        return share * kl(p, q) + (1 - share) * kl(q, p)


class TestTotalVariation(Builtin):
    name = "tvd"
    temperature_power = 0
    smooth = False

    def formula(self, p, q):
        return (p - q).abs().sum(-1) / 2


@pytest.mark.parametrize("beta", [1e-3, 0.01, 0.5, 0.99, 1 - 1e-3])
def test_normalized_jsd_is_continuous_to_both_ends_and_the_plain_one_is_not(beta):
    def mean(**params):
        return float(
            kdkit.build("loss", "jsd", **params)(TokenLossInputs(logits(1), Dense(logits(0)), target_ids())).mean()
        )

    end = round(beta)
    ratio = mean(beta=beta, normalized=True) / mean(beta=float(end))
    assert 0.4 < ratio < 1.6
    if beta in (1e-3, 1 - 1e-3):
        assert mean(beta=beta) < 2e-3 * mean(beta=float(end))


def test_jsd_is_bounded_by_ln_2_and_tvd_by_1():
    x = TokenLossInputs(60 * logits(1), Dense(60 * logits(0)), target_ids())
    assert kdkit.build("loss", "jsd")(x).max() == pytest.approx(math.log(2), rel=1e-9)
    assert kdkit.build("loss", "tvd")(x).max() == pytest.approx(1.0, rel=1e-9)


def test_reverse_kl_of_a_top_k_signal_without_a_visible_tail_is_finite():
    teacher = torch.tensor([[30.0, 0.0, -1.0, -2.0]])
    student = torch.zeros(1, 4, requires_grad=True)
    value = kdkit.build("loss", "reverse-kl")(TokenLossInputs(student, top_k(teacher, 1, 1.0), torch.tensor([0])))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(student.grad).all()
