from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch

import kdkit
from kdkit.api import RecipeError
from kdkit.testing.tiny import save_tiny_model, tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"What is {i} + {i}?", "completion": f"It is {2 * i}."} for i in range(40)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_tiny_model(root / "teacher", layers=3, seed=1)
    save_tiny_model(root / "student", layers=2, seed=2)
    return root


def recipe(tmp_path: Path, stages: dict) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"kdkit": 1, "name": "test", "stages": stages}))
    return file


def sft(models: Path, **values) -> dict:
    data = {"use": "jsonl", "source": "./rows.jsonl", "split": "train", "test_fraction": 0.2}
    base = {"kind": "sft", "model": str(models / "student"), "data": data, "max_steps": 6, "precision": "fp32"}
    return {**base, "per_device_train_batch_size": 4, "learning_rate": 1e-2, **values}


def distill(models: Path, **values) -> dict:
    teacher = {"use": "local", "model": str(models / "teacher"), "precision": "fp32"}
    return sft(models, **{"kind": "distill", "teacher": teacher, **values})


def run(tmp_path: Path, stages: dict, **options) -> kdkit.RunResult:
    options = {"inline": True, "out": tmp_path / "runs", **options}
    return kdkit.run(recipe(tmp_path, stages), **options)


def problems(tmp_path: Path, stages: dict) -> list[str]:
    return [problem.message for problem in kdkit.validate(recipe(tmp_path, stages))]


def digest(model_dir: Path) -> str:
    return hashlib.sha256((model_dir / "model.safetensors").read_bytes()).hexdigest()


def test_sft_writes_a_model_that_plain_transformers_loads(tmp_path, models):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run(tmp_path, {"sft": sft(models)})
    assert result.ok, result.error
    path = result.stage("sft").outputs["model"].path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert model.dtype is torch.float32
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    facts = json.loads((path / "kdkit.json").read_text())
    assert facts["learned_tokens"] == facts["trained_tokens"] > 100
    assert facts["losses"] == {"cross-entropy": 1.0}
    losses = [line["train/loss"] for line in result.stage("sft").metrics() if "train/loss" in line]
    assert all(math.isfinite(loss) for loss in losses)
    assert digest(path) != digest(models / "student")


def test_distillation_moves_the_student_towards_the_teacher(tmp_path, models):
    result = run(tmp_path, {"kd": distill(models, losses=[{"use": "forward-kl"}], max_steps=30, logging_steps=1)})
    assert result.ok, result.error
    losses = [line["train/forward-kl"] for line in result.stage("kd").metrics() if "train/forward-kl" in line]
    assert losses[-1] < 0.6 * losses[0]


def test_trained_tokens_add_up_over_stages(tmp_path, models):
    chain = {"one": sft(models), "two": sft(models, model="${stages.one.model}")}
    result = run(tmp_path, chain)
    facts = [json.loads((result.stage(s).outputs["model"].path / "kdkit.json").read_text()) for s in ("one", "two")]
    assert facts[1]["trained_tokens"] == facts[0]["trained_tokens"] + facts[1]["learned_tokens"]


def test_sft_and_distill_see_the_same_rows_for_the_same_tokens(tmp_path, models):
    result = run(tmp_path, {"sft": sft(models), "kd": distill(models)})
    tokens = [
        [line["train/learned_tokens"] for line in result.stage(s).metrics() if "train/learned_tokens" in line]
        for s in ("sft", "kd")
    ]
    assert tokens[0] == tokens[1]


def test_the_same_recipe_gives_the_same_bytes(tmp_path, models, monkeypatch):
    digests = []
    for name in ("a", "b"):
        monkeypatch.setenv("KDKIT_STORE", str(tmp_path / name))
        digests.append(digest(run(tmp_path, {"kd": distill(models)}).stage("kd").outputs["model"].path))
    assert digests[0] == digests[1]


