from __future__ import annotations

import json
import math
from typing import Any

import jsonschema
import numpy as np
import pytest
from made_up_scores import metric, model, study

from kdkit.api.errors import DataError
from kdkit.report.collect import collect, write_report
from kdkit.report.compare import Roles, ordered_pairs

NUMBER = {"type": ["number", "null"]}
CI95 = {
    "oneOf": [{"type": "null"}, {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}],
}


def entry(required, **properties):
    return {"type": "object", "required": [*properties, *required], "properties": properties}


TEXT = {"type": "string"}
SCHEMA = entry(
    [],
    recipe=TEXT,
    seed={"type": "integer"},
    models={
        "type": "object",
        "additionalProperties": entry(
            ["path", "parameters", "bytes", "trained_tokens", "speed", "counts"],
            metrics={
                "type": "object",
                "additionalProperties": entry(
                    [],
                    value=NUMBER,
                    n={"type": "integer"},
                    ci95=CI95,
                    higher_is_better={"type": ["boolean", "null"]},
                    unit=TEXT,
                ),
            },
            categories={
                "type": "object",
                "additionalProperties": {
                    "type": "object",
                    "additionalProperties": entry([], value={"type": "number"}, n={"type": "integer"}, ci95=CI95),
                },
            },
        ),
    },
    baselines={
        "type": "object",
        "additionalProperties": entry(
            [],
            metrics={
                "type": "object",
                "additionalProperties": entry([], value={"type": "number"}, n={"type": "integer"}, ci95=CI95),
            },
        ),
    },
    pairs={
        "type": "array",
        "items": entry(
            [], a=TEXT, b=TEXT, metric=TEXT, difference={"type": "number"}, ci95=CI95, p=NUMBER, n={"type": "integer"}
        ),
    },
    retention={"type": "array", "items": entry([], model=TEXT, of=TEXT, metric=TEXT, value=NUMBER, ci95=CI95)},
    gap_closed={
        "type": "array",
        "items": entry([], model=TEXT, metric=TEXT, base=TEXT, teacher=TEXT, value=NUMBER, ci95=CI95),
    },
    decoding={"type": "object"},
    notes={"type": "array", "items": TEXT},
)


def report(directory, **changes):
    return collect([directory], **{"recipe": "demo", "seed": 17, **changes})


def simple(write, datasets=("d",), **values):
    """Models by name, each with one plain metric."""
    return write({name: model({d: {"rouge-l": metric(x)} for d in datasets}) for name, x in values.items()})


def find(rows, **wanted):
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


@pytest.mark.parametrize("datasets", [("dolly",), ("dolly", "bugnet")])
def test_report_json_has_the_contracted_form(write, tmp_path, datasets) -> None:
    data = report(write(study(datasets, n=60)))
    write_report(data, tmp_path / "out")
    text = (tmp_path / "out" / "report.json").read_text()
    assert json.loads(text) == data
    jsonschema.validate(json.loads(text), SCHEMA)
    assert data["recipe"] == "demo"
    assert data["seed"] == 17
    keys = {"rouge-l", "exact-match", "perplexity", "teacher-kl"}
    wanted = keys if len(datasets) == 1 else {f"{d}/{k}" for d in datasets for k in keys}
    assert all(set(entry["metrics"]) == wanted for entry in data["models"].values())
    assert list(data["models"]) == ["base", "sft", "kd", "kd-int4", "teacher"]


def test_the_report_repeats_byte_for_byte(write) -> None:
    directory = write(study(n=40))
    assert json.dumps(report(directory)) == json.dumps(report(directory))
    changed = report(directory, bootstrap_seed=5)
    assert (
        changed["models"]["kd"]["metrics"]["rouge-l"]["ci95"]
        != report(directory)["models"]["kd"]["metrics"]["rouge-l"]["ci95"]
    )


def test_value_n_and_interval(write) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(30, 10, 400)
    found = report(simple(write, a=x))["models"]["a"]["metrics"]["rouge-l"]
    assert (found["value"], found["n"]) == (pytest.approx(x.mean()), 400)
    arm = 1.96 * x.std() / math.sqrt(400)
    assert found["ci95"] == pytest.approx([x.mean() - arm, x.mean() + arm], abs=0.15 * arm)


