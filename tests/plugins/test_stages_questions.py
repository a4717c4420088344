from __future__ import annotations

import json

import pytest
import yaml

import kdkit
from kdkit.testing.tiny import save_tiny_model

SHORT = [{"prompt": f"{i}?", "completion": f"{i}!"} for i in range(5)]
PLUGIN = """
from kdkit import Params, hookimpl
from kdkit.api import DataError, DatasetSpec, Example, MetricSpec, Rows

class NoParams(Params):
    pass

class Spaced:
    def score(self, predictions):
        raise DataError("nothing to see")

class Some:
    def load(self, ctx):
        answers = ["0!", "1!", None, None, None]
        return Rows(examples=[Example(id=str(n), prompt=f"{n}?", completion=text) for n, text in enumerate(answers)])

    def sample(self):
        return self.load(None)

@hookimpl
def kdkit_datasets():
    yield DatasetSpec(name="some", summary="Two rows of five have a reference", params=NoParams, build=lambda p: Some())

@hookimpl
def kdkit_metrics():
    yield MetricSpec(
        name="spaced", summary="x", params=NoParams, build=lambda params: Spaced(), higher_is_better=True,
        needs=frozenset({"completion"}),
    )
"""
LONG = {"prompt": "a long question " * 10, "completion": "yes"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def run(model, tmp_path):
    def run(rows, metrics, **values):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        stage = {
            "kind": "evaluate",
            "models": {"m": str(model)},
            "data": {"use": "jsonl", "source": "./rows.jsonl"},
            "metrics": [{"use": name} for name in metrics],
            "sampling": {"max_new_tokens": 4},
            "max_prompt_length": 80,
            **values,
        }
        stages = {"eval": stage, "report": {"kind": "report", "scores": ["${stages.eval.scores}"]}}
        (tmp_path / "parts.py").write_text(PLUGIN)
        recipe = {"kdkit": 1, "name": "r", "plugins": [str(tmp_path / "parts.py")], "stages": stages}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
        return kdkit.run(tmp_path / "r.yaml", out=tmp_path / "runs", inline=True)

    return run


def scores(result):
    return json.loads((result.stage("eval").outputs["scores"].path / "scores.json").read_text())


def test_an_overlong_prompt_is_an_error_by_default(run):
    result = run([*SHORT, LONG], ["rouge-l"])
    assert not result.ok
    assert "1 of 6 prompts have more than max_prompt_length=80 tokens" in str(result.error)


def test_overlong_prompts_are_left_out_and_counted_on_request(run):
    result = run([*SHORT, LONG], ["rouge-l", "perplexity"], overlong_prompts="drop")
    found = scores(result)
    assert found["datasets"]["jsonl"]["n"] == 5
    assert found["datasets"]["jsonl"]["overlong"] == 1
    assert found["models"]["m"]["results"]["jsonl"]["perplexity"]["n"] == 5
    assert found["baselines"]["identity"]["results"]["jsonl"]["rouge-l"]["n"] == 5
    assert "jsonl: 1 prompts were too long and are not asked" in result.report["notes"]


def test_a_dataset_of_overlong_prompts_is_an_error(run):
    result = run([LONG, {**LONG, "prompt": LONG["prompt"] + "."}], ["rouge-l"], overlong_prompts="drop")
    assert "all 2 prompts have more than max_prompt_length=80 tokens" in str(result.error)


def test_rows_without_references_are_scored_by_the_metrics_that_need_none(run):
    result = run([{"prompt": row["prompt"]} for row in SHORT], ["rouge-l", "perplexity", "length", "parse-rate"])
    assert result.ok, result.error
    found = scores(result)
    assert set(found["models"]["m"]["results"]["jsonl"]) == {"length", "parse-rate"}
    assert set(found["baselines"]) == {"identity", "empty"}
    assert set(found["baselines"]["identity"]["results"]["jsonl"]) == {"length", "parse-rate"}


def test_rows_without_a_reference_are_asked_where_no_metric_wants_one(run):
    found = scores(run([], ["length"], data={"use": "some"}))
    assert (found["datasets"]["some"]["n"], found["datasets"]["some"]["unreferenced"]) == (5, 0)
    assert found["models"]["m"]["results"]["some"]["length"]["n"] == 5
    assert set(found["baselines"]) == {"identity", "empty"}


def test_rows_without_a_reference_are_counted_where_a_metric_wants_one(run):
    result = run([], ["length", "rouge-l"], data={"use": "some"})
    found = scores(result)
    assert (found["datasets"]["some"]["n"], found["datasets"]["some"]["unreferenced"]) == (2, 3)
    assert found["models"]["m"]["results"]["some"]["length"]["n"] == 2
    assert result.report["datasets"]["some"]["unreferenced"] == 3
    assert "some: 3 rows have no reference and are not asked" in result.report["notes"]


def test_an_undefined_metric_is_a_dash_and_a_note_in_the_report(run):
    result = run(SHORT, ["rouge-l", "spaced"], baselines=False)
    assert result.ok, result.error
    assert result.report["models"]["m"]["metrics"]["spaced"]["value"] is None
    assert any(note.startswith("undefined (nothing to see): spaced of m") for note in result.report["notes"])


def test_the_scores_say_what_the_tokens_of_a_model_are(run):
    from kdkit.models.load import vocabulary
    from kdkit.testing.tiny import tiny_model, tiny_tokenizer

    expected = vocabulary(tiny_tokenizer(), tiny_model()).fingerprint
    assert scores(run(SHORT, ["length"]))["models"]["m"]["vocabulary"] == expected


def test_without_references_and_with_metrics_that_all_want_one_there_is_nothing_to_score(run):
    result = run([{"prompt": row["prompt"]} for row in SHORT], ["rouge-l", "exact-match"])
    assert "no row has a reference to score against" in str(result.error)
