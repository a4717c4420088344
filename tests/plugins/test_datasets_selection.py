from __future__ import annotations

import gc
import json
import random
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdkit.api import DataError, Example, Message
from kdkit.plugins.datasets import selection, splits, spool
from kdkit.plugins.datasets.options import SplitOptions
from kdkit.plugins.datasets.splits import Candidate, collect, content_id, part_of, prompt_key
from kdkit.plugins.datasets.values import SourceRow


def options(**given) -> SplitOptions:
    return SplitOptions.model_validate_json(json.dumps({"split": "all", **given}))


def convert(row: SourceRow) -> Candidate:
    """Rows (prompt, answer, group); without a group the prompt decides the part."""
    prompt, answer, group = row.columns["row"]
    example = Example(id=content_id(prompt, group, answers=[answer]), prompt=prompt, completion=answer)
    return Candidate(group or prompt_key(prompt), example)


class Source:
    """Rows that can be read again, as those of a file; counts how often they are."""

    def __init__(self, rows):
        self.rows, self.passes = rows, 0

    def __iter__(self):
        self.passes += 1
        rows = self.rows() if callable(self.rows) else self.rows
        return (SourceRow(f"f:{n}", {"row": (*row, "")[:3]}) for n, row in enumerate(rows))


def take(rows, opts, **kwargs):
    return collect(Source(rows), convert, opts, **kwargs)[0]


def plain(text):
    return " ".join(text.casefold().split())


words = st.sampled_from(["a", "A", " a", "b", "B ", "c", "ß", "SS"])
rows = st.lists(st.tuples(words, words, st.sampled_from(["", "g", "h", "i"])), max_size=30)
seeds = st.integers(0, 50)


@given(rows, seeds)
def test_exact_keeps_one_of_each_prompt_with_answer(rows, seed):
    kept = take(rows, options(split_seed=seed)).examples
    assert Counter((plain(e.prompt), plain(e.completion)) for e in kept) == dict.fromkeys(
        {(plain(prompt), plain(answer)) for prompt, answer, _ in rows}, 1
    )


@given(rows, seeds)
def test_prompt_keeps_one_of_each_prompt(rows, seed):
    kept = take(rows, options(split_seed=seed, dedup="prompt")).examples
    assert Counter(plain(e.prompt) for e in kept) == dict.fromkeys({plain(row[0]) for row in rows}, 1)


@given(rows, seeds)
def test_none_keeps_all_rows_under_ids_of_their_own(rows, seed):
    kept = take(rows, options(split_seed=seed, dedup="none"))
    assert Counter((e.prompt, e.completion) for e in kept.examples) == Counter(row[:2] for row in rows)
    assert len({e.id for e in kept.examples}) == len(rows)
    assert kept.counts == {"read": len(rows), "kept": len(rows), "broken": 0}


@given(rows, seeds, st.sampled_from(["none", "exact", "prompt"]), st.integers(1, 9), st.randoms(use_true_random=False))
def test_which_row_stays_does_not_depend_on_the_order_of_the_rows(rows, seed, dedup, count, shuffler):
    mixed = list(rows)
    shuffler.shuffle(mixed)
    for split in ("all", "train", "test"):
        given = {"split": split, "dedup": dedup, "split_seed": seed, "test_fraction": 0.5, "max_rows": count}
        one, other = (take(order, options(**given)) for order in (rows, mixed))
        assert one == other


@given(rows, seeds, st.sampled_from(["exact", "prompt"]))
def test_copies_are_never_in_two_parts(rows, seed, dedup):
    shares = {"split_seed": seed, "dedup": dedup, "test_fraction": 0.4, "validation_fraction": 0.2}
    parts = [take(rows, options(split=name, **shares)) for name in ("train", "validation", "test")]
    everything = take(rows, options(**shares))
    ids = [example.id for part in parts for example in part.examples]
    assert len(ids) == len(set(ids))
    assert set(ids) == {example.id for example in everything.examples}
    assert {part.counts.get("duplicate") for part in parts} == {everything.counts.get("duplicate")}
    for part in parts:
        assert part.counts["read"] == sum(number for name, number in part.counts.items() if name != "read")


