from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from conftest_train import FakeContext, make_rows
from test_loop import params, weights_hash
from torch import nn

from kdkit.api import ConformanceError, Dense, ModelError
from kdkit.api.errors import Stopped
from kdkit.models.heads import split
from kdkit.plugins.losses.hidden import HiddenCosine, HiddenMSE
from kdkit.plugins.losses.token import ForwardKL, cross_entropy
from kdkit.testing.tiny import tiny_model
from kdkit.train import checkpoint
from kdkit.train.batching import collate, micro_batches
from kdkit.train.loop import data_task, train
from kdkit.train.objective import CausalObjective, LossTerm, valid_hidden
from kdkit.train.packing import pack
from kdkit.train.representation import HiddenStates, Match, layer_pairs, matched, teacher_layers

PAIRS = ((0, 0), (1, 3), (-1, -1))


@dataclass
class Signals:
    parts: object
    last: torch.Tensor
    layers: dict

    def block(self, start, stop):
        with torch.no_grad():
            return Dense(self.parts.project(self.last[start:stop]))

    def hidden(self, layers):
        return tuple(self.layers[layer] for layer in layers)


class Teacher:
    """A teacher in memory, as the built-in one is."""

    def __init__(self, model):
        self.model, self.parts, self.states = model, split(model), HiddenStates(model)

    @property
    def hidden_sizes(self):
        return self.states.sizes

    def signals(self, batch, /, *, layers=()):
        with torch.no_grad(), self.states.keep(layers) as kept:
            last = valid_hidden(self.parts.trunk, batch)
        return Signals(self.parts, last, self.states.of_tokens(kept, last, batch, layers))


def terms_of(student, teacher, *losses, block=None, seed=3):
    """Weighted losses, with the representation ones matched; ``losses`` are (name, weight, loss, kind)."""
    terms = matched([LossTerm(*loss[:3], kind=loss[3]) for loss in losses], student, teacher, seed_for=lambda _: seed)
    for term in terms:
        if term.match is not None and block is not None:
            term.match._block = block
    return terms


LOSSES = (
    ("hidden-mse", 0.7, HiddenMSE(PAIRS, "linear"), "representation"),
    ("hidden-cosine", 0.4, HiddenCosine(((2, 4), (1, 1)), "linear"), "representation"),
    ("cross-entropy", 0.3, cross_entropy, "token"),
    ("forward-kl", 0.2, ForwardKL(), "token"),
)


def models(**values):
    return tiny_model(layers=2).double().train(), Teacher(tiny_model(layers=4, hidden=48, seed=1, **values).double())


