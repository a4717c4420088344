"""The stage lm-eval, with task files and data of this directory. Most of it needs the harness (extra: lm-eval)."""

from __future__ import annotations

import json
import math
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

import kdkit
from kdkit.host import compat
from kdkit.testing.tiny import save_tiny_model

TASKS = Path(__file__).with_name("lm_eval_tasks")


def installed() -> bool:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        return False
    return True


needs_harness = pytest.mark.skipif(not installed(), reason="lm-eval is not installed (extra: lm-eval)")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Rows are copied to a cache before they are read: not to that of the person who runs the tests."""
    import datasets.config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_tiny_model(root / "base", layers=1, seed=1)
    save_tiny_model(root / "kd", layers=1, seed=2)
    return root


def recipe(place: Path, models: Path, /, **stage: Any) -> Path:
    values = {
        "kind": "lm-eval",
        "models": {"base": str(models / "base")},
        "tasks": ["kdkit_pick"],
        "include_path": "./tasks",
        "precision": "fp32",
        **stage,
    }
    if not (place / "tasks").exists():
        shutil.copytree(TASKS, place / "tasks")
    file = place / "recipe.yaml"
    values = {key: value for key, value in values.items() if value is not None}
    stages = {"tasks": values, "report": {"kind": "report", "scores": ["${stages.tasks.scores}"]}}
    file.write_text(json.dumps({"kdkit": 1, "name": "test", "stages": stages}))
    return file


def failed(tmp_path: Path, models: Path, /, **stage: Any) -> Any:
    result = kdkit.run(recipe(tmp_path, models, **stage), inline=True, out=tmp_path / "runs")
    assert result.error is not None
    return result.error


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(models, tmp_path_factory):
    """One run over tasks of every kind: the scores, the report, the files."""
    place = tmp_path_factory.mktemp("run")
    given = {
        "models": {"base": str(models / "base"), "kd": str(models / "kd")},
        "tasks": {"pick": "kdkit_pick", "both": "kdkit_picks", "write": "kdkit_write", "read": "kdkit_read"},
        "num_fewshot": 1,
        "resamples": 50,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDKIT_STORE", str(place / "store"))
        result = kdkit.run(recipe(place, models, **given), inline=True, out=place / "runs")
    assert result.ok, result.error
    root = result.stage("tasks").outputs["scores"].path
    return json.loads((root / "scores.json").read_text()), result.report, root


@needs_harness
def test_choices_have_a_score_per_example(done):
    scores, _, _ = done
    found = scores["models"]["base"]["results"]["pick"]
    assert set(found) == {"acc", "acc-norm"}
    acc = found["acc"]
    assert set(acc["per_example"]) <= {0.0, 100.0}
    assert acc["ids"] == [str(i) for i in range(12)]
    assert (acc["n"], acc["unit"], acc["higher_is_better"]) == (12, "0-100", True)
    assert acc["value"] == pytest.approx(sum(acc["per_example"]) / 12)


@needs_harness
def test_a_group_is_one_dataset_with_its_tasks_as_categories(done):
    scores, report, _ = done
    assert scores["datasets"]["both"]["n"] == 24
    assert set(scores["datasets"]["both"]["categories"].values()) == {"kdkit_pick", "kdkit_pick_again"}
    both, alone = (scores["models"]["base"]["results"][name]["acc"] for name in ("both", "pick"))
    assert both["n"] == 24
    assert both["per_example"][:12] == alone["per_example"]
    assert both["ids"][0] == "kdkit_pick/0"
    assert set(report["models"]["base"]["categories"]["both/acc"]) == {"kdkit_pick", "kdkit_pick_again"}


@needs_harness
def test_every_way_to_read_an_answer_is_a_metric(done):
    scores, _, _ = done
    found = scores["models"]["base"]["results"]["write"]
    assert set(found) == {"exact-match-whole", "exact-match-number", "bleu-whole", "bleu-number"}
    assert found["exact-match-number"]["unit"] == "0-100"
    whole = found["bleu-whole"]
    assert (whole["per_example"], whole["ids"], whole["n"]) == ([], [], 12)


@needs_harness
def test_perplexity_is_that_of_all_words_together(done):
    scores, _, root = done
    found = scores["models"]["base"]["results"]["read"]
    lines = [json.loads(line) for line in (root / "lm-eval" / "base--read.jsonl").read_text().splitlines()]
    total, words = (sum(line["word_perplexity"][i] for line in lines) for i in (0, 1))
    length = sum(line["bits_per_byte"][1] for line in lines)
    assert found["word-perplexity"]["value"] == pytest.approx(math.exp(-total / words))
    assert found["bits-per-byte"]["value"] == pytest.approx(-total / length / math.log(2))
    assert found["word-perplexity"]["higher_is_better"] is False


@needs_harness
def test_the_report_has_n_and_intervals_and_compares_models(done):
    _, report, _ = done
    metrics = report["models"]["kd"]["metrics"]
    assert metrics["read/word-perplexity"]["n"] == 12
    low, high = metrics["read/word-perplexity"]["ci95"]
    assert low < metrics["read/word-perplexity"]["value"] < high
    compared = {pair["metric"] for pair in report["pairs"]}
    # Words and bytes are the same for models with other tokens.
    assert {"pick/acc", "both/acc", "read/word-perplexity", "read/bits-per-byte"} <= compared
    assert "write/bleu-whole" not in compared
    assert any("no per-example scores" in note for note in report["notes"])
    assert report["decoding"]["pick"]["num_fewshot"] == 1
    assert report["decoding"]["pick"]["harness"].startswith("lm-eval 0.4")


@needs_harness
def test_the_numbers_are_those_of_the_harness(done, models, monkeypatch):
    """The harness on its own, with its own loading of the model."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    scores, _, _ = done
    monkeypatch.chdir(TASKS)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(models / "base"), "dtype": "float32"},
        tasks=["kdkit_pick", "kdkit_read"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        num_fewshot=0,
        bootstrap_iters=0,
        device="cpu",
        batch_size=4,
    )["results"]
    ours = scores["models"]["base"]["results"]
    assert ours["read"]["word-perplexity"]["value"] == pytest.approx(
        found["kdkit_read"]["word_perplexity,none"], rel=1e-4
    )
    assert found["kdkit_pick"]["sample_len"] == ours["pick"]["acc"]["n"]