def test_pairs_are_students_with_base_each_other_and_teacher() -> None:
    names = ["base", "sft", "kd", "teacher"]
    pairs = ordered_pairs(names, Roles("teacher", "base", "base"))
    assert pairs == [
        ("sft", "base"),
        ("kd", "base"),
        ("kd", "sft"),
        ("sft", "teacher"),
        ("kd", "teacher"),
        ("teacher", "base"),
    ]
    assert ordered_pairs(["a", "b", "c"], Roles()) == [("b", "a"), ("c", "a"), ("c", "b")]
    assert ordered_pairs(["a", "b", "c"], Roles(reference="b")) == [("a", "b"), ("c", "a"), ("c", "b")]


def test_pair_difference_p_and_correction(write) -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(10, 3, 80)
    data = report(simple(write, base=base, sft=base + rng.normal(0, 2, 80), kd=base + 5 + rng.normal(0, 2, 80)))
    clear = find(data["pairs"], a="kd", b="base")
    assert clear["difference"] == pytest.approx(5, abs=0.6)
    assert clear["ci95"][0] > 4
    assert clear["p"] == pytest.approx(1 / 10_001)
    assert clear["p_holm"] == pytest.approx(3 / 10_001)
    assert clear["n"] == 80
    assert find(data["pairs"], a="sft", b="base")["p"] > 0.05


def test_retention_is_the_share_of_the_teachers_score(write) -> None:
    rng = np.random.default_rng(2)
    base = rng.uniform(5, 10, 100)
    data = report(simple(write, base=base, kd=base * 1.6, teacher=base * 2))
    row = find(data["retention"], model="kd")
    assert (row["of"], row["metric"], row["n"]) == ("teacher", "rouge-l", 100)
    assert row["value"] == pytest.approx(0.8, rel=1e-12)
    # The ratio is the same on every example, so there is no spread to show.
    assert row["ci95"] is None
    assert any("same number" in note for note in data["notes"])
    assert find(data["retention"], model="base")["value"] == pytest.approx(0.5)
    assert all(row["model"] != "teacher" for row in data["retention"])


def test_retention_interval_is_that_of_the_paired_ratio(write) -> None:
    rng = np.random.default_rng(3)
    teacher = rng.uniform(10, 50, 200)
    kd = 0.8 * teacher + rng.normal(0, 4, 200)
    row = find(report(simple(write, teacher=teacher, kd=kd))["retention"], model="kd")
    index = np.random.default_rng(0).integers(0, 200, size=(20_000, 200))
    brute = np.quantile(kd[index].mean(axis=1) / teacher[index].mean(axis=1), [0.025, 0.975])
    assert row["value"] == pytest.approx(kd.mean() / teacher.mean())
    assert row["ci95"] == pytest.approx(brute, abs=0.003)


def test_gap_closed_by_hand_for_perplexity(write) -> None:
    rng = np.random.default_rng(4)
    tokens = rng.integers(5, 50, 150)
    hard = rng.normal(0, 0.3, 150)
    level = {"base": 3.0, "kd": 2.4, "teacher": 2.0}
    nll = {name: mean + hard + rng.normal(0, 0.05, 150) for name, mean in level.items()}
    models = {
        name: model({"d": {"perplexity": metric(x, weights=tokens, link="exp", higher=False)}})
        for name, x in nll.items()
    }
    data = report(write(models))
    row = find(data["gap_closed"], model="kd")
    ppl = {name: math.exp((x * tokens).sum() / tokens.sum()) for name, x in nll.items()}
    assert row["value"] == pytest.approx((ppl["base"] - ppl["kd"]) / (ppl["base"] - ppl["teacher"]))
    index = np.random.default_rng(0).integers(0, 150, size=(20_000, 150))
    drawn = {n: np.exp((x * tokens)[index].sum(axis=1) / tokens[index].sum(axis=1)) for n, x in nll.items()}
    brute = np.quantile((drawn["base"] - drawn["kd"]) / (drawn["base"] - drawn["teacher"]), [0.025, 0.975])
    assert row["ci95"] == pytest.approx(brute, abs=0.002)
    assert (row["base"], row["teacher"]) == ("base", "teacher")
    assert data["retention"] == []


