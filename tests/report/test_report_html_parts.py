from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise
from xml.etree import ElementTree as Xml

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_runs import predictions, run
from made_up_scores import metric, model, scores

from kdkit.api.errors import DataError
from kdkit.report.collect import collect
from kdkit.report.html.axis import Axis
from kdkit.report.html.charts import Bar, Dot, Line, bar_chart, dot_chart, line_chart
from kdkit.report.html.plots import loss_figures, reward_figures
from kdkit.report.html.samples import read_samples
from kdkit.report.html.text import clean, clip, shorten
from kdkit.report.html.training import read_history


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=5), st.booleans())
def test_ticks_are_round_few_and_cover_the_values(values, zero) -> None:
    axis = Axis.over(values, 10, 110, zero=zero)
    assert 2 <= len(axis.ticks) <= 6
    step = axis.ticks[1] - axis.ticks[0]
    leading = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(leading - round_number) for round_number in (1, 2, 5)) < 1e-6
    slack = 1e-6 * max(map(abs, axis.ticks))
    assert axis.ticks[0] - slack <= min(values)
    assert max(values) <= axis.ticks[-1] + slack
    assert not zero or axis.ticks[0] <= 0 <= axis.ticks[-1]
    assert (axis(axis.ticks[0]), axis(axis.ticks[-1])) == (10, 110)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ((0, 38), ["0", "10", "20", "30", "40"]),
        ((0.02, 0.11), ["0.02", "0.04", "0.06", "0.08", "0.10", "0.12"]),
        ((-1.5, 1.2), ["−2", "−1", "0", "1", "2"]),
        ((0, 25_000), ["0", "5,000", "10.0k", "15.0k", "20.0k", "25.0k"]),
        ((0, 8e-6), ["0e+00", "2e−06", "4e−06", "6e−06", "8e−06"]),
    ],
)
def test_tick_labels(values, labels) -> None:
    axis = Axis.over(values, 0, 1)
    assert [axis.label(tick) for tick in axis.ticks] == labels


def test_a_dot_stands_at_its_value_between_the_ends_of_its_interval() -> None:
    dots = [Dot("a", "10 ±5", 10.0, (5.0, 15.0), 0), Dot("b", "20", 20.0, None, 1)]
    svg = Xml.fromstring(dot_chart("chart", dots, "points"))
    marker = [element for element in svg.iter("path") if element.get("class") == "marker"]
    xs = [float(element.get("transform")[10:].split()[0]) for element in marker]
    whisker = next(element for element in svg.iter("line") if element.get("class") == "whisker")
    ticks = {e.text: float(e.get("x")) for e in svg.iter("text") if e.get("class") == "tick" and e.text != "points"}
    assert xs == pytest.approx([ticks["10"], ticks["20"]])
    assert float(whisker.get("x1")) == pytest.approx(ticks["5"])
    assert (float(whisker.get("x1")) + float(whisker.get("x2"))) / 2 == pytest.approx(xs[0], abs=0.01)
    assert [group.get("class") for group in svg.iter("g")] == ["s0", "s1"]
    assert marker[0].get("d") != marker[1].get("d"), "colour is not the only difference"


def test_ticks_leave_room_for_their_labels() -> None:
    for high in (84.6, 25_000, 3e-6, 0.123, 7.0):
        svg = Xml.fromstring(dot_chart("chart", [Dot("name " * 9, "1,234 ±567", high, (high / 9, high), 0)], ""))
        ticks = [(float(e.get("x")), len(e.text)) for e in svg.iter("text") if e.get("class") == "tick"]
        assert len(ticks) >= 2
        assert all(b[0] - a[0] >= 6.4 * max(a[1], b[1]) for a, b in pairwise(ticks)), high


def test_bars_begin_at_zero_and_may_be_negative() -> None:
    bars = [Bar("g", "up", 10.0, None, 0), Bar("g", "down", -5.0, None, 1)]
    up, down = list(Xml.fromstring(bar_chart("chart", bars, "")).iter("rect"))
    assert float(down.get("x")) + float(down.get("width")) == pytest.approx(float(up.get("x")), abs=0.02)
    assert float(up.get("width")) == pytest.approx(2 * float(down.get("width")), abs=0.02)