@needs_harness
@pytest.mark.parametrize(
    ("text", "asked", "given"), [("", 2, 2), ("num_fewshot: 0", 2, 0), ("num_fewshot: 3", None, 3)]
)
def test_solved_examples_are_those_of_the_recipe_unless_the_task_says_none(tmp_path, text, asked, given):
    from types import SimpleNamespace

    from kdkit.plugins.stages.lm_eval_tasks import Tasks

    with_task(tmp_path, text)
    params = SimpleNamespace(tasks={"mine": "kdkit_mine"}, allow_code=False, num_fewshot=asked)
    (task,) = Tasks(params, tmp_path / "tasks", 1).load("kdkit_mine")["tasks"].values()
    assert task.get_config("num_fewshot") == given


# --- what is refused --------------------------------------------------------------------------------------------------


def test_without_the_harness_the_pip_line_is_all_there_is(tmp_path, models, monkeypatch):
    def version(name):
        if name == "lm-eval":
            raise PackageNotFoundError(name)
        return real(name)

    real = compat.version
    monkeypatch.setattr(compat, "version", version)
    with pytest.raises(kdkit.api.EnvironmentUnmet) as error:
        kdkit.run(recipe(tmp_path, models), inline=True, out=tmp_path / "runs")
    assert error.value.exit_code == 4
    assert "stage 'lm-eval' needs the extra 'lm-eval', which lacks lm-eval==" in str(error.value)
    assert str(error.value).endswith("install it with: pip install 'kdkit[lm-eval]'")
    assert not (tmp_path / "runs" / "test").exists() or not list((tmp_path / "runs" / "test").iterdir())


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"tasks": {"a/b": "kdkit_pick"}}, "tasks.a/b: 'a/b' is no name"),
        ({"models": {"a b": "./m"}}, "models.a b: 'a b' is no name"),
        ({"include_path": "org/tasks"}, "include_path: it is a directory on this machine, such as ./tasks"),
        ({"tasks": []}, "tasks: "),
        ({"alow_code": True}, "did you mean"),
    ],
)
def test_mistakes_are_found_before_a_run(tmp_path, models, stage, message):
    problems = " | ".join(f"{p.path}: {p.message}" for p in kdkit.validate(recipe(tmp_path, models, **stage)))
    assert message in problems


@needs_harness
def test_an_unknown_task_is_named_with_a_suggestion(tmp_path, models, monkeypatch):
    quick_index(monkeypatch)
    error = failed(tmp_path, models, tasks=["kdkit_pik"])
    assert error.exit_code == 2
    assert "the harness has no task 'kdkit_pik'; did you mean 'kdkit_pick'?" in str(error)


def quick_index(monkeypatch) -> None:
    """The harness's own files are thousands: leave them out."""
    import lm_eval.tasks

    real = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_path, include_defaults=False: real(include_path=include_path, include_defaults=False),
    )


