from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from conftest_train import FakeContext
from test_loop import params
from test_objective import ShapeSpy, Teacher, assert_same

from kdkit.api import AlignedLossInputs, ConformanceError, Dense, Example, Message, TopK
from kdkit.models.cuts import CutEncoder
from kdkit.plugins.losses import aligned as aligned_losses
from kdkit.plugins.losses.aligned import ULD, _descending
from kdkit.plugins.losses.token import cross_entropy
from kdkit.testing.tiny import tiny_model, tiny_piece_tokenizer, tiny_tokenizer
from kdkit.train import blocked, blocks, loop
from kdkit.train.aligned import AlignedSignals, Span, aligned_batch
from kdkit.train.alignment import NO_GROUP, AlignedRow, align
from kdkit.train.batching import collate, micro_batches
from kdkit.train.loop import data_task, train
from kdkit.train.objective import CausalObjective, LossTerm
from kdkit.train.packing import pack

PIECES = 387
ANSWERS = ["It is the 10.", "and 😀\n\n what  it is!", " in  ", "x", "What\nis it 20 20", "é"]


def uld(weight=1.0, **values) -> LossTerm:
    return LossTerm("uld", weight, ULD(**values), vocabulary=PIECES, kind="aligned")


def make_aligned() -> list[AlignedRow]:
    """Rows of two tokenizers; two are cut short, one has answers in several turns, and ids stand for two rows each."""
    student, teacher = CutEncoder(tiny_tokenizer()), CutEncoder(tiny_piece_tokenizer())
    turns = (Message("user", "a?"), Message("assistant", "It is"), Message("user", "c?"))
    examples = [Example(id=f"row-{i // 2}", prompt="Q: ", completion=text) for i, text in enumerate(ANSWERS)]
    examples += [Example(id="turns", prompt=turns, completion="the end", every_turn=True)]
    rows = [(student.cut_row(e), teacher.cut_row(e)) for e in examples]
    rows[0] = (rows[0][0].cut(9), rows[0][1])
    rows[1] = (rows[1][0], rows[1][1].cut(10))
    return [align(*pair) for pair in rows]


@pytest.fixture(scope="module")
def aligned() -> list[AlignedRow]:
    return make_aligned()


def models(*, tied=True, seed=0):
    return tiny_model(tied=tied, seed=seed).double().train(), tiny_model(vocab=PIECES, seed=1, layers=3).double()


def distribution(logits, ids, merge="joint", temperature=1.0):
    """Textbook form for one group: row i of the logits predicts ``ids[i]``."""
    p = torch.softmax(logits / temperature, -1)
    value = p[0]
    if merge == "joint":
        for row, token in list(zip(p, ids, strict=True))[1:]:
            value = value * row[token]
    return value


def distance(p, q):
    """Every entry is compared with the one of the same rank, or with 0."""
    a, b = (x[sorted(range(len(x)), key=x.tolist().__getitem__, reverse=True)] for x in (p, q))
    size = max(len(a), len(b))
    a, b = (torch.cat([x, x.new_zeros(size - len(x))]) for x in (a, b))
    return (a - b).abs().sum()


