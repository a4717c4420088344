"""The loop with streams of the student's own completions: gradients, checkpoints, and the buffer."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest_train import FakeContext, make_rows
from policy_rows import Clip, make_completions, plain, sampled
from test_loop import damage_manifest, flat, params, record, weights_hash, with_dropout

from kdkit.api import ConformanceError, StageError
from kdkit.api.errors import Stopped
from kdkit.plugins.losses.token import cross_entropy
from kdkit.testing.tiny import tiny_model
from kdkit.train import checkpoint
from kdkit.train.loop import Task, train
from kdkit.train.objective import LossTerm
from kdkit.train.policy.buffer import RolloutBuffer
from kdkit.train.streams import DataRows, Share, Stream

CE = LossTerm("cross-entropy", 0.3, cross_entropy)
LM = LossTerm("lm/cross-entropy", 0.5, cross_entropy)


class Fixed:
    """The same completions in every step."""

    def __init__(self, rows):
        self.given, self.size = rows, len(rows)

    def rows(self, step, share):
        return [self.given[place] for place in share.places]

    def metrics(self, all_ranks):
        return {}

    def state(self, step, share):
        return None

    def restore(self, state, step, share):
        pass


def clip(weight=0.7, **values) -> LossTerm:
    return LossTerm("clip", weight, Clip(**values), kind="policy")


def policy_stream(rows, *terms, temperature=0.8) -> Stream:
    return Stream(terms or (clip(), CE), Fixed(rows), temperature=temperature)


def data_stream(rows) -> Stream:
    return Stream((LM,), DataRows([rows], [1.0], seed=5))


def step(root, streams, monkeypatch, *, size=8, accumulation=1, **values):
    """The gradient of one optimiser step, and what was logged."""
    seen, ctx, model = record(monkeypatch), FakeContext(root), tiny_model().double().train()
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    train(Task(model, streams, **values), params(max_steps=1, max_grad_norm=1e9, **options), ctx, compute=torch.float64)
    return flat(seen[0]["grads"]), {name: value for _, logged in ctx.values for name, value in logged.items()}


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
@pytest.mark.parametrize(("size", "accumulation"), [(1, 8), (2, 4), (8, 1)])
def test_a_step_divides_by_what_it_has_in_all_micro_batches(tmp_path, monkeypatch, aggregation, size, accumulation):
    rows = make_completions()
    rows[3] = replace(rows[3], counts=False)
    streams = [policy_stream(rows, clip(aggregation=aggregation), CE)]
    got, logged = step(tmp_path, streams, monkeypatch, size=size, accumulation=accumulation)
    model, loss = tiny_model().double(), Clip(aggregation)
    value, wanted = plain(model, rows, loss, weights=(0.7, 0.3))
    assert float(got.norm()) == pytest.approx(float(flat(wanted.values()).norm()), rel=1e-9)
    assert logged["train/loss"] == pytest.approx(value, rel=1e-5)
    assert logged["train/clip"] == pytest.approx(plain(model, rows, loss)[0], rel=1e-5)
    assert logged["train/cross-entropy"] == pytest.approx(plain(model, rows, loss, weights=(0.0, 1.0))[0], rel=1e-5)
    assert 0 < logged["train/clip/outside"] < 1
    assert logged["train/learned_tokens"] == sum(row.targets for row in rows if row.counts)


def test_two_streams_add_up(tmp_path, monkeypatch):
    own, data = policy_stream(make_completions()), data_stream(make_rows(8))
    alone, logs = zip(*(step(tmp_path / str(i), [s], monkeypatch) for i, s in enumerate((own, data))), strict=True)
    for size, accumulation in ((8, 1), (2, 4)):
        options = {"size": size, "accumulation": accumulation}
        both, logged = step(tmp_path / f"both-{size}", [own, data], monkeypatch, **options)
        assert torch.allclose(both, sum(alone), rtol=1e-9, atol=1e-12)
        for name in ("train/clip", "train/clip/outside", "train/cross-entropy", "train/lm/cross-entropy"):
            assert logged[name] == pytest.approx((logs[0] | logs[1])[name], rel=1e-5)
        names = {"train/clip": 0.7, "train/cross-entropy": 0.3, "train/lm/cross-entropy": 0.5}
        assert logged["train/loss"] == pytest.approx(sum(weight * logged[name] for name, weight in names.items()))
        tokens = sum(row.targets for row in (*make_completions(), *make_rows(8)))
        assert logged["train/learned_tokens"] == tokens


def test_the_temperature_of_a_stream_is_that_of_its_log_probabilities(tmp_path, monkeypatch):
    rows = make_completions()
    _, logged = step(tmp_path, [policy_stream(rows, clip(), temperature=1.3)], monkeypatch)
    assert logged["train/clip"] == pytest.approx(plain(tiny_model().double(), rows, Clip(), temperature=1.3)[0])


def test_held_out_rows_are_measured_by_the_last_stream_without_policy_losses(tmp_path, monkeypatch):
    own, held_out = policy_stream(make_completions()), make_rows(4, seed=3)
    _, logged = step(tmp_path / "a", [own], monkeypatch, held_out=held_out)
    assert {name for name in logged if name.startswith("eval/")} == {"eval/loss", "eval/cross-entropy"}
    _, logged = step(tmp_path / "b", [own, data_stream(make_rows(8))], monkeypatch, held_out=held_out)
    assert {name for name in logged if name.startswith("eval/")} == {"eval/loss", "eval/lm/cross-entropy"}
    _, logged = step(tmp_path / "c", [policy_stream(make_completions(), clip())], monkeypatch, held_out=held_out)
    assert not {name for name in logged if name.startswith("eval/")}


# --- checkpoints ------------------------------------------------------------------------------------------------------


def schedule(root, *, stop_at=None, **values):
    """Two iterations of 8 rollouts, two epochs each, 4 rows a step: 8 steps. Rollouts follow from the live weights."""
    model, made, ctx = with_dropout(), [], FakeContext(root, stop_at=stop_at)

    def make(iteration):
        made.append(iteration)
        rng, rows = random.Random(iteration), make_completions(seed=iteration)
        rows = [replace(row, old_logprobs=tuple(sampled(row, rng, model))) for row in rows]
        # What is drawn here must not matter to a run that does not draw it.
        torch.rand(3)
        return rows

    buffer = RolloutBuffer(make, num_rollouts=8, ppo_epochs=2, seed=3, per_pass=16)
    streams = [Stream((clip(), CE), buffer, temperature=0.8), data_stream(make_rows(10))]
    options = {"max_steps": None, "num_train_epochs": 1.0, "per_device_train_batch_size": 2,
               "gradient_accumulation_steps": 2}  # fmt: skip
    stopped = False
    try:
        train(Task(model, streams), params(**{**options, **values}), ctx, compute=torch.float32)
    except Stopped:
        stopped = True
    assert stopped == (stop_at is not None)
    return weights_hash(model), made, ctx


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    weights, made, _ = schedule(tmp_path_factory.mktemp("straight"))
    assert made == [0, 1]
    return weights


@pytest.mark.parametrize("stop", range(1, 8))
def test_a_run_that_stops_anywhere_goes_on_to_bitwise_the_same_weights(tmp_path, straight, stop):
    _, before, _ = schedule(tmp_path, stop_at=stop)
    files = {path.name for path in (tmp_path / "checkpoints" / f"step-{stop:06d}").iterdir()}
    assert ("rows-0.safetensors" in files) == ("rows-0.json" in files) == (stop != 4)
    weights, after, _ = schedule(tmp_path)
    assert weights == straight
    # Held rollouts are never made again; at the end of an iteration there are none to hold.
    assert before + after == [0, 1]


def test_a_run_that_stops_again_and_again(tmp_path, straight):
    made = [iteration for stop in (1, 2, 5, 6) for iteration in schedule(tmp_path, stop_at=stop)[1]]
    weights, last, _ = schedule(tmp_path)
    assert weights == straight
    assert made + last == [0, 1]


def flip(path):
    data = bytearray((path / "rows-0.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "rows-0.safetensors").write_bytes(data)


def remove(path):
    (path / "rows-0.json").unlink()


def edit(path):
    text = (path / "rows-0.json").read_text()
    (path / "rows-0.json").write_text(text.replace("prompt-1", "prompt-2", 1))


@pytest.mark.parametrize("damage", [flip, remove, edit, damage_manifest])
def test_damaged_rollouts_are_noticed_and_the_checkpoint_before_is_used(tmp_path, straight, damage):
    schedule(tmp_path, stop_at=7, save_steps=3)
    damage(tmp_path / "checkpoints" / "step-000007")
    weights, made, ctx = schedule(tmp_path)
    assert "checkpoint step-000007 is damaged" in ctx.logs[0]
    assert ctx.logs[1] == "resumed at step 6 of 8"
    assert (weights, made) == (straight, [])


def test_a_disk_that_is_full_of_rollouts_keeps_the_older_checkpoint(tmp_path, straight, monkeypatch):
    real = checkpoint.save_file

    def full(tensors, path):
        if "step-000003" in str(path) and path.name == "rows-0.safetensors":
            raise OSError("No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    weights, _, ctx = schedule(tmp_path, save_steps=1)
    assert weights == straight
    assert any("step-000003 not written: No space left" in line for line in ctx.logs)


# --- the buffer -------------------------------------------------------------------------------------------------------


def buffer(rows=None, *, made=None, epochs=3, count=8, seed=1):
    rows = rows or make_completions(count)

    def make(iteration):
        if made is not None:
            made.append(iteration)
        return [replace(row, id=f"{iteration}/{index}") for index, row in enumerate(rows)]

    return RolloutBuffer(make, num_rollouts=count, ppo_epochs=epochs, seed=seed, per_pass=20)


def test_every_epoch_learns_every_rollout_once_in_another_order():
    made, share = [], Share(4)
    source = buffer(made=made)
    steps = [[row.id for row in source.rows(step, share)] for step in range(12)]
    epochs = [steps[i] + steps[i + 1] for i in range(0, 12, 2)]
    for number, epoch in enumerate(epochs):
        assert Counter(epoch) == Counter(f"{number // 3}/{index}" for index in range(8))
    assert len({tuple(id_[2:] for id_ in epoch) for epoch in epochs}) == 6
    assert made == [0, 1]
    assert source.size == 60
    assert [row.id for row in buffer(seed=2).rows(0, share)] != steps[0]
    assert [row.id for row in buffer().rows(7, share)] == steps[7]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_rows_of_one(world):
    alone = [row.id for row in buffer().rows(1, Share(4))]
    parts = [[row.id for row in buffer().rows(1, Share(4, rank, world))] for rank in range(world)]
    assert [parts[place % world][place // world] for place in range(4)] == alone


@pytest.mark.parametrize("name", ["token_weights", "ref_logprobs", "support"])
def test_rollouts_of_which_some_lack_a_field_are_not_held(name):
    rows = make_completions(support=True)
    rows[3] = replace(rows[3], **{name: None})
    source = RolloutBuffer(lambda _: rows, num_rollouts=8, ppo_epochs=1, seed=1, per_pass=8)
    with pytest.raises(ConformanceError, match=f"some completions have {name}, others do not"):
        source.rows(0, Share(4))


def test_kept_ids_are_small():
    rows = make_completions(support=True)
    source = RolloutBuffer(lambda _: rows, num_rollouts=8, ppo_epochs=2, seed=1, per_pass=8)
    source.rows(0, Share(4))
    tensors = source.state(1, Share(4)).tensors
    assert {tensors[name].dtype for name in ("support", "support_sizes")} == {torch.int32}
    assert all(row.support.ids.nbytes == 4 * len(row.support.ids) for row in rows)


@pytest.mark.parametrize("support", [False, True])
def test_what_is_kept_comes_back_as_it_was(tmp_path, support):
    rows = make_completions(support=support, weighted=not support)
    rows[1] = replace(rows[1], counts=False, id='"\\é\n')
    rows = [replace(row, teacher_logprobs=tuple(x / 3 for x in row.advantages)) for row in rows]
    source, share = RolloutBuffer(lambda _: rows, num_rollouts=8, ppo_epochs=2, seed=1, per_pass=8), Share(4)
    source.rows(0, share)
    model = tiny_model()
    states = {"rows-0": source.state(1, share)}
    assert checkpoint.save(tmp_path, model, torch.optim.AdamW(model.parameters()), checkpoint.Progress(8, 1), print,
                           states)  # fmt: skip
    assert checkpoint.load_state(tmp_path / "step-000001", "rows-1") is None
    other = RolloutBuffer(lambda _: [], num_rollouts=8, ppo_epochs=2, seed=1, per_pass=8)
    other.restore(checkpoint.load_state(tmp_path / "step-000001", "rows-0"), 1, share)
    for step in range(1, 4):
        assert other.rows(step, share) == source.rows(step, share)


def test_rollouts_of_another_iteration_are_not_taken_back():
    source, share = buffer(), Share(4)
    source.rows(7, share)
    state = source.state(8, share)
    assert source.state(12, share) is None
    for given, step in ((state, 5), (state, 12), (None, 8), (None, 9)):
        with pytest.raises(StageError, match="does not hold the rollouts of iteration"):
            buffer().restore(given, step, share)
    buffer().restore(None, 6, share)


def test_iterations_that_do_not_fit_are_refused():
    with pytest.raises(StageError, match="8 rollouts are no multiple of the 3 rows of a step"):
        buffer().rows(0, Share(3))
    with pytest.raises(StageError, match="8 rollouts are no multiple of the 16 rows"):
        buffer().rows(0, Share(16))
    with pytest.raises(StageError, match="iteration 1 has 7 rollouts, not 8"):
        RolloutBuffer(lambda _: make_completions(7), num_rollouts=8, ppo_epochs=1, seed=1, per_pass=8).rows(0, Share(4))


def test_the_time_for_rollouts_is_logged(tmp_path):
    _, _, ctx = schedule(tmp_path)
    seconds = [values["train/rollout_s"] for _, values in ctx.values]
    assert [value > 0 for value in seconds] == [True, False, False, False] * 2