def test_the_teachers_kl_of_zero_is_the_end_of_the_gap(write) -> None:
    rng = np.random.default_rng(5)
    kl = {"base": rng.uniform(0.8, 1.2, 50), "kd": rng.uniform(0.1, 0.3, 50), "teacher": np.zeros(50)}
    scored = {n: metric(x, higher=False, unit="nats/token") for n, x in kl.items()}
    data = report(write({n: model({"d": {"teacher-kl": x}}) for n, x in scored.items()}))
    teacher = data["models"]["teacher"]["metrics"]["teacher-kl"]
    assert (teacher["value"], teacher["ci95"]) == (0.0, None)
    row = find(data["gap_closed"], model="kd")
    assert row["value"] == pytest.approx(1 - kl["kd"].mean() / kl["base"].mean())
    assert row["ci95"][0] < row["value"] < row["ci95"][1]


def test_no_share_of_a_gap_that_is_not_clear(write) -> None:
    rng = np.random.default_rng(6)
    base = rng.uniform(10, 40, 60)
    data = report(simple(write, base=base, kd=base + 1, teacher=base + rng.normal(0, 5, 60)))
    assert data["retention"] == []
    assert data["gap_closed"] == []
    assert any(note.startswith("no gap to close") for note in data["notes"])
    assert any(note.startswith("no retention") for note in data["notes"])


def test_no_share_of_a_teacher_that_is_worse_than_the_base(write) -> None:
    x = np.linspace(10, 40, 50)
    data = report(simple(write, base=x + 5, kd=x + 2, teacher=x))
    assert data["retention"] == []
    assert data["gap_closed"] == []


@pytest.mark.parametrize(("baseline", "shown"), [(False, False), (True, False)])
def test_a_teacher_at_zero_gives_no_retention(write, baseline, shown) -> None:
    models = {"kd": np.linspace(0, 1, 20), "teacher": np.zeros(20)} | ({"base": np.zeros(20)} if baseline else {})
    data = report(simple(write, **models))
    assert bool(data["retention"]) is shown
    assert any("not clearly above zero" in note for note in data["notes"])


def test_no_share_where_the_common_examples_show_no_teacher(write) -> None:
    ids = [f"row-{i}" for i in range(40)]
    scores = {
        "base": metric([10.0] * 38 + [50.0] * 2, ids=ids),
        "teacher": metric([90.0] * 38 + [0.0] * 2, ids=ids),
        "kd": metric([5.0, 6.0], ids=ids[38:]),
        "elsewhere": metric([5.0, 6.0], ids=["p", "q"]),
    }
    data = report(write({name: model({"d": {"m": part}}) for name, part in scores.items()}, datasets={"d": {"n": 42}}))
    assert data["gap_closed"] == []
    assert [row["model"] for row in data["retention"]] == ["base"]
    (note,) = [note for note in data["notes"] if note.startswith("not given")]
    assert all(
        f"{what} {name} on m" in note for what in ("retention of", "gap closed by") for name in ("kd", "elsewhere")
    )


def test_a_base_without_scores_is_no_floor(write) -> None:
    draw = np.random.default_rng(1)
    teacher = metric(draw.uniform(50, 90, 60))
    models = {
        "teacher": model({"d": {"m": teacher}}),
        "kd": model({"d": {"m": metric(draw.uniform(30, 60, 60))}}),
        "base": model({"d": {"other": metric(draw.uniform(30, 60, 60))}}),
    }
    data = report(write(models))
    assert [(row["model"], row["metric"]) for row in data["retention"]] == [("kd", "m")]
    assert not any("no retention" in note for note in data["notes"])


def test_floors_are_checked_on_the_examples_of_the_row(write) -> None:
    draw = np.random.default_rng(2)
    ids = [f"row-{i}" for i in range(60)]
    # The teacher is good, but not on the 20 examples that one student has; nor is the base known there to be worse.
    teacher = np.where(np.arange(60) < 20, draw.uniform(1, 9, 60), draw.uniform(70, 90, 60))
    empty = metric(draw.uniform(0, 10, 60), ids=ids)
    scored = {
        "teacher": metric(teacher, ids=ids),
        "base": metric(draw.uniform(0, 10, 60), ids=ids),
        "part": metric(draw.uniform(40, 50, 20), ids=ids[:20]),
        "whole": metric(draw.uniform(40, 50, 60), ids=ids),
    }
    models = {name: model({"d": {"m": part}}) for name, part in scored.items()}
    data = report(write(models, datasets={"d": {"n": 60}}, baselines={"empty": {"results": {"d": {"m": empty}}}}))
    assert [row["model"] for row in data["retention"]] == ["base", "whole"]
    assert [row["model"] for row in data["gap_closed"]] == ["whole"]
    notes = " | ".join(data["notes"])
    assert "not clearly better than base: retention of part on m" in notes
    assert "gap closed by part on m" in notes