def gradients(student, teacher, rows, *, size=8, lay=collate, losses=LOSSES, match_block=None, block=None):
    student.zero_grad()
    terms = terms_of(student, teacher, *losses, block=match_block)
    objective = CausalObjective(student, terms, block=block)
    scale, loss = 1 / sum(row.targets for row in rows), 0.0
    sums = torch.zeros(len(terms), dtype=torch.float64)
    for part in micro_batches(rows, size):
        batch = lay(part)
        measured = objective(batch, teacher.signals(batch, layers=teacher_layers(terms)), scale)
        measured.loss.backward()
        loss, sums = loss + float(measured.loss.detach()), sums + measured.sums
        assert measured.counts == (measured.tokens,) * len(terms)
    return loss, sums, {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def reference(student, teacher, rows, *, seed=3):
    """Row by row from ``output_hidden_states`` and full logits, with textbook formulas."""
    student.zero_grad()
    torch.manual_seed(seed)
    mse_maps = [nn.Linear(32, 48, bias=False) for _ in range(3)]
    torch.manual_seed(seed)
    cosine_maps = [nn.Linear(32, 48, bias=False) for _ in range(2)]
    maps = nn.ModuleList([*mse_maps, *cosine_maps]).double()
    total, count = torch.zeros(4, dtype=torch.float64), sum(row.targets for row in rows)
    for row in rows:
        ids, keep = torch.tensor([row.ids]), torch.tensor(row.learned)[1:]
        own = student(input_ids=ids, output_hidden_states=True)
        with torch.no_grad():
            its = teacher.model(input_ids=ids, output_hidden_states=True)
        s, t = ([h[0, :-1][keep] for h in out.hidden_states] for out in (own, its))
        mse = sum(
            ((m(s[a]) - t[b]) ** 2).sum() / 48 for m, (a, b) in zip(maps[:3], ((0, 0), (1, 3), (2, 4)), strict=True)
        )
        cos = 0.0
        for m, (a, b) in zip(maps[3:], ((2, 4), (1, 1)), strict=True):
            x, y = m(s[a]), t[b]
            # The embedding of the pad id is zero, and so is the state of a row that starts with it.
            known = (x != 0).any(-1) & (y != 0).any(-1)
            cos = cos + (~known).sum() + (1 - (x * y).sum(-1)[known] / (x.norm(dim=-1) * y.norm(dim=-1))[known]).sum()
        ce = nn.functional.cross_entropy(own.logits[0, :-1][keep], ids[0, 1:][keep], reduction="sum")
        log_p, log_q = (torch.log_softmax(o.logits[0, :-1][keep], -1) for o in (its, own))
        total = total + torch.stack([mse, cos, ce, (log_p.exp() * (log_p - log_q)).sum()])
    loss = (total * torch.tensor([0.7, 0.4, 0.3, 0.2], dtype=torch.float64)).sum() / count
    loss.backward()
    grads = {f"model.{name}": p.grad.clone() for name, p in student.named_parameters()}
    places = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    grads |= {
        f"matches.{a}.projectors.{b}.weight": m.weight.grad.clone() for m, (a, b) in zip(maps, places, strict=True)
    }
    return float(loss.detach()), total.detach(), grads


def assert_same(got, want, *, rtol=1e-9):
    assert got[0] == pytest.approx(want[0], rel=rtol)
    assert torch.allclose(got[1], want[1], rtol=rtol)
    assert got[2].keys() == want[2].keys()
    for name, grad in want[2].items():
        assert torch.allclose(got[2][name], grad, rtol=rtol, atol=rtol * float(grad.abs().max())), name


@pytest.mark.parametrize("lay", [collate, partial(collate, side="left"), pack])
@pytest.mark.parametrize(("size", "match_block"), [(1, 1), (3, 4), (8, None), (8, 5)])
def test_value_and_gradient_are_those_of_the_formulas(size, match_block, lay):
    """Student and projectors, for every split, padding, packing and block."""
    rows = make_rows()
    student, teacher = models()
    want = reference(student, teacher, rows)
    assert_same(gradients(student, teacher, rows, size=size, lay=lay, match_block=match_block, block=match_block), want)


def test_no_gradient_reaches_the_teacher():
    student, teacher = models()
    gradients(student, teacher, make_rows())
    assert all(p.grad is None for p in teacher.model.parameters())

    class Live(Teacher):
        """One that forgets no_grad."""

        def signals(self, batch, /, *, layers=()):
            with self.states.keep(layers) as kept:
                last = valid_hidden(self.parts.trunk, batch)
            return Signals(self.parts, last, self.states.of_tokens(kept, last, batch, layers))

    gradients(student, Live(teacher.model), make_rows())
    assert all(p.grad is None for p in teacher.model.parameters())


def test_hidden_states_alone_make_no_logits_and_leave_the_head_alone(monkeypatch):
    student, teacher = tiny_model(tied=False).double().train(), Teacher(tiny_model(layers=4, seed=1).double())
    calls = []
    student.lm_head.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(Signals, "block", lambda *_: calls.append(1))
    loss, _, grads = gradients(student, teacher, make_rows(), losses=(LOSSES[0],))
    assert loss > 0
    assert not calls
    assert "model.lm_head.weight" not in grads
    assert "model.model.norm.weight" in grads, "the last state comes after the norm"


def test_a_teacher_is_asked_for_logits_only_where_a_loss_reads_them():
    student, teacher = models()
    (mse, _, ce, _), rows = terms_of(student, teacher, *LOSSES), make_rows()
    batch = collate(rows)
    signals = teacher.signals(batch, layers=teacher_layers([mse]))
    signals.block = None
    objective = CausalObjective(student, [mse, replace(ce, teacher=False)])
    assert float(objective(batch, signals, 1.0).loss.detach()) > 0
    with pytest.raises(TypeError):
        CausalObjective(student, [mse, ce])(batch, signals, 1.0)


def test_a_batch_without_learned_tokens_gives_zero():
    student, teacher = models()
    rows = make_rows()
    silent = [type(row)(row.id, row.ids, (False,) * len(row.ids)) for row in rows]
    for losses in (LOSSES, LOSSES[:2]):
        terms = terms_of(student, teacher, *losses)
        batch = collate(silent)
        measured = CausalObjective(student, terms)(batch, teacher.signals(batch, layers=teacher_layers(terms)), 1.0)
        measured.loss.backward()
        assert float(measured.loss.detach()) == 0.0


def test_the_value_is_zero_for_equal_models_and_the_same_without_gradient():
    student = tiny_model(layers=3).double()
    teacher, rows = Teacher(tiny_model(layers=3).double()), make_rows()
    # The state of the pad id can be zero here, which has no direction.
    batch = collate([type(row)(row.id, tuple(min(i, 257) for i in row.ids), row.learned) for row in rows])
    for loss in (HiddenMSE(), HiddenCosine()):
        terms = terms_of(student, teacher, ("hidden", 1.0, loss, "representation"))
        assert terms[0].match.pairs == [(1, 1), (2, 2), (3, 3)]
        assert list(terms[0].match.parameters()) == []
        with torch.no_grad():
            measured = CausalObjective(student, terms)(batch, teacher.signals(batch, layers=[1, 2, 3]), 1.0)
        assert not measured.loss.requires_grad
        assert float(measured.loss) == pytest.approx(0, abs=1e-12)
    student, teacher, batch = *models(), collate(rows)
    with_gradient = gradients(student, teacher, rows)[0]
    terms = terms_of(student, teacher, *LOSSES)
    with torch.no_grad():
        scale = 1 / sum(row.targets for row in rows)
        signals = teacher.signals(batch, layers=teacher_layers(terms))
        measured = CausalObjective(student, terms)(batch, signals, scale)
    assert float(measured.loss) == pytest.approx(with_gradient, rel=1e-12)


def test_gradient_checkpointing_changes_nothing():
    student, teacher = models()
    plain = gradients(student, teacher, make_rows())
    student.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(gradients(student, teacher, make_rows()), plain)


def test_half_precision_stays_near_and_keeps_master_gradients():
    rows, student = make_rows(), tiny_model().train()
    teacher = Teacher(tiny_model(layers=4, hidden=48, seed=1))
    want = reference(tiny_model().double().train(), models()[1], rows)
    half = Teacher(tiny_model(layers=4, hidden=48, seed=1).bfloat16())
    for those, compute, rel in ((teacher, torch.float32, 1e-4), (half, torch.bfloat16, 0.03)):
        student.zero_grad()
        terms = terms_of(student, those, *LOSSES)
        batch = collate(rows)
        objective = CausalObjective(student, terms, compute=compute)
        measured = objective(
            batch, those.signals(batch, layers=teacher_layers(terms)), 1 / sum(row.targets for row in rows)
        )
        measured.loss.backward()
        assert measured.loss.dtype is torch.float32
        assert float(measured.loss.detach()) == pytest.approx(want[0], rel=rel)
        for name, p in objective.named_parameters():
            assert p.grad.dtype is torch.float32
            cosine = nn.functional.cosine_similarity(p.grad.double().flatten(), want[2][name].flatten(), dim=0)
            assert cosine > 0.98, name


# --- layers -----------------------------------------------------------------------------------------------------------


def test_pairs_of_layers():
    pairs = partial(layer_pairs, where="loss x")
    assert pairs([], 4, 12) == [(1, 3), (2, 6), (3, 9), (4, 12)]  # TinyBERT: g(m) = 3 m
    assert pairs([], 3, 7) == [(1, 2), (2, 5), (3, 7)]
    assert pairs([], 4, 2) == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert pairs([(-1, -1), (0, 0), (-5, -13)][:2], 4, 12) == [(4, 12), (0, 0)]
    assert pairs([(-5, -13)], 4, 12) == [(0, 0)]
    for bad, whose in (((5, 1), "student has no layer 5"), ((1, 13), "teacher has no layer 13"), ((-6, 1), "layer -6")):
        with pytest.raises(ModelError, match=whose):
            pairs([bad], 4, 12)
    with pytest.raises(ModelError, match=r"allowed: 0 .the embedding. to 4 .the last."):
        pairs([(5, 1)], 4, 12)
    with pytest.raises(ModelError, match=r"pair of layers \[4, 12\] appears twice"):
        pairs([(4, 12), (-1, -1)], 4, 12)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=1))


def gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=61, hidden_size=16, ffn_dim=24, num_hidden_layers=3, num_attention_heads=2, word_embed_proj_dim=8,
        do_layer_norm_before=False, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return OPTForCausalLM(config)


@pytest.mark.parametrize("make", [partial(tiny_model, layers=3), gpt2, gemma2, opt])
def test_layers_are_counted_as_transformers_does(make):
    torch.manual_seed(0)
    model = make().eval()
    states, trunk = HiddenStates(model), split(model).trunk
    batch = collate([type(row)(row.id, tuple(i % 61 for i in row.ids), row.learned) for row in make_rows(3)])
    with torch.no_grad():
        out = trunk(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids,
                    output_hidden_states=True, use_cache=False)  # fmt: skip
        with states.keep([0, 1, 2, 3]) as kept:
            last = valid_hidden(trunk, batch)
    got = states.of_tokens(kept, last, batch, [0, 1, 2, 3])
    learned = batch.labels_mask[:, 1:]
    for index in range(3):
        assert torch.equal(got[index], out.hidden_states[index][:, :-1][learned]), index
    assert torch.equal(got[3], out.last_hidden_state[:, :-1][learned])
    assert states.sizes == tuple(got[index].shape[1] for index in range(4))


def test_a_model_without_one_list_of_layers_is_refused():
    model = tiny_model(layers=2)
    model.model.more = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(ModelError, match="cannot tell which modules are the 2 decoder layers"):
        HiddenStates(model)


