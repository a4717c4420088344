"""The grpo stage, as a recipe asks for it."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kdkit
from kdkit.plugins.stages.grpo_plugin import GRPOStageParams
from kdkit.testing.tiny import save_tiny_model, tiny_tokenizer
from kdkit.train.policy.records import read_records

ROWS = [{"prompt": f"What is {'very ' * (i % 4)}{i} + {i}?", "completion": f"It is {2 * i}."} for i in range(40)]
DATA = {"use": "jsonl", "source": "./rows.jsonl", "split": "train", "test_fraction": 0.2}
PLUGIN = '''
from __future__ import annotations
from pathlib import Path
from pydantic import Field
from kdkit import Params, hookimpl
from kdkit.api import Completion, Component, RewardScore, RewardSpec, RolloutSpec
from kdkit.api import Sandbox, SandboxJob, SandboxLimits

class Nothing(Params):
    """Nothing."""

def low(rollouts, /):
    """The share of low ids among the first six tokens."""
    return [RewardScore.of(sum(i < 128 for i in r.token_ids[:6]) / 6) for r in rollouts]

def high(rollouts, /):
    return [RewardScore.of(sum(i >= 128 for i in r.token_ids[:6]) / 6) for r in rollouts]

class Held(Params):
    """A sandbox."""

    sandbox: Component[Sandbox] = Field(default={"use": "auto"}, validate_default=True)

class HeldUp:
    """`low`, times what a program prints; in the second call of a process the program computes for ever."""

    def __init__(self, sandbox):
        self.session, self.calls = sandbox.open(SandboxLimits(wall_s=900.0, cpu_s=300.0)), 0

    def __call__(self, rollouts, /):
        self.calls += 1
        if self.calls == 2:
            Path(__file__).with_name("second-call").touch()
        text = "while True: pass" if self.calls == 2 else "print(1)"
        outcome = self.session.run([SandboxJob(program=text)])[0]
        if outcome.status != "ok":
            return [RewardScore.infra_error(outcome.status)] * len(rollouts)
        return [RewardScore.of(int(outcome.stdout) * score.value) for score in low(rollouts)]

    def close(self):
        self.session.close()

PROGRAM = """```python
while True:
    pass
```"""

class Script:
    """Always answers with the same program; every third answer is cut."""

    def __init__(self, model):
        self.ids = tuple(model.tokenizer(PROGRAM, add_special_tokens=False)["input_ids"])

    def generate(self, prompts, sampling, seeds, /):
        return [Completion("", self.ids, truncated=place % 3 == 2) for place in range(len(prompts))]

@hookimpl
def kdkit_rewards():
    """Rewards."""
    yield RewardSpec(name="low", summary="Low ids", params=Nothing, build=lambda params, ctx: low, range=(0, 1))
    yield RewardSpec(name="held", summary="Low ids, slowly", params=Held, range=(0, 1),
                     build=lambda params, ctx: HeldUp(ctx.build(params.sandbox)))
    yield RewardSpec(name="high", summary="High ids", params=Nothing, build=lambda params, ctx: high, range=(0, 0.5))

@hookimpl
def kdkit_rollouts():
    """Engines."""
    yield RolloutSpec(name="script", summary="Says one thing", params=Nothing,
                      build=lambda params, ctx, model: Script(model))
'''


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "student", seed=2)


def recipe(tmp_path: Path, student: Path, **values) -> Path:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "other.py").write_text(PLUGIN)
    stage = {
        "kind": "grpo",
        "model": str(student),
        "data": DATA,
        "rewards": [{"use": "low"}],
        "num_generations": 4,
        "num_rollouts": 16,
        "num_iterations": 2,
        "max_completion_length": 8,
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "logging_steps": 1,
        **values,
    }
    text = {"kdkit": 1, "name": "test", "plugins": ["./other.py"], "stages": {"own": stage}}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(text, indent=1))
    return file


def finished(result) -> tuple[str, list[dict], list]:
    """Hash of the weights, metrics line by line, and the rollouts."""
    assert result.ok, result.error
    path = result.stage("own").outputs["model"].path
    lines = [line for line in result.stage("own").metrics() if "train/loss" in line]
    weights = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    return weights, lines, list(read_records(path.parent / "rollouts"))


def run(tmp_path: Path, student: Path, **values) -> tuple[str, list[dict], list]:
    return finished(kdkit.run(recipe(tmp_path, student, **values), out=tmp_path / "runs", inline=True))


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_reward_rises(tmp_path, student):
    _, lines, records = run(
        tmp_path, student, max_steps=40, num_iterations=1, num_rollouts=32, per_device_train_batch_size=32,
        num_generations=8, learning_rate=1e-2, losses=[{"use": "grpo", "beta": 0.01}],
    )  # fmt: skip
    values = [line["train/reward/total/mean"] for line in lines]
    assert sum(values[-5:]) / 5 > sum(values[:5]) / 5 + 0.2
    assert lines[0]["train/grpo/ref_kl"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["train/grpo/ref_kl"] > 0.01
    assert 0 < lines[-1]["train/entropy"] < lines[0]["train/entropy"]
    for name in ("clip_low", "clip_high", "ratio"):
        assert f"train/grpo/{name}" in lines[0]
    assert [record.iteration for record in records] == [i for i in range(1, 41) for _ in range(32)]
    for line in lines:
        own = [record for record in records if record.iteration == line["step"]]
        assert line["train/reward/low/mean"] == pytest.approx(sum(record.rewards["low"] for record in own) / 32)
        assert line["train/truncated_share"] == sum(record.truncated for record in own) / 32


def test_a_second_pass_moves_away_from_what_was_sampled(tmp_path, student):
    _, lines, records = run(tmp_path, student, learning_rate=1e-2)
    assert [line["step"] for line in lines if "train/entropy" in line] == [1, 5]
    assert lines[0]["train/grpo/ratio"] == pytest.approx(1, abs=1e-4)
    assert lines[3]["train/grpo/approx_kl"] > 1e-5
    assert [record.step for record in records] == [0] * 16 + [4] * 16


@pytest.mark.parametrize("values", [
    {"losses": [{"use": "grpo", "loss_type": "dr_grpo", "constant_length": 8}], "scale_rewards": "none"},
    {"losses": [{"use": "grpo", "loss_type": "grpo", "importance_sampling_level": "sequence"}], "top_k": 30},
    {"losses": [{"use": "grpo", "loss_type": "bnpo"}], "scale_rewards": "batch", "temperature": 1.5, "top_p": 0.9},
    {"resample_groups": 2, "mask_truncated_completions": True, "losses": [{"use": "grpo", "weight": 0.5}]},
])  # fmt: skip
def test_every_form_of_it_trains(tmp_path, student, values):
    _, lines, records = run(tmp_path, student, max_steps=4, **values)
    weight = 0.5 if "resample_groups" in values else 1.0
    assert lines[0]["train/loss"] == pytest.approx(weight * lines[0]["train/grpo"])
    if "resample_groups" in values:
        assert lines[0]["train/masked_share"] > 0
        assert not any(record.counts and record.truncated for record in records)


def test_dropout_does_not_look_like_a_change_of_the_policy(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    drops = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    sizes = {"vocab_size": 259, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**sizes, **drops, bos_token_id=256, eos_token_id=258)).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    _, lines, _ = run(tmp_path, tmp_path / "gpt2", max_steps=2, losses=[{"use": "grpo", "beta": 0.1}])
    assert lines[0]["train/grpo/ratio"] == pytest.approx(1, abs=1e-5)
    assert lines[0]["train/grpo/ref_kl"] == pytest.approx(0, abs=1e-9)


def test_several_rewards_with_weights_ranges_and_schedules(tmp_path, student):
    rewards = [{"use": "low", "weight": 2.0}, {"use": "high", "from_step": 4}]
    _, lines, records = run(tmp_path, student, rewards=rewards)
    assert [len(record.rewards) for record in records] == [1] * 16 + [2] * 16
    for record in records:
        assert record.total == pytest.approx(2 * record.rewards["low"] + record.rewards.get("high", 0))
        assert record.rewards.get("high", 0) <= 0.5
    assert "train/reward/high/mean" not in lines[0]
    assert lines[4]["train/reward/high/mean"] == sum(record.rewards["high"] for record in records[16:]) / 16


def test_another_engine_answers(tmp_path, student):
    rewards = [{"use": "correctness", "sandbox": {"use": "unsafe-local"}}, {"use": "low"}]
    how = {"max_length": 400, "max_completion_length": 200, "max_steps": 1, "num_iterations": 1}
    _, lines, records = run(tmp_path, student, rewards=rewards, rollout={"use": "script"}, **how)
    assert records[0].text.endswith("pass\n```")
    assert [record.truncated for record in records] == [place % 3 == 2 for place in range(16)]
    assert lines[0]["train/reward/correctness/unscorable"] == 1, "the rows have no tests"
    assert records[0].notes == {"correctness": "no tests", "low": None}
    assert not any("mismatch" in name for name in lines[0])


# --- stopping ---------------------------------------------------------------------------------------------------------

SCHEDULE = {"losses": [{"use": "grpo", "beta": 0.1}], "resample_groups": 1, "top_k": 60}
"""8 steps: two iterations of two epochs of two steps."""


@pytest.fixture(scope="module")
def straight(tmp_path_factory, student):
    return run(tmp_path_factory.mktemp("straight"), student, **SCHEDULE)


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_run_that_stops_goes_on_to_bitwise_the_same_weights(tmp_path, student, straight, monkeypatch, stop):
    """In the middle of an epoch, between epochs, between iterations."""
    from kdkit.engine.context import Context

    real, seen = Context.progress, {"step": 0}

    def progress(self, step, total, /, **values):
        seen["step"] = step
        real(self, step, total, **values)

    with monkeypatch.context() as patch:
        patch.setattr(Context, "progress", progress)
        patch.setattr(Context, "stopping", lambda self: seen["step"] == stop)
        monkeypatch.setenv("KDKIT_STORE", str(tmp_path / "store"))
        stopped = kdkit.run(recipe(tmp_path, student, **SCHEDULE), out=tmp_path / "runs", inline=True)
        assert not stopped.ok
    weights, lines, records = run(tmp_path, student, **SCHEDULE)
    assert (weights, records) == (straight[0], straight[2])
    made = [line["step"] for line in lines if "train/entropy" in line]
    assert made == [1, 5], "rollouts that a checkpoint holds are not made again"


@pytest.mark.parametrize("call", [1, 2])
def test_a_run_that_dies_while_it_judges_goes_on_to_bitwise_the_same_weights(
    tmp_path, student, straight, monkeypatch, call
):
    from kdkit.train.rewards import RewardSet

    real, calls = RewardSet.__call__, []

    def dying(self, rollouts, *, step=None):
        calls.append(step)
        scored = real(self, rollouts, step=step)
        if len(calls) == call:
            raise kdkit.api.StageError("the power is gone")
        return scored

    schedule = {**SCHEDULE, "save_steps": 3}
    with monkeypatch.context() as patch:
        patch.setattr(RewardSet, "__call__", dying)
        monkeypatch.setenv("KDKIT_STORE", str(tmp_path / "store"))
        died = kdkit.run(recipe(tmp_path, student, **schedule), out=tmp_path / "runs", inline=True)
        assert "the power is gone" in str(died.error)
    weights, lines, records = run(tmp_path, student, **schedule)
    assert (weights, records) == (straight[0], straight[2])
    assert [line["step"] for line in lines if "train/learned_tokens" in line] == list(range(1, 9))


CHILD_SUBREAPER = 36


def parents() -> dict[int, tuple[int, str]]:
    """Parent and state of every process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            found[int(entry.name)] = int(parent), state
    return found


