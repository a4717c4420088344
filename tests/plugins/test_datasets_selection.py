from __future__ import annotations

import gc
import json
import random
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdkit.api import Example, Message
from kdkit.plugins.datasets import selection, spool
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


def take(rows, opts, **kwargs):
    source = (SourceRow(f"f:{n}", {"row": (*row, "")[:3]}) for n, row in enumerate(rows))
    return collect(source, convert, opts, **kwargs)[0]


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
            examples = take(((f"{n} {text}", f"{n}") for n in range(count)), options(**given)).examples
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
