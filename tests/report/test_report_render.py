from __future__ import annotations

import io
import re

import pytest
from made_up_scores import metric, model, study
from rich.console import Console

from kdkit.report import sentences, views
from kdkit.report.collect import collect
from kdkit.report.markdown import render_markdown
from kdkit.report.terminal import render_terminal


@pytest.fixture
def data(write):
    return collect([write(study())], recipe="demo_recipe", seed=17)


def shown(data, width=80, **options) -> str:
    out = io.StringIO()
    Console(file=out, width=width, **options).print(render_terminal(data))
    return out.getvalue()


def rows(markdown: str, title: str) -> dict[str, list[str]]:
    """The table below a heading: first cell to the others."""
    _, _, rest = markdown.partition(f"## {title}")
    lines = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells if not row[0].startswith("---")}


def test_markdown_table_has_models_in_order_with_size_and_intervals(data) -> None:
    table = rows(render_markdown(data), "Scores (n = 400)")
    assert list(table) == ["model", "base", "sft", "kd", "kd-int4", "teacher"]
    assert table["model"][:4] == ["parameters", "on disk", "trained tokens", "rouge-l (0-100)"]
    assert table["kd-int4"][:3] == ["124M", "140 MB", "4.80M"]
    assert table["teacher"][:3] == ["1.54B", "3.09 GB", "-"]
    kd = data["models"]["kd"]["metrics"]["rouge-l"]
    value, arm = re.fullmatch(r"([\d.]+) ±([\d.]+) \(\+\)", table["kd"][3]).groups()
    assert float(value) == pytest.approx(kd["value"], abs=0.01)
    assert float(arm) == pytest.approx(max(kd["ci95"][1] - kd["value"], kd["value"] - kd["ci95"][0]), abs=0.01)
    assert "(" not in table["base"][3]


def test_markdown_says_what_is_not_significant(data) -> None:
    table = rows(render_markdown(data), "Differences in exact-match")
    for row in data["pairs"]:
        if row["metric"] == "exact-match":
            verdict = table[f"{row['a']} - {row['b']}"][-1]
            assert (verdict == "no significant difference") is (row["p"] > 0.05)
    assert table["kd - sft"][-1] == "no significant difference"
    assert table["kd - base"][-1] == "kd better"
    assert rows(render_markdown(data), "Differences in perplexity")["kd - base"][-1] == "kd better"


def test_markdown_shows_shares_decoding_counts_and_limits(data) -> None:
    text = render_markdown(data)
    assert rows(text, "Gap closed")["kd"][0].endswith(" %")
    assert set(rows(text, "Retention")["model"]) == {"rouge-l", "exact-match"}
    assert rows(text, "Answers")["kd"] == ["400", "20 (5.00 %)", "0"]
    assert rows(text, "Speed")["kd"] == ["512", "4.00", "1.50 GB"]
    assert "max\\_new\\_tokens = 128" in text
    assert "temperature" not in text
    assert "trained on 4 times the tokens" in text
    assert "not the spread between training seeds" in text
    assert "seed 17" in text


def test_markdown_escapes_names_that_would_be_markup(write) -> None:
    models = {
        "a|b": model({"d": {"rouge-l": metric([1.0, 2.0])}}),
        "<b>*x*": model({"d": {"rouge-l": metric([1.0, 3.0])}}),
    }
    text = render_markdown(collect([write(models)], recipe="r", seed=1))
    assert "| a\\|b |" in text
    assert "\\<b>\\*x\\*" in text
    widths = {
        len(re.findall(r"(?<!\\)\|", line)) for line in text.partition("## Diff")[0].splitlines() if line[:1] == "|"
    }
    assert widths == {6}