def descendants(pid: int) -> set[int]:
    """All processes that a process started and that live, and those they started."""
    known, found, fresh = parents(), set(), {pid}
    while fresh:
        fresh = {child for child, (parent, _) in known.items() if parent in fresh} - found
        found |= fresh
    return {child for child in found if known[child][1] not in "ZX"}


def wait_for(condition, what: str):
    """Long enough for a machine that does a lot of other things."""
    end = time.monotonic() + 600
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.1)
    return found


@pytest.fixture
def orphanage():
    """Where orphans of this process's children come to: here, not to init, so that nobody gets lost."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    before = descendants(os.getpid())
    yield lambda: descendants(os.getpid()) - before
    prctl(CHILD_SUBREAPER, 0, 0, 0, 0)
    for pid, (parent, _) in parents().items():
        if parent == os.getpid() and pid not in before:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


@pytest.mark.skipif(sys.platform != "linux", reason="sandboxes need Linux")
@pytest.mark.timeout(1800)
def test_a_trainer_that_is_killed_while_programs_run_leaves_none_of_them(tmp_path, student, monkeypatch, orphanage):
    """And goes on to bitwise the weights of a run that nobody stopped."""
    held, schedule = [{"use": "held"}], {"losses": [{"use": "grpo", "beta": 0.1}], "save_steps": 3}
    straight = run(tmp_path / "straight", student, **schedule)
    monkeypatch.setenv("KDKIT_STORE", str(tmp_path / "store"))
    file = recipe(tmp_path, student, rewards=held, **schedule)
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-m", "kdkit", "run", str(file), "--out", str(tmp_path / "runs")]
        trainer = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

        def computing() -> set[int]:
            """Programs of the second iteration that use their core."""
            assert trainer.poll() is None, (tmp_path / "log").read_text()
            return {pid for pid in orphanage() if _spins(pid)} if (tmp_path / "second-call").exists() else set()

        try:
            assert wait_for(computing, "no program is running")
            # The worker, in which the judge lives, dies without a chance to clean up; so does its parent.
            workers = [pid for pid in orphanage() if _is_worker(pid)]
            for pid in (*workers, trainer.pid):
                os.kill(pid, signal.SIGKILL)
        finally:
            trainer.kill()
            trainer.wait()
    assert workers
    wait_for(lambda: not orphanage(), "programs are left")
    # A run that began again would call for the program that never ends, and fail.
    weights, lines, records = run(tmp_path, student, rewards=held, **schedule)
    assert weights == straight[0]
    assert [record.text for record in records] == [record.text for record in straight[2]]
    assert [line["step"] for line in lines if "train/entropy" in line] == [1, 5]


def _is_worker(pid: int) -> bool:
    try:
        return b"kdkit.engine.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _spins(pid: int) -> bool:
    """Whether it is a jailed Python that has computed for half a second."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        jailed = "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return jailed and int(fields[11]) > os.sysconf("SC_CLK_TCK") // 2


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "expected"), [
    ({"num_rollouts": 20}, "stages.own.num_rollouts: 20 is no multiple of the 8 rows of a step"),
    ({"num_rollouts": 24, "num_generations": 5}, "stages.own.num_rollouts: 24 is no multiple of num_generations=5"),
    ({"num_generations": 1}, "stages.own.num_generations: must be at least 2"),
    ({"rewards": []}, "stages.own.rewards: must have at least 1 entries"),
    ({"rewards": [{"use": "low", "from_step": 2}]}, "stages.own.rewards: no reward counts at the first step"),
    ({"rewards": [{"use": "low"}, {"use": "high", "from_step": 8}]},
     "stages.own.rewards.1.from_step: 'high' would never count: training has 8 steps"),
    ({"rewards": [{"use": "low"}, {"use": "high", "from_step": 7}], "num_iterations": 2},
     "stages.own.rewards.1.from_step: 'high' would never count: the last completions are sampled at step 4"),
    ({"losses": [{"use": "reverse-kl"}]}, "stages.own.losses.0.use: 'reverse-kl' is a token loss; this stage takes"),
    ({"losses": [{"use": "on-policy-reverse-kl"}]}, "stages.own.losses.0.use: 'on-policy-reverse-kl' needs a teacher"),
    ({"losses": [{"use": "grpo"}, {"use": "grpo"}]}, "stages.own.losses.1.use: 'grpo' appears twice"),
    ({"losses": [{"use": "grpo", "loss_type": "dr_grpo"}]}, "stages.own.losses.0: loss_type: dr_grpo, and only it"),
    ({"eval_data": DATA}, "stages.own.eval_data: policy losses need the student's own completions"),
    ({"rollout": {"use": "script"}, "top_k": 5}, "stages.own.rollout.use: 'script' does not say what top_k and top_p"),
    ({"max_completion_length": 1024}, "stages.own.max_completion_length: 1024 leaves no room for a prompt"),
    ({"rewards": [{"use": "lwo"}]}, "stages.own.rewards.0.use: "),
])  # fmt: skip
def test_what_it_refuses_before_anything_runs(tmp_path, student, values, expected):
    (problem,) = kdkit.validate(recipe(tmp_path, student, **values))
    assert f"{problem.path}: {problem.message}".startswith(expected)
    assert problem.line


def test_prompts_without_room_are_refused(tmp_path, student):
    result = kdkit.run(recipe(tmp_path, student, max_length=20), out=tmp_path / "runs", inline=True)
    assert "leaves room for 8 tokens of an answer within max_length=20; the shortest has 14" in str(result.error)
    assert "lower max_completion_length" in str(result.error)


def test_the_defaults():
    fields = GRPOStageParams.model_fields
    assert (fields["num_generations"].default, fields["num_iterations"].default) == (8, 1)
    assert fields["scale_rewards"].default == "group"
    assert (fields["temperature"].default, fields["top_p"].default, fields["top_k"].default) == (1.0, 1.0, 0)
