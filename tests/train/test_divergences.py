from __future__ import annotations

import math

import pytest
import torch

import kdkit
from kdkit.api import ConformanceError, Dense, KdkitError, TokenLossInputs, TopK

N, V = 7, 23


def logits(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 3 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels() -> torch.Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(9))


def reference_kl(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> list[float]:
    """Plain Python, one token at a time."""
    values = []
    for zt, zs in zip((teacher / temperature).tolist(), (student / temperature).tolist(), strict=True):
        norm_t, norm_s = (math.log(sum(math.exp(z) for z in row)) for row in (zt, zs))
        kl = sum(math.exp(t - norm_t) * ((t - norm_t) - (s - norm_s)) for t, s in zip(zt, zs, strict=True))
        values.append(temperature**2 * kl)
    return values


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_forward_kl_value_and_gradient_match_the_formula(temperature):
    teacher, student = logits(0), logits(1).requires_grad_()
    loss = kdkit.build("loss", "forward-kl", temperature=temperature)
    values = loss(TokenLossInputs(student, Dense(teacher), labels()))
    assert values.tolist() == pytest.approx(reference_kl(teacher, student.detach(), temperature), rel=1e-12)
    values.sum().backward()
    p, q = (torch.softmax(z / temperature, -1) for z in (teacher, student.detach()))
    # d/dz_S of T^2 KL(p || q) with z_S scaled by 1/T.
    assert torch.allclose(student.grad, temperature * (q - p), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_forward_kl_is_zero_with_zero_gradient_at_equality(temperature):
    student = logits(2).requires_grad_()
    values = kdkit.build("loss", "forward-kl", temperature=temperature)(
        TokenLossInputs(student, Dense(student.detach().clone() + 5.0), labels())
    )
    assert values.abs().max() < 1e-14
    values.sum().backward()
    assert student.grad.abs().max() < 1e-14


def test_cross_entropy_matches_the_definition():
    student = logits(3).requires_grad_()
    values = kdkit.build("loss", "cross-entropy")(TokenLossInputs(student, None, labels()))
    expected = [
        -row[label] for row, label in zip(torch.log_softmax(student, -1).tolist(), labels().tolist(), strict=True)
    ]
    assert values.tolist() == pytest.approx(expected, rel=1e-12)
    values.sum().backward()
    one_hot = torch.nn.functional.one_hot(labels(), V)
    assert torch.allclose(student.grad, torch.softmax(student.detach(), -1) - one_hot, atol=1e-12)


def top_k(teacher: torch.Tensor, k: int, temperature: float = 1.0) -> TopK:
    logprobs, ids = torch.log_softmax(teacher / temperature, -1).topk(k)
    return TopK(ids, logprobs, temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_of_the_whole_vocabulary_equals_dense(temperature):
    teacher, loss = logits(4), kdkit.build("loss", "forward-kl", temperature=temperature)
    grads, values = [], []
    for signal in (Dense(teacher), top_k(teacher, V, temperature)):
        student = logits(5).requires_grad_()
        value = loss(TokenLossInputs(student, signal, labels()))
        value.sum().backward()
        values.append(value.detach())
        grads.append(student.grad)
    assert torch.allclose(*values, rtol=1e-10)
    assert torch.isfinite(grads[1]).all()
    assert torch.allclose(*grads, rtol=1e-8, atol=1e-12)


def test_top_k_is_a_lower_bound_that_sees_leaked_mass():
    teacher, loss = logits(6), kdkit.build("loss", "forward-kl")
    signal = top_k(teacher, 5)
    student = teacher.clone()
    dense = loss(TokenLossInputs(logits(7), Dense(teacher), labels()))
    assert (loss(TokenLossInputs(logits(7), signal, labels())) <= dense + 1e-12).all()
    # Moving the student's mass out of the top-k must cost exactly what K + 1 classes say: renormalising would give 0.
    leaked = student.scatter_add(-1, signal.ids, torch.full_like(signal.logprobs, -3.0)).requires_grad_()
    p, q = torch.softmax(teacher, -1), torch.softmax(leaked, -1)
    kept_p, kept_q = p.gather(-1, signal.ids), q.gather(-1, signal.ids)
    tail_p, tail_q = 1 - kept_p.sum(-1), 1 - kept_q.sum(-1)
    expected = (kept_p * (kept_p / kept_q).log()).sum(-1) + tail_p * (tail_p / tail_q).log()
    assert expected.min() > 0.01
    got = loss(TokenLossInputs(leaked, signal, labels()))
    assert got.tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    (want_grad,), (got_grad,) = (torch.autograd.grad(values.sum(), leaked) for values in (expected, got))
    assert torch.allclose(got_grad, want_grad, rtol=1e-7, atol=1e-12)


def test_top_k_refuses_another_temperature():
    with pytest.raises(ConformanceError, match="temperature 1, the loss wants 2"):
        kdkit.build("loss", "forward-kl", temperature=2.0)(TokenLossInputs(logits(0), top_k(logits(1), 3), labels()))


def test_a_divergence_without_a_teacher_or_with_another_vocabulary_is_refused():
    loss = kdkit.build("loss", "forward-kl")
    with pytest.raises(ConformanceError, match="needs a teacher"):
        loss(TokenLossInputs(logits(0), None, labels()))
    with pytest.raises(ConformanceError, match="do not match"):
        loss(TokenLossInputs(logits(0), Dense(logits(1)[:, :-1]), labels()))


def test_tokens_the_teacher_forbids_do_not_make_nan():
    teacher, student = logits(0), logits(1).requires_grad_()
    teacher[:, 3] = -torch.inf
    values = kdkit.build("loss", "forward-kl")(TokenLossInputs(student, Dense(teacher), labels()))
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert torch.isfinite(student.grad).all()


def test_half_precision_logits_are_computed_in_float32():
    teacher, student = logits(0, torch.bfloat16), logits(1, torch.bfloat16)
    values = kdkit.build("loss", "forward-kl")(TokenLossInputs(student, Dense(teacher), labels()))
    assert values.dtype is torch.float32
    assert values.tolist() == pytest.approx(reference_kl(teacher.double(), student.double(), 1.0), rel=1e-4)


def test_no_gradient_reaches_the_teacher():
    teacher, student = logits(0).requires_grad_(), logits(1).requires_grad_()
    kdkit.build("loss", "forward-kl")(TokenLossInputs(student, Dense(teacher), labels())).sum().backward()
    assert teacher.grad is None


def test_top_k_ids_beyond_the_shared_vocabulary_are_refused():
    signal = top_k(torch.cat([logits(1), torch.full((len(labels()), 1), 99.0)], dim=-1), 3)
    with pytest.raises(ConformanceError, match=f"names token {V}, student and teacher share {V} entries"):
        kdkit.build("loss", "forward-kl")(TokenLossInputs(logits(0), signal, labels()))


@pytest.mark.parametrize("name", ["forward-kl", "reverse-kl", "jsd", "tvd"])
def test_an_entry_that_is_there_twice_is_refused(name):
    signal = top_k(logits(1), 3)
    signal.ids[2, 2] = signal.ids[2, 0]
    with pytest.raises(ConformanceError, match=f"names token {int(signal.ids[2, 0])} more than once"):
        kdkit.build("loss", name)(TokenLossInputs(logits(0), signal, labels()))


def test_empty_slots_may_hold_any_id():
    student = torch.randn(2, 6, dtype=torch.float64)
    logprobs = torch.tensor([[0.7, 0.1, 0.0, 0.0], [0.5, 0.2, 0.1, 0.0]], dtype=torch.float64).log()
    results = []
    for rest in ([0, 0, 0], [5, 5, 1]):
        ids = torch.tensor([[3, 4, rest[0], rest[1]], [2, 0, 5, rest[2]]])
        x = TokenLossInputs(student, TopK(ids, logprobs), torch.zeros(2, dtype=torch.int64))
        results.append(kdkit.build("loss", "forward-kl")(x))
    assert torch.equal(*results)
    p, q = torch.tensor([0.7, 0.1, 0.2], dtype=torch.float64), student[0].softmax(-1)
    own = torch.stack([q[3], q[4], 1 - q[3] - q[4]])
    assert float(results[0][0]) == pytest.approx(float((p * (p / own).log()).sum()), rel=1e-12)


def test_a_stored_temperature_is_the_same_temperature():
    signal = top_k(logits(1), 3, 0.9)
    stored = TopK(signal.ids, signal.logprobs, temperature=float(torch.tensor(0.9)))
    loss = kdkit.build("loss", "forward-kl", temperature=0.3 * 3)
    assert torch.equal(*(loss(TokenLossInputs(logits(0), s, labels())) for s in (signal, stored)))


def test_a_stated_tail_is_taken_at_its_word_however_small():
    teacher = torch.tensor([[40.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    student = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    signal = top_k(teacher, 1)
    exact = TopK(signal.ids, signal.logprobs, tail_mass=3 * torch.exp(torch.tensor([-40.0], dtype=torch.float64)))
    loss = kdkit.build("loss", "reverse-kl")
    # The three other entries are alike in both models, so that one class for them loses nothing.
    dense = loss(TokenLossInputs(student, Dense(teacher), labels()[:1]))
    assert loss(TokenLossInputs(student, exact, labels()[:1])).tolist() == pytest.approx(dense.tolist(), rel=1e-9)


@pytest.mark.parametrize("beta", [1e-4, 1 - 1e-4])
def test_a_normalised_jsd_that_float32_cannot_compute_is_refused(beta):
    with pytest.raises(KdkitError, match=r"from 0.001 to 0.999"):
        kdkit.build("loss", "jsd", beta=beta, normalized=True)
