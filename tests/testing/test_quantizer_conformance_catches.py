"""Deliberately wrong quantizers: each must fail the suite, and every test of the suite must catch one."""

from __future__ import annotations

import inspect
import json
import shutil
import time
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from kdkit.api import KdkitError
from kdkit.api.errors import DataError
from kdkit.plugins.quantizers.rtn import RtnQuantizer
from kdkit.plugins.quantizers.rtn_plugin import RtnParams
from kdkit.testing.conformance import QuantizerConformance
from kdkit.testing.tiny import save_tiny_model

MODEL = "model.safetensors"


def right(source, rows, out, ctx):
    return RtnQuantizer(RtnParams()).quantize(source, rows, out, ctx)


def calibrated(source, rows, out, ctx):
    if not any(row.prompt for row in rows):
        raise DataError("no rows")
    return right(source, rows, out, ctx)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def scaled(source, rows, out, ctx):
    info = right(source, rows, out, ctx)
    tensors = load_file(out / MODEL)
    save_file({name: 9 * value if name.endswith("scales") else value for name, value in tensors.items()}, out / MODEL,
              metadata={"format": "pt"})  # fmt: skip
    return info


def another_tokenizer(source, rows, out, ctx):
    info = right(source, rows, out, ctx)
    text = (out / "tokenizer.json").read_text()
    (out / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|begin|>"))
    return info


def no_tokenizer(source, rows, out, ctx):
    info = right(source, rows, out, ctx)
    for file in out.glob("tokenizer*"):
        file.unlink()
    return info


def wrong_size(source, rows, out, ctx):
    info = right(source, rows, out, ctx)
    return replace(info, bytes_on_disk=info.bytes_on_disk + 1)


def a_copy(source, rows, out, ctx):
    info = right(source, rows, out, ctx)
    shutil.copyfile(source / MODEL, out / MODEL)
    return replace(info, bytes_on_disk=(out / MODEL).stat().st_size)


def no_bits(source, rows, out, ctx):
    return replace(right(source, rows, out, ctx), bits=0)


def errors_that_are_no_numbers(source, rows, out, ctx):
    return replace(right(source, rows, out, ctx), layer_errors={"a": float("nan")})


def kept_layers_that_are_none(source, rows, out, ctx):
    return replace(right(source, rows, out, ctx), kept_rtn=["no.such.layer"])


def the_time(source, rows, out, ctx):
    info = right(source, rows, out, ctx)
    edit(out / "config.json", made=time.time_ns())
    return info


def a_path(source, rows, out, ctx):
    info = right(source, rows, out, ctx)
    (out / "quantize_log.txt").write_text(str(source))
    return info


def text_in_a_file(source, rows, out, ctx):
    info = calibrated(source, rows, out, ctx)
    (out / "calibration.txt").write_text(rows[0].prompt)
    return info


def text_in_the_log(source, rows, out, ctx):
    ctx.log(f"starting with {rows[0].prompt[:40]}")
    return calibrated(source, rows, out, ctx)


def text_in_a_note(source, rows, out, ctx):
    return replace(calibrated(source, rows, out, ctx), notes=[rows[0].completion])


def again(source, rows, out, ctx):
    """Rounds the directory of a quantised model, as if it were another's."""
    if "quantization_config" not in json.loads((source / "config.json").read_text()):
        return right(source, rows, out, ctx)
    shutil.copytree(source, out)
    return None


def half_of_gpt2(source, rows, out, ctx):
    out.mkdir(parents=True)
    (out / "config.json").write_text("{}")
    shutil.rmtree(out) if "llama" in (source / "config.json").read_text() else None
    return right(source, rows, out, ctx)


def in_place(source, rows, out, ctx):
    """Writes where the result belongs from the start, and cleans nothing up."""
    out.mkdir(parents=True)
    (out / "config.json").write_text("{}")
    ctx.progress(0, 1)
    if ctx.stopping():
        raise KdkitError("stopped")
    (out / MODEL).write_bytes(bytes(10**6))


def beyond_the_end(source, rows, out, ctx):
    ctx.progress(3, 1)
    return right(source, rows, out, ctx)


def loads_rows_itself(source, rows, out, ctx):
    return right(source, ctx.load("jsonl"), out, ctx)


def in_place_politely(source, rows, out, ctx):
    """Says what happened, and leaves what it wrote."""
    try:
        in_place(source, rows, out, ctx)
    except OSError as error:
        raise KdkitError("no room") from error


def two_lines(source, rows, out, ctx):
    try:
        return right(source, rows, out, ctx)
    except KdkitError as error:
        raise KdkitError("no room\nat all") from error


LOADS, SIZE = "test_what_it_writes_loads_and_is_the_same_model", "test_its_size_is_what_lies_on_the_disk"
SAME, ROWS = "test_the_same_model_gives_the_same_files", "test_rows_of_calibration_stay_out"
NONE, TWICE = "test_without_rows_it_refuses_or_needs_none", "test_a_quantized_model_is_refused"
OTHER, DISK = "test_another_architecture_is_quantized_or_refused", "test_a_full_disk_leaves_nothing"
MIDWAY, SIGNAL = "test_a_failure_half_way_leaves_nothing", "test_a_signal_stops_it"
WRONG = [
    (scaled, LOADS, "logits differ by"),
    (another_tokenizer, LOADS, "the tokenizer is another one"),
    (no_tokenizer, LOADS, "tokenizer"),
    (beyond_the_end, LOADS, r"progress\(3, 1, {}\) is no progress"),
    (loads_rows_itself, LOADS, "a quantizer loads no data: jsonl"),
    (wrong_size, SIZE, r"bytes_on_disk is \d+, on the disk are \d+"),
    (a_copy, SIZE, r"(\d+) bytes became \1"),
    (no_bits, SIZE, "bits 0 and group_size"),
    (errors_that_are_no_numbers, SIZE, r"not finite, or of other layers: \['a'\]"),
    (kept_layers_that_are_none, SIZE, r"of other layers: \['no\.such\.layer'\]"),
    (the_time, SAME, "two runs wrote different models"),
    (a_path, SAME, "mention a path of this machine"),
    (text_in_a_file, ROWS, r"is in \['calibration\.txt'\]"),
    (text_in_the_log, ROWS, "is in what it says"),
    (text_in_a_note, ROWS, "is in what it says"),
    (right, NONE, "no rows was not refused"),
    (again, TWICE, "a quantised model was not refused"),
    (half_of_gpt2, OTHER, "it failed and left model"),
    (in_place, DISK, "File too large"),
    (in_place_politely, DISK, "it failed and left model"),
    (two_lines, DISK, "a full disk is refused in more than one line"),
    (in_place, MIDWAY, "it failed and left model"),
    (in_place, SIGNAL, "it failed and left model"),
]


def suite(quantize, *, looks_at_rows):
    class Wrong:
        def quantize(self, *args):
            return quantize(*args)

    return type("Suite", (QuantizerConformance,), {"build": lambda self: Wrong(), "calibrated": looks_at_rows})()


def check(quantize, test, source, tmp_path):
    looks_at_rows = quantize in {calibrated, text_in_a_file, text_in_the_log, text_in_a_note} or test == NONE
    method = getattr(suite(quantize, looks_at_rows=looks_at_rows), test)
    given = {"source": source, "tmp_path": tmp_path}
    method(**{name: given[name] for name in inspect.signature(method).parameters})


@pytest.fixture
def source(tmp_path):
    return save_tiny_model(tmp_path / "source")


@pytest.mark.parametrize(("quantize", "test", "reason"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_quantizer_fails(quantize, test, reason, source, tmp_path):
    with pytest.raises((KdkitError, OSError), match=reason):
        check(quantize, test, source, tmp_path)


@pytest.mark.parametrize("test", [name for name in dir(QuantizerConformance) if name.startswith("test_")])
def test_a_right_quantizer_passes_and_no_test_is_idle(test, source, tmp_path):
    assert test in {caught for _, caught, _ in WRONG}
    check(calibrated if test in {NONE, ROWS} else right, test, source, tmp_path)
