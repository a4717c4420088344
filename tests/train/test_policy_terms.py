from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from policy_rows import END, Clip, make_completions, plain
from test_objective import ShapeSpy, Teacher, assert_same

from kdkit.api import ConformanceError, PolicyLossOutput, TopK
from kdkit.plugins.losses.token import ReverseKL, cross_entropy
from kdkit.testing.tiny import tiny_model
from kdkit.train.batching import collate, micro_batches
from kdkit.train.blocks import signal_part
from kdkit.train.objective import CausalObjective, LossTerm
from kdkit.train.packing import pack
from kdkit.train.policy import terms as policy_terms
from kdkit.train.policy.batch import policy_batch
from kdkit.train.policy.rows import KeptIds, PolicyRow, sequence_count, token_count
from kdkit.train.policy.terms import taken_logprobs

AGGREGATIONS = [Clip("token-mean"), Clip("sequence-mean"), Clip("constant-length", 9)]
CUTS = [(1, "right", 1), (2, "left", 3), (4, "packed", 7), (8, "packed", 10_000), (8, "right", 5)]
"""Micro-batch size, padding side or rows laid end to end, tokens of a block."""


def lay(rows, layout):
    if layout == "packed":
        return pack(rows)
    batch = collate(rows, side=layout)
    batch.input_ids[batch.attention_mask == 0] = END
    return batch


def gradients(model, rows, terms, *, size=8, layout="right", block=None, temperature=0.8, teacher=None, compute=None):
    """Loss, gradients and what was measured in one optimiser step cut into micro-batches of ``size``."""
    model.zero_grad()
    objective = CausalObjective(model, terms, block=block, compute=compute)
    loss, measured = 0.0, []
    for part in micro_batches(rows, size):
        batch, policy = policy_batch(part, lambda rows: lay(rows, layout), temperature)
        signals = Teacher(teacher)(batch) if teacher else None
        scales = {"policy": policy, "sequence_scale": 1 / max(sequence_count(rows), 1)}
        found = objective(batch, signals, 1 / max(token_count(rows), 1), **scales)
        found.loss.backward()
        loss += float(found.loss.detach())
        measured.append(found)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}, measured


def policy(loss, weight=1.0, **values) -> LossTerm:
    return LossTerm("clip", weight, loss, kind="policy", **values)


def both(loss):
    return (LossTerm("cross-entropy", 0.3, cross_entropy), policy(loss, 0.7))


# --- value and gradient -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", AGGREGATIONS, ids=lambda loss: loss.aggregation)
@pytest.mark.parametrize("support", [False, True])
def test_value_and_gradient_are_those_of_whole_logits_however_rows_are_cut(loss, support):
    model, rows = tiny_model().double().train(), make_completions(support=support)
    want = plain(model, rows, loss, weights=(0.7, 0.3))
    for size, layout, block in CUTS:
        got = gradients(model, rows, both(loss), size=size, layout=layout, block=block)
        assert_same(got[:2], want, rtol=1e-10)


@pytest.mark.parametrize("size", [1, 8])
def test_the_same_in_float32(size):
    model, rows = tiny_model().train(), make_completions()
    want = plain(tiny_model().double(), rows, AGGREGATIONS[1], weights=(0.7, 0.3))
    got = gradients(model, rows, both(AGGREGATIONS[1]), size=size, layout="packed", block=5)
    assert_same((got[0], {name: grad.double() for name, grad in got[1].items()}), want, rtol=1e-5)


def test_bf16_products_stay_near_float64():
    rows = make_completions()
    want = plain(tiny_model().double(), rows, AGGREGATIONS[0], weights=(0.7, 0.3))
    got = gradients(tiny_model().train(), rows, both(AGGREGATIONS[0]), layout="packed", compute=torch.bfloat16)
    assert got[0] == pytest.approx(want[0], rel=0.05)
    one, other = (torch.cat([grads[name].double().flatten() for name in want[1]]) for grads in (got[1], want[1]))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.97