def reference(model, teacher, rows, *, weights=(1.0, 0.0), shift=1, **values):
    """One row at a time, no padding, full logits, explicit loops; ``shift=0`` reads tokens at their own positions."""
    model.zero_grad()
    groups, tokens = sum(r.groups for r in rows), sum(r.targets for r in rows)
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        sides = []
        for net, side, numbers in ((model, row, row.student_groups), (teacher, row.teacher, row.teacher_groups)):
            logits = net(input_ids=torch.tensor([side.ids])).logits[0]
            logits = logits if net is model else logits.detach()
            places = [t for t, flag in enumerate(side.learned) if flag]
            sides.append((logits, side.ids, dict(zip(places, numbers, strict=True))))
        for group in range(row.groups):
            parts = []
            for logits, ids, numbers in sides:
                places = [t for t, g in numbers.items() if g == group]
                rows_of = torch.stack([logits[t - shift] for t in places])
                parts.append(distribution(rows_of, [ids[t] for t in places], **values))
            total = total + weights[0] * distance(*parts) / groups
        logits, ids, numbers = sides[0]
        for t in numbers:
            total = total - weights[1] * torch.log_softmax(logits[t - 1], -1)[ids[t]] / tokens
    total.backward()
    return float(total.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


def gradients(model, teacher, rows, *, size, lay=collate, block=None, terms=None, compute=None):
    model.zero_grad()
    made = CausalObjective(model, terms or (uld(),), block=block, compute=compute)
    tokens, groups = sum(r.targets for r in rows), sum(r.groups for r in rows)
    loss = 0.0
    for part in micro_batches(rows, size):
        batch, signals = aligned_batch(part, lay, Teacher(teacher))
        measured = made(batch, signals, 1 / tokens, 1 / groups)
        measured.loss.backward()
        loss += float(measured.loss.detach())
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


# -- the loss alone


def inputs(seed=0, *, width=23, other=17, spread=2.0, dtype=torch.float64) -> AlignedLossInputs:
    """Three groups: 1 token against 2, 3 against 1, 1 against 1."""
    generator = torch.Generator().manual_seed(seed)
    z, w = (spread * torch.randn(n, v, generator=generator, dtype=torch.float64) for n, v in ((5, width), (4, other)))
    ids = [torch.randint(0, v, (n,), generator=generator) for n, v in ((5, width), (4, other))]
    groups = torch.tensor([0, 1, 1, 1, 2]), torch.tensor([0, 0, 1, 2])
    return AlignedLossInputs(z.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), *ids, *groups, 3)


@pytest.mark.parametrize("merge", ["joint", "first"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("width", "other"), [(23, 17), (17, 23), (20, 20)])
def test_value_and_gradient_are_those_of_the_formula(merge, temperature, width, other):
    x = inputs(width=width, other=other)
    values = ULD(merge=merge, temperature=temperature)(x)
    wanted = []
    for group in range(3):
        mine, its = x.student_groups == group, x.teacher_groups == group
        p = distribution(x.student_logits[mine], x.student_labels[mine], merge, temperature)
        q = distribution(x.teacher_logits[its].detach(), x.teacher_labels[its], merge, temperature)
        wanted.append(distance(p, q))
    wanted = torch.stack(wanted)
    assert torch.allclose(values, wanted, rtol=1e-12)
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    got, want = (torch.autograd.grad((v * scale).sum(), x.student_logits)[0] for v in (values, wanted))
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-13)
    assert bool(got[2:4].any()) == (merge == "joint"), "only the joint form trains the further tokens of a group"


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 60.0])
def test_both_ways_to_sort_agree_with_ties_and_in_the_gradient(spread):
    """On a CPU float32 is sorted by NumPy: as torch sorts it, entry by entry."""
    generator = torch.Generator().manual_seed(0)
    # Rounded, so that many entries are equal; far apart, so that many are 0.
    rough = (spread * torch.randn(7, 300, generator=generator)).round()
    for values in (torch.softmax(rough, -1), torch.softmax(rough, -1)[:, ::2], torch.zeros(2, 5), torch.zeros(0, 5)):
        factors = torch.randn(values.shape, generator=generator)
        results = []
        for sort in (_descending, lambda p: p.sort(dim=-1, descending=True, stable=True).values):
            p = values.clone().requires_grad_()
            got = sort(p)
            results.append((got.detach(), torch.autograd.grad((got * factors).sum(), p)[0]))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
        before = values.clone()
        assert torch.equal(_descending(values), results[1][0])
        assert torch.equal(values, before)