@pytest.mark.parametrize("width", [80, 100, 60])
@pytest.mark.parametrize("datasets", [("dolly",), ("dolly", "codeforces-cots", "bugnet")])
def test_no_line_is_wider_than_the_terminal(write, width, datasets) -> None:
    models = study(datasets, n=30)
    models["a-student-with-a-name-that-is-longer-than-any-label-column"] = models.pop("kd")
    text = shown(collect([write(models)], recipe="demo", seed=1), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text


def test_numbers_are_never_wrapped_at_80_columns(write) -> None:
    data = collect([write(study(("dolly", "codeforces-cots"), n=30))], recipe="demo", seed=1)
    text = shown(data)
    for table in (*views.scores_tables(data), views.gap_table(data), *views.pair_tables(data)):
        for row in table.rows:
            for index, cell in enumerate(row):
                if index not in table.text_columns:
                    assert cell in text
    for line in text.splitlines():
        assert not re.match(r"\s*±", line.removeprefix("± is"))


def test_one_score_table_per_dataset(write) -> None:
    models = study(("dolly", "dolly/es"), n=30)
    data = collect([write(models)], recipe="demo", seed=1)
    tables = list(views.scores_tables(data))
    assert [table.title for table in tables] == ["Scores on dolly (n = 30)", "Scores on dolly/es (n = 30)"]
    assert all(table.header[1] == "rouge-l\n(0-100)" for table in tables)
    gap = views.gap_table(data)
    assert gap is not None
    assert "dolly/es/\nperplexity" in gap.header
    assert "| dolly/es/perplexity |" in render_markdown(data)
    assert sentences.direction_line(data).startswith("Higher is better: rouge-l, exact-match. Lower")


def test_a_model_that_was_not_scored_has_a_dash(write) -> None:
    models = {
        "a": model({"d": {"m": metric([1.0, 2.0]), "k": metric([1.0, 2.0])}}),
        "b": model({"d": {"m": metric([1.0])}}),
    }
    data = collect([write(models, datasets={"d": {"n": 2}})], recipe="r", seed=1)
    table = rows(render_markdown(data), "Scores (n = 1 to 2)")
    assert table["b"][3:] == ["1.00", "-"]


def test_terminal_repeats_labels_when_it_splits_a_table(write) -> None:
    data = collect([write(study(n=30))], recipe="demo", seed=1)
    _, _, scores = shown(data, 45).partition("Scores")
    block = scores.partition("Higher is better")[0]
    labels = re.findall(r"^kd ", block, flags=re.MULTILINE)
    assert len(labels) == len(re.findall(r"^model", block, flags=re.MULTILINE)) > 1
    assert all(name in block for name in ("rouge-l", "exact-match", "perplexity", "teacher-kl"))


def test_terminal_without_a_terminal_has_no_escape_codes(data) -> None:
    assert "\x1b" not in shown(data)
    assert "\x1b[1m" in shown(data, force_terminal=True, color_system="standard", no_color=False)


def test_terminal_prints_names_as_they_are(write) -> None:
    models = {name: model({"d": {"rouge-l": metric([1.0, 2.0])}}) for name in ("[bold]x[/bold]", ":smile:")}
    text = shown(collect([write(models)], recipe="[red]", seed=1))
    assert re.search(r"^\[bold\]x\[/bold\]  ", text, flags=re.MULTILINE)
    assert re.search(r"^:smile:  ", text, flags=re.MULTILINE)
    assert "Report: [red]" in text


def pair(**changes):
    row = {"a": "kd", "b": "base", "metric": "m", "difference": 2.0, "ci95": [1, 3], "p": 0.01, "p_holm": 0.03, "n": 9}
    return row | changes


@pytest.mark.parametrize(
    ("row", "higher", "text"),
    [
        (pair(), True, "kd better"),
        (pair(), False, "base better"),
        (pair(difference=-2.0), True, "base better"),
        (pair(p=0.04, p_holm=0.12), True, "kd better, not after correction"),
        (pair(p=0.051, p_holm=0.2), True, "no significant difference"),
        (pair(p=0.05, p_holm=0.05), True, "kd better"),
        (pair(p=None, p_holm=None), True, "no test on one example"),
    ],
)
def test_verdict(row, higher, text) -> None:
    assert views.verdict(row, higher_is_better=higher) == text


def test_marks_compare_with_the_reference_in_both_directions(write) -> None:
    x = [float(i) for i in range(20)]
    models = {
        name: model({"d": {"ppl": metric([v + d for v in x], higher=False)}})
        for name, d in {"a": 3.0, "ref": 2.0, "b": 1.0, "same": 2.0}.items()
    }
    data = collect([write(models)], recipe="r", seed=1, reference="ref")
    (table,) = views.scores_tables(data)
    marks = {row[0]: row[1].rpartition(" ")[2] for row in table.rows}
    assert marks["a"] == "(-)"
    assert marks["b"] == "(+)"
    assert marks["same"] == "(=)"
    assert not marks["ref"].startswith("(")
    assert "worse than ref" in sentences.legend(data)


def test_marks_go_by_the_corrected_p(data) -> None:
    for row in data["pairs"]:
        row["p"], row["p_holm"] = 0.01, 0.06
    (table,) = views.scores_tables(data)
    assert all(cell.endswith("(=)") for row in table.rows[1:] for cell in row[1:])


def test_sampled_answers_are_a_limit(data) -> None:
    assert not any("sampled" in line for line in sentences.limits(data))
    data["models"]["kd"]["decoding"]["dolly"]["do_sample"] = True
    assert any("sampled once" in line for line in sentences.limits(data))
    data["models"]["kd"]["decoding"]["dolly"]["num_samples"] = 4
    (line,) = [line for line in sentences.limits(data) if "sampled" in line]
    assert "sampled 4 times per prompt" in line


def test_decoding_names_the_number_of_answers_only_where_they_are_sampled(data) -> None:
    data["decoding"] = {
        "a": {"do_sample": True, "temperature": 0.7, "num_samples": 4},
        "b": {"do_sample": False, "temperature": 1.0, "num_samples": 1},
    }
    assert sentences.decoding_lines(data) == [
        "a: do_sample = true, temperature = 0.7, num_samples = 4",
        "b: do_sample = false",
    ]


@pytest.fixture
def with_baselines(write):
    x = [float(i) for i in range(20)]
    floors = {"identity": metric(x), "reference": metric([100.0] * 20)}
    models = {
        "kd": model({"d": {"rouge-l": metric([v + i % 3 for i, v in enumerate(x)]), "length": metric(x, higher=None)}})
    }
    baselines = {name: {"results": {"d": {"rouge-l": part}}} for name, part in floors.items()}
    return collect([write(models, baselines=baselines)], recipe="r", seed=1)


def test_baselines_stand_below_the_scores(with_baselines) -> None:
    table = rows(render_markdown(with_baselines), "Baselines")
    assert list(table) == ["baseline", "identity", "reference"]
    assert table["baseline"] == ["rouge-l (0-100)"]
    assert re.fullmatch(r"9\.5 ±2\.\d", table["identity"][0])
    assert table["reference"] == ["100"]
    text = shown(with_baselines)
    assert re.search(r"^identity +9\.5 ±2\.\d$", text, flags=re.MULTILINE)
    line = sentences.baselines_line(with_baselines)
    assert line.startswith("Baselines: identity echoes the input; reference gives")
    assert line.split()[0] in text
    assert line in render_markdown(with_baselines)
    assert "majority" not in text


def test_a_report_without_baselines_does_not_mention_them(data) -> None:
    assert sentences.baselines_line(data) == ""
    del data["baselines"]  # as in a report of an earlier version
    assert "aseline" not in render_markdown(data)
    assert "aseline" not in shown(data)


def test_a_metric_without_a_direction_is_said_to_have_none(with_baselines) -> None:
    assert sentences.direction_line(with_baselines) == "Higher is better: rouge-l. Neither is better: length."
    assert "Differences in length" not in render_markdown(with_baselines)


def test_answers_count_the_samples_and_those_without_a_verdict(data) -> None:
    counts = {"n": 400, "answers": 1_600, "truncated": 16, "empty": 0, "unjudged": 8}
    data["models"]["kd"]["counts"]["dolly"] = counts
    table = rows(render_markdown(data), "Answers")
    assert table["model"] == ["answers", "truncated", "empty", "unjudged"]
    assert table["kd"] == ["1,600", "16 (1.00 %)", "0", "8 (0.500 %)"]
    assert table["sft"][-1] == "0"


def test_models_that_gave_no_answers_have_no_row(data) -> None:
    for entry in data["models"].values():
        entry["counts"]["dolly"] |= {"answers": 0}
    assert views.answers_table(data) is None


def test_a_variant_of_a_metric_has_its_caveat(write) -> None:
    models = {"a": model({"d": {"rouge-l-code": metric([1.0, 2.0])}})}
    lines = sentences.limits(collect([write(models)], recipe="r", seed=1))
    assert any(line.startswith("ROUGE-L counts shared words") for line in lines)


def test_few_examples_are_a_limit(write) -> None:
    for n, wanted in ((49, True), (50, False)):
        models = {"a": model({"d": {"m": metric([float(i) for i in range(n)])}})}
        lines = sentences.limits(collect([write(models, f"n{n}")], recipe="r", seed=1))
        assert any("fewer than 50 examples" in line for line in lines) is wanted


def test_rare_passes_are_a_limit(write) -> None:
    def limited(passes: int) -> bool:
        scored = model({"d": {"exact-match": metric([100.0] * passes + [0.0] * (200 - passes))}})
        directory = write({"base": scored}, name=f"passes-{passes}")
        return "few answers pass" in render_markdown(collect([directory], recipe="r", seed=1))

    assert [limited(passes) for passes in (0, 4, 60, 196, 200)] == [False, True, False, True, False]


def test_an_undefined_score_does_not_change_the_number_of_examples(write) -> None:
    none = metric([]) | {"value": None, "reason": "no words"}
    models = {name: model({"d": {"m": part}}) for name, part in (("a", none), ("b", metric([1.0, 2.0] * 20)))}
    text = render_markdown(collect([write(models)], recipe="r", seed=1))
    assert "## Scores (n = 40)" in text
    assert "undefined (no words): m of a" in text


def test_the_reference_is_a_bound_for_metrics_of_references_only(with_baselines) -> None:
    assert "the most that metrics which compare with references can give" in render_markdown(with_baselines)


def test_further_lines_of_a_note_stand_below_its_first_word(data):
    text = shown({**data, "notes": ["one " * 30, "two"]}, 60)
    lines = text[text.index("Notes") :].splitlines()[1:5]
    assert [line[:5] for line in lines] == ["- one", "  one", "  one", "- two"]