@pytest.mark.parametrize("support", [False, True])
def test_an_entropy_bonus_is_part_of_value_and_gradient(support):
    model, rows = tiny_model().double().train(), make_completions(support=support)
    loss = Clip("sequence-mean", wants_entropy=True)
    want = plain(model, rows, loss, weights=(0.7, 0.3))
    assert_same(gradients(model, rows, both(loss), size=4, layout="packed", block=7)[:2], want, rtol=1e-10)


def test_entropies_are_made_only_when_a_loss_wants_them(monkeypatch):
    asked, real = [], policy_terms.taken_logprobs
    monkeypatch.setattr(
        "kdkit.train.blocks.taken_logprobs", lambda *args, **values: asked.append(values) or real(*args, **values)
    )
    rows = make_completions(4)
    for wants in (False, True):
        asked.clear()
        seen = []
        gradients(tiny_model(), rows, [policy(Clip(wants_entropy=wants, seen=seen))])
        assert {values["entropy"] for values in asked} == {wants}
        assert all((x.entropy is not None) == wants for x in seen)


def test_only_the_shared_vocabulary_is_sampled_from():
    model, rows = tiny_model(vocab=264).double().train(), make_completions(4)
    want = plain(model, rows, AGGREGATIONS[0], vocabulary=259)
    assert_same(gradients(model, rows, [policy(AGGREGATIONS[0], vocabulary=259)])[:2], want, rtol=1e-10)
    assert gradients(model, rows, [policy(AGGREGATIONS[0])])[0] != pytest.approx(want[0], rel=1e-4)


def test_the_order_of_the_rows_and_their_ids_do_not_matter():
    model, rows = tiny_model().double().train(), make_completions()
    want = gradients(model, rows, both(AGGREGATIONS[1]), size=2)
    renamed = [replace(row, id="same") for row in rows]
    for other in (rows[::-1], rows[3:] + rows[:3], renamed[::-1]):
        got = gradients(model, other, both(AGGREGATIONS[1]), size=2, layout="packed")
        assert_same(got[:2], want[:2], rtol=1e-10)


def test_a_token_loss_beside_it_sees_the_teacher_at_the_same_tokens():
    """The single-step term of MiniLLM: weights of importance belong to the tokens they were computed for."""
    model, teacher, rows = tiny_model().double().train(), tiny_model(seed=1).double(), make_completions()
    total, tokens = 0.0, sum(row.targets for row in rows)
    for row in rows:
        keep = torch.tensor(row.learned)[1:]
        p, q = (torch.log_softmax(m(input_ids=torch.tensor([row.ids])).logits[0, :-1][keep], -1).detach()
                for m in (teacher, model))  # fmt: skip
        total += float((torch.tensor(row.token_weights) * (q.exp() * (q - p)).sum(-1)).sum()) / tokens
    for layout in ("left", "packed"):
        got = gradients(model, rows, [LossTerm("reverse-kl", 1.0, ReverseKL())], size=4, layout=layout, teacher=teacher)
        assert got[0] == pytest.approx(total, rel=1e-10)


# --- what does not count ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", AGGREGATIONS, ids=lambda loss: loss.aggregation)
@pytest.mark.parametrize("weighted", [False, True])
def test_completions_that_do_not_count_are_as_if_they_were_not_there(loss, weighted):
    model, rows = tiny_model().double().train(), make_completions(weighted=weighted)
    out = [replace(row, counts=False, old_logprobs=(float("-inf"),) * row.targets) for row in rows[::3]]
    kept = [row for index, row in enumerate(rows) if index % 3]
    want = plain(model, kept, loss, weights=(0.7, 0.3))
    got = gradients(model, [*out, *kept], both(loss), size=3, layout="packed")
    assert_same(got[:2], want, rtol=1e-10)
    assert [sum(column) for column in zip(*(m.counts for m in got[2]), strict=True)] == [
        sum(row.targets for row in kept),
        sum(row.targets for row in kept) if loss.aggregation == "token-mean" else len(kept),
    ]