def test_float32_is_sorted_by_its_bits_and_other_tensors_by_torch(monkeypatch):
    names = []
    ranked = aligned_losses._Ranked.apply
    monkeypatch.setattr(aligned_losses._Ranked, "apply", lambda p: names.append(p.dtype) or ranked(p))
    x, wide = inputs(dtype=torch.float32), inputs()
    values, wanted = ULD()(x), ULD()(wide)
    assert names == [torch.float32]
    assert torch.allclose(values.double(), wanted, rtol=1e-5)
    got, want = (torch.autograd.grad(v.sum(), z.student_logits)[0] for v, z in ((values, x), (wanted, wide)))
    assert torch.allclose(got.double(), want, rtol=1e-3, atol=1e-6)


def test_what_is_not_a_number_stays_visible():
    x = inputs(dtype=torch.float32)
    with torch.no_grad():
        x.student_logits[0, 3] = float("nan")
    assert ULD()(x).isnan().tolist() == [True, False, False]


def test_a_golden_value():
    """Two entries against three: .75, .25 and .5, .25, .25; then two tokens against one, the second has p = .5."""
    z = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.5, 0.5]]).double().log()
    w = torch.tensor([[0.5, 0.25, 0.25]] * 2).double().log()
    labels = torch.tensor([0, 0, 1]), torch.tensor([0, 0])
    x = AlignedLossInputs(z, w, *labels, torch.tensor([0, 1, 1]), torch.tensor([0, 1]), 2)
    assert ULD()(x).tolist() == pytest.approx([0.25 + 0 + 0.25, 0.125 + 0.125 + 0.25])
    assert ULD(merge="first")(x).tolist() == pytest.approx([0.5, 0.5])


def test_zero_with_zero_gradient_where_models_and_tokens_agree():
    x = inputs()
    z, ids, groups = x.student_logits, x.student_labels, x.student_groups
    values = ULD()(AlignedLossInputs(z, z.detach() + 3, ids, ids, groups, groups, 3))
    assert values.abs().max() < 1e-12
    same = ULD()(AlignedLossInputs(z, z.detach(), ids, ids, groups, groups, 3))
    assert torch.equal(same, torch.zeros_like(same))
    assert torch.equal(torch.autograd.grad(same.sum(), z)[0], torch.zeros_like(z))


def test_no_gradient_reaches_the_teacher_and_the_inputs_stay():
    x = inputs()
    before = x.student_logits.detach().clone(), x.teacher_logits.detach().clone()
    ULD()(x).sum().backward()
    assert x.teacher_logits.grad is None
    assert x.student_logits.grad is not None
    assert torch.equal(x.student_logits, before[0])
    assert torch.equal(x.teacher_logits, before[1])


def test_values_lie_between_0_and_2_even_for_models_that_are_certain():
    for spread in (1.0, 50.0):
        for seed in range(10):
            x = inputs(seed, spread=spread, dtype=torch.float32)
            values = ULD()(x)
            assert values.dtype is torch.float32
            assert ((values >= 0) & (values <= 2 + 1e-6)).all()
            assert torch.isfinite(torch.autograd.grad(values.sum(), x.student_logits)[0]).all()


def test_half_precision_is_computed_in_float32():
    x = inputs(dtype=torch.bfloat16)
    wide = AlignedLossInputs(x.student_logits.float(), x.teacher_logits.float(), x.student_labels, x.teacher_labels,
                             x.student_groups, x.teacher_groups, 3)  # fmt: skip
    assert torch.equal(ULD()(x), ULD()(wide))


# -- the engine


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lay", [collate, pack])
@pytest.mark.parametrize(("size", "block"), [(1, 1), (1, None), (2, 3), (3, 7), (7, 16), (7, 10_000)])
def test_gradient_is_the_same_for_every_split_layout_and_block(aligned, size, lay, block, tied):
    model, teacher = models(tied=tied)
    want = reference(model, teacher, aligned)
    assert_same(gradients(model, teacher, aligned, size=size, lay=lay, block=block), want, rtol=1e-9)