def test_a_trivial_answer_to_other_examples_is_no_floor(write) -> None:
    ids = [f"row-{i}" for i in range(80)]
    draw = np.random.default_rng(3)
    models = {
        "teacher": model({"d": {"m": metric(draw.uniform(50, 70, 60), ids=ids[:60])}}),
        "kd": model({"d": {"m": metric(draw.uniform(30, 50, 60), ids=ids[:60])}}),
    }
    identity = metric(np.full(20, 95.0), ids=ids[60:])
    empty = metric(draw.uniform(0, 9, 80), ids=ids)
    baselines = {n: {"results": {"d": {"m": m}}} for n, m in (("identity", identity), ("empty", empty))}
    data = report(write(models, datasets={"d": {"n": 80}}, baselines=baselines))
    assert [row["model"] for row in data["retention"]] == ["kd"]


def test_an_undefined_score_is_null_with_its_reason_and_the_others_stay(write) -> None:
    broken = metric([], link="identity", higher=False, unit="") | {"value": None, "reason": "exp(800) is too large"}
    fine = metric(np.linspace(2, 3, 30), weights=[3.0] * 30, link="exp", higher=False, unit="")
    data = report(write({n: model({"d": {"perplexity": m}}) for n, m in (("base", broken), ("kd", fine), ("x", fine))}))
    assert data["models"]["base"]["metrics"]["perplexity"]["value"] is None
    assert data["models"]["kd"]["metrics"]["perplexity"]["n"] == 30
    assert "undefined (exp(800) is too large): perplexity of base" in data["notes"]
    assert [(row["a"], row["b"]) for row in data["pairs"]] == [("x", "kd")]


def test_numbers_per_token_are_not_compared_between_vocabularies(write) -> None:
    draw = np.random.default_rng(4)
    tokens = [10.0] * 60

    def entry(level: float, vocabulary: str | None) -> dict[str, Any]:
        ppl = metric(draw.uniform(level, level + 0.2, 60), weights=tokens, link="exp", higher=False, unit="")
        rouge = metric(draw.uniform(90 - 20 * level, 95 - 20 * level, 60))
        return model({"d": {"perplexity": ppl, "rouge-l": rouge}}, vocabulary=vocabulary)

    models = {
        "base": entry(3, "a"),
        "kd": entry(2.5, "a"),
        "other": entry(2.5, "b"),
        "old": entry(2.5, None),
        "teacher": entry(2, "a"),
    }
    data = report(write(models))
    pairs = {(row["a"], row["b"]) for row in data["pairs"] if row["metric"] == "perplexity"}
    assert ("kd", "base") in pairs
    assert ("old", "base") in pairs
    assert not any("other" in pair and "old" not in pair for pair in pairs)
    assert [row["model"] for row in data["gap_closed"] if row["metric"] == "perplexity"] == ["kd", "old"]
    assert "other" in {row["model"] for row in data["gap_closed"] if row["metric"] == "rouge-l"}
    note = next(note for note in data["notes"] if "the models have different tokens" in note)
    assert "perplexity of other and base" in note
    assert "gap closed by other on perplexity" in note
    assert "rouge-l" not in note


def test_nothing_passed_and_nothing_failed_have_exact_intervals(write) -> None:
    for values, expected in (([0.0] * 30, [0.0, 11.570]), ([100.0] * 30, [88.430, 100.0])):
        models = {"base": model({"d": {"m": metric(values), "length": metric(values, unit="characters")}})}
        directory = write(models, name=f"all-{values[0]}")
        metrics = report(directory)["models"]["base"]["metrics"]
        assert metrics["m"]["ci95"] == pytest.approx(expected, abs=0.001)
        assert metrics["length"]["ci95"] is None