def test_a_layer_that_hands_on_something_else_is_refused():
    class Flat(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.attention_type = inner, "full_attention"

        def forward(self, hidden_states, **others):
            return self.inner(hidden_states[0], **others)

    model = tiny_model(layers=2)
    model.model.layers[1] = Flat(model.model.layers[1])
    model.model.layers[0].register_forward_hook(lambda _m, _a, out: out[None])
    with pytest.raises(ModelError, match="has no hidden states of tokens at layer 1"):
        HiddenStates(model)


def test_only_the_layers_that_were_asked_for_are_kept():
    """Of six hidden states a teacher keeps the two that were asked for, and of them the learned tokens."""
    model = tiny_model(layers=5).eval()
    teacher, seen = Teacher(model), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, _a, out: seen.append(weakref.ref(out)))
    rows = make_rows()
    signals = teacher.signals(collate(rows), layers=[2, 5])
    gc.collect()
    assert len(seen) == 5
    assert all(state() is None for state in seen), "a whole hidden state is alive"
    assert {index: tuple(state.shape) for index, state in signals.layers.items()} == {
        index: (sum(row.targets for row in rows), 32) for index in (2, 5)
    }
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_widths_that_cannot_be_compared_are_named():
    student, teacher = models()
    with pytest.raises(ModelError, match=r"student are 32 wide, those of the teacher 48.*projector: linear"):
        terms_of(student, teacher, ("hidden-mse", 1.0, HiddenMSE(PAIRS), "representation"))


def test_a_teacher_without_hidden_states_is_named():
    student, teacher = models()
    with pytest.raises(ModelError, match="the teacher gives no hidden states"):
        terms_of(student, object(), LOSSES[0])
    terms, batch = terms_of(student, teacher, LOSSES[0]), collate(make_rows())
    with pytest.raises(ConformanceError, match="hidden-mse: a representation loss needs the teacher's hidden states"):
        CausalObjective(student, terms)(batch, None, 1.0)


def test_values_and_states_of_another_shape_are_named():
    class Mean(HiddenMSE):
        __slots__ = ()

        def __call__(self, x, /):
            return super().__call__(x).mean()

    student, teacher = models()
    with pytest.raises(ConformanceError, match="mean: a representation loss returns one value per token"):
        gradients(student, teacher, make_rows(), losses=(("mean", 1.0, Mean(PAIRS, "linear"), "representation"),))
    match = Match(HiddenMSE(((1, 1),)), [8, 8], [8, 8], seed=0, name="x")
    with pytest.raises(ConformanceError, match=r"hidden states of \(3, 8\) and \(2, 8\) instead of widths 8 and 8"):
        match([torch.zeros(3, 8)], [torch.zeros(2, 8)], None, None)


def test_weights_of_tokens_count():
    match = Match(HiddenMSE(((1, 1),)), [8, 8], [8, 8], seed=0, name="x", block=2)
    own, its = torch.randn(5, 8), torch.randn(5, 8)
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 0.0])
    want = (weights * ((own - its) ** 2).mean(-1)).sum()
    assert torch.allclose(match([own], [its], weights, None), want)


# --- the loop ---------------------------------------------------------------------------------------------------------