@pytest.mark.parametrize("values", [{"merge": "first"}, {"temperature": 2.0}])
def test_parameters_reach_the_engine(aligned, values):
    model, teacher = models()
    got = gradients(model, teacher, aligned, size=3, block=4, terms=(uld(**values),))
    assert_same(got, reference(model, teacher, aligned, **values), rtol=1e-9)


@pytest.mark.parametrize(("size", "block"), [(1, 1), (3, 5), (7, 10_000)])
def test_tokens_and_groups_have_denominators_of_their_own(aligned, size, block):
    model, teacher = models()
    terms = (uld(0.7), LossTerm("cross-entropy", 0.3, cross_entropy))
    want = reference(model, teacher, aligned, weights=(0.7, 0.3))
    assert_same(gradients(model, teacher, aligned, size=size, block=block, terms=terms, lay=pack), want, rtol=1e-9)


def test_tokens_are_read_where_they_are_predicted(aligned):
    """Probabilities of a group at its tokens' own positions are those of the tokens that come next."""
    model, teacher = models()
    got = gradients(model, teacher, aligned, size=7)[0]
    assert got == pytest.approx(reference(model, teacher, aligned)[0], rel=1e-10)
    assert abs(got - reference(model, teacher, aligned, shift=0)[0]) > 1e-3


def test_a_student_that_knows_its_teacher_by_other_tokens_has_no_loss():
    """Both predict every token of the answer with certainty; a shift by one would be certainty about other tokens."""
    student, teacher = CutEncoder(tiny_tokenizer()), CutEncoder(tiny_piece_tokenizer())
    example = Example(id="1", prompt="Q: ", completion="It is what 10")
    row = align(student.cut_row(example), teacher.cut_row(example))

    class Certain:
        def __init__(self, side, width):
            self.logits = torch.zeros(len(side.ids) - 1, width).scatter_(1, torch.tensor(side.ids[1:])[:, None], 60.0)
            self.logits = self.logits[torch.tensor(side.learned[1:])]

        def block(self, start, stop):
            return Dense(self.logits[start:stop])

    batch, signals = aligned_batch([row], collate, lambda _: Certain(row.teacher, PIECES))
    labels = batch.input_ids[:, 1:][batch.labels_mask[:, 1:]]
    span = next(iter(signals.spans(10_000)))
    logits = Certain(row, 259).logits
    assert ULD()(signals.inputs(logits, labels, span)).max() < 1e-6
    assert ULD()(signals.inputs(logits.roll(-1, 0), labels, span)).max() > 0.5


def test_equal_models_with_equal_tokenizers_have_no_loss_and_no_gradient():
    encoder, model = CutEncoder(tiny_tokenizer()), tiny_model().double().train()
    sides = [encoder.cut_row(Example(id=str(i), prompt="Q: ", completion=text)) for i, text in enumerate(ANSWERS)]
    loss, grads = gradients(model, tiny_model().double(), [align(s, s) for s in sides], size=3)
    assert loss < 1e-12
    assert all(grad.abs().max() < 1e-12 for grad in grads.values())


def test_the_full_logits_of_neither_model_ever_exist(aligned):
    model, teacher = tiny_model().train(), tiny_model(vocab=PIECES, seed=1)
    with ShapeSpy() as spy:
        batch, signals = aligned_batch(aligned, pack, Teacher(teacher))
        CausalObjective(model, (uld(),), block=4)(batch, signals, 1.0, 1.0).loss.backward()
    longest = max(max(r.student_groups.count(g), r.teacher_groups.count(g)) for r in aligned for g in range(r.groups))
    assert longest < 6 < len(signals.labels)
    heads = {(259, 32), (32, 259), (32, PIECES)}
    seen = {shape for shape in spy.shapes - heads if shape and shape[-1] in {259, PIECES}}
    assert max(shape[0] for shape in seen if shape[-1] == PIECES) == longest, seen
    # The student's blocks are projected four at a time.
    assert max(shape[0] for shape in seen) <= 16 < int(batch.labels_mask[:, 1:].sum()), seen
    assert all(len(shape) <= 2 for shape in seen), seen


