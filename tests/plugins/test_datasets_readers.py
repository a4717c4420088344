from __future__ import annotations

import datetime
import gzip
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdkit.api import DataError, EnvironmentUnmet
from kdkit.plugins.datasets import json_list, readers, values
from kdkit.plugins.datasets.readers import read_rows


def columns(path: Path) -> list[dict]:
    rows = list(read_rows(path))
    assert [row.problem for row in rows] == [""] * len(rows)
    return [dict(row.columns) for row in rows]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


ROWS = [{"a": "uno", "n": 1, "f": 0.5, "l": [1, None, {"x": True}]}, {"a": "dos\u2028tres\x85", "n": None}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def test_jsonl_lines_end_at_newline_only(tmp_path):
    assert columns(write(tmp_path / "x.jsonl", LINES)) == ROWS


def test_jsonl_with_bom_crlf_blank_lines_and_no_final_newline(tmp_path):
    data = b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n").rstrip()
    file = write(tmp_path / "x.jsonl", data)
    assert columns(file) == ROWS
    assert [row.where for row in read_rows(file)] == [f"{file}:1", f"{file}:3"]


def test_jsonl_gz(tmp_path):
    assert columns(write(tmp_path / "x.jsonl.gz", gzip.compress(LINES))) == ROWS


def test_json_list(tmp_path):
    file = write(tmp_path / "x.json", b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode())
    assert columns(file) == ROWS
    assert [row.where for row in read_rows(file)] == [f"{file}:[1]", f"{file}:[2]"]


def test_json_file_with_one_object_a_line(tmp_path):
    assert columns(write(tmp_path / "x.json", LINES)) == ROWS


def test_parquet_dates_are_text_and_nan_is_null(tmp_path):
    table = pa.table(
        {
            "a": ["x", None],
            "d": [datetime.date(2024, 5, 1), None],
            "f": [float("nan"), 1.5],
            "m": pa.array([[{"role": "user", "content": "hi"}], []]),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    assert columns(tmp_path / "x.parquet") == [
        {"a": "x", "d": "2024-05-01", "f": None, "m": [{"role": "user", "content": "hi"}]},
        {"a": None, "d": None, "f": 1.5, "m": []},
    ]


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (pa.array([b"\x00\x01"]), "'x' holds bytes, which is no JSON value"),
        (pa.array([float("inf")]), "'x' holds a number that is not finite"),
        (pa.array(["a\0b"]), "'x' holds a NUL character"),
    ],
)
def test_parquet_values_that_are_no_json(tmp_path, array, problem):
    pq.write_table(pa.table({"x": array}), tmp_path / "x.parquet")
    (row,) = read_rows(tmp_path / "x.parquet")
    assert (row.where, row.problem) == (f"{tmp_path}/x.parquet:1", problem)


def test_parquet_rows_are_numbered_over_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_BATCH", 2)
    pq.write_table(pa.table({"n": list(range(5))}), tmp_path / "x.parquet")
    rows = list(read_rows(tmp_path / "x.parquet"))
    assert [(row.where.rsplit(":", 1)[1], row.columns["n"]) for row in rows] == [(str(i + 1), i) for i in range(5)]


def test_directory_takes_its_data_files_by_name(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "c.jsonl", b'{"n": 9}\n')
    write(tmp_path / "b.jsonl", b'{"n": 2}\n')
    write(tmp_path / "a.json", b'[{"n": 1}]')
    write(tmp_path / "README.md", b"# no rows")
    write(tmp_path / ".hidden.jsonl", b"not json")
    assert columns(tmp_path) == [{"n": 1}, {"n": 2}]


DEEP = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
HOSTILE = [
    pytest.param(b"{", "is not JSON: Expecting property name enclosed in double quotes at character 2", id="truncated"),
    pytest.param(b'{"a": "x', "is not JSON: Unterminated string", id="cut text"),
    pytest.param(b'{"a": 1} {"a": 2}', "is not JSON: Extra data at character 10", id="two objects"),
    pytest.param(b'["a"]', "is a list, not an object", id="list"),
    pytest.param(b"null", "is null, not an object", id="null"),
    pytest.param(b"17", "is a number, not an object", id="number"),
    pytest.param(b'"text"', "is a text, not an object", id="text"),
    pytest.param(b'{"a": "caf\xe9"}', "is not UTF-8 at byte 11", id="latin-1"),
    pytest.param('{"a": 1}'.encode("utf-16"), "is not UTF-8 at byte 1", id="utf-16"),
    pytest.param(b"\0" * 300, "is not JSON", id="NUL bytes of a lost disk block"),
    pytest.param(b'{"a": "x\\u0000y"}', "'a' holds a NUL character", id="escaped NUL"),
    pytest.param(b'{"a": {"b": ["\\ud83d"]}}', "'a' holds half of a surrogate pair", id="lone surrogate"),
    pytest.param(b'{"\\udc00": 1}', "holds half of a surrogate pair", id="surrogate key"),
    pytest.param(b'{"a": NaN}', "is not JSON: NaN is no JSON number", id="NaN"),
    pytest.param(b'{"a": [-Infinity]}', "is not JSON: -Infinity is no JSON number", id="infinity"),
    pytest.param(b'{"a": 1e999}', "'a' holds a number that is not finite", id="overflow"),
    pytest.param(b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit", id="huge integer"),
    pytest.param(DEEP, "is nested too deeply", id="100,000 brackets"),
    pytest.param(b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "'a' is nested more than 64 levels deep", id="65 levels"),
]


@pytest.mark.parametrize(("line", "problem"), HOSTILE)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_broken_line_is_named_and_its_neighbours_are_read(tmp_path, line, problem, suffix):
    data = b'{"n": 1}\n' + line + b'\n{"n": 3}\n'
    file = write(tmp_path / f"x{suffix}", gzip.compress(data) if suffix == ".jsonl.gz" else data)
    first, broken, last = read_rows(file)
    assert (first.columns, last.columns) == ({"n": 1}, {"n": 3})
    assert broken.where == f"{file}:2"
    assert broken.problem.startswith(problem) or broken.problem.endswith(problem)
    assert dict(broken.columns) == {}


def test_63_levels_and_surrogate_pairs_are_fine(tmp_path):
    data = b'{"a": ' + b"[" * 63 + b"]" * 63 + b', "b": "\\ud83d\\ude00"}\n'
    (row,) = read_rows(write(tmp_path / "x.jsonl", data))
    assert row.problem == ""
    assert row.columns["b"] == "\U0001f600"


def test_line_length_limit_counts_to_the_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE", 20)
    fits, too_long = b'{"a": "' + b"x" * 11 + b'"}', b'{"a": "' + b"x" * 13 + b'"}'
    assert (len(fits), len(too_long)) == (20, 22)
    rows = list(read_rows(write(tmp_path / "x.jsonl", fits + b"\n" + too_long + b"\n" + fits * 3 + b"\n" + fits)))
    assert [bool(row.problem) for row in rows] == [False, True, True, False]
    assert rows[1].problem == "the line is longer than 20 bytes"
    assert rows[3].where.endswith(":4")


def test_a_huge_line_is_never_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE", 10_000)
    file = write(tmp_path / "x.jsonl", b"x" * 20_000_000 + b'\n{"n": 2}\n')
    tracemalloc.start()
    try:
        long, row = read_rows(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert long.problem.startswith("the line is longer")
    assert row.columns == {"n": 2}
    assert peak < 2_000_000


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_gzip_bomb_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "EXPANSION_FROM", 1_000_000)
    file = write(tmp_path / "x.jsonl.gz", gzip.compress(b"\n" * 10_000_000))
    with pytest.raises(DataError) as error:
        list(read_rows(file))
    assert one_line(error).startswith(f"{file}: grows to more than ")


def test_repetitive_compressed_rows_are_no_bomb(tmp_path):
    data = b"".join(b'{"n": %d, "text": "the same text again and again"}\n' % n for n in range(50_000))
    assert len(columns(write(tmp_path / "x.jsonl.gz", gzip.compress(data)))) == 50_000


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_truncated_gzip(tmp_path, keep):
    data = gzip.compress(os.urandom(1000).hex().encode().join([b'{"a": "', b'"}\n']) * 50)
    file = write(tmp_path / "x.jsonl.gz", data[: int(len(data) * keep)])
    with pytest.raises(DataError, match="is damaged or cut") as error:
        list(read_rows(file))
    assert one_line(error).startswith(str(file))


def test_gzip_that_is_none(tmp_path):
    with pytest.raises(DataError, match="is damaged or cut"):
        list(read_rows(write(tmp_path / "x.jsonl.gz", LINES)))


@pytest.mark.parametrize("damage", ["cut", "text", "flipped"])
def test_damaged_parquet(tmp_path, damage):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [f"row {n}" for n in range(1000)]}), file)
    data = bytearray(file.read_bytes())
    data[40:60] = bytes(20)
    file.write_bytes({"cut": data[: len(data) // 2], "text": b"PAR1 not really", "flipped": bytes(data)}[damage])
    with pytest.raises(DataError, match="is damaged") as error:
        list(read_rows(file))
    assert one_line(error).startswith(str(file))


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("x.jsonl", b"", "is empty"),
        ("x.jsonl", b"\n \r\n", "is empty"),
        ("x.json", b"[]", "is empty"),
        ("x.json", b"", "is empty"),
        # Without the time of day, which would make another test name in each of pytest's workers.
        ("x.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("x.csv", b"a,b\n", "has an unknown format; allowed: .jsonl, .jsonl.gz, .json, .parquet"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, data, what):
    file = write(tmp_path / name, data)
    with pytest.raises(DataError) as error:
        list(read_rows(file))
    assert one_line(error).startswith(f"{file}: {what}")


def test_empty_parquet(tmp_path):
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="is empty"):
        list(read_rows(tmp_path / "x.parquet"))


def test_an_empty_file_in_a_directory_is_named(tmp_path):
    write(tmp_path / "a.jsonl", LINES)
    write(tmp_path / "b.jsonl", b"")
    with pytest.raises(DataError, match=r"b\.jsonl: is empty"):
        list(read_rows(tmp_path))


def test_missing_file_pipe_and_directory_without_data(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(read_rows(tmp_path / "absent.jsonl"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="is no regular file"):
        list(read_rows(tmp_path / "pipe.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data files in this directory"):
        list(read_rows(tmp_path / "empty"))


def test_a_file_the_system_refuses(tmp_path, monkeypatch):
    file = write(tmp_path / "x.jsonl", LINES)

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(EnvironmentUnmet, match="cannot be read: Permission denied"):
        list(read_rows(file))


def test_json_list_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(json_list, "_CHUNK", 3)
    rows = [{"a": "ñ€𝄞" * n, "n": [n, {"x": "\\]"}]} for n in range(9)]
    for text in (
        json.dumps(rows, ensure_ascii=False),
        json.dumps(rows, indent=3) + " \n",
        "[" + json.dumps(rows[8]) + "]",
    ):
        assert columns(write(tmp_path / "x.json", text.encode())) == json.loads(text)


def test_json_list_never_holds_more_than_an_item(tmp_path):
    file = tmp_path / "x.json"
    file.write_bytes(b"[" + b",\n".join(b'{"n": %d, "text": "%s"}' % (n, b"x" * 1000) for n in range(20_000)) + b"]")
    tracemalloc.start()
    try:
        assert sum(row.columns["n"] for row in read_rows(file)) == sum(range(20_000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert file.stat().st_size > 20_000_000
    assert peak < 2_000_000


def test_a_broken_item_of_a_json_list_is_named_and_its_neighbours_are_read(tmp_path):
    items = ['{"n": 1}', "3", '{"a": NaN}', '{"a": "x\\u0000"}', '{"a": ' + "[" * 64 + "]" * 64 + "}", '{"n": 6}']
    file = write(tmp_path / "x.json", f"[{', '.join(items)}]".encode())
    rows = list(read_rows(file))
    assert [row.where for row in rows] == [f"{file}:[{n}]" for n in range(1, 7)]
    assert [row.problem for row in rows] == [
        "",
        "is a number, not an object",
        "'a' holds a number that is not finite",
        "'a' holds a NUL character",
        "'a' is nested more than 64 levels deep",
        "",
    ]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b'[{"a": 1},', ":[2]: is not JSON: Expecting value at character 11"),
        (b'[{"a": 1}', ":[1]: is not JSON: expecting ',' or ']' at character 10"),
        (b'[{"a": 1} {"a": 2}]', ":[1]: is not JSON: expecting ',' or ']' at character 11"),
        (b'[{"a": 1}] x', ":[1]: is not JSON: more text after the list at character 12"),
        (b'[{"a": 1}, {"a": 2]', ":[2]: is not JSON: Expecting ',' delimiter at character 19"),
        (b"[" * 100_000, ":[1]: is nested too deeply"),
        (b'[{"a": 1}, ' + b"[" * 10_000 + b"]" * 10_000 + b"]", ":[2]: is nested too deeply"),
        (b'[{"a": "\xff"}]', ": is not UTF-8 at byte 9"),
        (b'[ {"a": "' + "ñ".encode() * 70_000 + b'\xe2\x82"}]', ":[1]: is not UTF-8 at byte 140,010"),
        (b'[{"a": ' + b"9" * 5000 + b"}]", ":[1]: is not JSON: Exceeds the limit"),
    ],
)
def test_a_json_list_that_breaks_off_says_where(tmp_path, data, what):
    file = write(tmp_path / "x.json", data)
    with pytest.raises(DataError) as error:
        list(read_rows(file))
    assert one_line(error).startswith(f"{file}{what}")


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (b'{"a": 1 "b": 2}', "Expecting ',' delimiter at character 20"),
        (b"{'a': 1}", "Expecting property name enclosed in double quotes at character 13"),
        (b'{"a": tru}', "Expecting value at character 18"),
        (b'{"a": "\x01"}', "Invalid control character at character 19"),
    ],
)
def test_a_syntax_error_in_a_long_json_list_is_no_long_item(tmp_path, monkeypatch, broken, what):
    monkeypatch.setattr(readers, "MAX_LINE", 1000)
    monkeypatch.setattr(json_list, "_CHUNK", 100)
    file = write(tmp_path / "x.json", b'[{"a": 1}, ' + broken + b', {"a": 3}' * 1000 + b"]")
    with pytest.raises(DataError) as error:
        list(read_rows(file))
    assert one_line(error).startswith(f"{file}:[2]: is not JSON: {what}")


@pytest.mark.parametrize("chunk", range(1, 40))
def test_a_json_list_is_the_same_wherever_the_window_ends(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_list, "_CHUNK", chunk)
    items = [{"é": '\u2028\\"', "n": [-1.5e-10, True, False, None]}, {"𝄞": "𝄞𝄞", "m": [123456789, {}]}]
    file = write(tmp_path / "x.json", json.dumps(items, indent=1).encode())
    assert [row.columns for row in read_rows(file)] == items


def test_longest_item_of_a_json_list(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE", 1000)
    monkeypatch.setattr(json_list, "_CHUNK", 100)
    file = write(tmp_path / "x.json", b'[{"a": 1}, {"a": "' + b"x" * 5000 + b'"}]')
    with pytest.raises(DataError, match=r"x\.json:\[2\]: is longer than 2,000 characters"):
        list(read_rows(file))


def test_parquet_row_that_is_not_utf8_is_named_and_its_neighbours_are_read(tmp_path):
    offsets, data = pa.py_buffer(np.array([0, 2, 5, 6], "int32").tobytes()), pa.py_buffer(b"okcaf\xe9")
    text = pa.Array.from_buffers(pa.string(), 3, [None, offsets, data])
    assert len(text) == 3
    pq.write_table(pa.table({"a": text}), tmp_path / "x.parquet")
    rows = list(read_rows(tmp_path / "x.parquet"))
    assert [row.columns for row in rows[:2]] == [{"a": "ok"}, {"a": "caf"}]
    assert rows[2].problem == "holds text that is not UTF-8 at byte 1"


def test_parquet_bombs_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "EXPANSION_FROM", 1_000_000)
    monkeypatch.setattr(readers, "EXPANSION", 20)
    pq.write_table(pa.table({"a": ["x" * 3_000_000]}), tmp_path / "long.parquet", use_dictionary=False)
    pq.write_table(pa.table({"a": ["y" * 10_000] * 10_000}), tmp_path / "often.parquet")
    assert (tmp_path / "often.parquet").stat().st_size < 50_000
    for name in ("long", "often"):
        with pytest.raises(DataError) as error:
            list(read_rows(tmp_path / f"{name}.parquet"))
        assert f"{name}.parquet: grows to more than " in one_line(error)


def test_texts_that_a_table_holds_once_and_names_often_count_each_time(tmp_path, monkeypatch):
    def save(count: int) -> Path:
        column = pa.DictionaryArray.from_arrays(pa.array([0, 1] * count), pa.array(["x" * 1000, "y"]))
        pq.write_table(pa.table({"a": column, "n": pa.array(range(2 * count))}), tmp_path / "x.parquet")
        return tmp_path / "x.parquet"

    assert [row.columns for row in read_rows(save(2))] == [
        {"a": text, "n": n} for n, text in enumerate(["x" * 1000, "y"] * 2)
    ]
    monkeypatch.setattr(readers, "EXPANSION_FROM", 100_000)
    monkeypatch.setattr(readers, "EXPANSION", 1)
    with pytest.raises(DataError, match="grows to more than"):
        list(read_rows(save(200)))
    lists = pa.ListArray.from_arrays(pa.array([0, 1]), pa.DictionaryArray.from_arrays(pa.array([0]), pa.array(["x"])))
    pq.write_table(pa.table({"a": lists}), tmp_path / "y.parquet")
    with pytest.raises(DataError, match="dictionaries within lists"):
        list(read_rows(tmp_path / "y.parquet"))


def test_a_parquet_file_that_says_it_is_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "EXPANSION_FROM", 1_000_000)
    pq.write_table(pa.table({"a": ["x" * 3_000_000]}), tmp_path / "x.parquet", use_dictionary=False, compression="zstd")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", None)
    with pytest.raises(DataError, match="grows to more than "):
        list(read_rows(tmp_path / "x.parquet"))


def test_large_parquet_batches_become_objects_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_BATCH_BYTES", 100)
    pq.write_table(pa.table({"a": [f"{n:0200}" for n in range(70)]}), tmp_path / "x.parquet")
    assert [int(row["a"]) for row in columns(tmp_path / "x.parquet")] == list(range(70))


def test_a_long_text_is_refused_and_a_list_of_tokens_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(values, "MAX_TEXT", 10)
    file = write(tmp_path / "x.jsonl", b'{"a": "0123456789"}\n{"a": "0123456789x"}\n{"a": ["012345", "6789x"]}\n')
    assert [row.problem for row in read_rows(file)] == ["", "'a' is longer than 10 characters", ""]
    (row,) = read_rows(write(tmp_path / "y.jsonl", b'{"a": ["0123456789x", "b"]}'))
    assert row.problem == "'a' is longer than 10 characters"


@pytest.mark.parametrize(
    ("value", "problem"),
    [('"a\\u0000"', "'t' holds a NUL character"), ('"\\udc00"', "'t' holds half of a surrogate pair")],
)
def test_broken_tokens_in_a_list(tmp_path, value, problem):
    (row,) = read_rows(write(tmp_path / "x.jsonl", f'{{"t": ["a", {value}, "b"]}}'.encode()))
    assert row.problem == problem


def test_links_in_a_circle_and_directories_that_look_like_files(tmp_path):
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    (tmp_path / "dir.jsonl").mkdir()
    for path, what in (
        (loop, "no such file"),
        (tmp_path / "dir.jsonl", "no data files"),
        (tmp_path, "is no regular f"),
    ):
        with pytest.raises(DataError, match=what):
            list(read_rows(path))