def test_a_step_in_which_nothing_counts_has_no_gradient():
    rows = [replace(row, counts=False) for row in make_completions(3)]
    for loss in AGGREGATIONS:
        value, grads, _ = gradients(tiny_model().double(), rows, both(loss))
        assert value == 0.0
        assert all(not grad.any() for grad in grads.values())


def own_ids(rows):
    """Ids that are learned in the first of the rows and in no other."""
    first, *others = ({*row.ids[-row.targets :]} for row in rows)
    found = sorted(first.difference(*others))
    assert found
    return found


def infinite_for(tokens, real):
    """A loss that is infinite, and whose gradient is, for certain tokens."""

    def loss(x):
        assert len(x.labels) == len(x.student_logits)
        outside = torch.isin(x.labels, torch.tensor(tokens))
        infinite = (0 * x.student_logits[outside, 0]).log()
        return real(x) + torch.zeros(len(outside)).masked_scatter(outside, infinite)

    return loss


@pytest.mark.parametrize("reason", ["counts", "weight"])
@pytest.mark.parametrize("topk", [False, True])
def test_a_token_without_a_weight_cannot_poison_the_others(reason, topk):
    rows = make_completions()
    bad = own_ids(rows)
    if reason == "counts":
        rows[0] = replace(rows[0], counts=False)
    else:
        rows[0] = replace(rows[0], token_weights=(1e-320,) * rows[0].targets)
    model, teacher = tiny_model(), tiny_model(seed=1)
    for layout, size in (("packed", 8), ("left", 1)):
        found = []
        for loss in (ReverseKL(), infinite_for(bad, ReverseKL())):
            term = [LossTerm("reverse-kl", 1.0, loss)]
            model.zero_grad()
            objective, total = CausalObjective(model, term, block=5), 0.0
            for part in micro_batches(rows, size):
                batch, completions = policy_batch(part, lambda rows, layout=layout: lay(rows, layout), 1.0)
                signals = Teacher(teacher)(batch)
                signals = AsTopK(signals) if topk else signals
                measured = objective(batch, signals, 1 / max(token_count(rows), 1), policy=completions)
                measured.loss.backward()
                total += float(measured.loss.detach())
            found.append((total, {name: p.grad.clone() for name, p in model.named_parameters()}))
        assert found[0][0] != 0
        assert_same(found[1], found[0], rtol=1e-6)


def test_a_loss_is_never_asked_about_no_token():
    """Blocks of a completion that does not count have nothing left."""
    rows, seen = make_completions(), []
    rows[0] = replace(rows[0], counts=False)

    def loss(x):
        seen.append(len(x.labels))
        return ReverseKL()(x)

    gradients(
        tiny_model(), rows, [LossTerm("reverse-kl", 1.0, loss)], size=1, layout="left", teacher=tiny_model(seed=1)
    )
    assert seen
    assert 0 not in seen


def test_a_part_of_a_signal_has_all_that_it_says():
    signal = TopK(torch.arange(8).view(4, 2), torch.randn(4, 2), tail_mass=torch.rand(4), taken=torch.randn(4))
    for which in (slice(1, 3), torch.tensor([0, 3])):
        part = signal_part(signal, which)
        for name in ("ids", "logprobs", "tail_mass", "taken"):
            assert torch.equal(getattr(part, name), getattr(signal, name)[which]), name


class AsTopK:
    """The five most probable tokens of a dense signal, with the tail and the taken tokens stated."""

    def __init__(self, signals):
        self.signals = signals

    def block(self, start, stop):
        logprobs = self.signals.block(start, stop).logits.log_softmax(-1)
        top = logprobs.topk(5)
        return TopK(top.indices, top.values, tail_mass=1 - top.values.exp().sum(-1), taken=logprobs[:, 0])


