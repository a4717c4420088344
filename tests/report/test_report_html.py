from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from made_up_runs import HOSTILE, enrich, run
from made_up_scores import metric, model, study

from kdkit.report.collect import collect, write_report
from kdkit.report.html import render_html

VOID = {"meta", "link", "input", "img", "br", "hr"}


class Page(HTMLParser):
    """A parsed page that insists on balanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.raw: dict[str, list[str]] = {"style": [], "script": []}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]].append(data)
        else:
            self.text.append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture
def made(tmp_path):
    """Report and scores directory of a run with everything in it."""

    def do(**changes):
        directory = run(tmp_path / "store", **changes)
        return enrich(collect([directory], recipe="demo", seed=17)), directory

    return do


def test_every_part_is_there(made) -> None:
    report, directory = made()
    page = Page(render_html(report, [directory]))
    words = page.words()
    sections = [attributes["id"] for attributes in page.attributes("section")]
    assert sections == ["scores", "teacher", "pairs", "categories", "losses", "samples", "sizes", "notes", "again"]
    assert [a["href"] for a in page.attributes("a")] == [f"#{section}" for section in sections]
    for wanted in (
        "5 models on dolly: 60 examples, seed 17.",
        "▲ better than base",
        "= no significant difference",
        "identity repeats its input 11.20 ±0.50",
        "Gap closed: 0 % is base, 100 % is teacher",
        "Retention: share of teacher's score",
        "kd − sft",
        "kind 7 (n = 19)",
        "Best and worst by rouge-l of kd",
        "stage kd (distill)",
        "12 min 34 s",
        "do_sample = false, max_new_tokens = 128",
        "kd was trained on 4 times the tokens of sft",
        "Every model was trained once (seed 17)",
        "kdkit 0.1.0",
        "learning_rate",
    ):
        assert wanted in words, wanted
    labels = [attributes["aria-label"] for attributes in page.attributes("svg")]
    assert len(labels) == 4 + 1 + 2
    rouge = next(label for label in labels if label.startswith("rouge-l by model, 0-100, higher is better: base "))
    assert "majority 3.10 ±0.50" in rouge
    assert "reference" not in rouge, "it would push all others to one side"
    assert any(
        re.match(r"Losses of stage kd: total from 4\.\d+ at step 10 to .* at step 600; ", label) for label in labels
    )
    # Nothing is left of the template, and no Python value was printed.
    assert not re.search(r"\{\{|\{%|\bNone\b|<kdkit|Undefined", words)


def test_marks_and_verdicts_agree_with_the_report(made) -> None:
    report, directory = made()
    words = Page(render_html(report, [directory])).words()
    against = [row for row in report["pairs"] if row["b"] == "base"]
    clear = [row for row in against if row["p_holm"] <= 0.05]
    assert 0 < len(clear) < len(against)
    assert words.count("▲ better than base") == len(clear)
    assert words.count("= no significant difference") == len(against) - len(clear)
    assert "▼ worse" not in words
    # The same against the teacher: all others are worse.
    turned = collect([directory], recipe="demo", seed=17, reference="teacher")
    words = Page(render_html(turned)).words()
    clear = [row for row in turned["pairs"] if "teacher" in (row["a"], row["b"]) and row["p_holm"] <= 0.05]
    assert {row["a"] for row in clear} > {"teacher"}
    assert words.count("▼ worse than teacher") == len(clear)
    assert "▲" not in words


def test_marks_are_corrected_and_verdicts_say_so(made) -> None:
    report, _ = made()
    for row in report["pairs"]:
        row |= {"p": 0.02, "p_holm": 0.2}
    words = Page(render_html(report)).words()
    assert "better, not after correction" in words
    assert "▲" not in words


def test_intervals_are_rounded_as_their_difference(made) -> None:
    report, directory = made()
    page = render_html(report, [directory])
    row = next(r for r in report["pairs"] if (r["a"], r["b"], r["metric"]) == ("kd-int4", "kd", "rouge-l"))
    low, high = row["ci95"]
    text = f"{low:+.1f} to {high:+.1f}".replace("-", "−")
    assert text in page


def test_only_our_own_code_may_run_and_nothing_is_loaded(made) -> None:
    report, directory = made(texts=HOSTILE)
    page = Page(render_html(report, [directory]))
    policy = next(m["content"] for m in page.attributes("meta") if m.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))

    def digest(tag: str) -> str:
        return base64.b64encode(hashlib.sha256("".join(page.raw[tag]).encode()).digest()).decode()

    assert rules == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest('style')}'",
        "script-src": f"'sha256-{digest('script')}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert [tag for tag, _ in page.tags].count("script") == 1 == [tag for tag, _ in page.tags].count("style")
    for tag, attributes in page.tags:
        assert tag not in {"img", "iframe", "object", "embed", "base", "form"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in {"style", "src", "srcset", "action", "xlink:href"}
            if name == "href":
                assert value.startswith("#") or value == "data:,"
    assert not re.search(r"//|url\(|@import", "".join(page.raw["style"]))
    assert not re.search(r"innerHTML|document\.write|eval\(|https?:", "".join(page.raw["script"]))


def test_hostile_text_is_shown_as_text(made, tmp_path) -> None:
    report, directory = made(texts=HOSTILE)
    page = Page(enrich_and_render(report, directory))
    shown = "".join(page.text)
    for text in (HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[3], "x" * 1000, "שלום", "👩‍👩‍👧‍👦"):
        assert text in shown
    assert "\u202e" not in shown
    assert "⟨U+202E⟩override" in shown
    assert "␀␆␛[31m␡⟨U+0085⟩" in shown
    assert "<b onmouseover=alert(1)>" in shown
    assert "id=injected" in shown
    assert not [a for _, a in page.tags if a.get("id") == "injected"]


def enrich_and_render(report, directory) -> str:
    return render_html(enrich(report, "<b onmouseover=alert(1)>"), [directory])


def test_every_field_of_a_report_is_escaped(made) -> None:
    report, _ = made()
    bad = '<i class="bad">&"\''
    text = json.dumps(report)
    for name in ("kd-int4", "dolly", "rouge-l", "0-100", "nats/token", "demo"):
        text = text.replace(name, name + json.dumps(bad)[1:-1])
    report = json.loads(text)
    report["notes"].append(bad)
    report["models"]["base"]["path"] = bad
    page = Page(render_html(report))
    assert not page.attributes("i")
    assert page.words().count(bad) > 20
    assert f"demo{bad}" in page.words()


def test_surrogates_do_not_break_the_file(made, tmp_path) -> None:
    report, directory = made(texts=("\ud800 alone", "fine"))
    write_report(report, tmp_path / "out", [directory])
    assert "⟨U+D800⟩ alone" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_same_inputs_same_bytes(made, tmp_path) -> None:
    report, directory = made()
    write_report(report, tmp_path / "a", [directory])
    write_report(json.loads(json.dumps(report)), tmp_path / "b", [directory])
    first = (tmp_path / "a" / "report.html").read_bytes()
    assert first == (tmp_path / "b" / "report.html").read_bytes()
    assert str(tmp_path).encode() not in first


def test_one_model_one_metric_one_example(write) -> None:
    directory = write({"only": model({"data": {"rouge-l": metric([3.0])}})})
    report = collect([directory], recipe="small", seed=1)
    page = Page(render_html(report, [directory]))
    assert [a["id"] for a in page.attributes("section")] == ["scores", "sizes", "notes", "again"]
    assert "1 model on data: 1 example, seed 1." in page.words()
    assert "3.00" in page.words()
    assert "sample" not in {a.get("class") for _, a in page.tags}


def test_without_intervals_and_values(write) -> None:
    nothing = {**metric([]), "value": None, "n": 0}
    entries = {
        "a": model({"data": {"m": metric([-1.0, -1.0]), "none": nothing}}, speed={}),
        "b": model({"data": {"m": metric([-1.0, -1.0]), "none": nothing}}, speed={}, parameters=None, bytes=None),
    }
    report = collect([write(entries)], recipe="flat", seed=1)
    page = Page(render_html(report))
    assert "±" not in page.words().replace("± is the longer arm", "")
    assert len(page.attributes("svg")) == 1, "a metric without a value has no chart"
    assert "–" in page.words()
    assert "−1.00" in page.words()
    assert "-1.00" not in page.words()


def test_several_datasets_have_their_own_tables(made) -> None:
    report, directory = made(datasets=("dolly", "bugnet"))
    words = Page(render_html(report, [directory])).words()
    assert "5 models on 2 datasets: 120 examples" in words
    for wanted in ("dolly, 60 examples", "bugnet, 60 examples", "rouge-l on bugnet (higher is better)"):
        assert wanted in words
    assert "dolly/rouge-l" not in words.split("Notes")[0]


def test_huge_predictions_make_no_huge_file(made) -> None:
    report, directory = made(texts=("<" * 100_000, "line\n" * 50_000), n=24)
    text = render_html(report, [directory])
    assert len(text.encode()) < 1_000_000
    assert "98,800 more characters" in Page(text).words()


def test_the_stage_gives_the_page_its_scores(tmp_path) -> None:
    from test_report_command import Context

    from kdkit.api.artifacts import Scores
    from kdkit.plugins.stages.plugin import ReportParams
    from kdkit.plugins.stages.report_stage import run as stage

    directory = run(tmp_path / "store", n=20)
    params = ReportParams.model_construct(scores=[Scores(path=directory)], teacher=None, baseline=None)
    made = stage(params, Context(tmp_path / "entry"))["report"]
    page = Page((made.path / "report.html").read_text(encoding="utf-8"))
    assert {"losses", "samples"} <= {attributes["id"] for attributes in page.attributes("section")}


def test_colours_can_be_read_in_light_and_dark() -> None:
    css = files("kdkit.report.html").joinpath("templates", "report.css").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w]+): (#[0-9a-f]{3,6});", block)) for block in css.split("@media (prefers")[:2]
    )
    for scheme in (light, dark):
        assert {f"c{index}" for index in range(8)} < scheme.keys()
        for name, colour in scheme.items():
            if name not in {"paper", "faint", "rule"}:
                # WCAG 2, level AA for text; labels of curves have their colour.
                assert contrast(colour, scheme["paper"]) >= 4.5, name


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_report_of_an_older_version_has_no_categories(made) -> None:
    report, _ = made()
    for entry in report["models"].values():
        del entry["categories"]
    del report["baselines"]
    words = Page(render_html(report)).words()
    assert "Categories" not in words
    assert "repeats its input" not in words
    assert study(n=4).keys() == report["models"].keys()
