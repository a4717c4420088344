"""Caches on disk: what is written comes back, and what a stranger or a full disk left is refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from test_signal_cache import by_id, made_up

from kdkit.api import DataError
from kdkit.train.signal_cache import encode, store
from kdkit.train.signal_cache.bits import pack_unary, pack_widths
from kdkit.train.signal_cache.description import (
    Identity,
    RuleFacts,
    Start,
    TeacherFacts,
    VocabularyFacts,
    difference,
    self_hash,
)
from kdkit.train.signal_cache.encode import Kept, decode_row, join
from kdkit.train.signal_cache.ids import IdCode
from kdkit.train.signal_cache.rows import Row, id_hash, row_hash
from kdkit.train.signal_cache.store import Entry, Reader, Writer, read_counts, write_counts

SHARD = "shard-00000.kdsc"


def entries(count: int, *, start: int = 0) -> list[Entry]:
    made = []
    for index in range(start, start + count):
        kept = made_up(index, 300, 4, scale=2, most=30)
        made.append(Entry(Row(f"row-{index}", row_hash((index, 1, 2), (False, True, True)), 4), kept))
    return made


def identity(**values) -> Identity:
    base = {
        "teacher": TeacherFacts(name="local t", use="local", models={"model": "aa"}, settings="0" * 64),
        "vocabulary": VocabularyFacts(width=300, tokens=300, fingerprint="1" * 64),
        "template": "2" * 64,
        "rule": RuleFacts(mass=0.999, min_probability=0.0, max_k=512, temperature=1.0, bits=8),
    }
    return Identity(**{**base, **values})


def start(counts: np.ndarray | None = None, **values) -> Start:
    code = IdCode(np.arange(300) if counts is None else counts).digest
    mine = identity(**values)
    return Start(**{name: getattr(mine, name) for name in Identity.model_fields}, code=code, measured={"kl": 0.1})


def writer(directory: Path, **values) -> Writer:
    return Writer(directory, start(**values))


def write(directory: Path, *shards: list[Entry]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_counts(directory, np.arange(300))
    made = writer(directory)
    for number, shard in enumerate(shards):
        made.write(number, rows_of(shard), shard)
    made.finish(len(shards))


def rows_of(shard: list[Entry]) -> list[Row]:
    return [entry.row for entry in shard]


def describe(directory: Path, change) -> None:
    """Change cache.json as somebody would who knows how its hash is made."""
    file = directory / "cache.json"
    data = json.loads(file.read_text())
    data.pop("sha256")
    change(data)
    file.write_text(json.dumps({**data, "sha256": self_hash(data)}))


def reshard(directory: Path, body: bytes, **record: int) -> None:
    """Replace the first shard by one with a single row, all its checksums right."""
    path = directory / SHARD
    head = path.read_bytes()[: store._HEAD.size]
    values = {"offset": len(head), "size": len(body), "tokens": 1, "crc": zlib.crc32(body), **record}
    index = np.zeros(1, dtype=store._RECORD)
    index["row"] = b"x" * 16
    for name, value in values.items():
        index[name] = value
    raw = index.tobytes()
    path.write_bytes(head + body + raw + store._FOOTER.pack(len(head + body), 1, zlib.crc32(raw), store._MARK))
    describe(directory, lambda data: data["shards"].update({SHARD: hashlib.sha256(raw).hexdigest()}))


# --- writing and reading ----------------------------------------------------------------------------------------------


def test_rows_are_read_one_by_one_from_any_shard(tmp_path):
    shards = entries(7), entries(5, start=7)
    write(tmp_path, *shards)
    reader = Reader(tmp_path)
    assert reader.description.totals.model_dump() == {
        "rows": 12, "tokens": 48, "bytes": sum(file.stat().st_size for file in tmp_path.iterdir())
    }  # fmt: skip
    for entry in (*shards[0], *shards[1]):
        place = reader.find(entry.row.hash)
        assert place is not None
        assert [set(token) for token in by_id(reader.read(place))] == [set(token) for token in by_id(entry.kept)]
        assert reader.knows(entry.row.id)
    assert reader.find(b"\0" * 16) is None
    assert not reader.knows("row-12")


def test_the_order_of_a_shard_is_that_of_its_rows_whatever_comes_first(tmp_path):
    shard = entries(7)
    write(tmp_path / "a", shard)
    write(tmp_path / "b")
    writer(tmp_path / "b").write(0, rows_of(shard), iter(shard[::-1]))
    assert (tmp_path / "a" / SHARD).read_bytes() == (tmp_path / "b" / SHARD).read_bytes()


def test_hashes_that_end_in_zero_are_found(tmp_path):
    kept = made_up(1, 300, 4, scale=2, most=30)
    hashes = [bytes([7] * 15 + [0]), bytes([7] * 16), bytes([0] * 16)]
    write(tmp_path, [Entry(Row(f"{h}", h, 4), kept) for h in hashes])
    assert len({Reader(tmp_path).find(h) for h in hashes}) == 3
    assert len(id_hash("\ud800")) == 8


def test_a_cache_grows_by_shards(tmp_path):
    write(tmp_path / "a", entries(7), entries(5, start=7))
    write(tmp_path / "b", entries(7))
    first = (tmp_path / "b" / SHARD).read_bytes()
    more = writer(tmp_path / "b")
    more.write(1, rows_of(entries(5, start=7)), entries(5, start=7))
    more.finish(2)
    assert (tmp_path / "b" / SHARD).read_bytes() == first
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_a_cache_takes_over_the_shards_of_another(tmp_path):
    write(tmp_path / "a", entries(7), entries(5, start=7))
    (tmp_path / "b").mkdir()
    write_counts(tmp_path / "b", np.arange(300))
    grown = writer(tmp_path / "b")
    for _ in range(2):
        grown.adopt(Reader(tmp_path / "a"))
    assert (tmp_path / "b" / SHARD).stat().st_ino == (tmp_path / "a" / SHARD).stat().st_ino, "one file on the disk"
    grown.write(2, rows_of(entries(3, start=12)), entries(3, start=12))
    assert grown.finish(3).totals.rows == 15
    assert {entry.row.hash for entry in entries(15) if Reader(tmp_path / "b").find(entry.row.hash) is None} == set()
    damaged = bytearray((tmp_path / "a" / SHARD).read_bytes())
    damaged[store._HEAD.size + 9] ^= 1
    (tmp_path / "a" / SHARD).unlink()
    (tmp_path / "a" / SHARD).write_bytes(damaged)
    (tmp_path / "b" / SHARD).unlink()
    with pytest.raises(DataError, match="a row is damaged"):
        grown.adopt(Reader(tmp_path / "a"))


def test_a_copy_stands_in_where_files_cannot_have_two_names(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path / "a", entries(7))
    (tmp_path / "b").mkdir()
    write_counts(tmp_path / "b", np.arange(300))
    writer(tmp_path / "b").adopt(Reader(tmp_path / "a"))
    assert (tmp_path / "b" / SHARD).read_bytes() == (tmp_path / "a" / SHARD).read_bytes()
    assert not list((tmp_path / "b").glob("*.tmp"))


@pytest.mark.parametrize("cut", [1, 6, 30, 200])
def test_a_shard_that_was_cut_off_is_not_there(tmp_path, cut):
    write(tmp_path, entries(7))
    shard, rows = tmp_path / SHARD, rows_of(entries(7))
    assert writer(tmp_path).has(0, rows)
    assert not writer(tmp_path).has(0, rows[:6])
    assert not writer(tmp_path).has(1, rows)
    shard.write_bytes(shard.read_bytes()[:-cut])
    assert not writer(tmp_path).has(0, rows)
    with pytest.raises(DataError, match=r"shard-00000.kdsc: (is cut off or damaged|has a damaged index)"):
        Reader(tmp_path)


def test_damage_is_found_where_it_is(tmp_path):
    write(tmp_path, entries(7))
    shard = tmp_path / SHARD
    data = bytearray(shard.read_bytes())
    data[store._HEAD.size + 14] ^= 1
    shard.write_bytes(bytes(data))
    assert not writer(tmp_path).has(0, rows_of(entries(7)))
    reader = Reader(tmp_path)
    places = [reader.find(entry.row.hash) for entry in entries(7)]
    with pytest.raises(DataError, match=f"at byte {store._HEAD.size}: a row is damaged"):
        reader.read(places[0])
    assert [reader.read(place).tokens for place in places[1:]] == [4] * 6


def test_every_byte_of_the_files_counts(tmp_path):
    write(tmp_path, entries(1))
    row = entries(1)[0].row
    for name in (SHARD, "cache.json"):
        raw = (tmp_path / name).read_bytes()
        for place in range(len(raw)):
            (tmp_path / name).write_bytes(raw[:place] + bytes([raw[place] ^ 8]) + raw[place + 1 :])
            with pytest.raises(DataError):
                Reader(tmp_path).read(Reader(tmp_path).find(row.hash) or 0)
        (tmp_path / name).write_bytes(raw)


def test_a_shard_for_another_code_rule_or_teacher_is_not_there(tmp_path):
    write(tmp_path, entries(7))
    rows = rows_of(entries(7))
    other = TeacherFacts(name="local t", use="local", models={"model": "bb"}, settings="0" * 64)
    rule = RuleFacts(mass=0.999, min_probability=0.0, max_k=512, temperature=1.0, bits=9)
    renamed = TeacherFacts(name="another name", use="local", models={"model": "aa"}, settings="0" * 64)
    assert writer(tmp_path, teacher=renamed).has(0, rows)
    assert not writer(tmp_path, teacher=other).has(0, rows)
    assert not writer(tmp_path, rule=rule).has(0, rows)
    changed = np.arange(300)
    changed[0] = 400
    write_counts(tmp_path, changed)
    assert not Writer(tmp_path, start(changed)).has(0, rows)
    with pytest.raises(DataError, match="belongs to another cache"):
        Writer(tmp_path, start(changed)).finish(1)


def test_shards_that_are_not_described_are_removed(tmp_path):
    write(tmp_path, entries(7), entries(5, start=7))
    writer(tmp_path).finish(1)
    assert not (tmp_path / "shard-00001.kdsc").exists()


def test_other_files_than_described_are_refused(tmp_path):
    write(tmp_path, entries(7))
    write(tmp_path / "other", entries(7, start=50))
    about = tmp_path / "cache.json"
    text = about.read_text()
    (tmp_path / SHARD).write_bytes((tmp_path / "other" / SHARD).read_bytes())
    with pytest.raises(DataError, match="not the shard that cache"):
        Reader(tmp_path)
    write(tmp_path, entries(7))
    write_counts(tmp_path, np.arange(300)[::-1])
    with pytest.raises(DataError, match="is not the one"):
        _ = Reader(tmp_path).code
    (tmp_path / "counts.bin").write_bytes(b"no")
    with pytest.raises(DataError, match="cannot be read"):
        _ = Reader(tmp_path).code
    about.write_text(text.replace('"bits": 8', '"bits": 9'))
    with pytest.raises(DataError, match="was changed after it was written"):
        Reader(tmp_path)
    about.write_text(json.dumps({"format": 99, "sha256": ""}))
    with pytest.raises(DataError, match="has format 99; allowed: 2"):
        Reader(tmp_path)
    about.unlink()
    with pytest.raises(DataError, match="no finished teacher cache"):
        Reader(tmp_path)


def test_leftovers_of_an_interruption_are_removed(tmp_path):
    write_counts(tmp_path, np.arange(300))
    (tmp_path / "shard-00003.kdsc.tmp").write_bytes(b"half")
    writer(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["counts.bin"]


def test_two_identities_differ_in_words():
    assert difference(identity(), identity()) is None
    teacher = identity().teacher
    cases = {
        "another teacher": {"teacher": teacher.model_copy(update={"models": {"model": "bb"}})},
        "other settings of the teacher": {"teacher": teacher.model_copy(update={"settings": "9" * 64})},
        "another tokenizer": {"vocabulary": VocabularyFacts(width=300, tokens=300, fingerprint="9" * 64)},
        "another vocabulary (300 and 299 entries)": {
            "vocabulary": VocabularyFacts(width=299, tokens=300, fingerprint="1" * 64)
        },
        "another chat template": {"template": "9" * 64},
        "another temperature (1 and 2)": {"rule": identity().rule.model_copy(update={"temperature": 2.0})},
    }
    for words, change in cases.items():
        assert (difference(identity(), identity(**change)) or "").startswith(words)
        assert identity().digest != identity(**change).digest
    renamed = identity(teacher=teacher.model_copy(update={"name": "x"}))
    assert difference(identity(), renamed) is None
    assert identity().digest == renamed.digest


# --- a stranger's cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("shards"), "shards: Field required"),
        (lambda d: d.pop("rule"), "rule: Field required"),
        (lambda d: d["vocabulary"].pop("width"), "vocabulary.width: Field required"),
        (lambda d: d["vocabulary"].update(width=-1), "vocabulary.width: Input should be greater than or equal to 1"),
        (lambda d: d["vocabulary"].update(width=2**21 + 1), "vocabulary.width: Input should be less than or equal"),
        (lambda d: d["vocabulary"].update(width="x"), "vocabulary.width: Input should be a valid integer"),
        (lambda d: d.update(shards=[1]), "shards: Input should be a valid dictionary"),
        (lambda d: d["rule"].update(temperature=True), "rule.temperature: Input should be a valid number"),
        (lambda d: d["rule"].update(temperature=-1.0), "rule.temperature: Input should be greater than 0"),
        (lambda d: d["totals"].update(rows=-1), "totals.rows: Input should be greater than or equal to 0"),
        (lambda d: d.update(more=1), "more: Extra inputs are not permitted"),
        (lambda d: d["shards"].update({"../../other.kdsc": "0" * 64}), "String should match pattern"),
        (lambda d: d["shards"].update({"/etc/passwd": "0" * 64}), "String should match pattern"),
    ],
)
def test_a_description_of_another_shape_is_refused_in_one_line(tmp_path, change, message):
    write(tmp_path, entries(1))
    describe(tmp_path, change)
    with pytest.raises(DataError) as caught:
        Reader(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"format": NaN}', "NaN is no number"),
        (b"\xff\xfe{", "is no JSON"),
        (b"[]", "is no JSON object"),
        (b"", "is no JSON"),
        (b"{" + b" " * 2**24 + b"}", "is larger than"),
    ],
    ids=["lists", "objects", "nan", "bytes", "list", "empty", "large"],
)
def test_a_description_that_is_none_is_refused_in_one_line(tmp_path, content, message):
    write(tmp_path, entries(1))
    (tmp_path / "cache.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        Reader(tmp_path)


def test_only_regular_files_beside_the_description_are_read(tmp_path):
    write(tmp_path, entries(1))
    shard = tmp_path / SHARD
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="is a link"):
        Reader(tmp_path)
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(DataError, match="is no regular file"):
        Reader(tmp_path)
    shard.unlink()
    shard.mkdir()
    with pytest.raises(DataError, match="is no regular file"):
        Reader(tmp_path)


def test_counts_are_never_unpacked_beyond_the_vocabulary(tmp_path):
    write(tmp_path, entries(1))
    (tmp_path / "counts.bin").write_bytes(zlib.compress(bytes(2**24), 9))
    with pytest.raises(DataError, match="is larger than the 706 bytes"):
        read_counts(tmp_path, 300)
    (tmp_path / "counts.bin").write_bytes(zlib.compress(bytes(2**16), 9))
    with pytest.raises(DataError, match="601 bytes for 300 ids"):
        read_counts(tmp_path, 300)
    for width in (0, -1, 2**21 + 1, 2**31):
        with pytest.raises(DataError, match="allowed: 1 to 2,097,152"):
            read_counts(tmp_path, width)


@pytest.mark.parametrize(
    "record", [{"tokens": 0}, {"offset": 2**64 - 1}, {"offset": 3}, {"size": 2**32 - 1}, {"size": 9, "offset": 79}]
)
def test_a_row_that_lies_outside_its_shard_is_refused(tmp_path, record):
    write(tmp_path, entries(1))
    reshard(tmp_path, b"12345678", **record)
    with pytest.raises(DataError, match="has a damaged index"):
        Reader(tmp_path)


def test_the_mark_of_a_shard_is_read(tmp_path):
    write(tmp_path, entries(1))
    raw = (tmp_path / SHARD).read_bytes()
    (tmp_path / SHARD).write_bytes(b"XXXX" + raw[4:])
    with pytest.raises(DataError, match="is cut off or damaged"):
        Reader(tmp_path)


def row_bytes(k, least, *, wide_k=24, wide_least=8, rice=0, unary=b"", rest=b"", behind=b"") -> bytes:
    """A row with this head and these parts, whatever sense they make."""
    n = len(k)
    values = np.array([*(np.array(k) - 1), *[1] * n, *least, *[rice] * n], dtype=np.int64)
    head = pack_widths(values, np.repeat(np.array([wide_k, 16, wide_least, 4]), n))
    return encode._HEAD.pack(wide_k, wide_least, len(unary), len(rest)) + head + unary + rest + behind


TWO = pack_unary(np.array([0, 0]))


@pytest.mark.parametrize(
    ("data", "tokens", "message"),
    [
        (row_bytes([1], [1]), 2**32 - 1, "head of the row is impossible"),
        (row_bytes([1], [1]), 0, "head of the row is impossible"),
        (encode._HEAD.pack(25, 8, 0, 0) + bytes(99), 1, "head of the row is impossible"),
        (row_bytes([2**24] * 64, [1] * 64), 64, "claims more ids than it can have"),
        (row_bytes([301], [1], unary=bytes(80), rest=bytes(80)), 1, "claims more ids than it can have"),
        (row_bytes([300] * 9, [1] * 9, unary=b"\xff" * 9, rest=b"\xff" * 999), 9, "claims more ids than it can have"),
        (row_bytes([300] * 9, [1] * 9, unary=b"\xff" * 999, rest=b"\xff" * 9), 9, "claims more ids than it can have"),
        (row_bytes([1], [0], unary=b"\x80", rest=b"\x80", behind=bytes(9)), 1, "a level is zero"),
        (row_bytes([2], [9], unary=TWO, rest=TWO, behind=bytes(9)), 1, "not in order"),
        (row_bytes([2], [9], unary=b"\xff", rest=TWO, behind=bytes(9)), 1, "8 numbers where 2 belong"),
        (row_bytes([1], [9], unary=bytes(99) + b"\1", rest=b"\x80", behind=bytes(9)), 1, "beyond the vocabulary"),
    ],
)
def test_a_row_that_is_none_is_refused_before_memory_is_taken(data, tokens, message):
    code = IdCode(np.zeros(300, dtype=np.int64))
    with pytest.raises(DataError, match=message):
        decode_row(data, tokens, code)


def test_no_parts_are_no_tokens():
    assert join([]).tokens == 0
    one = Kept(np.array([1]), np.array([3]), np.array([-0.5]), np.array([0.4]))
    assert join([join([]), one]).ids.tolist() == [3]