def test_an_impossible_token_of_a_completion_that_does_not_count_cannot_poison_the_others(monkeypatch):
    """The student itself rules it out: its log-probability is -inf."""
    model, rows = tiny_model(), make_completions()
    rows[0] = replace(rows[0], counts=False)
    want = gradients(model, rows, [policy(AGGREGATIONS[0])], layout="packed")
    only, real = torch.tensor(own_ids(rows)), policy_terms.taken_logprobs

    def impossible(logits, labels, **values):
        found = real(logits, labels, **values)
        return policy_terms.Taken(torch.where(torch.isin(labels, only), -torch.inf, found.logprobs), found.entropy)

    monkeypatch.setattr("kdkit.train.blocks.taken_logprobs", impossible)
    assert_same(gradients(model, rows, [policy(AGGREGATIONS[0])], layout="packed")[:2], want[:2], rtol=1e-6)


# --- what a loss sees -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["left", "packed"])
def test_a_loss_sees_whole_completions_once_a_micro_batch(layout):
    rows, seen = make_completions(), []
    rows[2] = replace(rows[2], counts=False)
    gradients(tiny_model().double(), rows, [policy(Clip(seen=seen))], size=4, layout=layout, block=2)
    assert len(seen) == 2
    found = []
    for x in seen:
        assert x.logprobs.is_leaf
        assert x.teacher_logprobs is None
        for index, length in enumerate(x.lengths.tolist()):
            row = next(r for r in rows if r.ids[-r.targets :] == tuple(x.completion_ids[index, :length].tolist()))
            found.append(row)
            real = torch.arange(x.mask.shape[1]) < length
            assert x.mask[index].tolist() == (real & row.counts).tolist()
            assert int(x.group_ids[index]) == row.group
            for name in ("old_logprobs", "advantages", "ref_logprobs", "importance_weights"):
                assert tuple(getattr(x, name)[index, :length].tolist()) == getattr(row, name)
            assert not x.old_logprobs[index, length:].any()
            assert bool((x.importance_weights[index, length:] == 1).all())
    assert sorted(row.ids for row in found) == sorted(row.ids for row in rows)


def test_metrics_are_sums_over_tokens_that_count():
    rows = make_completions()
    rows[1] = replace(rows[1], counts=False)
    whole, cut = (
        gradients(tiny_model().double(), rows, [policy(Clip())], size=size, layout="packed")[2] for size in (8, 2)
    )
    assert [{*m.metrics} for m in cut] == [{"clip/outside"}] * 4
    sums = [sum(int(m.metrics["clip/outside"]) for m in measured) for measured in (whole, cut)]
    assert sums[0] == sums[1]
    assert 0 < sums[0] < token_count(rows) == sum(m.tokens for m in cut)


def test_the_full_logits_never_exist():
    batch, completions = policy_batch(make_completions(), pack, 0.8)
    model = tiny_model().train()
    with ShapeSpy() as spy:
        objective = CausalObjective(model, [policy(Clip(wants_entropy=True))], block=4)
        objective(batch, None, 0.1, policy=completions, sequence_scale=0.1).loss.backward()
    over_vocabulary = {shape for shape in spy.shapes - {(259, 32), (32, 259)} if shape and shape[-1] == 259}
    assert (4, 259) in over_vocabulary
    assert all(len(shape) <= 2 and shape[:-1] <= (16,) for shape in over_vocabulary), over_vocabulary
    assert completions.tokens > 16


def test_evaluation_without_a_gradient_has_the_same_value():
    batch, completions = policy_batch(make_completions(), pack, 0.8)
    objective = CausalObjective(tiny_model().double(), both(AGGREGATIONS[1]))
    values = [batch, None, 0.1, 0.0]
    learned = objective(*values, policy=completions, sequence_scale=0.5)
    with torch.no_grad():
        read = objective(*values, policy=completions, sequence_scale=0.5)
    assert not read.loss.requires_grad
    assert float(read.loss) == pytest.approx(float(learned.loss.detach()), rel=1e-12)