def fit(root, *, stop_at=None, losses=LOSSES, seed=17, held_out=(), **values):
    ctx = FakeContext(root, stop_at=stop_at, seed=seed)
    student, teacher = tiny_model(layers=2).train(), Teacher(tiny_model(layers=4, hidden=48, seed=1))
    terms = matched([LossTerm(*loss[:3], kind=loss[3]) for loss in losses], student, teacher, seed_for=ctx.seed_for)
    signals = partial(teacher.signals, layers=teacher_layers(terms))
    work = data_task(student, terms, [make_rows(10)], [1.0], seed=ctx.seed_for("data-order"), signals=signals,
                     held_out=held_out)  # fmt: skip
    train(work, params(**values), ctx, compute=torch.float32)
    return student, nn.ModuleList(term.match for term in terms if term.match is not None), ctx


def test_training_brings_the_states_together_and_trains_the_projectors(tmp_path):
    start = fit(tmp_path / "a", learning_rate=1e-30, max_steps=1)[1]
    _, matches, ctx = fit(tmp_path / "b", max_steps=30, losses=LOSSES[:2], held_out=make_rows(4, seed=5))
    for name in ("hidden-mse", "hidden-cosine"):
        curve = [values[f"train/{name}"] for _, values in ctx.values if f"train/{name}" in values]
        assert 0 < curve[-1] < 0.8 * curve[0], name
    assert {"eval/hidden-mse", "eval/hidden-cosine", "eval/loss"} <= set(ctx.values[-1][1])
    for before, after in zip(start.parameters(), matches.parameters(), strict=True):
        assert float((after - before).detach().abs().max()) > 1e-3


def test_stop_and_resume_gives_bitwise_the_same_weights_and_projectors(tmp_path):
    want, matches, _ = fit(tmp_path / "a")
    for stop in (2, 5):
        with pytest.raises(Stopped, match="checkpoint saved"):
            fit(tmp_path / "b", stop_at=stop)
    got, resumed, ctx = fit(tmp_path / "b")
    assert ctx.logs[0] == "resumed at step 5 of 8"
    assert weights_hash(got) == weights_hash(want)
    assert weights_hash(resumed) == weights_hash(matches)


def test_the_resume_test_notices_projectors_that_are_not_restored(tmp_path, monkeypatch):
    want, matches, _ = fit(tmp_path / "a")
    with pytest.raises(Stopped):
        fit(tmp_path / "b", stop_at=4)
    real = checkpoint._restore_weights
    monkeypatch.setattr(checkpoint, "_restore_weights", lambda module, stored: real(
        module, {**stored, **{name: p for name, p in module.named_parameters() if "projectors" in name}}
    ))  # fmt: skip
    got, resumed, _ = fit(tmp_path / "b")
    assert weights_hash(resumed) != weights_hash(matches)
    assert weights_hash(got) != weights_hash(want)


def test_projectors_start_from_the_seed_alone(tmp_path):
    runs = []
    for seed, noise in ((17, 1), (17, 2), (18, 1)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        student, teacher = models()
        ctx = FakeContext(tmp_path, seed=seed)
        (term,) = matched([LossTerm(*LOSSES[0][:3], kind="representation")], student, teacher, seed_for=ctx.seed_for)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(torch.cat([p.flatten() for p in term.match.parameters()]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_checkpoints_of_other_losses_are_what_they_were(tmp_path):
    from safetensors import safe_open

    with pytest.raises(Stopped):
        fit(tmp_path, stop_at=2, losses=LOSSES[2:])
    (path,) = (tmp_path / "checkpoints").glob("step-*/model.safetensors")
    with safe_open(path, "pt") as file:
        assert "model.embed_tokens.weight" in file.keys()  # noqa: SIM118


def test_the_best_weights_are_those_of_the_model_alone(tmp_path):
    from safetensors import safe_open

    student, _, ctx = fit(
        tmp_path, losses=LOSSES[:1], held_out=make_rows(6, seed=5), eval_steps=2, max_steps=6, save_steps=2,
        metric_for_best_model="hidden-mse", learning_rate=1e-3,
    )  # fmt: skip
    assert any("eval/hidden-mse" in values for _, values in ctx.values)
    with safe_open(tmp_path / "checkpoints" / "best" / "model.safetensors", "pt") as file:
        best = set(file.keys())
    assert best == {name for name, _ in (*student.named_parameters(), *_buffers(student))}
    with safe_open(tmp_path / "checkpoints" / "step-000004" / "model.safetensors", "pt") as file:
        assert {"matches.0.projectors.2.weight", "model.lm_head.weight"} & set(file.keys()) == {
            "matches.0.projectors.2.weight"
        }, "projectors are kept, and a tied head is not kept twice"


def _buffers(module):
    return [(f"buffer:{name}", tensor) for name, tensor in module.named_buffers()]
