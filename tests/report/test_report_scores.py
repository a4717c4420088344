from __future__ import annotations

import copy

import pytest
from made_up_scores import metric, model

from kdkit.api.errors import DataError, ExitCode
from kdkit.report.scores import read_scores


def one(**changes):
    return {"a": model({"d": {"rouge-l": metric([1.0, 2.0])}}) | changes}


def test_models_and_datasets_of_several_files_are_merged(write) -> None:
    first = write({"a": model({"d1": {"rouge-l": metric([1.0])}})}, "one")
    second = write(
        {"a": model({"d2": {"rouge-l": metric([2.0])}}), "b": model({"d2": {"rouge-l": metric([3.0])}})}, "two"
    )
    merged = read_scores([first, second])
    assert list(merged.models) == ["a", "b"]
    assert list(merged.datasets) == ["d1", "d2"]
    assert {d: r["rouge-l"].value for d, r in merged.models["a"].results.items()} == {"d1": 1.0, "d2": 2.0}
    assert merged.notes == []


def test_the_same_scores_twice_are_no_conflict(write) -> None:
    first, second = write(one(), "one"), write(one(), "two")
    assert list(read_scores([first, first, second]).models) == ["a"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"path": "other/model"}, "path"),
        ({"parameters": 7}, "parameters"),
        ({"bytes": 7}, "bytes"),
        ({"trained_tokens": 7}, "trained_tokens"),
        ({"decoding": {"do_sample": True}}, "decoding"),
        ({"counts": {"d": {"n": 2, "truncated": 2, "empty": 0}}}, "counts"),
        ({"results": {"d": {"rouge-l": metric([1.0, 3.0])}}}, "rouge-l"),
    ],
)
def test_conflicting_duplicates_are_an_error_that_names_them(write, change, named) -> None:
    first, second = write(one(), "one"), write(one(**change), "two")
    with pytest.raises(DataError, match=named) as caught:
        read_scores([first, second])
    assert "'a'" in str(caught.value)
    assert str(second / "scores.json") in str(caught.value)
    assert caught.value.exit_code == ExitCode.INVALID


def test_two_test_sets_under_one_name_are_an_error(write) -> None:
    first = write(one(), "one")
    other = {"b": model({"d": {"rouge-l": metric([1.0, 2.0, 3.0])}})}
    with pytest.raises(DataError, match="dataset 'd' differs"):
        read_scores([first, write(other, "two")])


def test_a_speed_measured_twice_is_noted_not_an_error(write) -> None:
    first, second = write(one(), "one"), write(one(speed={"prompts_per_s": 9.0}), "two")
    merged = read_scores([first, second])
    assert merged.models["a"].speed["prompts_per_s"] == 4.0
    assert any("a: speed" in note for note in merged.notes)


def test_missing_file(tmp_path) -> None:
    with pytest.raises(DataError, match=r"scores\.json: cannot read .*evaluate stage"):
        read_scores([tmp_path])


@pytest.mark.parametrize(
    ("part", "value", "named"),
    [
        ("n", 5, "2 per-example values for n = 5"),
        ("ids", ["row-0"], "1 ids for 2 values"),
        ("weights", [1.0], "1 weights for 2 values"),
        ("weights", [1.0, -1.0], "negative"),
        ("link", "log", "link"),
        ("higher_is_better", "up", "higher_is_better"),
    ],
)
def test_malformed_scores_name_file_and_place(write, part, value, named) -> None:
    models = copy.deepcopy(one())
    models["a"]["results"]["d"]["rouge-l"][part] = value
    with pytest.raises(DataError, match=named) as caught:
        read_scores([write(models)])
    assert "models.a.results.d.rouge-l" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_results_on_an_unknown_dataset(write) -> None:
    with pytest.raises(DataError, match="unknown dataset 'd'"):
        read_scores([write(one(), datasets={})])


def test_scores_without_scores(write) -> None:
    with pytest.raises(DataError, match="no score"):
        read_scores([write({})])


def test_not_json(tmp_path) -> None:
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(DataError, match="not a scores file"):
        read_scores([tmp_path])


def test_baselines_are_merged_and_must_agree(write) -> None:
    def file(name, value):
        entry = {"results": {"d": {"rouge-l": metric([value, 2.0])}}}
        return write(one(), name, baselines={"identity": entry})

    first = file("one", 1.0)
    assert read_scores([first]).baselines["identity"]["d"]["rouge-l"].per_example == (1.0, 2.0)
    assert read_scores([first, file("two", 1.0)]).baselines.keys() == {"identity"}
    with pytest.raises(DataError, match="baseline 'identity': rouge-l on 'd' differs"):
        read_scores([first, file("three", 1.5)])


@pytest.mark.parametrize(("part", "value"), [("n", 5), ("ids", ["row-0"])])
def test_malformed_baselines_name_their_place(write, part, value) -> None:
    entry = {"results": {"d": {"rouge-l": {**metric([1.0, 2.0]), part: value}}}}
    with pytest.raises(DataError, match=r"baselines\.identity\.results\.d\.rouge-l"):
        read_scores([write(one(), baselines={"identity": entry})])


def test_baselines_on_an_unknown_dataset(write) -> None:
    entry = {"results": {"elsewhere": {"rouge-l": metric([1.0])}}}
    with pytest.raises(DataError, match="baseline 'identity' has results on unknown dataset 'elsewhere'"):
        read_scores([write(one(), baselines={"identity": entry})])


def test_a_file_from_before_several_answers_has_one_to_each_row(write) -> None:
    counts = read_scores([write(one())]).models["a"].counts["d"]
    assert (counts.n, counts.answers, counts.unjudged) == (2, 2, 0)