def test_a_loss_that_was_not_finite_interrupts_its_curve() -> None:
    line = Line("loss", ((1, 3.0), (2, None), (3, 2.0), (4, 1.0)), 0)
    svg = Xml.fromstring(line_chart("chart", [line], "step", "loss"))
    path = next(element.get("d") for element in svg.iter("path") if element.get("class") == "curve")
    assert (path.count("M"), path.count("L")) == (2, 1)


@pytest.mark.parametrize(("end", "other"), [(1.0, 5.0), (5.0, 1.0), (3.0, 5.0)])
def test_labels_of_curves_that_end_together_stand_apart(end, other) -> None:
    lines = [Line(f"loss {i}", ((0, other), (10, end)), i) for i in range(5)]
    svg = Xml.fromstring(line_chart("chart", lines, "step", "loss"))
    tops = sorted(float(element.get("y")) for element in svg.iter("text") if element.get("class") == "end")
    assert len(tops) == 5
    assert min(b - a for a, b in pairwise(tops)) >= 12.9
    assert tops[0] > 0
    assert tops[-1] < 200


def test_a_label_that_is_too_long_ends_in_an_ellipsis_and_keeps_its_tip() -> None:
    name = "a \x06very long name <of> a model, " * 9
    svg = Xml.fromstring(dot_chart("chart", [Dot(name, "1", 1.0, None, 0)], ""))
    label = next(element for element in svg.iter("text") if element.get("class") == "label")
    assert label.text.endswith("…")
    assert len(label.text) < 25
    assert next(svg.iter("title")).text.startswith("a ␆very long name <of>")


def test_clean_keeps_text_and_shows_the_rest() -> None:
    assert clean("tab\there\r\nnew\rline ü 漢 😀") == "tab\there\nnew\nline ü 漢 😀"
    assert clean("\x00\x1f\x7f\x9f\u2066\udfff") == "␀␟␡⟨U+009F⟩⟨U+2066⟩⟨U+DFFF⟩"


def test_clip_and_shorten_say_what_they_leave_out() -> None:
    assert (clip("abc", 3).text, clip("abc", 3).left_out) == ("abc", 0)
    assert (clip("abcd", 3).text, clip("abcd", 3).left_out) == ("abc", 1)
    assert (clip("a\n" * 100, 1000, lines=2).text, clip("a\n" * 100, 1000, lines=2).left_out) == ("a\na", 197)
    assert shorten("a\n b", 9) == "a b"
    assert shorten("abcdef", 3) == "ab…"
    assert shorten("a" + " " * 50, 3) == "a…"


def test_history_follows_keys_and_puts_causes_first(tmp_path) -> None:
    directory = run(tmp_path / "store")
    history = read_history([directory])
    assert [stage.name for stage in history.stages.values()] == ["sft", "kd", "eval"]
    assert history.made_by == {"sft": "5" * 12, "kd": "6" * 12}
    kd = history.stages["6" * 12]
    assert [(curve.name, curve.held_out, len(curve.points)) for curve in kd.curves] == [
        ("loss", False, 60),
        ("forward-kl", False, 60),
        ("cross-entropy", False, 60),
        ("loss", True, 6),
        ("forward-kl", True, 6),
        ("cross-entropy", True, 6),
    ]
    assert (kd.kind, kd.seconds, kd.versions["torch"]) == ("distill", 754.2, "2.13.0+cpu")
    # A single loss has no parts to show.
    assert [curve.name for curve in history.stages["5" * 12].curves] == ["loss", "loss"]


def test_rewards_of_what_was_sampled(tmp_path) -> None:
    """Not every step has new samples; a single reward has no parts to show."""
    directory = run(tmp_path / "store")
    for key, kind, names in (("5" * 12, "sft", ["length"]), ("6" * 12, "distill", ["think", "length-2"])):
        rows = [{"step": 2, "train/loss": 1.0}]
        for step in (1, 3):
            rewards = {f"train/reward/{name}/mean": 0.1 * step for name in (*names, "total")}
            rows.append({"step": step, **rewards, "train/reward/total/std": 9.0, "train/reward/total/unscorable": 0.5})
        file = tmp_path / "store" / f"{kind}-{key}" / "metrics.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    history = read_history([directory])
    assert [curve.name for curve in history.stages["5" * 12].rewards] == ["total"]
    assert [curve.name for curve in history.stages["6" * 12].rewards] == ["total", "think", "length-2"]
    assert history.stages["6" * 12].rewards[1].points == ((1.0, 0.1), (3.0, pytest.approx(0.3)))
    assert history.stages["e" * 12].rewards == ()
    sft, kd = reward_figures(history)
    assert (sft.title, kd.title) == ("sft", "kd")
    assert "total from 0.1 at step 1 to 0.3 at step 3; think from 0.1" in kd.svg
    assert "mean reward" in sft.svg
    assert len(list(loss_figures(history))) == 2


