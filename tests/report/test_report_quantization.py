from __future__ import annotations

import io
from typing import Any

import pytest
from made_up_scores import metric, model

from kdkit.api.errors import DataError
from kdkit.report import views
from kdkit.report.collect import collect
from kdkit.report.html import render_html
from kdkit.report.html.quantization import quantization_figures
from kdkit.report.markdown import render_markdown
from kdkit.report.terminal import render_terminal

GPTQ: dict[str, Any] = {
    "quantizer": "gptq",
    "bits": 4,
    "group_size": 64,
    "bytes_before": 200,
    "layer_errors": {"block.0.q": 0.01, "block.0.<b>down": 0.05},
    "rtn_errors": {"block.0.q": 0.04, "block.0.<b>down": 0.05},
    "kept_rtn": ["block.0.<b>down"],
    "notes": ["block.0.<b>down: error 0.06 is above 0.05"],
}
GGUF: dict[str, Any] = {"quantizer": "gguf", "bits": 8, "group_size": 32, "layer_errors": {"head": 0.0001, "q": None}}
PEER: dict[str, Any] = {**GPTQ, "rtn_errors": {}, "notes": []}
FOREIGN: dict[str, Any] = {"quantizer": "gptq", "bits": 4, "group_size": -1}
RESULTS = {"data": {"score": metric([1.0, 2.0, 3.0])}}


def made(**facts: Any) -> dict[str, Any]:
    speed = {"prefill_tokens_per_s": 900.0, "decode_tokens_per_s": 20.0, "load_seconds": 0.5}
    return model(RESULTS, parameters=1000, kernel="torch float32 on cpu, dequantised", speed=speed, **facts)


@pytest.fixture
def report(write):
    models = {
        "base": model(RESULTS, parameters=1000, bytes=2000),
        "four": made(bytes=600, quantization=GPTQ),
        "file": made(bytes=1060, quantization=GGUF),
        "peer": made(bytes=600, quantization=PEER),
        "foreign": made(bytes=600, quantization=FOREIGN),
    }
    return collect([write(models)], recipe="r", seed=1)


def test_the_table_has_the_quantised_models_alone(report) -> None:
    table = views.quantization_table(report)
    assert {row[0]: row[1:] for row in table.rows} == {
        "four": ("gptq", "4", "64", "0.600", "3.00 %", "4.50 %", "-", "1 of 2"),
        "file": ("gguf", "8", "32", "1.06", "-", "-", "0.0100 %", "-"),
        "peer": ("gptq", "4", "64", "0.600", "-", "-", "3.00 %", "1 of 2"),
        "foreign": ("gptq", "4", "row", "0.600", "-", "-", "-", "-"),
    }
    assert len(table.header) == 9


def test_layers_that_kept_rounding_to_nearest_are_listed(report) -> None:
    assert "four: 1 of 2 layers are rounded to nearest: block.0.<b>down" in report["notes"]
    assert "four: block.0.<b>down: error 0.06 is above 0.05" in report["notes"]


def test_every_rendering_says_that_no_integer_kernel_ran(report) -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(render_terminal(report))
    console.file.close()
    for text in (render_markdown(report), render_html(report), console.export_text()):
        assert "Quantised models" in text
        assert "torch float32 on cpu, dequantised" in text
        assert "were dequantised and ran as ordinary ones" in text


def test_speed_has_load_time_prefill_and_decode(report) -> None:
    table = views.speed_table(report)
    known = dict(zip(table.header, next(row for row in table.rows if row[0] == "four"), strict=True))
    assert known["prefill\n(tokens/s)"] == "900"
    assert known["decode\n(tokens/s)"] == "20.0"
    assert known["load\n(s)"] == "0.500"
    assert next(row for row in table.rows if row[0] == "base")[-1] == "-"


def test_layers_are_drawn_beside_rounding_to_nearest(report) -> None:
    figures = list(quantization_figures(report))
    assert [figure.title for figure in figures] == ["four", "file", "peer"]
    four, file, _ = figures
    assert four.svg.count('class="curve') == 2
    assert 'class="curve dashed"' in four.svg
    assert "lost output" in four.facts
    assert file.svg.count('class="curve') == 1
    assert "lost weight" in file.facts
    assert [cell.text for cell in four.numbers.rows[1]] == ["block.0.<b>down", "5.00", "5.00"]
    assert four.numbers.rows[1][0].note == "rounded to nearest"
    assert "block.0.<b>down" in four.remark
    page = render_html(report)
    assert "<b>down" not in page
    assert "&lt;b&gt;down" in page


def test_reports_without_quantised_models_have_no_section(write) -> None:
    report = collect([write({"base": model(RESULTS)})], recipe="r", seed=1)
    assert views.quantization_table(report) is None
    assert "kernel" not in views.speed_table(report).header
    assert 'id="quantized"' not in render_html(report)
    for entry in report["models"].values():  # as a version before this one wrote them
        del entry["quantization"], entry["kernel"]
    assert "Quantised" not in render_markdown(report)
    assert 'id="quantized"' not in render_html(report)


def test_facts_of_the_wrong_kind_are_refused(write) -> None:
    with pytest.raises(DataError, match="quantization"):
        collect([write({"a": made(quantization={"quantizer": "gptq", "bits": "four"})})], recipe="r", seed=1)


@pytest.mark.parametrize("width", range(44, 100))
def test_no_word_is_broken_where_columns_have_no_room(report, width) -> None:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width).print(render_terminal(report))
    speed = out.getvalue().split("\nSpeed")[1].split("\nAnswers")[0].split()
    for name in ("four", "file", "peer"):
        assert name in speed
    assert speed.count("float32") == speed.count("torch") == len([m for m in report["models"].values() if m["kernel"]])
