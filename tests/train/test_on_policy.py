from __future__ import annotations

import math
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from conftest_train import FakeContext, make_rows
from test_loop import CE, flat, params, record, run, weights_hash, with_dropout
from transformers import AutoModelForCausalLM

from kdkit.api import Sampling
from kdkit.api.errors import Stopped
from kdkit.models.chat import Encoded
from kdkit.models.heads import split
from kdkit.plugins.losses.token import ForwardKL
from kdkit.plugins.teachers.local import _HiddenSignals
from kdkit.testing.tiny import tiny_model
from kdkit.train.batching import DataOrder
from kdkit.train.loop import data_task, train
from kdkit.train.objective import LossTerm, valid_hidden
from kdkit.train.on_policy import OnPolicy, prompt_of

END = 258
KL = (LossTerm("forward-kl", 1.0, ForwardKL()),)
FIELDS = [field.name for field in fields(OnPolicy) if field.init]
SAMPLED = Sampling(do_sample=True, max_new_tokens=6)


def policy(model, *, share=1.0, seed=3, sampling=SAMPLED, stop_ids=(END,), max_length=40, **values) -> OnPolicy:
    values = {"compute": next(model.parameters()).dtype, **values}
    return OnPolicy(model, sampling, share=share, seed=seed, stop_ids=stop_ids, max_length=max_length, **values)


def answers(rows):
    return [row.ids[len(prompt_of(row)) :] for row in rows]


class Recorded(OnPolicy):
    """Keeps what every step learned from; it answers as ``own`` does."""

    def __init__(self, own):
        super().__init__(**{name: getattr(own, name) for name in FIELDS})
        self.seen = []

    def rows(self, step, rows, places):
        kept = OnPolicy.rows(self, step, rows, places)
        self.seen.append((step, list(rows), kept))
        return kept


def distil(root, *, model=None, share=0.5, stop_at=None, rows=None, **values):
    """Training under a teacher; returns result, student, context, and (step, rows of the data, rows learned)."""
    model = model or with_dropout()
    dtype = next(model.parameters()).dtype
    teacher = tiny_model(layers=3, seed=9).to(dtype)
    ctx = FakeContext(root, stop_at=stop_at)
    own = Recorded(policy(model, share=share))
    parts = split(teacher)
    work = data_task(
        model,
        KL,
        [rows or make_rows(10)],
        [1.0],
        seed=ctx.seed_for("data-order"),
        signals=lambda batch: _HiddenSignals(parts, valid_hidden(parts.trunk, batch)),
        on_policy=own,
    )
    try:
        result = train(work, params(**values), ctx, compute=dtype)
    except Stopped:
        return None, model, ctx, own.seen
    return result, model, ctx, own.seen


# --- which steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.83])
@pytest.mark.parametrize("seed", [1, 2**62])
def test_the_share_of_on_policy_steps_is_lambda(share, seed):
    n, own = 4000, policy(tiny_model(), share=share, seed=seed)
    chosen = [own.chosen(step) for step in range(n)]
    assert abs(sum(chosen) / n - share) < 4 * math.sqrt(share * (1 - share) / n)
    # Independent draws: as many changes as two coins in a row make, not long runs of either kind.
    changes = sum(a != b for a, b in pairwise(chosen))
    assert abs(changes / n - 2 * share * (1 - share)) < 4 / math.sqrt(n)


def test_zero_is_never_and_one_is_always():
    assert not any(policy(tiny_model(), share=0.0).chosen(step) for step in range(2000))
    assert all(policy(tiny_model(), share=1.0).chosen(step) for step in range(2000))


def test_the_choice_follows_from_the_seed():
    steps = range(200)
    one, same, other = (policy(tiny_model(), share=0.5, seed=seed) for seed in (1, 1, 2))
    assert [one.chosen(s) for s in steps] == [same.chosen(s) for s in steps] != [other.chosen(s) for s in steps]


# --- what is learned --------------------------------------------------------------------------------------------------