def test_a_pruned_student_starts_from_the_teachers_layers(tmp_path, models):
    stage = sft(models, model={"from": str(models / "teacher"), "keep_layers": [0, 2]}, learning_rate=1e-12)
    path = run(tmp_path, {"sft": stage}).stage("sft").outputs["model"].path
    from transformers import AutoModelForCausalLM

    model, teacher = AutoModelForCausalLM.from_pretrained(path), tiny_model(layers=3, seed=1)
    assert model.config.num_hidden_layers == 2
    for mine, theirs in ((0, 0), (1, 2)):
        got, want = model.model.layers[mine].mlp.up_proj.weight, teacher.model.layers[theirs].mlp.up_proj.weight
        assert torch.allclose(got, want, atol=1e-6)


def test_mixtures_and_evaluation_during_training(tmp_path, models):
    data = [
        {"use": "jsonl", "source": "./rows.jsonl", "split": "train", "weight": 3},
        {"use": "jsonl", "source": "./rows.jsonl", "split": "train", "max_rows": 4},
    ]
    held_out = {"use": "jsonl", "source": "./rows.jsonl", "split": "test", "test_fraction": 0.2}
    result = run(tmp_path, {"sft": sft(models, data=data, eval_data=held_out, eval_steps=2, eval_rows=3)})
    assert result.ok, result.error
    evaluated = [line for line in result.stage("sft").metrics() if "eval/loss" in line]
    assert [line["step"] for line in evaluated] == [2, 4, 6]


def evaluate(models: Path, **values) -> dict:
    data = {"use": "jsonl", "source": "./rows.jsonl", "split": "test", "test_fraction": 0.3}
    names = {"student": str(models / "student"), "teacher": str(models / "teacher")}
    metrics = [{"use": name} for name in ("rouge-l", "exact-match", "perplexity", "teacher-kl")]
    teacher = {"use": "local", "model": str(models / "teacher"), "precision": "fp32"}
    base = {"kind": "evaluate", "models": names, "data": data, "metrics": metrics, "teacher": teacher}
    return {**base, "sampling": {"max_new_tokens": 8}, "precision": "fp32", **values}