def test_one_example_gives_no_retention(write) -> None:
    assert report(simple(write, kd=[50.0], teacher=[100.0]))["retention"] == []


def test_a_teacher_that_is_always_right_gives_retention(write) -> None:
    data = report(simple(write, kd=[100.0, 0.0] * 10, teacher=[100.0] * 20))
    assert find(data["retention"], model="kd")["value"] == 0.5


@pytest.mark.parametrize(
    ("values", "note"),
    [([5.0], "only one example"), ([5.0, 5.0, 5.0], "every example has the same score"), ([], "no example was scored")],
)
def test_too_little_for_an_interval_is_null_with_a_note(write, values, note) -> None:
    data = report(simple(write, base=values, teacher=values))
    found = data["models"]["base"]["metrics"]["rouge-l"]
    assert found["ci95"] is None
    assert found["value"] == (5.0 if values else None)
    assert found["n"] == len(values)
    assert any(note in line for line in data["notes"])
    assert all(row["ci95"] is None for row in data["pairs"])
    assert json.dumps(data, allow_nan=False)


def test_one_example_has_a_difference_but_no_test(write) -> None:
    (row,) = report(simple(write, base=[1.0], kd=[3.0]))["pairs"]
    assert (row["difference"], row["ci95"], row["p"], row["p_holm"], row["n"]) == (2.0, None, None, None, 1)


def test_undefined_scores_are_null_with_a_note(write) -> None:
    models = {name: model({"d": {"reward": metric([1.0, 2.0, 3.0])}}) for name in ("a", "b")}
    models["a"]["results"]["d"]["reward"]["per_example"][1] = math.nan
    models["a"]["results"]["d"]["reward"]["value"] = math.nan
    data = report(write(models))
    assert data["models"]["a"]["metrics"]["reward"]["value"] is None
    assert data["pairs"] == []
    assert any("undefined for some examples" in note and "reward of a" in note for note in data["notes"])


def test_a_perplexity_beyond_floats_is_null_with_a_note(write) -> None:
    part = metric([800.0, 900.0], higher=False) | {"link": "exp", "value": None}
    found = report(write({"a": model({"d": {"perplexity": part}})}))
    assert found["models"]["a"]["metrics"]["perplexity"]["value"] is None
    assert any("too large" in note for note in found["notes"])


def test_a_metric_that_is_no_mean_keeps_its_value_without_interval(write) -> None:
    part = metric([1.0, 2.0, 3.0]) | {"value": 42.0}
    models = {"a": model({"d": {"bleu": part}}), "b": model({"d": {"bleu": metric([1.0, 2.0, 4.0])}})}
    data = report(write(models))
    assert data["models"]["a"]["metrics"]["bleu"] | {"unit": ""} == {
        "value": 42.0,
        "n": 3,
        "ci95": None,
        "higher_is_better": True,
        "unit": "",
    }
    assert data["pairs"] == []
    assert any("not the mean" in note for note in data["notes"])


def test_examples_without_tokens_are_left_out_and_noted(write) -> None:
    part = metric([1.0, 2.0, 9.0], weights=[1, 3, 0])
    data = report(write({"a": model({"d": {"nll": part}})}))
    assert data["models"]["a"]["metrics"]["nll"]["n"] == 2
    assert data["models"]["a"]["metrics"]["nll"]["value"] == 1.75
    assert any("without a token" in note for note in data["notes"])


def test_models_with_different_examples_are_compared_on_the_common_ones(write) -> None:
    models = {
        "base": model({"d": {"rouge-l": metric([1.0, 2.0, 3.0], ids=["x", "y", "z"])}}),
        "kd": model({"d": {"rouge-l": metric([9.0, 4.0], ids=["y", "x"])}}),
    }
    data = report(write(models, datasets={"d": {"n": 3}}))
    (row,) = data["pairs"]
    assert (row["difference"], row["n"]) == (5.0, 2)
    assert any("only on the examples" in note and "n = 2" in note for note in data["notes"])


def test_scores_without_ids_have_intervals_but_no_pairs(write) -> None:
    models = {name: model({"d": {"rouge-l": metric([1.0, 2.0, 4.0], ids=[])}}) for name in ("a", "b")}
    data = report(write(models))
    assert data["models"]["a"]["metrics"]["rouge-l"]["ci95"] is not None
    assert data["pairs"] == []
    assert any("want of common example ids" in note for note in data["notes"])