def test_a_log_probability_is_that_over_what_was_kept():
    logits = torch.tensor([[2.0, 1.0, 0.0, 5.0]], dtype=torch.float64, requires_grad=True)
    kept = torch.tensor([[True, True, True, False]])
    taken = taken_logprobs(logits, torch.tensor([1]), temperature=0.5, kept=kept, entropy=True)
    p = torch.softmax(torch.tensor([4.0, 2.0, 0.0], dtype=torch.float64), 0)
    assert float(taken.logprobs.detach()) == pytest.approx(float(p[1].log()))
    assert float(taken.entropy.detach()) == pytest.approx(float(-(p * p.log()).sum()))
    (taken.logprobs + taken.entropy).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 3] == 0


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["old_logprobs", "advantages", "teacher_logprobs", "token_weights", "support"])
def test_a_row_with_a_value_too_few_is_refused(name):
    row = next(row for row in make_completions() if row.targets > 1)
    with pytest.raises(ConformanceError, match=f"{name} has 1 entries for {row.targets} learned tokens"):
        replace(row, **{name: ((1,),)})


def test_a_row_without_a_completion_is_refused():
    with pytest.raises(ConformanceError, match="row x: a completion has no learned token"):
        PolicyRow("x", (1, 2), (False, False), (), (), 0)


def test_values_that_some_rows_lack_are_refused():
    rows = make_completions(3)
    rows[1] = replace(rows[1], ref_logprobs=None)
    with pytest.raises(ConformanceError, match="some completions have ref_logprobs, others do not"):
        policy_batch(rows, pack, 1.0)


def test_a_token_outside_its_support_is_refused():
    rows = make_completions(3, support=True)
    row = rows[1]
    kept = [row.support[token].tolist() for token in range(row.targets)]
    kept[-1] = [i for i in kept[-1] if i != row.ids[-1]]
    rows[1] = replace(row, support=KeptIds.of(kept))
    with pytest.raises(ConformanceError, match="a token outside the support it was sampled from"):
        policy_batch(rows, pack, 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"per_token": torch.zeros(2, 2)}, r"one value per token \(3, \d+\), got \(2, 2\)"),
        ({"aggregation": "mean"}, "cannot be aggregated by 'mean'"),
        ({"aggregation": "constant-length"}, "needs a constant_length"),
    ],
)
def test_a_loss_that_breaks_its_contract_is_named(values, message):
    def wrong(x):
        return PolicyLossOutput(**{"per_token": x.logprobs, "aggregation": "token-mean", **values})

    with pytest.raises(ConformanceError, match=message) as error:
        gradients(tiny_model(), make_completions(3), [policy(wrong)])
    assert "loss clip" in str(error.value)


def test_a_policy_loss_without_completions_is_refused():
    with pytest.raises(ConformanceError, match="loss clip: a policy loss needs completions of the student's own"):
        CausalObjective(tiny_model(), [policy(Clip())])(collate(make_completions(2)), None, 1.0)


# --- kept ids ---------------------------------------------------------------------------------------------------------


def test_kept_ids_are_those_of_every_token_in_four_bytes_each():
    given = [[5, 9], [], [150_000], [0, 1, 2]]
    kept = KeptIds.of(given)
    assert len(kept) == 4
    assert [kept[token].tolist() for token in range(4)] == given
    assert kept[-1].tolist() == given[-1]
    assert (kept.ids.dtype, kept.ids.nbytes) == (np.int32, 4 * 6)
    assert (kept.offsets.dtype, kept.offsets.tolist()) == (np.int64, [0, 2, 2, 3, 6])
    with pytest.raises(IndexError):
        kept[4]
    assert len(KeptIds.of([])) == 0
    assert KeptIds.of([kept[token] for token in range(4)]) == kept


def test_kept_ids_are_equal_where_every_token_has_the_same():
    kept = KeptIds.of([[1, 2], [3]])
    for other in ([[1, 2], [4]], [[1], [2, 3]], [[1, 2]], [[1, 2], [3], []]):
        assert kept != KeptIds.of(other)
        assert len({kept, KeptIds.of(other)}) == 2
    assert len({kept, KeptIds.of(((1, 2), (3,)))}) == 1
    assert kept != [[1, 2], [3]]
