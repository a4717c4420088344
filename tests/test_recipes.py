from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import kdkit
from kdkit.recipe import load_recipe
from kdkit.testing.tiny import save_tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
DATA = ROOT / "kdkit" / "plugins" / "datasets" / "data"
EVAL = {"dolly": "dolly_sample_en", "bugnet": "bugnet", "pytorrent": "pytorrent", "codeforces": "codeforces"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", layers=4)


def test_there_are_few_recipes():
    assert 1 <= len(RECIPES) <= 15


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_are_valid(recipe):
    assert kdkit.validate(recipe) == []


def test_quickstart_runs_with_a_tiny_model_and_is_cached_the_second_time(tiny, tmp_path):
    small = {
        "stages.answers.data.max_rows": 61,
        "stages.answers.sampling": {"do_sample": True, "max_new_tokens": 300},
        "stages.eval.sampling.max_new_tokens": 8,
        "stages.eval.data.test_fraction": 0.4,
        "stages.sft.data.test_fraction": 0.4,
        "stages.kd.data.test_fraction": 0.4,
        "stages.sft.max_length": 2000,
        "stages.kd.max_length": 2000,
        "stages.sft.max_steps": 4,
        "stages.kd.max_steps": 4,
    }
    var = {"teacher": str(tiny), "student": {"from": str(tiny), "keep_layers": 2}}
    result = kdkit.run(ROOT / "recipes" / "quickstart.yaml", set=small, var=var, out=tmp_path)
    assert result.ok, result.error
    report = result.report
    assert list(report["models"]) == ["base", "sft", "kd", "teacher"]
    for facts in report["models"].values():
        assert set(facts["metrics"]) == {"rouge-l", "perplexity", "teacher-kl"}
        assert all(metric["n"] > 3 for metric in facts["metrics"].values())
    tokens = {name: facts["trained_tokens"] for name, facts in report["models"].items()}
    assert tokens["sft"] == tokens["kd"] > 0 == tokens["base"] == tokens["teacher"]
    again = kdkit.run(ROOT / "recipes" / "quickstart.yaml", set=small, var=var, out=tmp_path)
    events = [json.loads(line) for line in (again.run_dir / "events.jsonl").read_text().splitlines()]
    assert not [event for event in events if event["type"] == "stage-started"]
    assert again.report == report


DIVERGENCES = ["forward-kl", "reverse-kl", "jsd", "skew-kl", "tvd"]


@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_kd_losses_compares_five_divergences_on_the_same_rows(on_policy, tiny, tmp_path):
    small = {
        "stages.answers.data.max_rows": 40,
        "stages.answers.sampling": {"do_sample": True, "max_new_tokens": 200},
        "stages.eval.sampling.max_new_tokens": 4,
        "stages.eval.data.test_fraction": 0.4,
    }
    students = ["sft", "kd", *DIVERGENCES]
    small |= {f"stages.{stage}.{field}": value for stage in students
              for field, value in {"max_length": 2000, "per_device_train_batch_size": 2}.items()}  # fmt: skip
    if on_policy:
        small |= {f"stages.{stage}.sampling": {"max_new_tokens": 5} for stage in DIVERGENCES}
    var = {"teacher": str(tiny), "student": {"from": str(tiny), "keep_layers": 2}, "steps": 2, "on_policy": on_policy}
    result = kdkit.run(ROOT / "recipes" / "kd_losses.yaml", set=small, var=var, out=tmp_path, inline=True)
    assert result.ok, result.error
    report = result.report
    assert set(report["models"]) == {"base", "teacher", *students}
    tokens = {name: report["models"][name]["trained_tokens"] for name in students}
    own = {tokens[name] for name in DIVERGENCES}
    if on_policy:
        assert max(own) <= 2 * 2 * 5
    else:
        assert len({*tokens.values()}) == 1
    values = {report["models"][name]["metrics"]["teacher-kl"]["value"] for name in DIVERGENCES}
    assert len(values) == 5, "five objectives, five students"


def test_kd_losses_differ_in_nothing_but_the_loss():
    stages = {n: s.params for n, s in load_recipe(ROOT / "recipes" / "kd_losses.yaml").stages.items()}
    assert [[loss.name for loss in stages[name].losses] for name in DIVERGENCES] == [[name] for name in DIVERGENCES]
    for name in ("kd", *DIVERGENCES):
        for field in type(stages["kd"]).model_fields.keys() - {"losses"}:
            assert repr(getattr(stages[name], field)) == repr(getattr(stages["kd"], field)), (name, field)


def test_kd_cache_trains_from_what_the_teacher_said(tiny, tmp_path):
    small: dict = {
        "stages.answers.data.max_rows": 40,
        "stages.answers.sampling": {"do_sample": True, "max_new_tokens": 200},
        "stages.eval.sampling.max_new_tokens": 4,
        "stages.eval.data.test_fraction": 0.4,
        "stages.cache.max_length": 2000,
        # A tiny model's tokens are all improbable: keep every one of them.
        "stages.cache.mass": 1.0,
        "stages.cache.min_probability": 0.0,
        "stages.cache.bits": 16,
    }
    for student in ("sft", "kd", "kd-cached"):
        small |= {f"stages.{student}.max_length": 2000, f"stages.{student}.per_device_train_batch_size": 2}
    var = {"teacher": str(tiny), "student": {"from": str(tiny), "keep_layers": 2}, "steps": 3}
    result = kdkit.run(ROOT / "recipes" / "kd_cache.yaml", set=small, var=var, out=tmp_path, inline=True)
    assert result.ok, result.error
    models = result.report["models"]
    assert models["kd"]["trained_tokens"] == models["kd-cached"]["trained_tokens"] > 0
    live, cached = (models[name]["metrics"]["teacher-kl"]["value"] for name in ("kd", "kd-cached"))
    assert cached == pytest.approx(live, rel=0.01)
    assert models["sft"]["metrics"]["teacher-kl"]["value"] != pytest.approx(live, rel=0.01)


def test_minillm_goes_on_from_the_quickstarts_student(tiny, tmp_path):
    small: dict = {
        "stages.answers.data.max_rows": 61,
        "stages.answers.sampling": {"do_sample": True, "max_new_tokens": 300},
        "stages.eval.sampling.max_new_tokens": 8,
        "stages.eval.data.test_fraction": 0.4,
        "stages.minillm.sampling.max_new_tokens": 8,
        "stages.minillm.num_rollouts": 4,
        "stages.sft.max_steps": 2,
    }
    for student in ("sft", "fkl", "minillm"):
        small |= {f"stages.{student}.max_length": 2000, f"stages.{student}.per_device_train_batch_size": 2}
    var = {"teacher": str(tiny), "student": {"from": str(tiny), "keep_layers": 2}, "steps": 5, "fkl_steps": 2}
    result = kdkit.run(ROOT / "recipes" / "minillm.yaml", set=small, var=var, out=tmp_path, inline=True)
    assert result.ok, result.error
    models = result.report["models"]
    assert list(models) == ["base", "sft", "fkl", "minillm", "teacher"]
    for facts in models.values():
        assert set(facts["metrics"]) == {"rouge-l", "distinct-2", "length", "teacher-kl", "student-kl"}
        assert facts["metrics"]["student-kl"]["n"] > 3
    before = models["sft"]["trained_tokens"]
    assert before < models["minillm"]["trained_tokens"] <= before + 5 * 2 * 8
    assert models["teacher"]["metrics"]["student-kl"]["value"] < 1e-6
    values = {models[name]["metrics"]["student-kl"]["value"] for name in ("sft", "fkl", "minillm")}
    assert len(values) == 3


def test_minillm_has_the_answers_and_the_student_of_the_quickstart():
    ours, quickstart = (load_recipe(ROOT / "recipes" / f"{name}.yaml").stages for name in ("minillm", "quickstart"))
    for stage in ("answers", "sft"):
        assert repr(ours[stage].params) == repr(quickstart[stage].params)
    fields = {
        "learning_rate",
        "warmup_ratio",
        "per_device_train_batch_size",
        "max_length",
        "model",
        "data",
    }
    for field in fields:
        assert repr(getattr(ours["fkl"].params, field)) == repr(getattr(ours["minillm"].params, field))


def exportable(path: Path) -> Path:
    """A tiny model whose tokenizer GGUF can hold: with a merge, and GPT-2's rule to split text."""
    from tokenizers import pre_tokenizers
    from tokenizers.models import BPE

    tokenizer = tiny_tokenizer()
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer.backend_tokenizer.model = BPE(vocab={**vocab, "Ġt": len(tokenizer)}, merges=[("Ġ", "t")])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return save_tiny_model(path, layers=4, vocab=len(tokenizer), tokenizer=tokenizer)


def test_quantize_starts_from_the_quickstarts_student(tmp_path):
    tiny = exportable(tmp_path / "tiny")
    small: dict = {
        "stages.answers.data.max_rows": 61,
        "stages.answers.sampling": {"do_sample": True, "max_new_tokens": 300},
        "stages.rollouts.sampling": {"do_sample": True, "max_new_tokens": 40},
        "stages.eval.sampling.max_new_tokens": 8,
        "stages.eval.data.test_fraction": 0.4,
        "stages.kd.max_length": 2000,
        "stages.kd.max_steps": 2,
        "stages.gptq-rollouts.max_rows": 6,
        "stages.gptq-answers.max_rows": 6,
    }
    var = {"teacher": str(tiny), "student": {"from": str(tiny), "keep_layers": 2}}
    result = kdkit.run(ROOT / "recipes" / "quantize.yaml", set=small, var=var, out=tmp_path)
    assert result.ok, result.error
    models = result.report["models"]
    quantizers = {"rtn": "rtn", "gptq-rollouts": "gptq", "gptq-answers": "gptq", "gguf": "gguf"}
    assert list(models) == ["kd", *quantizers, "teacher"]
    for name, quantizer in quantizers.items():
        facts = models[name]["quantization"]
        assert (facts["quantizer"], facts["bits"], facts["group_size"]) == (quantizer, 4, 32)
        assert models[name]["bytes"] < models["kd"]["bytes"]
        assert models[name]["kernel"].endswith("on cpu, dequantised")
        assert models[name]["speed"]["load_seconds"] > 0
    errors = [models[name]["quantization"]["layer_errors"] for name in ("gptq-rollouts", "gptq-answers")]
    assert errors[0] != errors[1], "two calibrations, two results"
    assert len(errors[0]) == 2 * 7
    assert models["gptq-answers"]["quantization"]["rtn_errors"].keys() == errors[1].keys()
    assert models["kd"]["quantization"] is models["teacher"]["quantization"] is None
    compared = {(row["a"], row["b"]) for row in result.report["pairs"]}
    assert {(name, "kd") for name in quantizers} <= compared
    page = (result.run_dir / "report.html").read_text(encoding="utf-8")
    assert page.count("Lost output by layer of gptq-") == 2
    assert page.count("Lost weight by layer of ") == 2
    again = kdkit.run(ROOT / "recipes" / "quantize.yaml", set=small, var=var, out=tmp_path)
    events = [json.loads(line) for line in (again.run_dir / "events.jsonl").read_text().splitlines()]
    assert not [event for event in events if event["type"] == "stage-started"]
    assert again.report == result.report


def test_quantize_has_the_answers_and_the_student_of_the_quickstart():
    ours, quickstart = (load_recipe(ROOT / "recipes" / f"{name}.yaml").stages for name in ("quantize", "quickstart"))
    for stage in ("answers", "kd"):
        assert repr(ours[stage].params) == repr(quickstart[stage].params)
    first, second = (ours[f"gptq-{name}"].params for name in ("rollouts", "answers"))
    assert repr(first.quantizer) == repr(second.quantizer)


def small_paper(recipe: Path, tiny: Path, source: Path, tmp_path: Path) -> dict:
    """Settings that cut a paper recipe down to seconds on the rows that ship with kdkit."""
    var: dict = {"teacher": str(tiny), "student": {"from": str(tiny), "keep_layers": 2}}
    parts = yaml.safe_load(recipe.read_text(encoding="utf-8"))["vars"]
    for part in ("train", "validation", "test"):
        var[part] = {**parts[part], "source": str(source), "test_fraction": 0.4, "validation_fraction": 0.3}
        if parts[part]["use"] == "pytorrent":  # nine functions of a few packages
            var[part]["split_by"] = "function"
    small: dict = {"stages.eval.num_samples": 2, "stages.eval.max_prompt_length": 1500, "stages.eval.max_length": 2048}
    small["stages.eval.sampling.max_new_tokens"] = 4
    for stage in ("teacher", "sft", "kd"):
        small |= {f"stages.{stage}.max_steps": 2, f"stages.{stage}.eval_steps": 1, f"stages.{stage}.max_length": 2048}
    return {"set": small, "var": var, "out": tmp_path / "runs", "inline": True}


PAPER = {
    "english_dolly": "dolly_sample_en",
    "spanish_dolly": "dolly_sample_es",
    "bugnet": "bugnet",
    "pytorrent": "pytorrent",
}


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes_run_at_smoke_size(name, tiny, tmp_path):
    (source,) = DATA.glob(f"{PAPER[name]}*.jsonl")
    recipe = ROOT / "recipes" / "paper" / f"{name}.yaml"
    result = kdkit.run(recipe, **small_paper(recipe, tiny, source, tmp_path))
    assert result.ok, result.error
    report = result.report
    assert list(report["models"]) == ["base", "sft", "kd", "teacher"]
    assert {"rouge-l", "perplexity", "teacher-kl"} <= set(report["models"]["kd"]["metrics"])
    assert {"identity", "empty", "reference"} <= set(report["baselines"])
    assert report["baselines"]["reference"]["metrics"]["rouge-l"]["value"] == pytest.approx(100)
    tokens = {model: facts["trained_tokens"] for model, facts in report["models"].items()}
    assert tokens["sft"] == tokens["kd"] > 0
    assert (result.run_dir / "report.html").is_file()


def test_paper_students_see_the_same_rows():
    """What the published comparison got wrong: its KD student saw four times the rows of its SFT student."""
    for name in PAPER:
        stages = {n: s.params for n, s in load_recipe(ROOT / "recipes" / "paper" / f"{name}.yaml").stages.items()}
        same = ("data", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
        for field in (*same, "learning_rate", "max_length", "overlong"):
            sft, kd = (getattr(stages[stage], field) for stage in ("sft", "kd"))
            assert repr(sft) == repr(kd), (name, field)


def test_eval_only_scores_four_corpora(tiny, tmp_path):
    var: dict = {"model": str(tiny)}
    small: dict = {"stages.eval.max_prompt_length": 2000, "stages.eval.sampling.max_new_tokens": 4}
    entries = yaml.safe_load((ROOT / "recipes" / "eval_only.yaml").read_text(encoding="utf-8"))["vars"]
    for corpus, pattern in EVAL.items():
        (source,) = DATA.glob(f"{pattern}*.jsonl")
        var[corpus] = {**entries[corpus], "source": str(source), "split": "all"}
    result = kdkit.run(ROOT / "recipes" / "eval_only.yaml", set=small, var=var, out=tmp_path / "runs", inline=True)
    assert result.ok, result.error
    assert {key.split("/")[0] for key in result.report["models"]["model"]["metrics"]} == {*EVAL}
    # To repeat the buggy program is a strong answer by word overlap, and a wrong one.
    assert result.report["baselines"]["identity"]["metrics"]["bugnet/rouge-l"]["value"] > 60


SHARED = {
    "dolly": "dolly_en/databricks-dolly-15k.partial.jsonl",
    "bugnet": "bugnet/bugnet_python.jsonl",
    "pytorrent": "pytorrent/pypi_functions_in_pytorrent_schema.jsonl",
    "codeforces": "codeforces/taco_stdio_in_open_r1_schema.jsonl",
}


@pytest.mark.shared
def test_eval_only_scores_real_files_as_its_header_says(shared_data, tiny, tmp_path):
    header = (ROOT / "recipes" / "eval_only.yaml").read_text(encoding="utf-8").partition("kdkit: 1")[0]
    entries = {name: yaml.safe_load(text) for name, text in re.findall(r"--var '(\w+)=(\{.*?\})'", header)}
    assert entries.keys() == EVAL.keys()
    var: dict = {"model": str(tiny)}
    for corpus, entry in entries.items():
        var[corpus] = {**entry, "source": str(shared_data / SHARED[corpus]), "max_rows": 5}
    small = {"stages.eval.max_prompt_length": 8000, "stages.eval.max_length": 8192}
    small["stages.eval.sampling.max_new_tokens"] = 4
    result = kdkit.run(ROOT / "recipes" / "eval_only.yaml", set=small, var=var, out=tmp_path / "runs", inline=True)
    assert result.ok, result.error
    measured = {tuple(key.split("/")) for key in result.report["models"]["model"]["metrics"]}
    assert {corpus for corpus, _ in measured} == {*EVAL}
    # Problems with tests have no reference answers.
    assert {metric for corpus, metric in measured if corpus == "codeforces"} == {"parse-rate", "length"}
    assert ("bugnet", "perplexity") in measured


@pytest.mark.parametrize("name", ["bugnet", "pytorrent"])
def test_the_code_recipes_measure_what_they_train(name):
    """What the published answers got wrong: a perfect student of theirs scores 0 on everything that reads code."""
    stages = {n: s.params for n, s in load_recipe(ROOT / "recipes" / "paper" / f"{name}.yaml").stages.items()}
    parts = [stages["sft"].data, stages["kd"].eval_data, stages["eval"].data]
    for part in parts:
        values = list(part.values()) if isinstance(part, dict) else part
        component = values[0] if isinstance(values, list) else values
        rows = component.found.spec.build(component.params).sample().examples
        assert rows
        assert all(row.targets == (row.completion,) for row in rows)


def test_the_recipe_in_the_readme_is_valid(tmp_path):
    (text,) = [block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "kdkit: 1" in block]
    (tmp_path / "my.yaml").write_text(text)
    assert kdkit.validate(tmp_path / "my.yaml") == []


def test_the_plugin_in_the_readme_works(tiny, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "my_losses.py").write_text(code)
    rows = [{"prompt": f"{i}?", "completion": f"{i}!"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "kind": "sft",
        "model": str(tiny),
        "data": {"use": "jsonl", "source": "./rows.jsonl"},
        "losses": [{"use": "focal-ce", "gamma": 1.5}],
        "max_steps": 2,
    }
    recipe = {"kdkit": 1, "name": "mine", "plugins": ["./my_losses.py"], "stages": {"sft": stage}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    result = kdkit.run(tmp_path / "mine.yaml", out=tmp_path / "runs", inline=True)
    assert result.ok, result.error


def test_commands_in_the_readme_exist():
    import subprocess
    import sys

    commands = set(re.findall(r"^kdkit ([a-z]+(?: (?:list|show|diff|prune|pull)\b)?)", README, re.MULTILINE))
    assert {"validate", "plan", "run", "runs list", "report", "plugins list", "models prune", "doctor"} <= commands
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "kdkit", *command.split(), "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, command


def test_code_grpo_warms_up_rewards_and_judges_held_out_problems(tiny, tmp_path):
    local = {"use": "unsafe-local"}
    small: dict = {
        "stages.sft.per_device_train_batch_size": 2,
        "stages.grpo.rewards.2.sandbox": local,
        "stages.grpo.rewards.3.correctness": {"use": "correctness", "sandbox": local},
        "stages.eval.judge.sandbox": local,
        "stages.eval.rewards.2.sandbox": local,
        "stages.eval.rewards.3.correctness": {"use": "correctness", "sandbox": local},
        "stages.eval.sampling.max_new_tokens": 6,
        "stages.eval.data.max_rows": 12,
        "stages.grpo.data.max_rows": 8,
    }
    var = {"student": str(tiny), "warmup_steps": 2, "steps": 2, "generations": 4, "rollouts": 8, "micro_batch": 4,
           "micro_batches": 2, "completion": 12, "length": 1500}  # fmt: skip
    recipe = ROOT / "recipes" / "code_grpo.yaml"
    result = kdkit.run(recipe, set=small, var=var, out=tmp_path, inline=True)
    assert result.ok, result.error
    models = result.report["models"]
    assert list(models) == ["base", "sft", "grpo"]
    for facts in models.values():
        rewards = {"reward", *(f"reward-{name}" for name in ("think", "steps", "correctness", "length"))}
        assert {"pass-at-1", "parse-rate", "length", *rewards} <= set(facts["metrics"])
        assert facts["metrics"]["pass-at-1"]["n"] == 12
    lines = [line for line in result.stage("grpo").metrics() if "train/loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    page = next(path.read_text() for path in result.run_dir.rglob("report.html"))
    assert "Rewards of stage grpo: total from" in page
    for name in ("think", "steps", "correctness", "length", "total"):
        assert f"train/reward/{name}/mean" in lines[0]
    assert len(list((result.run_dir / "stages" / "grpo" / "rollouts").iterdir())) == 2


def test_code_grpo_judges_mbpp_and_codeforces_rows_beside_the_held_out_problems_as_its_header_says(tiny, tmp_path):
    recipe = ROOT / "recipes" / "code_grpo.yaml"
    header = re.sub(r"^# ?", "", recipe.read_text(encoding="utf-8").partition("kdkit: 1")[0], flags=re.MULTILINE)
    (text,) = re.findall(r"--var 'held_out=(\{new:.*?\}\})'", header, re.DOTALL)
    held_out = yaml.safe_load(text)
    assert [entry["use"] for entry in held_out.values()] == ["io-problems", "mbpp", "codeforces"]
    for name, file in (("mbpp", "mbpp_sample.jsonl"), ("cf", "codeforces_sample.jsonl")):
        held_out[name] |= {"source": str(DATA / file), "split": "all"}
    held_out = {name: {**entry, "max_rows": 4} for name, entry in held_out.items()}
    local = {"use": "unsafe-local"}
    small: dict = {
        "stages.sft.per_device_train_batch_size": 2,
        "stages.grpo.rewards": [{"use": "think"}],
        "stages.grpo.data.max_rows": 4,
        "stages.eval.judge.sandbox": local,
        "stages.eval.rewards": [{"use": "think"}],
        "stages.eval.sampling.max_new_tokens": 4,
    }
    var = {"student": str(tiny), "warmup_steps": 1, "steps": 1, "generations": 2, "rollouts": 4, "micro_batch": 2,
           "micro_batches": 2, "completion": 8, "length": 2000, "held_out": held_out}  # fmt: skip
    result = kdkit.run(recipe, set=small, var=var, out=tmp_path, inline=True)
    assert result.ok, result.error
    for facts in result.report["models"].values():
        for name in held_out:
            assert facts["metrics"][f"{name}/pass-at-1"]["n"] == 4