def test_rows_keep_ids_and_prompts_and_learn_the_answer_alone():
    rows = make_rows(6)
    new = policy(tiny_model()).rows(0, rows, range(6))
    for row, own in zip(rows, new, strict=True):
        prompt = prompt_of(row)
        assert prompt == row.ids[: row.learned.index(True)]
        assert own.id == row.id
        assert own.ids[: len(prompt)] == prompt
        assert own.learned == (False,) * len(prompt) + (True,) * (len(own.ids) - len(prompt))
        assert 1 <= own.targets <= 6
    assert new != rows


def test_the_prompt_is_all_before_the_last_answer():
    turns = Encoded("chat", tuple(range(10)), (False, False, True, True, False, False, True, True, True, False))
    assert prompt_of(turns) == (0, 1, 2, 3, 4, 5)
    assert prompt_of(turns.cut(6)) == (0, 1), "of a row that was cut after its first answer"
    assert prompt_of(Encoded("first", (7, 8, 9), (False, True, True))) == (7,)


def test_answers_are_those_of_the_model_one_token_at_a_time():
    model, rows = tiny_model(), make_rows(5)
    greedy = policy(model, sampling=Sampling(max_new_tokens=6)).rows(0, rows, range(5))
    for row, answer in zip(rows, answers(greedy), strict=True):
        ids = list(prompt_of(row))
        for _ in answer:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert tuple(ids) == prompt_of(row) + answer


def test_the_end_token_is_learned_where_the_answer_ended_and_only_there():
    model, rows = tiny_model(), make_rows(5)
    first = [
        answer[0] for answer in answers(policy(model, sampling=Sampling(max_new_tokens=1)).rows(0, rows, range(5)))
    ]
    ends = policy(model, sampling=Sampling(max_new_tokens=6), stop_ids=(first[0],))
    got = answers(ends.rows(0, rows, range(5)))
    assert got[0] == (first[0],), "an empty answer is its end token"
    for answer in got:
        assert first[0] not in answer[:-1]
        assert answer[-1] == first[0] or len(answer) == 6
    counted = ends.metrics(lambda n: n)
    assert counted["truncated_share"] == sum(answer[-1] != first[0] for answer in got) / 5
    assert counted["answer_tokens"] == sum(map(len, got)) / 5
    assert counted["on_policy_share"] == 1.0
    assert ends.metrics(lambda n: n) == {"on_policy_share": 0.0, "generation_s": 0.0}, "counted since the last call"


def test_max_length_bounds_prompt_and_answer_together():
    rows = make_rows(8)
    longest = max(len(prompt_of(row)) for row in rows)
    bound = policy(tiny_model(), max_length=longest + 1, stop_ids=())
    short = bound.rows(0, rows, range(8))
    assert {len(row.ids) for row in short} == {longest + 1}
    assert bound.metrics(lambda n: n)["truncated_share"] == 1.0
    free = policy(tiny_model(), stop_ids=()).rows(0, rows, range(8))
    for row, whole in zip(short, free, strict=True):
        assert row.ids == whole.ids[: longest + 1], "the bound cuts an answer and does not change it"


def test_ids_that_the_teacher_lacks_are_never_drawn():
    model = tiny_model(vocab=300)
    with torch.no_grad():
        model.lm_head.weight[259:] += 3.0
        model.lm_head.weight[:259] -= 3.0
    hot = Sampling(do_sample=True, temperature=100.0, max_new_tokens=12)
    free = answers(policy(model, sampling=hot).rows(0, make_rows(8), range(8)))
    held = answers(policy(model, sampling=hot, vocabulary=259).rows(0, make_rows(8), range(8)))
    assert max(map(max, free)) >= 259 > max(map(max, held))


def test_a_float32_student_answers_in_bf16_as_the_saved_model_does(tmp_path):
    rows, sampling = make_rows(12), Sampling(do_sample=True, temperature=2.0, max_new_tokens=20)
    live = tiny_model(layers=4)
    live.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    before = weights_hash(live)
    half = policy(live, sampling=sampling, compute=torch.bfloat16).rows(0, rows, range(12))
    assert half == policy(saved, sampling=sampling, compute=torch.bfloat16).rows(0, rows, range(12))
    assert half != policy(live, sampling=sampling, compute=torch.float32).rows(0, rows, range(12))
    assert weights_hash(live) == before
    assert all(p.dtype is torch.float32 and p.requires_grad and p.grad is None for p in live.parameters())