def test_bf16_compute_stays_near_float32(aligned):
    model, teacher = tiny_model().train(), tiny_model(vocab=PIECES, seed=1)
    want = gradients(model, teacher, aligned, size=7)
    got = gradients(model, teacher, aligned, size=7, compute=torch.bfloat16)
    assert got[0] == pytest.approx(want[0], rel=0.05)
    assert all(grad.dtype is torch.float32 for grad in got[1].values())


def test_rows_without_a_common_text_have_no_value(aligned):
    silent = [AlignedRow(r.id, r.ids, r.learned, r.teacher, (NO_GROUP,) * r.targets, (NO_GROUP,) * r.teacher.targets, 0)
              for r in aligned]  # fmt: skip
    model, teacher = models()
    batch, signals = aligned_batch(silent, pack, Teacher(teacher))
    measured = CausalObjective(model, (uld(), LossTerm("ce", 1.0, cross_entropy)))(batch, signals, 1.0, 1.0)
    measured.loss.backward()
    assert measured.sums[0] == 0
    assert measured.sums[1] > 0
    assert measured.groups == 0
    # Between rows with groups they change nothing.
    mixed = [row for pair in zip(aligned, silent, strict=True) for row in pair]
    want = reference(model, teacher, aligned)
    for block in (1, 8, None):
        assert_same(gradients(model, teacher, mixed, size=5, block=block), want, rtol=1e-9)


def test_blocks_hold_whole_groups_and_bound_both_sides(aligned):
    batch, signals = aligned_batch(aligned * 3, pack, Teacher(tiny_model(vocab=PIECES)))
    for size in (1, 5, 16, 1000):
        spans = list(signals.spans(size))
        assert [s.start for s in spans] == [0, *(s.stop for s in spans[:-1])]
        assert spans[-1].stop == int(batch.labels_mask.sum())
        assert sum(s.groups for s in spans) == signals.groups
        for span in spans:
            inside = {g for g in signals.student_groups[span.start : span.stop] if g != NO_GROUP}
            assert inside == set(range(span.first, span.first + span.groups))
            if span.groups > 1:
                low, high = signals.ranges[span.first][0], signals.ranges[span.first + span.groups - 1][1]
                assert max(span.stop - span.start, high - low) <= size


def test_the_order_of_a_packed_batch_is_followed(aligned):
    batch, signals = aligned_batch(aligned, pack, Teacher(tiny_model(vocab=PIECES)))
    alone = [int(i) for row in aligned for i in row.ids]
    assert sorted(batch.example_ids) == sorted(row.id for row in aligned)
    assert len(alone) < batch.input_ids.numel() + 1
    labels = batch.input_ids[:, 1:][batch.labels_mask[:, 1:]].tolist()
    student, teacher = tiny_tokenizer(), tiny_piece_tokenizer()
    ours = [[i for i, g in zip(labels, signals.student_groups, strict=True) if g == n] for n in range(signals.groups)]
    theirs = [signals.labels[a:b].tolist() for a, b in signals.ranges]
    for mine, its in zip(ours, theirs, strict=True):
        texts = student.decode(mine), teacher.decode([teacher.convert_tokens_to_ids("x"), *its])[1:]
        ends = {"<|im_end|>": "<end_of_turn>", "\n<|im_end|>": "<end_of_turn>"}
        assert ends.get(texts[0], texts[0]) == texts[1]


