from __future__ import annotations

import hashlib
import math
import shutil
from contextlib import nullcontext

import pytest
import torch
from conftest_train import FakeContext, make_rows

from kdkit.api import StageError
from kdkit.api.errors import Stopped
from kdkit.plugins.losses.token import cross_entropy
from kdkit.testing.tiny import tiny_model
from kdkit.train import checkpoint
from kdkit.train.loop import MAX_SKIPPED, data_task, total_steps, train
from kdkit.train.objective import LossTerm
from kdkit.train.optim import adamw, learning_rate
from kdkit.train.params import OptimParams, TrainParams

CE = (LossTerm("cross-entropy", 1.0, cross_entropy),)


class Params(TrainParams):
    data: object = None
    losses: object = ()
    eval_data: object = None


def params(**values) -> Params:
    defaults = {"learning_rate": 1e-2, "max_steps": 8, "per_device_train_batch_size": 3, "logging_steps": 1}
    return Params.model_construct(**{**Params.model_construct().__dict__, **defaults, **values})


def run(root, *, model=None, stop_at=None, seed=17, held_out=(), terms=CE, rows=None, **values):
    ctx = FakeContext(root, stop_at=stop_at, seed=seed)
    model = model or tiny_model().train()
    work = data_task(model, terms, [rows or make_rows(10)], [1.0], seed=ctx.seed_for("data-order"), held_out=held_out)
    result = train(work, params(**values), ctx, compute=next(model.parameters()).dtype)
    return result, model, ctx


def weights_hash(model) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def with_dropout():
    model = tiny_model().train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return model


def test_training_learns_and_reports(tmp_path):
    result, _, ctx = run(tmp_path, max_steps=30)
    first, last = ctx.values[0][1]["train/loss"], ctx.values[-1][1]["train/loss"]
    assert last < 0.7 * first
    assert result.steps == 30
    assert result.tokens == ctx.values[-1][1]["train/learned_tokens"] > 0


@pytest.mark.parametrize("stops", [[1], [2, 5], [3, 4, 6]])
def test_stop_and_resume_gives_bitwise_the_same_weights(tmp_path, stops):
    _, straight, ctx = run(tmp_path / "a", model=with_dropout())
    logged = []
    for stop in stops:
        with pytest.raises(Stopped, match="checkpoint saved"):
            run(tmp_path / "b", model=with_dropout(), stop_at=stop)
    _, resumed, ctx2 = run(tmp_path / "b", model=with_dropout())
    assert weights_hash(resumed) == weights_hash(straight)
    assert ctx2.logs[0] == f"resumed at step {stops[-1]} of 8"
    logged = [(step, v["train/loss"], v["train/learning_rate"]) for step, v in ctx2.values]
    assert logged == [(s, v["train/loss"], v["train/learning_rate"]) for s, v in ctx.values[stops[-1] :]]


@pytest.mark.parametrize("lost", ["_restore_weights", "_restore_optimizer", "_restore_rng"])
def test_the_resume_test_notices_every_part_that_is_not_restored(tmp_path, lost, monkeypatch):
    _, straight, _ = run(tmp_path / "a", model=with_dropout())
    with pytest.raises(Stopped):
        run(tmp_path / "b", model=with_dropout(), stop_at=4)
    monkeypatch.setattr(checkpoint, lost, lambda *args: None)
    _, resumed, _ = run(tmp_path / "b", model=with_dropout())
    assert weights_hash(resumed) != weights_hash(straight)


def damage_truncate(path):
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-9])


def damage_flip(path):
    data = bytearray((path / "optimizer.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "optimizer.safetensors").write_bytes(data)


def damage_remove(path):
    (path / "progress.json").unlink()


def damage_manifest(path):
    (path / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_remove, damage_manifest])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage):
    _, straight, _ = run(tmp_path / "a")
    with pytest.raises(Stopped):
        run(tmp_path / "b", stop_at=5, save_steps=2)
    newest, before = sorted((tmp_path / "b" / "checkpoints").glob("step-*"), reverse=True)
    assert (newest.name, before.name) == ("step-000005", "step-000004")
    damage(newest)
    _, resumed, ctx = run(tmp_path / "b")
    assert "checkpoint step-000005 is damaged" in ctx.logs[0]
    assert ctx.logs[1] == "resumed at step 4 of 8"
    assert weights_hash(resumed) == weights_hash(straight)