# --- seeds, ranks, micro-batches --------------------------------------------------------------------------------------


def test_answers_follow_from_seed_step_and_place():
    model, rows = tiny_model().double(), make_rows(6)

    def said(step=0, seed=3, places=range(6)):
        return answers(policy(model, seed=seed).rows(step, rows, places))

    assert said() == said()
    assert said() != said(step=1)
    assert said() != said(seed=4)
    assert said() != said(places=range(6, 12))
    twins = [Encoded(str(i), rows[0].ids, rows[0].learned) for i in range(6)]
    assert len(set(answers(policy(model).rows(0, twins, range(6))))) > 1, "a prompt that comes twice gets two answers"


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_answers_of_one(world):
    """What the loop does on every rank: its rows, by their place among all rows of the step."""
    model, rows = tiny_model().double(), make_rows(6)
    alone = policy(model).rows(5, rows, range(6))
    for rank in range(world):
        places = range(rank, 6, world)
        assert policy(model).rows(5, [rows[i] for i in places], places) == [alone[i] for i in places]


def test_the_loop_asks_for_this_ranks_places(tmp_path, monkeypatch):
    from kdkit.train import loop

    asked = []
    model, rows = tiny_model(), make_rows(12)
    own = policy(model)
    monkeypatch.setattr(OnPolicy, "rows", lambda self, *args: asked.append(args) or args[1])
    monkeypatch.setattr(loop._Training, "world", 2)
    ctx = FakeContext(tmp_path)
    task = data_task(model, KL, [rows], [1.0], seed=ctx.seed_for("data-order"), on_policy=own)
    training = loop._Training(task, params(), ctx, torch.float32)
    monkeypatch.setattr(training, "accelerator", type("Second", (), {"process_index": 1}))
    training._rows(4)
    ((step, mine, places),) = asked
    order = DataOrder([12], [1.0], FakeContext(tmp_path).seed_for("data-order")).rows_of_step(4, 6)
    assert (step, list(places)) == (4, [1, 3, 5])
    assert [row.id for row in mine] == [rows[order[place][1]].id for place in (1, 3, 5)]