def test_what_the_engine_cannot_use_is_named(aligned, rows):
    batch, signals = aligned_batch(aligned, pack, Teacher(tiny_model(vocab=PIECES)))
    wrong = LossTerm("mean-loss", 1.0, lambda x: ULD()(x).mean(), kind="aligned")
    with pytest.raises(ConformanceError, match="mean-loss: an aligned loss returns one value per group"):
        CausalObjective(tiny_model(), (wrong,))(batch, signals, 1.0, 1.0)
    with pytest.raises(ConformanceError, match="uld: an aligned loss needs a teacher's view of the same text"):
        CausalObjective(tiny_model(), (uld(),))(collate(rows), None, 1.0, 1.0)

    class Few:
        def block(self, start, stop):
            return TopK(torch.zeros(stop - start, 1, dtype=torch.int64), torch.zeros(stop - start, 1))

    few = AlignedSignals(Few(), signals.labels, signals.student_groups, signals.teacher_groups, signals.ranges)
    with pytest.raises(ConformanceError, match="needs the teacher's logits"):
        CausalObjective(tiny_model(), (uld(),))(batch, few, 1.0, 1.0)


def test_a_block_of_a_wide_pair_is_smaller():
    from kdkit.train.objective import block_tokens

    narrow, wide = (CausalObjective(tiny_model(), (LossTerm("uld", 1.0, ULD(), vocabulary=v, kind="aligned"),))
                    for v in (259, 262_144))  # fmt: skip
    assert narrow.sizes().loss == narrow.sizes().product == block_tokens(518, 8)
    assert wide.sizes().loss == block_tokens(262_144 + 259, 8) == 2**30 // (262_403 * 4 * 8)


