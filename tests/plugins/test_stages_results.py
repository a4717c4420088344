"""What becomes of metrics that are undefined, break, or give something else than numbers."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import evaluate_plugins
import numpy as np
import pytest

from kdkit.api import Completion, Example, MetricSpec, Prediction, RewardScore, StageError
from kdkit.plugins.metrics.plugin import kdkit_metrics
from kdkit.plugins.stages.decoding import Decoded, decode
from kdkit.plugins.stages.forced import Forcing
from kdkit.plugins.stages.judging import verdicts
from kdkit.plugins.stages.results import Results

SPECS = {spec.name: spec for spec in [*kdkit_metrics(), *evaluate_plugins.kdkit_metrics()]}
NO_PARAMS = evaluate_plugins.NoParams


def metric(name, **params):
    spec = SPECS[name]
    return SimpleNamespace(name=name, found=SimpleNamespace(spec=spec), params=spec.params(**params))


@pytest.fixture
def results(tmp_path):
    def make(*metrics):
        log = []
        ctx = SimpleNamespace(log=log.append, build=lambda c: c.found.spec.build(c.params))
        made = Results(metrics, ctx, tmp_path / "predictions")
        made.said = log
        return made

    return make


def predictions(*texts, **fields):
    return [Prediction("p", text, ("yes",), id=str(n), **fields) for n, text in enumerate(texts)]


def test_one_undefined_metric_leaves_the_others(results):
    made = results(metric("exact-match"), metric("distinct-n"), metric("pass-at-k"))
    found = made.score(predictions("yes", "no"), "kd on d")
    assert found["exact-match"]["value"] == 50.0
    assert "reason" not in found["exact-match"]
    entry = found["distinct-2"]
    assert (entry["value"], entry["n"], entry["per_example"], entry["ids"]) == (None, 0, [], [])
    assert entry["reason"] == "distinct-2: none of 2 answers has 2 words"
    assert (entry["higher_is_better"], entry["unit"]) == (None, "0-100")
    assert "2 without a verdict" in found["pass-at-1"]["reason"]
    assert made.said[0] == "kd on d: distinct-2 is undefined: distinct-2: none of 2 answers has 2 words"
    json.dumps(found, allow_nan=False)


def test_a_measure_that_is_no_number_is_null_and_makes_its_metric_undefined(results, tmp_path):
    made = results(metric("exact-match"), metric("perplexity"))
    rows = predictions("yes", measures={"nll": math.nan, "tokens": 3.0}, traces={"own_kl": (1.0, math.inf)})
    made.write("m", "d", rows)
    row = json.loads((tmp_path / "predictions" / "m--d.jsonl").read_text())
    assert row["measures"] == {"nll": None, "tokens": 3.0}
    assert row["traces"] == {"own_kl": [1.0, None]}
    found = made.score(rows, "m on d")
    assert found["perplexity"]["reason"] == "example 0: nll is nan over 3.0 tokens"
    assert found["exact-match"]["value"] == 100.0


def test_numbers_of_any_kind_become_plain_and_finite(results):
    found = results(metric("spoken")).score(predictions("yes", "nan"), "m on d")["spoken"]
    assert found["per_example"] == [3.0, None]
    assert found["value"] is None
    assert found["n"] == 2
    json.dumps(found, allow_nan=False)


def test_a_metric_that_scored_nothing_is_undefined(results):
    found = results(metric("spoken")).score(predictions("", ""), "m on d")["spoken"]
    assert (found["value"], found["n"], found["reason"]) == (None, 0, "no answer was scored")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("text", "metric bad: not a result: could not convert string to float"),
        ("link", "metric bad: not a result: link is 'log'"),
        ("weights", "metric bad: weights are 1 finite numbers of 0 or more"),
        ("negative", "metric bad: weights are 1 finite numbers of 0 or more"),
    ],
)
def test_a_malformed_result_names_its_metric(results, what, message):
    with pytest.raises(StageError, match=f"^{message}"):
        results(metric("bad", what=what)).score(predictions("yes"), "m on d")


def test_a_baseline_that_breaks_a_metric_breaks_nothing_else(results):
    made = results(metric("ratio"), metric("spoken"), metric("bad"), metric("length"))
    rows = [Example(id=str(n), prompt="p", completion=text) for n, text in enumerate(("yes", "no"))]
    found = made.baselines({"d": rows})
    assert set(found["empty"]["results"]["d"]) == {"length"}
    assert set(found["reference"]["results"]["d"]) == {"ratio", "spoken", "length"}
    assert "d: the empty baseline has no ratio: ZeroDivisionError: division by zero" in made.said
    assert "d: the empty baseline has no spoken: no answer was scored" in made.said
    assert any(line.startswith("d: the empty baseline has no bad: not a result") for line in made.said)


def test_a_reward_that_is_no_number_is_no_verdict():
    rows = [Example(id="a", prompt="p")]
    given = [RewardScore.of(math.nan), RewardScore("ok", np.float64(1.0)), RewardScore.of(0.5)]
    passed, unjudged = verdicts(lambda rollouts: given, "j", ["p"], rows, [Completion("", ())] * 3)
    assert passed == [None, True, False]
    assert type(passed[1]) is bool
    assert unjudged == {"without a number": 1}


@pytest.mark.parametrize("given", [3, 5])
def test_an_engine_that_gives_another_number_of_answers_is_an_error(monkeypatch, given):
    monkeypatch.setattr("kdkit.plugins.stages.decoding.prompt_ids", lambda encoder, dataset, rows, params: [[1]] * 2)
    engine = SimpleNamespace(generate=lambda prompts, sampling, seeds: [Completion("", (1,))] * given)
    ctx = SimpleNamespace(build=lambda *parts: engine, seed_for=lambda name: 1)
    params = SimpleNamespace(num_samples=2, rollout=SimpleNamespace(name="lossy"), sampling=None)
    subject = SimpleNamespace(artifact=SimpleNamespace(path=None), tokenizer=None, model=None, encoder=None)
    rows = [Example(id=name, prompt="p") for name in "ab"]
    with pytest.raises(StageError, match=f"^rollout lossy: {given} answers to 4 prompts on d$"):
        decode(subject, {"d": rows}, params, ctx, lambda dataset: None)
    given = 4
    decoded = decode(subject, {"d": rows}, params, ctx, lambda dataset: None)
    assert (decoded.prompts, decoded.tokens, len(decoded.answers["d"])) == (2, 4, 4)
    assert isinstance(decoded, Decoded)


def test_a_teacher_that_loses_answers_is_an_error():
    forcing = object.__new__(Forcing)
    rows = [Example(id=name, prompt="p") for name in "ab"]
    with pytest.raises(StageError, match=r"^teacher: 1 answers to 2 prompts$"):
        forcing.exposure(None, rows, [Completion("", ())] * 2, [Completion("", ())])


@pytest.mark.parametrize("needs", [frozenset(), frozenset({"reference"})])
def test_a_metric_needs_something_that_a_model_gives(needs):
    fields = {"name": "mine", "summary": "x", "params": NO_PARAMS, "build": print, "higher_is_better": True}
    assert MetricSpec(**fields, needs=needs | {"nll"})
    with pytest.raises(ValueError, match="metric 'mine' needs nothing that a model gives"):
        MetricSpec(**fields, needs=needs)
    with pytest.raises(ValueError, match="not kebab-case"):
        MetricSpec(**{**fields, "name": "My"})