@pytest.mark.parametrize(("size", "accumulation"), [(6, 1), (3, 2), (2, 3), (1, 6)])
def test_micro_batches_change_nothing(tmp_path, size, accumulation):
    runs = []
    for name, split_ in (("a", (6, 1)), ("b", (size, accumulation))):
        _, model, ctx, seen = distil(
            tmp_path / name, model=tiny_model().double().train(), max_steps=4, rows=make_rows(8),
            per_device_train_batch_size=split_[0], gradient_accumulation_steps=split_[1],
        )  # fmt: skip
        runs.append((model, [kept for _, _, kept in seen], ctx.values[-1][1]["train/learned_tokens"]))
    (want, rows, tokens), (got, same_rows, same_tokens) = runs
    assert rows == same_rows
    assert tokens == same_tokens
    for a, b in zip(want.parameters(), got.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def test_all_micro_batches_of_a_step_are_of_one_kind(tmp_path):
    _, _, ctx, seen = distil(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=12)
    kinds = [{own == row for own, row in zip(kept, rows, strict=True)} for _, rows, kept in seen]
    assert all(kind in ({True}, {False}) for kind in kinds)
    assert {True} in kinds
    assert {False} in kinds
    assert [v["train/on_policy_share"] for _, v in ctx.values] == [float(kind == {False}) for kind in kinds]


# --- gradients and state ----------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_same_rows_given_as_data(tmp_path, monkeypatch):
    seen = record(monkeypatch)
    options = {"max_steps": 1, "max_grad_norm": 1e9, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    result, _, ctx, ((_, _, sampled),) = distil(
        tmp_path / "own", model=tiny_model().double().train(), share=1.0, rows=make_rows(6), **options
    )
    distil(tmp_path / "data", model=tiny_model().double().train(), share=0.0, rows=sampled, **options)
    distil(tmp_path / "other", model=tiny_model().double().train(), share=0.0, rows=make_rows(6), **options)
    own, data, other = (flat(step["grads"]) for step in seen)
    assert torch.allclose(own, data, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(own, other, rtol=1e-2)
    # The denominator is that of what was learned, not of what the data held.
    assert result.tokens == sum(row.targets for row in sampled) != sum(row.targets for row in make_rows(6))
    values = ctx.values[-1][1]
    assert values["train/learned_tokens"] == result.tokens == 6 * values["train/answer_tokens"]
    assert values["train/generation_s"] > 0


def test_a_share_of_zero_trains_as_without(tmp_path):
    _, plain, _, _ = distil(tmp_path / "a", share=0.0)
    model = with_dropout()
    teacher = split(tiny_model(layers=3, seed=9))
    work = data_task(
        model,
        KL,
        [make_rows(10)],
        [1.0],
        seed=(ctx := FakeContext(tmp_path / "b")).seed_for("data-order"),
        signals=lambda b: _HiddenSignals(teacher, valid_hidden(teacher.trunk, b)),
    )
    train(work, params(), ctx, compute=torch.float32)
    assert weights_hash(plain) == weights_hash(model)


@pytest.mark.parametrize("stops", [[1], [2, 5], [3, 4, 6]])
def test_stop_and_resume_replays_choices_answers_and_weights(tmp_path, stops):
    _, straight, ctx, seen = distil(tmp_path / "a")
    kinds = [rows != kept for _, rows, kept in seen]
    assert {True, False} == set(kinds), "the steps must be of both kinds"
    replayed = []
    for stop in stops:
        replayed += distil(tmp_path / "b", stop_at=stop)[3]
    _, resumed, ctx2, last = distil(tmp_path / "b")
    assert replayed + last == seen
    assert weights_hash(resumed) == weights_hash(straight)
    names = ("train/loss", "train/on_policy_share", "train/answer_tokens", "train/learned_tokens")
    logged = [[(step, *map(values.get, names)) for step, values in c.values] for c in (ctx, ctx2)]
    assert logged[1] == logged[0][stops[-1] :]


def test_dropout_after_an_answer_does_not_depend_on_it():
    """Not even for a model that draws numbers while it answers."""
    model, rows = with_dropout(), make_rows(4)
    model.model.embed_tokens.register_forward_hook(lambda _module, _args, out: out + 0 * torch.rand(1))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    policy(model).rows(0, rows, range(4))
    assert torch.equal(torch.get_rng_state(), before)


def test_answers_are_given_without_dropout_and_training_goes_on_with_it():
    model, rows = with_dropout(), make_rows(8)
    model.train()
    assert policy(model).rows(0, rows, range(8)) == policy(tiny_model()).rows(0, rows, range(8))
    assert all(module.training for module in model.modules())


def test_gradient_checkpointing_keeps_its_cache_out_of_the_way(tmp_path):
    """Checkpointing forbids a key-value cache in training; answers are the same, and so is the gradient."""
    runs = [distil(tmp_path / str(on), share=1.0, max_steps=3, gradient_checkpointing=on, model=tiny_model().train())
            for on in (False, True)]  # fmt: skip
    assert runs[0][3] == runs[1][3]
    assert runs[1][1].is_gradient_checkpointing
    for a, b in zip(runs[0][1].parameters(), runs[1][1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_the_live_student_answers(tmp_path):
    """Answers change as the student learns; those of a student that stands still do not."""
    moving, still = (
        distil(tmp_path / name, share=1.0, model=tiny_model().train(), learning_rate=rate, max_steps=4)[3]
        for name, rate in (("a", 3e-2), ("b", 1e-30))
    )
    assert moving[0] == still[0]
    assert moving[3][2] != still[3][2]


def test_evaluation_keeps_to_the_data(tmp_path):
    held_out = make_rows(5, seed=5)
    _, _, plain = run(tmp_path / "a", model=tiny_model().train(), held_out=held_out, max_steps=1, learning_rate=1e-30)
    model = tiny_model().train()
    ctx = FakeContext(tmp_path / "b")
    work = data_task(model, CE, [make_rows(10)], [1.0], seed=3, held_out=held_out, on_policy=policy(model))
    train(work, params(max_steps=1, learning_rate=1e-30), ctx, compute=torch.float32)
    want, got = ([v["eval/loss"] for _, v in c.values if "eval/loss" in v] for c in (plain, ctx))
    assert got == pytest.approx(want)