def test_a_model_without_a_metric_is_left_out_of_it(write) -> None:
    models = {
        "base": model({"d": {"rouge-l": metric([1.0, 2.0]), "f1": metric([1.0, 2.0])}}),
        "kd": model({"d": {"rouge-l": metric([1.0, 3.0])}}),
    }
    data = report(write(models))
    assert set(data["models"]["kd"]["metrics"]) == {"rouge-l"}
    assert {row["metric"] for row in data["pairs"]} == {"rouge-l"}


def test_a_metric_with_two_directions_is_an_error(write) -> None:
    models = {"a": model({"d": {"m": metric([1.0])}}), "b": model({"d": {"m": metric([1.0], higher=False)}})}
    with pytest.raises(DataError, match="m on 'd' has another direction"):
        report(write(models))


def test_roles_by_their_usual_names(write) -> None:
    directory = simple(write, base=[1.0, 2.0], kd=[2.0, 3.0], teacher=[3.0, 4.0])
    assert report(directory)["roles"] == {"teacher": "teacher", "baseline": "base", "reference": "base"}
    chosen = report(directory, teacher="kd", baseline="teacher", reference="kd")["roles"]
    assert chosen == {"teacher": "kd", "baseline": "teacher", "reference": "kd"}


def test_no_roles_no_shares(write) -> None:
    data = report(simple(write, a=[1.0, 2.0], b=[2.0, 4.0]))
    assert data["roles"] == {"teacher": None, "baseline": None, "reference": None}
    assert (data["retention"], data["gap_closed"]) == ([], [])


def test_an_unknown_role_is_an_error_with_a_suggestion(write) -> None:
    directory = simple(write, base=[1.0], techer=[2.0])
    with pytest.raises(
        DataError, match=r"report\.teacher: no evaluated model .*'teacher'.*allowed: base, techer.*'techer'"
    ):
        report(directory, teacher="teacher")
    with pytest.raises(DataError, match="both teacher and baseline"):
        report(directory, teacher="base", baseline="base")


def test_shared_decoding_is_shown_and_differences_are_noted(write) -> None:
    settings = {"do_sample": True, "temperature": 1.0}
    models = {
        "a": model({"d": {"rouge-l": metric([1.0])}}, decoding=settings),
        "b": model({"d": {"rouge-l": metric([1.0])}}, decoding=settings | {"temperature": 0.7}),
        "copy": model({"d": {"rouge-l": metric([1.0])}}, decoding={}),
    }
    data = report(write(models))
    assert data["decoding"] == {"d": {"do_sample": True}}
    assert any("decoding differs" in note and "temperature (d)" in note for note in data["notes"])
    assert data["models"]["b"]["decoding"]["d"]["temperature"] == 0.7


def test_unequal_training_is_noted(write) -> None:
    part = {"d": {"rouge-l": metric([1.0])}}
    models = {
        "base": model(part),
        "sft": model(part, trained_tokens=1_000_000),
        "kd": model(part, trained_tokens=4_000_000),
        "teacher": model(part, trained_tokens=50_000_000),
    }
    notes = report(write(models))["notes"]
    assert any("kd was trained on 4 times the tokens of sft" in note for note in notes)
    models["kd"] = model(part, trained_tokens=1_010_000)
    assert not any("times the tokens" in note for note in report(write(models, "equal"))["notes"])


def trivial(**values):
    """The ``baselines`` of a scores file with one metric."""
    return {"baselines": {name: {"results": {"d": {"rouge-l": metric(x)}}} for name, x in values.items()}}


def named(write, models, **values):
    """Models and baselines by name, each with one plain metric."""
    return write({name: model({"d": {"rouge-l": metric(x)}}) for name, x in models.items()}, **trivial(**values))