def test_a_full_disk_keeps_older_checkpoints_and_training_goes_on(tmp_path, monkeypatch):
    real = checkpoint.save_file

    def full(tensors, path):
        if "step-000004" in str(path):
            raise RuntimeError("I/O error: No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    result, _, ctx = run(tmp_path, save_steps=2)
    assert result.steps == 8
    assert any("step-000004 not written: I/O error: No space left" in line for line in ctx.logs)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000006"]


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path, stop_at=2)
    with pytest.raises(StageError, match="made for 8 steps, now 12 are planned"):
        run(tmp_path, max_steps=12)


@pytest.mark.parametrize(("size", "accumulation"), [(6, 1), (3, 2), (2, 3), (1, 6)])
def test_accumulation_is_one_large_batch(tmp_path, size, accumulation):
    _, want, _ = run(tmp_path / "want", model=tiny_model().double().train(), max_steps=3, per_device_train_batch_size=6)
    _, got, _ = run(
        tmp_path / "got",
        model=tiny_model().double().train(),
        max_steps=3,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
    )
    for a, b in zip(got.parameters(), want.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    _, plain, _ = run(tmp_path / "a", max_steps=3)
    _, saved, _ = run(tmp_path / "b", max_steps=3, gradient_checkpointing=True)
    for a, b in zip(plain.parameters(), saved.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def poisoned(times):
    calls = iter(range(10**6))

    def loss(x):
        values = cross_entropy(x)
        return values * math.nan if next(calls) in times else values

    return (LossTerm("poisoned", 1.0, loss),)


def test_a_non_finite_step_is_skipped_and_counted(tmp_path):
    result, model, ctx = run(tmp_path, terms=poisoned({2, 3}))
    assert result.skipped == 2
    assert sum("step skipped" in line for line in ctx.logs) == 2
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_training_gives_up_when_gradients_stay_non_finite(tmp_path):
    with pytest.raises(StageError, match=r"not finite in 5 steps in a row, last with rows row-"):
        run(tmp_path, terms=poisoned(set(range(MAX_SKIPPED + 3))))


def test_the_best_weights_are_kept(tmp_path):
    held_out = make_rows(6, seed=5)
    result, model, ctx = run(
        tmp_path, held_out=held_out, eval_steps=2, metric_for_best_model="loss", learning_rate=5e-2, max_steps=20
    )
    evaluated = {step: values["eval/loss"] for step, values in ctx.values if "eval/loss" in values}
    best = min(evaluated, key=evaluated.get)
    assert best < 20, "the learning rate must be high enough to overfit"
    assert result.best_step == best
    _, _, again = run(tmp_path / "again", model=model, held_out=held_out, max_steps=1, learning_rate=1e-12)
    final = [values["eval/loss"] for _, values in again.values if "eval/loss" in values][-1]
    assert final == pytest.approx(evaluated[best], rel=1e-4)


def test_early_stopping_ends_after_its_patience(tmp_path):
    result, _, _ = run(
        tmp_path,
        held_out=make_rows(6, seed=5),
        eval_steps=1,
        metric_for_best_model="loss",
        early_stopping_patience=3,
        learning_rate=5e-2,
        max_steps=60,
    )
    assert result.steps == result.best_step + 3 < 60


def test_evaluation_is_a_token_mean_over_all_rows(tmp_path):
    held_out, model = make_rows(5, seed=3), tiny_model().eval()
    _, _, ctx = run(tmp_path, model=model, held_out=held_out, max_steps=1, learning_rate=1e-30)
    nll = 0.0
    for row in held_out:
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            logprobs = torch.log_softmax(tiny_model()(input_ids=ids).logits[0, :-1], -1)
        nll -= sum(float(logprobs[t - 1, row.ids[t]]) for t in range(1, len(row.ids)) if row.learned[t])
    got = [values["eval/loss"] for _, values in ctx.values if "eval/loss" in values]
    assert got == [pytest.approx(nll / sum(row.targets for row in held_out), rel=1e-5)]


def test_too_little_space_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(checkpoint.EnvironmentUnmet, match="checkpoints need"):
        run(tmp_path)


def test_checkpoints_that_exist_count_as_space(tmp_path, monkeypatch):
    model = tiny_model()
    need = 6 * sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    old = tmp_path / "step-000001"
    old.mkdir()
    (old / "optimizer.safetensors").write_bytes(bytes(1000))
    for free in (need - 1000, need - 1001):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(10**9, 0, free))
        with nullcontext() if free == need - 1000 else pytest.raises(checkpoint.EnvironmentUnmet, match="are free"):
            checkpoint.check_space(tmp_path, model)


def test_steps_follow_epochs_or_max_steps():
    assert total_steps(params(max_steps=None, num_train_epochs=2.0), 10, 1) == 7
    assert total_steps(params(max_steps=None, num_train_epochs=2.0, gradient_accumulation_steps=2), 10, 1) == 4
    assert total_steps(params(max_steps=5), 10, 1) == 5


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_learning_rate_schedule(shape):
    p = OptimParams(learning_rate=1.0, lr_scheduler_type=shape, warmup_ratio=0.1, min_learning_rate=0.1)
    rates = [learning_rate(step, 100, p) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    expected = {
        "constant": [1.0] * 90,
        "linear": [0.1 + 0.9 * (1 - i / 90) for i in range(90)],
        "cosine": [0.1 + 0.9 * (1 + math.cos(math.pi * i / 90)) / 2 for i in range(90)],
    }
    assert rates[10:] == pytest.approx(expected[shape])


def test_only_matrices_are_decayed():
    model = tiny_model()
    groups = adamw(model, OptimParams(weight_decay=0.3)).param_groups
    decayed = {id(p) for g in groups if g["weight_decay"] == 0.3 for p in g["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == ("norm" not in name), name


def record(monkeypatch) -> list[dict]:
    seen = []

    def step(optimizer, closure=None):
        grads = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
        seen.append({"grads": grads, "lr": optimizer.param_groups[0]["lr"]})

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return seen


def flat(grads):
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize(("size", "accumulation"), [(6, 1), (4, 2), (1, 6)])
def test_the_gradient_is_the_token_mean_of_the_step(tmp_path, monkeypatch, size, accumulation):
    """AdamW hides the scale of a gradient, so the gradient itself is compared."""
    seen, rows = record(monkeypatch), make_rows(6 if size != 4 else 8)
    model = tiny_model().double().train()
    run(tmp_path, model=model, rows=rows, max_steps=1, max_grad_norm=1e9, per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation)  # fmt: skip
    reference = tiny_model().double()
    total = 0.0
    for row in rows:
        ids, keep = torch.tensor([row.ids]), torch.tensor(row.learned)[1:]
        logits = reference(input_ids=ids).logits[0, :-1][keep]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, 1:][keep], reduction="sum")
    (total / sum(row.targets for row in rows)).backward()
    by_size = sorted(float(p.grad.norm()) for p in reference.parameters())
    assert sorted(float(g.norm()) for g in seen[0]["grads"]) == pytest.approx(by_size, rel=1e-9)


def test_gradients_are_clipped_and_the_learning_rate_is_applied(tmp_path, monkeypatch):
    seen = record(monkeypatch)
    run(tmp_path, max_steps=5, max_grad_norm=0.01, lr_scheduler_type="linear", learning_rate=1e-3)
    assert all(float(flat(step["grads"]).norm()) == pytest.approx(0.01, rel=1e-3) for step in seen)
    assert [step["lr"] for step in seen] == pytest.approx([1e-3 * (1 - i / 5) for i in range(5)])


def test_dropout_is_on_in_training_and_off_in_evaluation(tmp_path):
    held_out = make_rows(4, seed=5)
    model = with_dropout()
    _, _, ctx = run(tmp_path / "a", model=model, held_out=held_out, eval_steps=1, max_steps=4, learning_rate=1e-30)
    evaluated = [v["eval/loss"] for _, v in ctx.values if "eval/loss" in v]
    assert len(evaluated) == 4
    assert max(evaluated) - min(evaluated) < 1e-6
    _, _, plain = run(tmp_path / "b", max_steps=4, learning_rate=1e-30)
    trained = [[v["train/loss"] for _, v in c.values if "train/loss" in v] for c in (ctx, plain)]
    assert all(abs(a - b) > 1e-6 for a, b in zip(*trained, strict=True)), "dropout was off, also after an evaluation"


def test_gradient_checkpointing_is_switched_on(tmp_path):
    _, model, _ = run(tmp_path, max_steps=1, gradient_checkpointing=True)
    assert model.is_gradient_checkpointing


def test_the_seed_changes_the_order_of_the_rows(tmp_path):
    losses = [
        [v["train/loss"] for _, v in run(tmp_path / str(seed), seed=seed, learning_rate=1e-30)[2].values]
        for seed in (1, 2)
    ]
    assert losses[0] != losses[1]


def test_mixture_weights_reach_the_loop(tmp_path):
    short = make_rows(10, seed=1)
    long = [type(row)(f"long-{row.id}", row.ids * 4, (False, *[True] * (4 * len(row.ids) - 1))) for row in short]
    tokens = {}
    for name, weights in (("short", [0.99, 0.01]), ("long", [0.01, 0.99])):
        ctx, model = FakeContext(tmp_path / name), tiny_model().train()
        work = data_task(model, CE, [short, long], weights, seed=ctx.seed_for("data-order"))
        tokens[name] = train(work, params(max_steps=10), ctx, compute=torch.float32).tokens
    assert tokens["long"] > 3 * tokens["short"]


def test_the_logged_loss_is_the_weighted_sum(tmp_path):
    terms = (LossTerm("a", 0.25, cross_entropy), LossTerm("b", 2.0, lambda x: 3 * cross_entropy(x)))
    _, _, ctx = run(tmp_path, terms=terms, max_steps=2)
    for _, values in ctx.values:
        assert values["train/b"] == pytest.approx(3 * values["train/a"], rel=1e-5)
        assert values["train/loss"] == pytest.approx(0.25 * values["train/a"] + 2 * values["train/b"], rel=1e-5)


def test_tokens_and_the_best_step_survive_a_resume(tmp_path):
    options = {"held_out": make_rows(6, seed=5), "eval_steps": 1, "metric_for_best_model": "loss"}
    options |= {"learning_rate": 5e-2, "max_steps": 14}
    straight, want, _ = run(tmp_path / "a", **options)
    assert straight.best_step < 9
    with pytest.raises(Stopped):
        run(tmp_path / "b", stop_at=10, **options)
    resumed, got, _ = run(tmp_path / "b", **options)
    assert (resumed.tokens, resumed.best_step) == (straight.tokens, straight.best_step)
    assert weights_hash(got) == weights_hash(want)


def test_patience_counts_from_the_last_improvement(tmp_path, monkeypatch):
    from kdkit.train.loop import _Training

    values = iter([5.0, 6.0, 4.0, 6.0, 6.0, 6.0, 1.0])
    monkeypatch.setattr(_Training, "_evaluate", lambda self: {"loss": next(values)})
    result, _, _ = run(tmp_path, held_out=make_rows(2), eval_steps=1, metric_for_best_model="loss",
                       early_stopping_patience=3, max_steps=20)  # fmt: skip
    assert (result.steps, result.best_step) == (6, 3)


def test_best_weights_that_cannot_be_written_are_not_claimed(tmp_path, monkeypatch):
    real, calls = checkpoint.save_file, []

    def second_is_full(tensors, path):
        calls.append(path)
        if "best" in str(path) and sum("best" in str(p) for p in calls) > 1:
            raise OSError("No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", second_is_full)
    result, _, ctx = run(tmp_path, held_out=make_rows(6), rows=make_rows(6), eval_steps=1,
                         metric_for_best_model="loss", max_steps=5)  # fmt: skip
    assert result.best_step == 1
    assert any("best not written: No space left" in line for line in ctx.logs)
    first = next(v["eval/loss"] for _, v in ctx.values if "eval/loss" in v)
    assert result.evaluation["loss"] == pytest.approx(first)


def test_skipped_steps_are_neither_counted_nor_logged(tmp_path):
    result, _, ctx = run(tmp_path, terms=poisoned({2}), logging_steps=4)
    assert all(math.isfinite(values["train/loss"]) for _, values in ctx.values)
    straight, _, _ = run(tmp_path / "b", max_steps=8)
    assert 0 < result.tokens < straight.tokens


def test_the_environment_does_not_scale_the_gradient(tmp_path, monkeypatch):
    seen = record(monkeypatch)
    run(tmp_path / "a", max_steps=1, max_grad_norm=1e9)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    run(tmp_path / "b", max_steps=1, max_grad_norm=1e9)
    assert torch.equal(flat(seen[0]["grads"]), flat(seen[1]["grads"]))
