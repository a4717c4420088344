from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest_train import make_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from kdkit.api import ConformanceError, DataError, Dense, TokenLossInputs, TopK
from kdkit.plugins.losses.token import JSD, AdaptiveKL, ForwardKL, ReverseKL, SkewKL, SkewReverseKL, TotalVariation
from kdkit.train.batching import collate
from kdkit.train.packing import pack, unpack
from kdkit.train.signal_cache.bits import pack_unary, pack_widths, read_unary, read_widths
from kdkit.train.signal_cache.encode import Kept, decode_row, encode_row, join
from kdkit.train.signal_cache.ids import IdCode, _layout_number
from kdkit.train.signal_cache.measure import Loss, cached_kl, measure
from kdkit.train.signal_cache.rows import row_hash, rows_of
from kdkit.train.signal_cache.select import Rule, UnfitTokenError, as_topk

LOSSES = [ForwardKL(), ReverseKL(), JSD(), SkewKL(), SkewReverseKL(), AdaptiveKL(), TotalVariation()]


def as_bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)


def made_up(seed: int, vocabulary: int, tokens: int, *, scale: float, most: int) -> Kept:
    """Kept ids of distributions from flat (scale 0) to peaked."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(tokens):
        k = int(rng.integers(1, min(most, vocabulary) + 1))
        ids = rng.choice(vocabulary, k, replace=False).astype(np.int64)
        shares = np.exp(rng.normal(size=k) * scale) / vocabulary
        inside = 1.0 if k == vocabulary else rng.uniform(0.05, 1 - 1e-9)
        shares *= inside / shares.sum()
        tail = 0.0 if k == vocabulary else 1 - inside
        parts.append(Kept(np.array([k]), ids, np.log(shares), np.array([tail])))
    return join(parts)


def by_id(kept: Kept) -> list[dict[int, float]]:
    ends = np.cumsum(kept.k)
    return [
        dict(zip(kept.ids[e - k : e].tolist(), kept.logprobs[e - k : e].tolist(), strict=True))
        for e, k in zip(ends, kept.k, strict=True)
    ]


# --- bits and ids -----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 24), st.integers(0, 2**24 - 1)), max_size=200))
def test_numbers_of_mixed_widths_come_back(pairs):
    widths = np.array([w for w, _ in pairs], dtype=np.int64)
    values = np.array([v & (2**w - 1) for w, v in pairs], dtype=np.int64)
    data = pack_widths(values, widths)
    assert len(data) == -(-int(widths.sum()) // 8)
    assert read_widths(as_bytes(data + b"\xff"), widths).tolist() == values.tolist()


@given(st.lists(st.integers(0, 300), max_size=100))
def test_unary_numbers_come_back(values):
    data = pack_unary(np.array(values, dtype=np.int64))
    assert read_unary(as_bytes(data + b"\x00"), len(values)).tolist() == values


def test_bits_that_end_too_early_are_refused():
    with pytest.raises(DataError, match="too early"):
        read_widths(as_bytes(b"\x00"), np.array([9]))
    for count in (0, 2):
        with pytest.raises(DataError, match=f"1 numbers where {count} belong"):
            read_unary(as_bytes(b"\x01"), count)


def test_layouts_belong_to_the_nearest_power_of_two():
    k = np.array([1, 2, 3, 5, 6, 11, 12, 262_144])
    assert (2 ** _layout_number(k)).tolist() == [1, 2, 4, 4, 8, 8, 16, 131_072]


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3, 17, 259, 49_152, 262_144]), st.floats(0, 4), st.booleans())
def test_any_row_comes_back_within_its_rounding(seed, vocabulary, scale, sampled):
    kept = made_up(seed, vocabulary, 5, scale=scale, most=300)
    counts = np.bincount(kept.ids, minlength=vocabulary) * 3 if sampled else np.zeros(vocabulary, dtype=np.int64)
    code = IdCode(counts)
    read = decode_row(encode_row(kept, code, 12), kept.tokens, code)
    assert read.k.tolist() == kept.k.tolist()
    for want, got, tail, cached_tail in zip(by_id(kept), by_id(read), kept.tail, read.tail, strict=True):
        assert set(got) == set(want)
        assert math.fsum(math.exp(v) for v in got.values()) + cached_tail == pytest.approx(1, abs=1e-12)
        # Of an id: half a level, up or down; of them all together: no more than the worst of them, and the tail's step.
        level = {i: max(1.0, math.exp(v / 3) * 4095) for i, v in want.items()}
        bound = {i: 3 * math.log(n / (n - 0.5)) for i, n in level.items()}
        worst = max(bound.values())
        assert all(abs(got[i] - want[i]) <= bound[i] + worst + 1e-3 for i in want)
        assert cached_tail == pytest.approx(tail, rel=1e-3)


def test_the_highest_id_and_all_ids_come_back():
    vocabulary = 262_144
    code = IdCode(np.zeros(vocabulary, dtype=np.int64))
    one = Kept(np.array([1, 2]), np.array([262_143, 0, 262_143]), np.log([0.5, 0.25, 0.125]), np.array([0.5, 0.625]))
    assert decode_row(encode_row(one, code, 8), 2, code).ids.tolist() == [262_143, 0, 262_143]
    everything = np.arange(vocabulary)[::-1].copy()
    flat = Kept(np.array([vocabulary]), everything, np.full(vocabulary, -math.log(vocabulary)), np.zeros(1))
    read = decode_row(encode_row(flat, code, 8), 1, code)
    assert sorted(read.ids.tolist()) == list(range(vocabulary))
    assert read.logprobs == pytest.approx(flat.logprobs, abs=1e-9)
    assert read.tail.tolist() == [0.0]


def test_frequent_ids_cost_fewer_bits():
    rng = np.random.default_rng(0)
    weights = 1 / (np.arange(49_152) + 20.0)
    shuffled = rng.permutation(49_152)
    ids = np.concatenate(
        [shuffled[rng.choice(49_152, 64, replace=False, p=weights / weights.sum())] for _ in range(200)]
    )
    k = np.full(100, 64)
    learned = IdCode(np.bincount(ids[6400:], minlength=49_152))
    plain = IdCode(np.zeros(49_152, dtype=np.int64))
    sizes = [sum(map(len, code.encode(ids[:6400], k)[:2])) * 8 / 6400 for code in (learned, plain)]
    assert sizes[1] == pytest.approx(math.log2(49_152 / 64) + 2, abs=0.3)
    assert sizes[0] < sizes[1] - 1.5


def test_the_code_is_a_function_of_its_counts():
    counts = np.random.default_rng(3).poisson(2.0, 500)
    assert IdCode(counts).digest == IdCode(counts.copy()).digest
    counts[7] += 1
    assert IdCode(counts).digest != IdCode(np.roll(counts, 1)).digest


def test_a_damaged_row_is_refused():
    kept = made_up(1, 500, 6, scale=2, most=40)
    code = IdCode(np.zeros(500, dtype=np.int64))
    data = encode_row(kept, code, 8)
    for cut in (0, 5, 12, len(data) // 2):
        with pytest.raises(DataError):
            decode_row(data[:cut], kept.tokens, code)


# --- what is kept -----------------------------------------------------------------------------------------------------


def rule(**values) -> Rule:
    base = {"mass": 1.0, "min_probability": 0.0, "max_k": 10**6, "temperature": 1.0, "bits": 16, "vocabulary": 50}
    return Rule(**{**base, **values})


def top(ids: list[int], logprobs: list[float], tail: float | None = None) -> TopK:
    return TopK(torch.tensor([ids]), torch.tensor([logprobs]), None if tail is None else torch.tensor([tail]))


def logits(tokens: int = 20, vocabulary: int = 50, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, vocabulary, generator=generator) * scale


def test_ids_are_kept_until_they_have_the_mass():
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.97, 0.01, 0.01, 0.01]])
    kept = rule(mass=0.9, vocabulary=4).keep(Dense(probs.log()))
    assert kept.k.tolist() == [3, 1]
    assert kept.ids.tolist() == [0, 1, 2, 0]
    assert kept.tail == pytest.approx([0.05, 0.03], abs=1e-6)
    assert rule(mass=0.9, max_k=2, vocabulary=4).keep(Dense(probs.log())).k.tolist() == [2, 1]
    assert rule(min_probability=0.1, vocabulary=4).keep(Dense(probs.log())).k.tolist() == [3, 1]
    assert rule(min_probability=0.99, vocabulary=4).keep(Dense(probs.log())).k.tolist() == [1, 1]


def test_entries_beyond_the_students_vocabulary_do_not_exist():
    wide = logits(vocabulary=60)
    kept = rule().keep(Dense(wide))
    reference = torch.log_softmax(wide[:, :50].double(), -1)
    got = as_topk(kept, 1.0, "cpu")
    assert got.ids.max() == 49
    assert torch.allclose(got.logprobs.double(), reference.gather(-1, got.ids), atol=1e-5)


def test_a_sparse_teacher_is_kept_as_it_is():
    top = torch.log_softmax(logits(), -1).topk(8)
    kept = rule(mass=0.9).keep(TopK(top.indices, top.values))
    dense = rule(mass=0.9, max_k=8).keep(Dense(logits()))
    assert kept.ids.tolist() == dense.ids.tolist()
    assert kept.tail == pytest.approx(dense.tail, abs=1e-6)


@pytest.mark.parametrize(
    ("signal", "message"),
    [
        (TopK(torch.tensor([[1]]), torch.tensor([[-0.1]]), temperature=2.0), "temperature 2, the cache wants 1"),
        (top([1], [float("nan")]), "gives values that are no log-probabilities"),
        (top([1, 2], [-1.0, float("nan")]), "gives values that are no log-probabilities"),
        (top([1, 2], [-1.0, math.inf]), "gives values that are no log-probabilities"),
        (top([1, 2], [-math.inf, -math.inf]), "gives values that are no log-probabilities"),
        (top([1], [0.7]), "gives values that are no log-probabilities"),
        (top([3, 50], [-0.9, -1.5]), "names token 50, of 50"),
        (top([-1, 3], [-0.9, -1.5]), "names token -1, of 50"),
        (top([3, 4, 3], [-1.1, -2.0, -1.2]), "names token 3 twice"),
        (top([3, 4], [-0.1, -0.1]), "gives probabilities that sum to 1.81"),
        (top([3, 4], [-0.8, -1.9], 0.9), "gives probabilities that sum to 1.499 with their tail"),
        (top([3, 4], [-0.8, -1.9], 0.2), "gives probabilities that sum to 0.7989 with their tail"),
        (top([3, 4], [-0.8, -1.9], float("nan")), "sum to nan with their tail"),
    ],
)
def test_a_sparse_teacher_that_does_not_fit_is_refused(signal, message):
    with pytest.raises(ConformanceError, match=message):
        rule().keep(signal)


def test_empty_slots_of_a_sparse_teacher_may_have_any_id():
    kept = rule().keep(top([7, 7, -1, 9], [-0.8, -math.inf, -math.inf, -1.9], 1 - math.exp(-0.8) - math.exp(-1.9)))
    assert kept.ids.tolist() == [7, 9]
    assert kept.tail == pytest.approx([1 - math.exp(-0.8) - math.exp(-1.9)], abs=1e-6)


@pytest.mark.parametrize("value", [float("nan"), math.inf])
def test_a_logit_that_is_no_number_is_refused_with_its_token(value):
    wrong = logits()
    wrong[13, 7] = value
    with pytest.raises(UnfitTokenError, match="gives logits that are NaN or infinite") as caught:
        rule(max_k=3).keep(Dense(wrong))
    assert caught.value.token == 13
    with pytest.raises(UnfitTokenError):
        rule(max_k=3).keep(Dense(torch.full((1, 50), -math.inf)))


def test_a_logit_of_minus_infinity_is_a_probability_of_zero():
    values = logits()
    values[:, 20:] = -math.inf
    kept = rule().keep(Dense(values))
    assert kept.ids.max() < 20
    assert kept.tail == pytest.approx(np.zeros(20), abs=1e-6)


@pytest.mark.parametrize("value", [float("nan"), math.inf, -math.inf])
def test_no_number_that_is_not_finite_is_written(value):
    code = IdCode(np.zeros(50, dtype=np.int64))
    for logprobs, tail in (([-1.0, value], 0.2), ([-1.0, -1.0], value)):
        kept = Kept(np.array([2]), np.array([3, 4]), np.array(logprobs), np.array([tail]))
        with pytest.raises(ConformanceError, match="not finite"):
            encode_row(kept, code, 7)


def test_a_kept_id_that_is_nearly_impossible_comes_back():
    """Of a sparse teacher, the most probable id it names is kept, however improbable."""
    code = IdCode(np.zeros(50, dtype=np.int64))
    for value in (-30.0, -1000.0):
        kept = Kept(np.array([1, 2]), np.array([3, 4, 5]), np.array([value, -0.1, value]), np.array([1.0, 0.1]))
        read = decode_row(encode_row(kept, code, 7), 2, code)
        assert read.ids.tolist() == [3, 4, 5] or read.ids.tolist() == [3, 5, 4]
        assert np.isfinite(read.logprobs).all()
        assert by_id(read)[0][3] < -9
        # The rarest of a token with others has one level, not none.
        assert by_id(read)[1][5] == pytest.approx(3 * math.log(1 / 123), abs=0.2)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_slots_that_a_token_does_not_need_change_neither_value_nor_gradient(loss):
    kept = rule(mass=0.95).keep(Dense(logits()))
    assert len(set(kept.k.tolist())) > 3
    student = logits(seed=1)
    together = student.clone().requires_grad_()
    values = loss(TokenLossInputs(together, as_topk(kept, 1.0, "cpu"), torch.zeros(20, dtype=torch.int64)))
    values.sum().backward()
    for token in range(20):
        alone = student[token : token + 1].clone().requires_grad_()
        signal = as_topk(kept.part(token, token + 1), 1.0, "cpu")
        assert torch.isfinite(signal.logprobs).all()
        value = loss(TokenLossInputs(alone, signal, torch.zeros(1, dtype=torch.int64)))
        value.sum().backward()
        assert value.item() == pytest.approx(values[token].item(), abs=1e-6)
        assert torch.allclose(together.grad[token], alone.grad[0], atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_all_ids_with_many_bits_are_nearly_the_dense_teacher(loss):
    code = IdCode(np.zeros(50, dtype=np.int64))
    kept = rule().keep(Dense(logits(scale=1.5)))
    assert kept.k.tolist() == [50] * 20
    read = decode_row(encode_row(kept, code, 16), 20, code)
    found = []
    for signal in (Dense(logits(scale=1.5)), as_topk(read, 1.0, "cpu")):
        student = logits(seed=1).requires_grad_()
        values = loss(TokenLossInputs(student, signal, torch.zeros(20, dtype=torch.int64)))
        (gradient,) = torch.autograd.grad(values.sum(), student)
        found.append((values.detach(), gradient))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-3, atol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)


def test_the_divergence_counts_the_tail_as_spread_evenly():
    probs = torch.tensor([[0.6, 0.3, 0.08, 0.02]])
    kept = rule(max_k=2, vocabulary=4).keep(Dense(probs.log()))
    want = 0.08 * math.log(0.08 / 0.05) + 0.02 * math.log(0.02 / 0.05)
    assert float(cached_kl(probs.log(), kept, 1.0)) == pytest.approx(want, abs=1e-5)
    flat = torch.zeros(1, 4)
    assert float(cached_kl(flat, rule(max_k=2, vocabulary=4).keep(Dense(flat)), 1.0)) == pytest.approx(0, abs=1e-6)


def test_a_tail_of_zero_leaves_the_divergence_finite():
    probs = torch.tensor([[0.6, 0.4 - 2e-9, 1e-9, 1e-9]])
    kept = Kept(np.array([2]), np.array([0, 1]), np.log([0.6, 0.4]), np.zeros(1))
    assert float(cached_kl(probs.log(), kept, 1.0)) == pytest.approx(0, abs=1e-6)


def test_the_cosine_near_the_teacher_shows_what_the_one_at_the_start_does_not():
    teacher, total = logits(), Loss()
    measure(total, teacher, logits(seed=1), rule(max_k=2).keep(Dense(teacher)), 1.0)
    values = total.values()
    assert values["gradient_cosine_near_teacher"] < values["gradient_cosine_start"] < 1
    exact = Loss()
    measure(exact, teacher, logits(seed=1), rule().keep(Dense(teacher)), 1.0)
    assert exact.values()["gradient_cosine_near_teacher"] == pytest.approx(1, abs=1e-3)
    again = Loss()
    measure(again, teacher, logits(seed=1), rule(max_k=2).keep(Dense(teacher)), 1.0)
    assert again.values() == values


def test_the_measured_gradient_is_that_of_training():
    teacher, student = logits(), logits(seed=1)
    total = Loss()
    measure(total, teacher, student, rule(max_k=3).keep(Dense(teacher)), 1.0)
    p, q = torch.softmax(teacher.double(), -1), torch.softmax(student.double(), -1)
    full = q - p
    top = p.topk(3).indices
    inside = torch.zeros_like(p).scatter(-1, top, 1.0).bool()
    # Outside the kept ids the target is the student's own shape with the teacher's mass.
    scale = (p * ~inside).sum(-1, keepdim=True) / (q * ~inside).sum(-1, keepdim=True)
    cached = q - torch.where(inside, p, q * scale)
    want = float((full * cached).sum() / (full.norm() * cached.norm()))
    assert total.values()["gradient_cosine_start"] == pytest.approx(want, abs=1e-5)
    assert want < 0.999


# --- rows of batches --------------------------------------------------------------------------------------------------


def test_rows_are_found_by_content_in_padded_and_packed_batches():
    rows = make_rows(9)
    want = {row.id: (row_hash(row.ids, row.learned), row.targets) for row in rows}
    for batch in (pack(rows), collate(rows), collate(rows, side="left")):
        found = rows_of(batch)
        assert {row.id: (row.hash, row.tokens) for row in found} == want
        assert sum(row.tokens for row in found) == int(batch.labels_mask[:, 1:].sum())
    assert rows_of(unpack(pack(rows))) == rows_of(pack(rows))


def test_a_row_is_another_when_a_token_or_what_is_learned_changes():
    ids, learned = (5, 6, 7, 8), (False, False, True, True)
    same = row_hash(ids, learned)
    assert same == row_hash(np.array(ids), np.array([True, False, True, True])), "the first token is never learned"
    others = [row_hash((5, 6, 7, 9), learned), row_hash(ids[:3], learned[:3]), row_hash(ids, (False, True, True, True))]
    assert len({same, *others}) == 4