@pytest.mark.parametrize("memory", [selection.MEMORY, 0])
def test_max_rows_and_a_file_change_nothing_about_which_rows_are_kept(monkeypatch, memory):
    monkeypatch.setattr(selection, "MEMORY", memory)
    monkeypatch.setattr(selection, "_SPARE", 3)
    rows = [(f"{n % 150}", "x" * (n // 150 % 2), f"g{n % 40}") for n in range(400)]
    random.Random(5).shuffle(rows)
    everything = take(rows, options(test_fraction=0.3)).examples
    assert len(everything) == 300
    for count in (1, 7, 100, 299, 300, 500):
        few = take(rows, options(max_rows=count))
        assert list(few.examples) == list(everything[:count])
        assert few.counts.get("over-max-rows", 0) == max(0, 300 - count)
        assert few.counts["duplicate"] == 100


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("memory", [selection.MEMORY, 0])
def test_max_rows_are_found_although_copies_in_another_part_beat_those_held(monkeypatch, reverse, memory):
    monkeypatch.setattr(selection, "_SPARE", 0)
    monkeypatch.setattr(selection, "MEMORY", memory)
    groups = {part: [f"g{n}" for n in range(99) if part_of(f"g{n}", options(test_fraction=0.5)) == part] for part in
              ("train", "test")}  # fmt: skip
    # The order goes by the group: of the training rows those that are beaten come first, and would alone be held.
    place = {g: splits._bits(f"0:order:{g}") for names in groups.values() for g in names}
    first, last = min(groups["test"], key=place.get), max(groups["train"], key=place.get)
    beaten = min((g for g in groups["train"] if place[g] > place[first]), key=place.get)
    rows = [(f"{n}", "a", beaten) for n in range(60)] + [(f"x{n}", "a", last) for n in range(60)]
    rows += [(f"{n}", "a", first) for n in range(60)]
    rows.sort(key=lambda row: content_id(row[0], row[2], answers=[row[1]]), reverse=reverse)
    given = {"split": "train", "test_fraction": 0.5, "validation_fraction": 0}
    everything = take(rows, options(**given))
    assert len(everything.examples) == 60
    for count in (1, 10, 59, 60, 61):
        source = Source(rows)
        few = collect(source, convert, options(max_rows=count, **given))[0]
        assert list(few.examples) == list(everything.examples)[:count]
        assert few.counts.get("over-max-rows", 0) == max(0, 60 - count)
        once = collect(iter(Source(rows)), convert, options(max_rows=count, **given))[0]
        assert (list(once.examples), once.counts) == (list(few.examples), few.counts)
        assert source.passes <= 2
    rows.sort(key=lambda row: row[2] == first)
    source = Source(rows)
    assert list(collect(source, convert, options(max_rows=10, **given))[0].examples) == list(everything.examples)[:10]
    assert source.passes == 2


def test_rows_that_change_between_two_passes_are_an_error(monkeypatch):
    monkeypatch.setattr(selection, "_SPARE", 0)
    passes = iter([[("a", "x", ""), ("b", "y", "")], []])
    monkeypatch.setattr(selection.Selection, "_hold", lambda *given: None)
    with pytest.raises(DataError, match="changed while they were read"):
        take(lambda: next(passes), options(max_rows=1))


def tagged(rows, opts):
    def convert(row: SourceRow) -> Candidate:
        key, shared = row.columns["row"]
        return Candidate(key, Example(id=f"{key}-{row.where}", prompt=row.where, completion="c"), shared=shared)

    return collect([SourceRow(f"f:{n}", {"row": row}) for n, row in enumerate(rows)], convert, opts)[0]


def test_what_two_parts_share_stays_in_the_later_one():
    shares = {"test_fraction": 0.3, "validation_fraction": 0.3}
    keys = {part_of(f"g{n}", options(**shares)): f"g{n}" for n in range(99)}
    train, validation, test = (keys[part] for part in ("train", "validation", "test"))
    rows = [(train, ("a",)), (validation, ("a",)), (test, ("a", "b")), (train, ("b", "c")), (validation, ("c",))]
    rows += [(train, ("d",)), (train, ("d",)), (train, ())]
    kept = {part: tagged(rows, options(split=part, **shares)) for part in ("train", "validation", "test", "all")}
    assert {part: sorted(e.prompt for e in found.examples) for part, found in kept.items()} == {
        "train": ["f:5", "f:6", "f:7"],
        "validation": ["f:4"],
        "test": ["f:2"],
        "all": [f"f:{n}" for n in range(8)],
    }
    assert kept["train"].counts["shared-with-other-split"] == 2
    for found in kept.values():
        assert found.counts["read"] == sum(number for name, number in found.counts.items() if name != "read")
    assert len(tagged(rows, options(split="train", dedup="none", **shares)).examples) == 5


def test_of_rows_that_differ_in_category_or_extra_columns_one_stays_whatever_the_order():
    facts = [("x", {"tests": [1]}), ("x", {"tests": [2]}), ("y", {"tests": [1]}), ("x", {"tests": [1]})]
    kept = set()
    for order in (facts, facts[::-1]):
        rows = [SourceRow(f"f:{n}", {"row": fact}) for n, fact in enumerate(order)]

        def convert(row):
            category, extra = row.columns["row"]
            return Candidate("k", Example(id="1", prompt="p", category=category, extra=extra))

        (example,) = collect(rows, convert, options(max_rows=1))[0].examples
        kept.add(json.dumps([example.category, example.extra]))
    assert len(kept) == 1


@pytest.mark.parametrize("order", [["x", "x", "x~2"], ["x~2", "x", "x"], ["x", "x~2", "x"], ["x"] * 3 + ["x~2"] * 2])
def test_generated_ids_are_no_ids_of_the_source(order):
    def convert(row):
        return Candidate(row.columns["id"], Example(id=row.columns["id"], prompt=row.columns["id"]))

    rows = [SourceRow(f"f:{n}", {"id": name}) for n, name in enumerate(order)]
    ids = [example.id for example in collect(rows, convert, options(dedup="none"))[0].examples]
    assert len(set(ids)) == len(ids) == len(order)


def test_the_row_that_stays_is_the_first_in_hash_order():
    rows = [("same", "a", f"g{n}") for n in range(50)]
    (kept,) = take(rows, options()).examples
    (first, *_) = take(rows, options(dedup="none")).examples
    assert kept == first


def test_large_results_lie_in_a_file_and_are_the_same(monkeypatch):
    rows = [(f"prompt {n} ñ€𝄞", f"a\n{n}") for n in range(300)]
    held = take(rows, options())
    monkeypatch.setattr(selection, "MEMORY", 20_000)
    stored = take(rows, options())
    assert isinstance(held.examples, tuple)
    assert isinstance(stored.examples, spool.StoredExamples)
    assert (list(stored.examples), stored.counts) == (list(held.examples), held.counts)
    assert (len(stored.examples), stored.examples[-1]) == (300, held.examples[-1])
    assert tuple(stored.examples[10:20:3]) == held.examples[10:20:3]
    with pytest.raises(IndexError):
        stored.examples[300]


def test_every_field_survives_the_file():
    example = Example(
        id="1",
        prompt=(Message("system", "S"), Message("user", "U\u2028")),
        completion=None,
        every_turn=True,
        references=("a", "b"),
        category="c",
        echo="e",
        extra={"tests": [1, None, {"x": 0.5}]},
    )
    file = spool.ExampleFile()
    places = [file.write(example), file.write(Example(id="2", prompt="p"))]
    assert list(spool.StoredExamples(file, places)) == [example, Example(id="2", prompt="p")]


def test_the_file_is_closed_with_the_rows():
    file = spool.ExampleFile()
    stored = spool.StoredExamples(file, [file.write(Example(id="1", prompt="p"))])
    stream = file._stream
    del file
    gc.collect()
    assert stored[0].id == "1"
    del stored
    gc.collect()
    assert stream.closed


@pytest.mark.parametrize("given", [{"max_rows": 20}, {}])
def test_memory_does_not_grow_with_the_texts(monkeypatch, given):
    # With max_rows nothing has to go to the file.
    monkeypatch.setattr(selection, "MEMORY", 10**9 if given else 500_000)
    text = "x" * 10_000

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            rows = lambda: ((f"{n} {text}", f"{n}") for n in range(count))  # noqa: E731
            examples = take(rows, options(**given)).examples
            assert sum(len(example.prompt) > 10_000 for example in examples) == min(count, given.get("max_rows", count))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # 15 MB of text; a kilobyte for each row is allowed.
    if "max_rows" in given:
        monkeypatch.setattr(selection, "_SPARE", 5)
    assert peak(1500) < 3_000_000


def test_estimated_memory_is_about_right():
    def make(n: int) -> Example:
        texts = [f"{n}{i}" * 40 for i in range(3)]
        return Example(id=f"{n}", prompt=(Message("user", texts[0]),), completion=texts[1], extra={"t": [texts[2], n]})

    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        examples = [make(n) for n in range(1000, 3000)]
        real = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.6 < sum(map(spool.memory_of, examples)) / real < 1.7


def test_copies_of_another_part_count_as_duplicates_only():
    rows = [("same", "a", f"g{n}") for n in range(30)]
    counts = {split: dict(take(rows, options(split=split, test_fraction=0.5)).counts) for split in ("train", "test")}
    parts = [part_of(f"g{n}", options(test_fraction=0.5)) for n in range(30)]
    assert set(parts) >= {"train", "test"}
    assert all(count["duplicate"] == 29 for count in counts.values())
    assert sum(count["kept"] for count in counts.values()) == 1


def test_the_part_that_the_source_gives_counts():
    def given(row: SourceRow) -> Candidate:
        return Candidate(
            "same key", Example(id=row.where, prompt=row.where), part="test" if row.where > "f:4" else "train"
        )

    rows = [SourceRow(f"f:{n}", {}) for n in range(8)]
    for split, count in (("train", 5), ("test", 3), ("validation", 0), ("all", 8)):
        assert len(collect(rows, given, options(split=split))[0].examples) == count