def test_baselines_have_value_n_and_interval(write, tmp_path) -> None:
    rng = np.random.default_rng(6)
    x = rng.uniform(0, 30, 80)
    data = report(named(write, {"kd": x + 5}, identity=x, reference=[100.0] * 80))
    jsonschema.validate(data, SCHEMA)
    write_report(data, tmp_path)
    found = data["baselines"]["identity"]["metrics"]["rouge-l"]
    assert (found["value"], found["n"]) == (pytest.approx(x.mean()), 80)
    assert found["ci95"][0] < x.mean() < found["ci95"][1]
    assert data["baselines"]["reference"]["metrics"]["rouge-l"] == {"value": 100.0, "n": 80, "ci95": None}
    assert {row["a"] for row in data["pairs"]} | {row["b"] for row in data["pairs"]} <= {"kd"}


def test_baselines_of_several_datasets_have_the_keys_of_the_models(write) -> None:
    models = {"kd": model({d: {"rouge-l": metric([1.0, 2.0])} for d in ("d1", "d2")})}
    both = {"results": {d: {"rouge-l": metric([0.0, 1.0])} for d in ("d1", "d2")}}
    data = report(write(models, baselines={"empty": both}))
    assert set(data["baselines"]["empty"]["metrics"]) == {"d1/rouge-l", "d2/rouge-l"}


def test_a_model_that_is_no_better_than_copying_is_named(write) -> None:
    rng = np.random.default_rng(7)
    x = rng.uniform(20, 60, 100)
    models = {"base": x + rng.normal(0, 5, 100), "kd": x + 10, "worse": x - 10}
    (note,) = [n for n in report(named(write, models, identity=x))["notes"] if "identity" in n]
    assert note == (
        "not clearly better than copying the input (the identity baseline): base on rouge-l, worse on rouge-l"
    )


@pytest.mark.parametrize(
    ("floors", "missing"),
    [
        ({"identity": 8.0}, None),
        ({"identity": 40.0}, "the identity baseline"),
        ({"identity": 5.0, "majority": 30.0, "empty": 0.0}, "the majority baseline"),
        ({"empty": 31.0}, "the empty baseline"),
        ({"reference": 100.0}, None),
    ],
)
def test_retention_needs_a_teacher_above_the_best_trivial_answer(write, floors, missing) -> None:
    rng = np.random.default_rng(8)
    models = {"kd": rng.normal(24, 5, 60), "teacher": rng.normal(30, 5, 60)}
    data = report(named(write, models, **{name: rng.normal(level, 5, 60) for name, level in floors.items()}))
    assert [row["model"] for row in data["retention"]] == ([] if missing else ["kd"])
    notes = [note for note in data["notes"] if note.startswith("no retention")]
    assert notes == (
        [f"no retention, because the teacher is not clearly better than {missing}: rouge-l"] if missing else []
    )


def test_retention_still_needs_a_teacher_above_the_untrained_student(write) -> None:
    x = np.random.default_rng(9).uniform(20, 40, 60)
    data = report(named(write, {"base": x, "kd": x, "teacher": x}, identity=x - 15))
    assert data["retention"] == []
    assert any("not clearly better than base: rouge-l" in note for note in data["notes"])


def test_a_metric_without_a_direction_is_described_and_not_compared(write) -> None:
    rng = np.random.default_rng(10)
    models = {
        name: model({"d": {"length": metric(rng.normal(level, 9, 50), higher=None, unit="tokens")}})
        for name, level in {"base": 20, "kd": 60, "teacher": 90}.items()
    }
    floor = {"baselines": {"identity": {"results": {"d": {"length": metric([99.0] * 50, higher=None, unit="tokens")}}}}}
    data = report(write(models, **floor))
    jsonschema.validate(data, SCHEMA)
    assert data["models"]["kd"]["metrics"]["length"]["ci95"] is not None
    assert (data["pairs"], data["retention"], data["gap_closed"], data["notes"]) == ([], [], [], [])


def grouped(x, categories, **changes):
    ids = [f"row-{i}" for i in range(len(x))]
    facts = {"d": {"n": len(x), "categories": dict(zip(ids, categories, strict=True))}}
    return {"kd": model({"d": {"rouge-l": metric(x)}})}, {"datasets": facts, **changes}