def test_evaluate_and_report_have_the_contract_fields(tmp_path, models):
    stages = {"eval": evaluate(models), "report": {"kind": "report", "scores": ["${stages.eval.scores}"]}}
    result = run(tmp_path, stages)
    assert result.ok, result.error
    student, teacher = (result.report["models"][name] for name in ("student", "teacher"))
    assert set(student["metrics"]) == {"rouge-l", "exact-match", "perplexity", "teacher-kl"}
    n = student["metrics"]["rouge-l"]["n"]
    assert n == student["metrics"]["perplexity"]["n"] > 5
    assert student["trained_tokens"] == 0
    assert student["bytes"] == (models / "student" / "model.safetensors").stat().st_size
    assert teacher["metrics"]["teacher-kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert student["metrics"]["teacher-kl"]["value"] > 0.01
    assert student["counts"]["jsonl"]["n"] == n
    speeds = ("generated_tokens_per_s", "prefill_tokens_per_s", "load_seconds")
    assert all(student["speed"][name] > 0 for name in speeds)
    assert student["kernel"].startswith("torch ")
    assert student["quantization"] is None


def test_perplexity_is_that_of_the_whole_answer_and_its_end(tmp_path, models):
    result = run(tmp_path, {"eval": evaluate(models, metrics=[{"use": "perplexity"}], teacher=None)})
    scores = json.loads((result.stage("eval").outputs["scores"].path / "scores.json").read_text())
    found = scores["models"]["student"]["results"]["jsonl"]["perplexity"]
    model, tokenizer = tiny_model(layers=2, seed=2), tiny_tokenizer()
    by_prompt = {row["prompt"]: row["completion"] for row in ROWS}
    lines = (result.stage("eval").outputs["scores"].path / "predictions" / "student--jsonl.jsonl").read_text()
    nll, tokens = 0.0, 0
    for line in map(json.loads, lines.splitlines()):
        answer = tokenizer(by_prompt[line["prompt"]] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        prompt = tokenizer(line["prompt"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=torch.tensor([prompt + answer])).logits[0], -1)
        nll -= sum(float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
        tokens += len(answer)
    assert found["value"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)


def test_generate_keeps_only_whole_answers_and_resumes_by_chunk(tmp_path, models, monkeypatch):
    from kdkit.plugins.stages import generating

    monkeypatch.setattr(generating, "CHUNK", 8)
    teacher = {"use": "local", "model": str(models / "teacher"), "precision": "fp32"}
    stage = {
        "kind": "generate",
        "teacher": teacher,
        "data": {"use": "instructions", "split": "all", "max_rows": 30},
        "sampling": {"do_sample": True, "max_new_tokens": 300},
    }
    result = run(tmp_path, {"answers": stage})
    assert result.ok, result.error
    artifact = result.stage("answers").outputs["data"]
    rows = [json.loads(line) for line in artifact.path.read_text().splitlines()]
    assert sum(artifact.info.values()) == 30
    assert len(rows) == artifact.info["kept"]
    assert artifact.info["truncated"] > 0
    assert all(row["completion"].strip() for row in rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": [{"use": "forward-kl"}]}, "'forward-kl' needs a teacher; use a distill stage"),
        ({"losses": [{"use": "cross-entropy"}, {"use": "cross-entropy"}]}, "'cross-entropy' appears twice"),
        ({"eval_steps": 2}, "eval_steps needs eval_data"),
    ],
)
def test_mistakes_in_a_training_stage_are_found_before_it_runs(tmp_path, models, change, message):
    assert message in " | ".join(problems(tmp_path, {"sft": sft(models, **change)}))


def test_mistakes_in_other_stages_are_found_before_they_run(tmp_path, models):
    found = problems(tmp_path, {"kd": distill(models, losses=[{"use": "cross-entropy"}])})
    assert any("no loss uses the teacher" in message for message in found)
    stage = evaluate(models)
    del stage["teacher"]
    assert any("'teacher-kl' needs 'teacher'" in message for message in problems(tmp_path, {"eval": stage}))


def failure(tmp_path: Path, stages: dict) -> kdkit.api.KdkitError:
    result = run(tmp_path, stages)
    assert not result.ok
    assert "\n" not in str(result.error)
    store = Path(result.run_dir).parents[2]
    assert not list(store.rglob("sft-*/manifest.json"))
    return result.error


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path, models, tmp_path_factory):
    from transformers import AutoTokenizer

    other = save_tiny_model(tmp_path_factory.mktemp("other"), seed=3, vocab=260)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    stage = distill(models, teacher={"use": "local", "model": str(other)})
    error = failure(tmp_path, {"kd": stage})
    assert error.exit_code == 2
    assert "vocabular" in str(error)


def test_rows_that_do_not_fit_are_counted_and_none_left_is_an_error(tmp_path, models):
    error = failure(tmp_path, {"sft": sft(models, max_length=8)})
    assert error.exit_code == 2
    assert "longer than max_length=8; the shortest has" in str(error)


def test_a_prompt_over_the_limit_is_named(tmp_path, models):
    error = failure(tmp_path, {"eval": evaluate(models, max_prompt_length=5)})
    assert error.exit_code == 2
    assert "have more than max_prompt_length=5 tokens, the longest is" in str(error)


def test_an_unknown_model_path_is_located(tmp_path, models):
    with pytest.raises(RecipeError, match=r"recipe\.yaml:1:\d+: stages\.sft\.model: "):
        run(tmp_path, {"sft": sft(models, model="./nowhere")})


@pytest.fixture
def handed_over(monkeypatch) -> list:
    """What the training stages hand to the loop, which then trains nothing."""
    from kdkit.plugins.stages import training
    from kdkit.train.loop import TrainResult

    seen = []

    def fake(task, params, ctx, *, compute):
        seen.append((task, compute))
        return TrainResult(steps=1, tokens=5, skipped=0, evaluation={})

    monkeypatch.setattr(training, "train", fake)
    return seen


def test_weights_of_losses_and_datasets_reach_the_loop(tmp_path, models, handed_over):
    rows = {"use": "jsonl", "source": "./rows.jsonl"}
    losses = [{"use": "forward-kl", "weight": 0.7, "temperature": 2.0}, {"use": "cross-entropy", "weight": 0.3}]
    stage = distill(models, losses=losses, data=[{**rows, "weight": 3}, {**rows, "max_rows": 4}])
    assert run(tmp_path, {"kd": stage}).ok
    task, _ = handed_over[0]
    assert [(term.name, term.weight) for term in task.terms] == [("forward-kl", 0.7), ("cross-entropy", 0.3)]
    assert task.terms[0].loss.temperature == 2.0
    assert task.streams[0].source.weights == (3.0, 1.0)
    assert [len(part) for part in task.streams[0].source.data] == [40, 4]


def test_divergences_are_confined_to_the_shared_vocabulary(tmp_path, models, handed_over, tmp_path_factory):
    wide = save_tiny_model(tmp_path_factory.mktemp("wide"), vocab=264)
    assert run(tmp_path, {"kd": distill(models, model=str(wide))}).ok
    task, _ = handed_over[0]
    assert {term.name: term.vocabulary for term in task.terms} == {"forward-kl": 259, "cross-entropy": None}


def test_evaluation_confines_the_divergence_to_the_shared_vocabulary(tmp_path, models, tmp_path_factory):
    wide = save_tiny_model(tmp_path_factory.mktemp("wide"), vocab=264)
    stage = {**evaluate(models), "models": {"wide": str(wide)}, "metrics": [{"use": "teacher-kl"}]}
    result = run(tmp_path, {"eval": stage})
    assert result.ok, result.error


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_reaches_the_loop_and_the_saved_weights(tmp_path, models, handed_over, precision, dtype):
    from safetensors import safe_open

    result = run(tmp_path, {"sft": sft(models, precision=precision)})
    assert handed_over[0][1] is dtype
    assert next(handed_over[0][0].model.parameters()).dtype is torch.float32
    with safe_open(result.stage("sft").outputs["model"].path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}  # noqa: SIM118 - not a mapping


def test_overlong_rows_are_cut_when_asked(tmp_path, models, handed_over):
    stage = sft(models, max_length=20, overlong="truncate")
    assert run(tmp_path, {"sft": stage}).ok
    rows = handed_over[0][0].streams[0].source.data[0]
    assert max(len(row.ids) for row in rows) == 20
    assert all(row.targets for row in rows)


def test_generation_stops_where_training_ended_an_answer(tmp_path, models, handed_over, tmp_path_factory):
    from transformers import AutoTokenizer, GenerationConfig

    other = save_tiny_model(tmp_path_factory.mktemp("other"))
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(other)
    config = GenerationConfig.from_pretrained(other)
    config.eos_token_id = 256
    config.save_pretrained(other)
    result = run(tmp_path, {"sft": sft(models, model=str(other))})
    saved = GenerationConfig.from_pretrained(result.stage("sft").outputs["model"].path)
    assert saved.eos_token_id == [256, 258]


class ScriptedTeacher:
    """Answers with the seed it was given; counts its calls."""

    def __init__(self):
        self.seeds: list[int] = []

    def generate(self, prompts, sampling, seed, /):
        from kdkit.api import Completion

        self.seeds += [seed + i for i in range(len(prompts))]
        return [Completion(f"answer {seed + i}", (1, 2)) for i in range(len(prompts))]

    def close(self):
        pass


class GenerateContext:
    """What the generate stage uses of its context."""

    def __init__(self, root: Path, teacher: ScriptedTeacher, *, stop: bool = False):
        self.out, self.checkpoints, self.name = root / "out", root / "checkpoints", "answers"
        self.out.mkdir(parents=True, exist_ok=True)
        self.teacher, self.stop = teacher, stop

    def load(self, component):
        from kdkit.api import Example, Rows

        return Rows(examples=[Example(id=str(i), prompt=f"{i}?") for i in range(20)])

    def build(self, component):
        return self.teacher

    def seed_for(self, purpose):
        return 1000

    def stopping(self):
        return self.stop

    def log(self, message):
        pass

    def progress(self, step, total, **values):
        pass


def generate_stage(ctx: GenerateContext) -> dict:
    from kdkit.plugins.stages import generating
    from kdkit.plugins.stages.plugin import GenerateParams

    return generating.run(GenerateParams.model_construct(teacher=None, data=[None]), ctx)


def test_a_stopped_generate_stage_keeps_whole_chunks_and_goes_on(tmp_path, monkeypatch):
    from kdkit.api.errors import Stopped
    from kdkit.plugins.stages import generating

    monkeypatch.setattr(generating, "CHUNK", 8)
    straight = ScriptedTeacher()
    want = generate_stage(GenerateContext(tmp_path / "a", straight))["data"].path.read_text()
    assert len(set(straight.seeds)) == 20, "every prompt has a seed of its own"
    first, second = ScriptedTeacher(), ScriptedTeacher()
    with pytest.raises(Stopped, match="after 8 answers"):
        generate_stage(GenerateContext(tmp_path / "b", first, stop=True))
    got = generate_stage(GenerateContext(tmp_path / "b", second))["data"].path.read_text()
    assert (len(first.seeds), len(second.seeds)) == (8, 12)
    assert got == want


def test_rows_over_max_length_have_no_perplexity(tmp_path, models):
    scores = []
    for limit in (2048, 24):
        result = run(
            tmp_path, {"eval": evaluate(models, max_length=limit, metrics=[{"use": "perplexity"}], teacher=None)}
        )
        assert result.ok, result.error
        text = (result.stage("eval").outputs["scores"].path / "scores.json").read_text()
        scores.append(json.loads(text)["models"]["student"]["results"]["jsonl"]["perplexity"]["n"])
    assert 0 < scores[1] < scores[0]


def test_eval_rows_limits_the_evaluation(tmp_path, models, handed_over):
    held_out = {"use": "jsonl", "source": "./rows.jsonl", "split": "test", "test_fraction": 0.5}
    assert run(tmp_path, {"sft": sft(models, eval_data=held_out, eval_rows=3)}).ok
    assert len(handed_over[0][0].held_out) == 3


def test_generation_defaults_that_transformers_refuses_to_save_do_not_lose_the_training(tmp_path, models):
    from transformers import GenerationConfig

    other = save_tiny_model(tmp_path / "other")
    values = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**values, "temperature": 0.6, "top_p": 0.9}))
    result = run(tmp_path, {"sft": sft(models, model=str(other))})
    assert result.ok, result.error
    assert GenerationConfig.from_pretrained(result.stage("sft").outputs["model"].path).eos_token_id == [258]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {"../x": "a/b"}}, "'../x' is no name"),
        ({"metrics": [{"use": "rouge-l"}]}, "no metric uses the teacher"),
        ({"sampling": {"temperature": 0.7}}, "need do_sample: true"),
    ],
)
def test_mistakes_in_an_evaluation_are_found_before_it_runs(tmp_path, models, change, message):
    assert message in " | ".join(problems(tmp_path, {"eval": {**evaluate(models), **change}}))


# --- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("whose", "kind"), [("student", "sft"), ("student", "distill"), ("teacher", "distill"),
                                             ("teacher", "cache-teacher")])  # fmt: skip
def test_rows_beyond_the_positions_of_a_model_are_not_read(tmp_path, models, whose, kind):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 259, "n_positions": 20, "n_embd": 32, "n_layer": 1, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=256, eos_token_id=258)).save_pretrained(tmp_path / "short")
    tiny_tokenizer().save_pretrained(tmp_path / "short")
    given = {"model": str(tmp_path / "short")} if whose == "student" else {}
    stage = sft(models, **given)
    if kind != "sft":
        name = tmp_path / "short" if whose == "teacher" else models / "teacher"
        stage = distill(models, losses=[{"use": "forward-kl"}], **given, teacher={"use": "local", "model": str(name)})
    expected = f"longer than the {whose}'s 20 positions"
    if kind == "cache-teacher":
        stage = {"kind": kind, "teacher": stage["teacher"], "student": stage["model"], "data": stage["data"]}
        expected = r"tokens, and the teacher 20 positions; set max_length: 20"
    result = run(tmp_path, {"s": stage})
    assert expected in str(result.error)