def test_history_survives_a_move_of_the_store(tmp_path) -> None:
    run(tmp_path / "old")
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert len(read_history([tmp_path / "new" / ("evaluate-" + "e" * 12) / "scores"]).stages) == 3


def test_history_of_other_scores_is_not_taken(tmp_path) -> None:
    directory = run(tmp_path / "store")
    text = (directory / "scores.json").read_text()
    (directory / "scores.json").write_text(text + "\n")
    assert read_history([directory]).stages == {}
    shutil.copytree(directory, tmp_path / "copy")
    assert read_history([tmp_path / "copy"]).stages == {}


def test_what_is_missing_or_damaged_in_the_store_is_left_out(tmp_path) -> None:
    directory = run(tmp_path / "store")
    (tmp_path / "store" / ("sft-" + "5" * 12) / "manifest.json").write_text("{")
    with (tmp_path / "store" / ("distill-" + "6" * 12) / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 610, "train/loss": "NaN"}\n[]\n{"step": ')
    history = read_history([directory])
    assert [stage.name for stage in history.stages.values()] == ["kd", "eval"]
    assert history.made_by == {"kd": "6" * 12}
    assert history.stages["6" * 12].curves[0].points[-1] == (610, None)


def test_long_histories_are_thinned_and_keep_their_last_point(tmp_path) -> None:
    directory = run(tmp_path / "store")
    file = tmp_path / "store" / ("sft-" + "5" * 12) / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": step, "train/loss": 1.0}) + "\n" for step in range(1, 10_001)))
    points = read_history([directory]).stages["5" * 12].curves[0].points
    assert 200 <= len(points) <= 240
    assert points[-1][0] == 10_000


@pytest.fixture
def ranked(tmp_path):
    """A dataset of 40 rows whose scores are known: row i has score i for the student."""

    def do(higher: bool = True, names=("base", "kd", "teacher"), **changes):
        ids = [f"row-{i}" for i in range(40)]
        results = {
            name: {
                "data": {
                    "perplexity": metric([1.0] * 40, weights=[1.0] * 40, link="exp", higher=False),
                    "score": metric(list(range(40)), higher=higher),
                    **changes,
                }
            }
            for name in names
        }
        tmp_path.joinpath("scores.json").write_text(json.dumps(scores({n: model(r) for n, r in results.items()})))
        for name in names:
            predictions(tmp_path, name, "data", ids, ("text",))
        return tmp_path

    return do


def samples_of(directory, **changes):
    return read_samples([directory], collect([directory], recipe="r", seed=1, **changes))


@pytest.mark.parametrize("higher", [True, False])
def test_best_and_worst_go_by_the_metric(ranked, higher) -> None:
    (of,) = samples_of(ranked(higher))
    groups = {group: [s.id for s in of.samples if s.group == group] for group in ("best", "worst", "random")}
    top, bottom = ([f"row-{i}" for i in (39, 38, 37, 36)], [f"row-{i}" for i in range(4)])
    assert (groups["best"], groups["worst"]) == ((top, bottom) if higher else (bottom, top))
    assert len(groups["random"]) == 8
    assert (of.metric, of.model, of.total) == ("score", "kd", 40)
    assert len({s.id for s in of.samples}) == 16
    first = of.samples[0]
    assert [(a.model, a.score) for a in first.answers] == [
        (n, 39.0 if higher else 0.0) for n in ("base", "kd", "teacher")
    ]
    assert (first.reference.text, first.more_references) == ("text", 1)


def test_openings_begin_where_prompts_differ(ranked) -> None:
    directory = ranked()
    for file in (directory / "predictions").iterdir():
        text = file.read_text().replace('"prompt": "text', '"prompt": "<system>Be brief.</system>\\nQuest: text')
        file.write_text(text.replace('?", "text"', '?<end>\\n<answer>", "text"'))
    openings = [sample.opening for sample in samples_of(directory)[0].samples]
    assert openings[0] == "…39?"
    assert len(set(openings)) == 16
    # A single prompt has nothing in common with others.
    for file in (directory / "predictions").iterdir():
        file.write_text(file.read_text().splitlines()[0] + "\n")
    assert (
        samples_of(directory)[0].samples[0].opening
        == "<system>Be brief.</system> Quest: text Question 0?<end> <answer>"
    )


def test_the_draw_does_not_depend_on_the_order_of_the_rows(ranked) -> None:
    directory = ranked()
    before = samples_of(directory)
    for file in (directory / "predictions").iterdir():
        file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    assert [s.id for s in samples_of(directory)[0].samples] == [s.id for s in before[0].samples]


def test_several_answers_to_an_example_count_by_their_mean(tmp_path) -> None:
    from kdkit.report.html.samples import _by_id
    from kdkit.report.scores import MetricScores

    result = MetricScores(value=2.0, n=3, per_example=(1.0, 4.0, None), ids=("a", "a", "b"), higher_is_better=True)
    assert _by_id(result) == {"a": 2.5}


def test_without_a_metric_of_answers_all_samples_are_random(tmp_path) -> None:
    results = {"data": {"perplexity": metric([1.0] * 20, weights=[1.0] * 20, link="exp")}}
    tmp_path.joinpath("scores.json").write_text(json.dumps(scores({"kd": model(results)})))
    predictions(tmp_path, "kd", "data", [f"row-{i}" for i in range(20)], ("text",))
    (of,) = samples_of(tmp_path)
    assert {sample.group for sample in of.samples} == {"random"}
    assert of.metric == ""


def test_answers_that_were_never_generated_are_no_samples(ranked) -> None:
    directory = ranked()
    for file in (directory / "predictions").iterdir():
        file.write_text(file.read_text().replace('"text": "text"', '"text": ""'))
    assert samples_of(directory) == []
    shutil.rmtree(directory / "predictions")
    assert samples_of(directory) == []


def test_files_of_other_names_are_never_opened(ranked) -> None:
    directory = ranked(names=("base", "../../kd"[6:], "teacher"))
    (directory.parent / "x--data.jsonl").write_text("secret")
    text = (directory / "scores.json").read_text().replace('"teacher": {', '"../../x": {')
    (directory / "scores.json").write_text(text)
    (of,) = samples_of(directory)
    assert {answer.model for sample in of.samples for answer in sample.answers} == {"base", "kd"}


@pytest.mark.parametrize(
    ("line", "named"), [("{", "not JSON lines"), ("[]", "no prediction"), ('{"id": 1}', "no prediction")]
)
def test_damaged_predictions_are_named(ranked, line, named) -> None:
    directory = ranked()
    (directory / "predictions" / "kd--data.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=rf"{named}|kd--data\.jsonl"):
        samples_of(directory)


def test_all_texts_together_are_bounded(tmp_path) -> None:
    datasets, names = [f"d{i}" for i in range(12)], [f"m{i}" for i in range(14)]
    results = {name: {"score": metric(list(range(20)))} for name in datasets}
    tmp_path.joinpath("scores.json").write_text(json.dumps(scores({name: model(results) for name in names})))
    for name in names:
        for dataset in datasets:
            predictions(tmp_path, name, dataset, [f"row-{i}" for i in range(20)], ("y" * 3000,))
    roles = {"roles": {"teacher": None, "baseline": None, "reference": None}}
    found = read_samples([tmp_path], roles)
    assert len(found) == 10
    assert {len(sample.answers) for of in found for sample in of.samples} == {12}
    total = sum(
        len(passage.text)
        for of in found
        for sample in of.samples
        for passage in (sample.prompt, sample.reference, *(answer.text for answer in sample.answers))
    )
    assert 500_000 < total <= 1_000_000


@pytest.mark.parametrize(
    ("higher", "words"), [(True, "higher is better"), (False, "lower is better"), (None, "neither end is better")]
)
def test_a_column_says_which_end_is_better(higher, words) -> None:
    from kdkit.report.html.tables import Column

    assert Column("m", "d", "m", "0-100", higher).facts == f"0-100, {words}"