def with_task(tmp_path: Path, text: str, *, code: str = "") -> None:
    shutil.copytree(TASKS, tmp_path / "tasks")
    (tmp_path / "tasks" / "mine.yaml").write_text(f"include: pick.yaml\ntask: kdkit_mine\n{text}\n")
    (tmp_path / "tasks" / "mine.py").write_text(code)


CODE = """
from pathlib import Path

Path(__file__).with_name("ran").touch()


def text(doc):
    return "Q: " + doc["question"]
"""


@needs_harness
def test_python_beside_a_task_file_does_not_run(tmp_path, models):
    with_task(tmp_path, "doc_to_text: !function mine.text", code=CODE)
    error = failed(tmp_path, models, tasks=["kdkit_mine"])
    assert error.exit_code == 2
    assert "a task file runs Python: !function mine.text; read it, then set allow_code: true" in str(error)
    assert not (tmp_path / "tasks" / "ran").exists()


@needs_harness
def test_python_beside_a_task_file_runs_when_the_recipe_allows_it(tmp_path, models):
    with_task(tmp_path, "doc_to_text: !function mine.text", code=CODE)
    file = recipe(tmp_path, models, tasks=["kdkit_mine"], allow_code=True, limit=2)
    result = kdkit.run(file, inline=True, out=tmp_path / "runs")
    assert result.ok, result.error
    assert (tmp_path / "tasks" / "ran").exists()
    scores = json.loads((result.stage("tasks").outputs["scores"].path / "scores.json").read_text())
    assert scores["models"]["base"]["results"]["lm-eval-kdkit_mine"]["acc"]["n"] == 2


@needs_harness
def test_a_task_that_lacks_a_package(tmp_path, models):
    with_task(tmp_path, "doc_to_text: !function mine.text", code="import no_such_package_here")
    error = failed(tmp_path, models, tasks=["kdkit_mine"], allow_code=True)
    assert error.exit_code == 4
    assert "task kdkit_mine: it lacks a package: No module named 'no_such_package_here'" in str(error)


@needs_harness
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("doc_to_text: !function os.getcwd", "a task file runs Python: !function os.getcwd"),
        ("doc_to_text: \"{{ ''.__class__.__mro__[1].__subclasses__() }}\"", "reaches for more than its data"),
        ("metric_list: [{metric: no_such_metric, aggregation: mean, higher_is_better: true}]", "'no_such_metric' with"),
        ("metric_list: [{metric: accuracy, hf_evaluate: true, aggregation: mean}]", "loads the metric 'accuracy' with"),
        ("unsafe_code: true", "it runs programs that the model writes, and the harness has no sandbox"),
        ("output_type: guess", "the harness cannot load it: ValueError"),
        ("dataset_kwargs: {data_files: {test: no.jsonl}}", "the harness cannot load it: FileNotFoundError"),
        ('doc_to_text: "{{ nothing.there }}"', "task kdkit_mine"),
    ],
)
def test_task_files_that_are_refused(tmp_path, models, text, message):
    with_task(tmp_path, text)
    error = failed(tmp_path, models, tasks=["kdkit_mine"])
    assert error.exit_code == 2, error
    assert message in str(error)


@needs_harness
def test_data_of_the_hub_needs_a_network(tmp_path, models):
    with_task(tmp_path, "dataset_path: org/questions\ndataset_kwargs: {}")
    error = failed(tmp_path, models, tasks=["kdkit_mine"])
    assert error.exit_code == 4
    assert "task kdkit_mine: its data cannot be fetched" in str(error)


@needs_harness
def test_a_chat_template_that_is_not_there(tmp_path, models):
    from kdkit.testing.tiny import tiny_tokenizer

    save_tiny_model(tmp_path / "plain", tokenizer=tiny_tokenizer(chat_template=None))
    error = failed(tmp_path, models, models={"plain": str(tmp_path / "plain")}, apply_chat_template=True)
    assert error.exit_code == 2
    assert "model plain: it has no chat template" in str(error)


@needs_harness
def test_a_stop_is_heard_between_tasks(tmp_path, models, monkeypatch):
    from kdkit.engine.context import Context

    monkeypatch.setattr(Context, "stopping", lambda self: True)
    assert "stopped before base on lm-eval-kdkit_pick; an evaluation starts again" in str(failed(tmp_path, models))


def test_the_directory_is_part_of_the_key(tmp_path, models):
    from kdkit.engine.plan import make_plan
    from kdkit.engine.store import Store
    from kdkit.recipe import load_recipe

    def key():
        recipe_file = recipe(tmp_path, models)
        return make_plan(load_recipe(recipe_file), Store(tmp_path / "store")).stages[0].key

    before = key()
    assert key() == before
    rows = tmp_path / "tasks" / "sums.jsonl"
    rows.write_text(rows.read_text().replace("many", "more"))
    assert key() != before