def test_categories_have_their_own_means_and_intervals(write) -> None:
    rng = np.random.default_rng(11)
    x = np.concatenate([rng.normal(20, 5, 60), rng.normal(50, 5, 30), [7.0], [9.0]])
    models, facts = grouped(x, ["open"] * 60 + ["closed"] * 30 + ["rare", ""])
    data = report(write(models, **facts))
    jsonschema.validate(data, SCHEMA)
    found = data["models"]["kd"]["categories"]["rouge-l"]
    assert list(found) == ["open", "closed", "rare"]
    assert (found["open"]["value"], found["open"]["n"]) == (pytest.approx(x[:60].mean()), 60)
    assert found["closed"]["ci95"][0] < x[60:90].mean() < found["closed"]["ci95"][1]
    assert found["rare"] == {"value": 7.0, "n": 1, "ci95": None}


def test_without_categories_there_are_none(write) -> None:
    models, facts = grouped([1.0, 2.0], ["", ""])
    assert report(write(models, **facts))["models"]["kd"]["categories"] == {}


def test_only_the_largest_of_very_many_categories_are_shown(write) -> None:
    models, facts = grouped(np.arange(120.0), [f"c{i % 50}" for i in range(120)])
    data = report(write(models, **facts))
    found = data["models"]["kd"]["categories"]["rouge-l"]
    assert len(found) == 40
    assert {f"c{i}" for i in range(20)} <= set(found), "those with three examples"
    assert "only the 40 largest categories have scores of their own: d (50)" in data["notes"]


def test_a_category_that_overflows_is_absent(write) -> None:
    part = metric([1.0, 1.0, 800.0], weights=[400, 500, 1], link="exp", higher=False)
    ids = {"row-0": "fine", "row-1": "fine", "row-2": "broken"}
    models = {"kd": model({"d": {"perplexity": part}})}
    data = report(write(models, datasets={"d": {"n": 3, "categories": ids}}))
    assert set(data["models"]["kd"]["categories"]["perplexity"]) == {"fine"}


def test_answers_to_one_example_count_as_one(write) -> None:
    rng = np.random.default_rng(12)
    x = rng.uniform(0, 100, (50, 4))
    ids = [f"row-{i}" for i in range(50) for _ in range(4)]
    models = {
        "many": model({"d": {"rouge-l": metric(x.ravel(), ids=ids)}}),
        "means": model({"d": {"rouge-l": metric(x.mean(axis=1))}}),
    }
    data = report(write(models, datasets={"d": {"n": 50}}))
    many, means = (data["models"][name]["metrics"]["rouge-l"] for name in ("many", "means"))
    assert many["n"] == means["n"] == 50
    assert many["ci95"] == pytest.approx(means["ci95"], rel=1e-9)
    (row,) = data["pairs"]
    assert (row["n"], row["difference"], row["p"]) == (50, pytest.approx(0, abs=1e-9), 1.0)
    assert not any("unequal" in note or "not the mean" in note for note in data["notes"])


def test_unequal_numbers_of_answers_are_noted_and_weigh_the_same(write) -> None:
    part = metric([0.0, 0.0, 0.0, 100.0], ids=["a", "a", "a", "b"])
    data = report(write({"kd": model({"d": {"rouge-l": part}})}, datasets={"d": {"n": 2}}))
    assert data["models"]["kd"]["metrics"]["rouge-l"]["value"] == 50.0
    assert any("unequal numbers of answers" in note and "rouge-l of kd" in note for note in data["notes"])
    # A metric that averages over examples by itself has nothing to note.
    data = report(write({"kd": model({"d": {"rouge-l": part | {"value": 50.0}}})}, "own", datasets={"d": {"n": 2}}))
    assert (data["models"]["kd"]["metrics"]["rouge-l"]["value"], data["notes"]) == (50.0, [])


def test_what_a_metric_left_out_is_noted(write) -> None:
    part = metric([1.0, 2.0]) | {"counts": {"answers without a verdict": 1_200}}
    notes = report(write({"kd": model({"d": {"pass-at-1": part}})}))["notes"]
    assert notes == ["answers without a verdict: pass-at-1 of kd (1,200)"]


def test_a_quantised_copy_is_compared_with_what_it_was_made_from() -> None:
    pairs = ordered_pairs(["base", "base-int4", "kd", "kd-int4", "teacher"], Roles("teacher", "base", "base"))
    assert {("kd-int4", "kd"), ("base-int4", "base"), ("kd", "teacher"), ("kd-int4", "teacher")} <= set(pairs)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == 10, "every two models, once"
