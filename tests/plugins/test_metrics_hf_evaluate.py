"""The metric hf-evaluate with scripts on this machine. Runs where evaluate is installed (extra: evaluate)."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest

import kdkit
from kdkit.api import DataError, EnvironmentUnmet, Prediction, RecipeError
from kdkit.host import Catalog
from kdkit.testing.tiny import save_tiny_model

sys.path.insert(0, str(Path(__file__).parent))

from hf_scripts import LISTS, MEAN, POOLED, TEXT, WORDS, own_caches, write_script

pytest.importorskip("evaluate")

ROWS = [
    ("the cat sat", "the cat sat down"),
    ("a dog", "a dog barks loudly"),
    ("nothing", "something else"),
    ("one two three", "one two three"),
    ("up", "up and away"),
    ("red blue", "red green blue"),
]
PREDICTIONS = [Prediction(f"q{i}", text, (reference, "spare"), id=str(i)) for i, (text, reference) in enumerate(ROWS)]


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    return own_caches(tmp_path, monkeypatch)


@pytest.fixture
def script(tmp_path):
    """Writes a script, in a directory of its name."""
    return partial(write_script, tmp_path)


def build(**params):
    return kdkit.build("metric", "hf-evaluate", **params)


def test_half_a_character_in_an_answer_is_no_error(script):
    result = build(name="words", path=script(body=MEAN)).score(
        [*PREDICTIONS, Prediction("q", "a \ud800", ("a b",), id="9")]
    )
    assert result.per_example[-1] == 1.0


def test_a_mean_has_a_value_per_example(script):
    result = build(name="words", path=script(body=MEAN)).score(PREDICTIONS)
    assert result.per_example == (3.0, 2.0, 0.0, 3.0, 1.0, 2.0)
    assert result.value == pytest.approx(11 / 6)
    assert (result.n, result.ids, result.ci95) == (6, ("0", "1", "2", "3", "4", "5"), None)


def test_a_list_of_values_is_taken_as_it_is(script):
    path = script(body=WORDS + 'return {"words": overlap}')
    result = build(name="words", path=path).score(PREDICTIONS)
    assert result.per_example == (3.0, 2.0, 0.0, 3.0, 1.0, 2.0)


def test_a_metric_of_the_corpus_has_an_interval_and_no_value_per_example(script):
    metric = build(name="words", path=script(body=POOLED))
    result = metric.score(PREDICTIONS)
    assert result.value == pytest.approx(11 / 19)
    assert (result.per_example, result.ids, result.n) == ((), (), 6)
    low, high = result.ci95
    assert 0 < low < result.value < high <= 1
    assert metric.score(PREDICTIONS).ci95 == result.ci95


def test_the_interval_draws_examples_and_not_answers(script):
    path = script(body=POOLED)
    answers = [p for p in PREDICTIONS for _ in range(4)]
    once, often = (build(name="words", path=path).score(items) for items in (PREDICTIONS, answers))
    assert often.n == 24
    assert often.ci95 == once.ci95


def test_no_resamples_no_interval(script):
    assert build(name="words", path=script(body=POOLED), resamples=0).score(PREDICTIONS).ci95 is None


def test_the_value_that_counts(script):
    path = script(body=MEAN)
    result = build(name="words", path=path, value="most").score(PREDICTIONS)
    assert result.value == 3.0
    assert result.per_example == ()
    with pytest.raises(DataError, match="no result 'least'; allowed: words, most; set value"):
        build(name="words", path=path, value="least").score(PREDICTIONS)
    with pytest.raises(DataError, match="it has several results; allowed: words, most"):
        build(name="other", path=path).score(PREDICTIONS)


def test_options_reach_the_metric(script):
    path = script(arguments="predictions, references, factor=1", body=WORDS + 'return {"words": factor * sum(overlap)}')
    assert build(name="words", path=path, options={"factor": 10}).score(PREDICTIONS).value == 110.0


def test_all_references_go_where_lists_are_taken(script):
    body = 'return {"words": sum(len(r) for r in references) / len(references)}'
    assert build(name="words", path=script(features=LISTS, body=body)).score(PREDICTIONS).value == 2.0


def test_a_measurement_needs_no_references(script):
    path = script(
        features=f'{{"data": {TEXT}}}', arguments="data", kind="Measurement", body='return {"size": len(data)}'
    )
    bare = [Prediction("q", "a", (), id=str(i)) for i in range(3)]
    assert build(name="words", path=path).score(bare).value == 3.0


def test_answers_without_a_reference_are_left_out_and_counted(script):
    metric = build(name="words", path=script(body=MEAN))
    result = metric.score([*PREDICTIONS, Prediction("q", "text", (), id="9")])
    assert result.n == 6
    assert result.counts == {"predictions without references": 1}
    with pytest.raises(DataError, match="none of 1 predictions has a reference"):
        metric.score([Prediction("q", "text", (), id="9")])


def test_what_it_cannot_score_is_named(script):
    path = script(features='{"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}', body=MEAN)
    with pytest.raises(DataError, match="hf-evaluate words: it cannot score these answers: ValueError"):
        build(name="words", path=path).score(PREDICTIONS)


def test_inputs_that_kdkit_does_not_have_are_refused(script):
    path = script(features=f'{{"predictions": {TEXT}, "sources": {TEXT}}}', body=MEAN)
    with pytest.raises(DataError, match="it wants predictions, sources; allowed: predictions and references"):
        build(name="words", path=path)


def test_a_missing_script_is_named(tmp_path):
    with pytest.raises(DataError, match="no such script; path is a script, or a directory DIR"):
        build(name="words", path=str(tmp_path / "words"))


def test_a_script_that_lacks_a_package_says_so(script):
    path = script(body="import no_such_package_here\n        return {}")
    file = Path(path, "words.py")
    file.write_text("import no_such_package_here\n" + file.read_text())
    with pytest.raises(EnvironmentUnmet, match="no_such_package_here") as error:
        build(name="words", path=path)
    assert error.value.exit_code == 4


def test_nothing_is_fetched_by_name(monkeypatch):
    import evaluate

    monkeypatch.setattr(evaluate, "load", lambda *args, **named: pytest.fail("asked the Hub"))
    with pytest.raises(EnvironmentUnmet, match="'bleu' is not on this machine, and kdkit does not fetch code; get its"):
        build(name="bleu")


def test_a_script_that_was_fetched_before_is_found_by_name(script, caches):
    place = caches / "metrics" / "evaluate-metric--words" / ("0" * 64)
    place.mkdir(parents=True)
    for parent in (place, place.parent, place.parent.parent):
        (parent / "__init__.py").touch()
    (place / "words.py").write_text(Path(script(body=MEAN), "words.py").read_text())
    assert build(name="words").score(PREDICTIONS).value == pytest.approx(11 / 6)


# --- in a recipe ------------------------------------------------------------------------------------------------------


def recipe(tmp_path, metrics):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}?", "completion": "a b c"}) + "\n" for i in range(6))
    )
    save_tiny_model(tmp_path / "m1", seed=1)
    save_tiny_model(tmp_path / "m2", seed=2)
    stages = {
        "eval": {
            "kind": "evaluate",
            "models": {"base": "./m1", "other": "./m2"},
            "data": {"use": "jsonl", "source": "./rows.jsonl", "split": "all"},
            "metrics": metrics,
            "baselines": False,
            "sampling": {"max_new_tokens": 4},
            "precision": "fp32",
        },
        "report": {"kind": "report", "scores": ["${stages.eval.scores}"]},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"kdkit": 1, "name": "test", "stages": stages}))
    return file


LENGTHS = (
    'return {"mean": sum(map(len, predictions)) / len(predictions), "pooled": float(len(set("".join(predictions))))}'
)


def test_a_report_shows_both_kinds_with_n_and_interval(script, tmp_path):
    script(body=LENGTHS)
    chosen = {"use": "hf-evaluate", "name": "words", "path": "./words", "higher_is_better": True}
    file = recipe(tmp_path, [{**chosen, "value": "mean"}, {**chosen, "value": "pooled"}])
    result = kdkit.run(file, inline=True, out=tmp_path / "runs")
    assert result.ok, result.error
    metrics = result.report["models"]["base"]["metrics"]
    assert {name: entry["n"] for name, entry in metrics.items()} == {"hf-words-mean": 6, "hf-words-pooled": 6}
    assert all(entry["higher_is_better"] for entry in metrics.values())
    compared = {pair["metric"] for pair in result.report["pairs"]}
    assert compared == {"hf-words-mean"}
    assert any("no per-example scores" in note and "hf-words-pooled" in note for note in result.report["notes"])
    low, high = metrics["hf-words-pooled"]["ci95"]
    assert low < high
    # The script is part of the content key.
    first = result.stage("eval").entry
    script_file = tmp_path / "words" / "words.py"
    script_file.write_text(script_file.read_text() + "\n# another\n")
    again = kdkit.run(file, inline=True, out=tmp_path / "runs", until="eval")
    assert again.stage("eval").entry != first


def test_the_key_says_which_metric_it_is():
    spec = Catalog.discover(disable=["*"]).find("metric", "hf-evaluate").spec
    made = {
        name: spec.key(spec.params(**given))
        for name, given in {
            "plain": {"name": "bleu"},
            "value": {"name": "rouge", "value": "rougeL"},
            "community": {"name": "org/My_Metric"},
        }.items()
    }
    assert made == {"plain": "hf-bleu", "value": "hf-rouge-rougel", "community": "hf-org-my-metric"}
    assert spec.direction(spec.params(name="wer", higher_is_better=False)) is False
    assert spec.direction(spec.params(name="wer")) is None


@pytest.mark.parametrize("name", ["../bleu", "a/b/c", "", ".hidden", "a b"])
def test_a_name_is_no_path(name):
    with pytest.raises(RecipeError, match="name"):
        build(name=name)