@pytest.mark.parametrize(
    ("width", "other", "tokens"), [(4000, 4000, 1), (12_000, 4000, 1), (4000, 12_000, 1), (12_000, 4000, 2)]
)
def test_the_memory_of_a_block_is_what_its_size_is_chosen_for(width, other, tokens, monkeypatch):
    """With torch's sort, which needs more than NumPy's, and whose memory is seen here."""
    from torch.profiler import ProfilerActivity, profile

    monkeypatch.setattr(aligned_losses, "_descending", lambda p: p.sort(dim=-1, descending=True, stable=True).values)
    count = 64
    groups = tuple(place // tokens for place in range(count))
    its = tuple(range(count // tokens))
    signals = AlignedSignals(Wide(len(its), other), torch.zeros(len(its), dtype=torch.int64), groups, its,
                             tuple((g, g + 1) for g in its))  # fmt: skip
    terms = (LossTerm("uld", 0.5, ULD(temperature=2.0), kind="aligned"), LossTerm("ce", 0.5, cross_entropy))
    block = blocks.Block(terms, (1.0, 1.0), torch.zeros(count, dtype=torch.int64), signals, lambda x: x)
    head = torch.randn(width, 4)
    grads = [torch.zeros(count, 4), torch.zeros(width, 4), None]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as spy:
        blocked._run_product(
            block, torch.randn(count, 4), [head, None], [Span(0, count, 0, len(its))], grads, torch.float32
        )
    events = [e for e in spy.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = list(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    copies = max(alive) / (count * (width + other) * 4)
    assert 2 < copies < blocks.ALIGNED_COPIES


class Wide:
    def __init__(self, count, width):
        self.logits = torch.randn(count, width)

    def block(self, start, stop):
        return Dense(self.logits[start:stop].clone())


@pytest.mark.parametrize("size", [1, 7])
def test_the_loop_divides_groups_and_tokens_by_those_of_the_step(aligned, tmp_path, monkeypatch, size):
    scales = []
    forward = CausalObjective.forward

    def spy(self, batch, signals, *scale, **more):
        scales.append(scale)
        return forward(self, batch, signals, *scale, **more)

    monkeypatch.setattr(CausalObjective, "forward", spy)
    model, teacher = models()
    wanted = [reference(model, teacher, aligned, weights=w)[0] for w in ((1.0, 0.0), (0.0, 1.0))]
    ctx, terms = FakeContext(tmp_path), (uld(0.7), LossTerm("cross-entropy", 0.3, cross_entropy))
    task = data_task(model, terms, [aligned], [1.0], seed=3, held_out=aligned, signals=Teacher(teacher))
    split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 7 // size}
    train(task, params(max_steps=1, learning_rate=1e-15, **split), ctx, compute=torch.float64)
    tokens, groups = sum(r.targets for r in aligned), sum(r.groups for r in aligned)
    assert set(scales) == {(1 / tokens, 1 / groups), (1.0, 1.0)}
    logged = {key: value for _, values in ctx.values for key, value in values.items()}
    for part in ("train", "eval"):
        found = [logged[f"{part}/{name}"] for name in ("uld", "cross-entropy")]
        assert found == pytest.approx(wanted, rel=1e-5)
        assert logged[f"{part}/loss"] == pytest.approx(0.7 * wanted[0] + 0.3 * wanted[1], rel=1e-5)


def test_rows_without_a_teachers_side_are_refused_by_name(aligned, rows, tmp_path):
    mixed = [[*aligned[:1], *rows[:1]]]
    task = data_task(tiny_model().train(), (uld(),), mixed, [1.0], seed=0, signals=Teacher(tiny_model()))
    with pytest.raises(ConformanceError, match=f"row {rows[0].id}: an aligned loss needs rows in the teacher's tokens"):
        train(task, params(max_steps=1), FakeContext(tmp_path), compute=torch.float32)


class Rank(loop._Training):
    """One of two ranks: what it tells the other is kept, what it hears is given."""

    world = 2
    rank, heard = 0, ()

    def _all_ranks(self, value):
        place = len(self.told)
        self.told.append(value)
        return value + (self.heard[place] if self.heard else 0)

    def _rows(self, step):
        return [self.task.streams[0].source.data[0][self.rank :: 2]]

    def _apply(self, norm, rows):
        self.seen.update({name: p.grad.clone() for name, p in self._bare().named_parameters()})
        return super()._apply(norm, rows)


@pytest.mark.parametrize("size", [1, 4])
def test_ranks_divide_by_the_tokens_and_groups_of_all_ranks(aligned, tmp_path, monkeypatch, size):
    """Two ranks with unlike numbers of groups; the mean of their gradients, which DDP takes, is that of one process."""
    terms = (uld(0.7), LossTerm("cross-entropy", 0.3, cross_entropy))
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_grad_norm": 1e9}
    given = params(max_steps=1, learning_rate=1e-15, **options)

    def run_rank(rank, heard):
        model, teacher = models()
        task = data_task(model, terms, [aligned], [1.0], seed=0, held_out=aligned, signals=Teacher(teacher))
        ctx = FakeContext(tmp_path / f"{rank}-{len(heard)}")
        training = Rank(task, given, ctx, torch.float64)
        training.rank, training.heard, training.told, training.seen = rank, heard, [], {}
        monkeypatch.setattr(type(training.accelerator), "process_index", rank)
        training.run()
        return training, {key: value for _, values in ctx.values for key, value in values.items()}

    told = [run_rank(rank, ())[0].told for rank in (0, 1)]
    groups = [sum(row.groups for row in aligned[rank::2]) for rank in (0, 1)]
    assert [counts[1] for counts in told] == groups
    assert groups[0] != groups[1]
    (one, logged), (two, others) = (run_rank(rank, told[1 - rank]) for rank in (0, 1))
    model, teacher = models()
    for name, grad in reference(model, teacher, aligned, weights=(0.7, 0.3))[1].items():
        assert torch.allclose((one.seen[name] + two.seen[name]) / 2, grad, rtol=1e-8, atol=1e-12), name
    # The sums of both ranks would be added, too: each logs its own part of the mean.
    for weights, name in (((1.0, 0.0), "uld"), ((0.0, 1.0), "cross-entropy")):
        wanted = reference(model, teacher, aligned, weights=weights)[0]
        for part in ("eval", "train"):
            share = logged[f"{part}/{name}"] + others[f"{part}/{name}"]
            assert share == pytest.approx(wanted, rel=1e-5), (part, name)
