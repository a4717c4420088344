"""Rows and files that were made by accident or by malice, through a whole loader: one located line, or a count."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdkit.api import KdkitError
from kdkit.plugins.datasets.dolly import DollyLoader
from kdkit.plugins.datasets.plugin import DollyParams

GOOD = {"instruction": "Name a bird.", "context": "", "response": "An owl.", "category": "open_qa"}
LAST = {**GOOD, "instruction": "Name a fish.", "response": "A cod."}
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
TEXT_SUFFIXES = SUFFIXES[:3]


def load(ctx, path, **given):
    params = DollyParams.model_validate_json(json.dumps({"source": str(path), "split": "all", **given}))
    return DollyLoader(params).load(ctx)


def text_file(directory: Path, suffix: str, *rows: bytes) -> Path:
    path = directory / f"x{suffix}"
    data = b"[" + b",".join(rows) + b"]" if suffix == ".json" else b"".join(row + b"\n" for row in rows)
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    return path


def whole_file(directory: Path, suffix: str, bad: dict) -> Path:
    """``bad`` between two good rows."""
    if suffix == ".parquet":
        path = directory / "x.parquet"
        pq.write_table(pa.Table.from_pylist([GOOD, bad, LAST]), path)
        return path
    return text_file(directory, suffix, *(json.dumps(row).encode() for row in (GOOD, bad, LAST)))


def place(path: Path) -> str:
    return f"{path}:[2]" if path.suffix == ".json" else f"{path}:2"


def fails(ctx, path, **given) -> str:
    with pytest.raises(KdkitError) as error:
        load(ctx, path, **given)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def one_bad_row(ctx, path, what):
    assert fails(ctx, path, on_error="fail").startswith(f"{place(path)}: {what}")
    rows = load(ctx, path, on_error="skip")
    assert rows.counts == {"read": 3, "kept": 2, "broken": 1}
    assert {example.completion for example in rows.examples} == {"An owl.", "A cod."}
    assert f"skipped 1 broken rows; the first: {place(path)}: {what}" in ctx.lines[-1]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"response": "x" * (10 * 2**20)}, "'response' is longer than 10,000,000 characters"),
        ({"response": "x\0y"}, "'response' holds a NUL character"),
        ({"response": None}, "has no 'response'"),
    ],
    ids=["10 MB", "NUL", "missing"],
)
def test_rows_of_every_format(load_context, tmp_path, suffix, change, what):
    if "10,000,000" in what and suffix.startswith(".jsonl"):
        what = "the line is longer than 10,000,000 bytes"
    one_bad_row(load_context, whole_file(tmp_path, suffix, {**GOOD, **change}), what)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_columns_too_many_are_no_harm(load_context, tmp_path, suffix):
    more = {f"column {n}": n for n in range(500)}
    rows = load(load_context, whole_file(tmp_path, suffix, {**GOOD, "response": "A wren.", **more}))
    assert rows.counts == {"read": 3, "kept": 3, "broken": 0}


@pytest.mark.parametrize("suffix", TEXT_SUFFIXES)
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"instruction": 3}, "'instruction' is a number, not text"),
        ({"response": {"a": [1]}}, "'response' is an object, not text"),
        ({"context": ["a"]}, "'context' is a list, not text"),
        ({"category": False}, "'category' is false, not text"),
        ({"response": "\ud83d"}, "'response' holds half of a surrogate pair"),
    ],
)
def test_wrong_types(load_context, tmp_path, suffix, change, what):
    one_bad_row(load_context, whole_file(tmp_path, suffix, {**GOOD, **change}), what)


@pytest.mark.parametrize(
    ("column", "what"),
    [
        (pa.array([1, 2, 3]), "'response' is a number, not text"),
        (pa.array([b"a", b"b", b"c"]), "'response' holds bytes, which is no JSON value"),
        (pa.array([[["a"]], None, []]), "'response' is a list of other things than texts"),
    ],
)
def test_parquet_columns_of_wrong_types(load_context, tmp_path, column, what):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"instruction": ["a", "b", "c"], "response": column}), path)
    assert fails(load_context, path).startswith(f"{path}:1: {what}")
    assert load(load_context, path, on_error="skip").counts == {"read": 3, "kept": 0, "broken": 3}


DEEP = b'{"instruction": ' + b"[" * 10_000 + b"]" * 10_000 + b', "response": "x"}'


@pytest.mark.parametrize("suffix", TEXT_SUFFIXES)
@pytest.mark.parametrize(
    ("line", "what", "located"),
    [
        (DEEP, "is nested too deeply", True),
        (b'{"a": ' * 10_000 + b"1" + b"}" * 10_000, "is nested too deeply", True),
        (b'{"instruction": "caf\xe9", "response": "x"}', "is not UTF-8 at byte", False),
        (b'{"instruction": "a", "response": "x', "is not JSON: ", True),
        (b"\0" * 50, "is not JSON: ", True),
    ],
    ids=["10,000 lists", "10,000 objects", "latin-1", "cut", "NUL bytes"],
)
def test_lines_that_are_no_json(load_context, tmp_path, suffix, line, what, located):
    good = [json.dumps(row).encode() for row in (GOOD, LAST)]
    path = text_file(tmp_path, suffix, good[0], line, good[1])
    if suffix != ".json":
        one_bad_row(load_context, path, what)
        return
    for on_error in ("fail", "skip"):
        assert fails(load_context, path, on_error=on_error).startswith(f"{path}{':[2]' if located else ''}: {what}")


def empty(path: Path, suffix: str) -> bytes:
    if suffix == ".parquet":
        pq.write_table(pa.table({"instruction": pa.array([], pa.string())}), path)
        return path.read_bytes()
    return {".jsonl": b"", ".jsonl.gz": gzip.compress(b""), ".json": b"[]"}[suffix]


def cut(path: Path, suffix: str) -> bytes:
    data = whole_file(path.parent, suffix, {**GOOD, "response": os.urandom(2000).hex()}).read_bytes()
    return data[: len(data) // 2]


def noise(path: Path, suffix: str) -> bytes:
    del path, suffix
    return bytes(range(256)) * 4


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("make", [empty, cut, noise])
def test_files_that_cannot_be_used(load_context, tmp_path, suffix, make):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(make(path, suffix))
    assert fails(load_context, path, on_error="fail").startswith(str(path))
    if suffix == ".jsonl" and make is not empty:
        # Line by line there is something to skip.
        assert load(load_context, path, on_error="skip").counts["broken"] >= 1
    elif (suffix, make) != (".json", noise):
        assert fails(load_context, path, on_error="skip").startswith(str(path))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_paths_that_are_no_files(load_context, tmp_path, suffix, on_error):
    loop, directory = tmp_path / f"loop{suffix}", tmp_path / f"directory{suffix}"
    loop.symlink_to(loop)
    directory.mkdir()
    (directory / f"again{suffix}").symlink_to(directory)
    for path, where in ((loop, loop), (directory, directory / f"again{suffix}"), (tmp_path / f"no{suffix}", None)):
        assert fails(load_context, path, on_error=on_error).startswith(str(where or path))


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_gzip_bomb_is_stopped_by_its_real_bounds(load_context, tmp_path, on_error):
    path = tmp_path / "x.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=9) as stream:
        for _ in range(80):
            stream.write(b" " * 2**20)
    assert path.stat().st_size < 200_000
    assert "grows to more than 67,108,864 bytes" in fails(load_context, path, on_error=on_error)
