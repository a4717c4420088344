from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdkit.api import DataError, Example, Message
from kdkit.plugins.datasets.options import SplitOptions
from kdkit.plugins.datasets.splits import Candidate, collect, content_id, part_of, prompt_key
from kdkit.plugins.datasets.values import RowError, SourceRow

prompts = st.text(min_size=1, max_size=12)
pairs = st.lists(st.tuples(prompts, st.text(max_size=3)), max_size=40)
fractions = st.tuples(st.floats(0, 0.49), st.floats(0, 0.49))
seeds = st.integers(-(2**40), 2**40)


def options(split="all", fractions=(0.3, 0.3), seed=0, max_rows=None) -> SplitOptions:
    # model_construct: split: test with a fraction of 0 is refused by validation and tested elsewhere.
    return SplitOptions.model_construct(
        split=split, test_fraction=fractions[0], validation_fraction=fractions[1], split_seed=seed, max_rows=max_rows
    )


def convert(row: SourceRow) -> Candidate | str:
    prompt, answer = row.columns["prompt"], row.columns["answer"]
    if answer == "broken":
        raise RowError("is broken")
    if answer == "empty":
        return "empty-completion"
    identity = row.columns.get("id") or content_id(prompt, answers=[answer])
    return Candidate(prompt_key(prompt), Example(id=identity, prompt=prompt, completion=answer))


def take(rows, opts, **kwargs):
    source = [
        SourceRow(f"f:{n}", {"prompt": row[0], "answer": row[1], "id": row[2] if row[2:] else None})
        for n, row in enumerate(rows)
    ]
    return collect(source, convert, opts, **kwargs)[0]


@given(pairs, fractions, seeds)
def test_parts_are_disjoint_and_together_everything(rows, shares, seed):
    parts = {name: take(rows, options(name, shares, seed)).examples for name in ("train", "validation", "test", "all")}
    ids = {name: {example.id for example in part} for name, part in parts.items()}
    assert ids["train"] | ids["validation"] | ids["test"] == ids["all"]
    assert sum(len(parts[name]) for name in ("train", "validation", "test")) == len(parts["all"]) == len(set(rows))
    texts = [{example.prompt for example in parts[name]} for name in ("train", "validation", "test")]
    assert len(set.union(*texts)) == sum(map(len, texts))


@given(pairs, pairs, seeds, st.randoms(use_true_random=False))
def test_neither_order_nor_other_rows_move_a_row(rows, more, seed, shuffler):
    before = take(rows, options("train", seed=seed)).examples
    mixed = [*rows, *more]
    shuffler.shuffle(mixed)
    after = take(mixed, options("train", seed=seed)).examples
    wanted = set(rows)
    assert tuple(e for e in after if (e.prompt, e.completion) in wanted) == before


@given(pairs, st.integers(1, 50), seeds)
def test_max_rows_takes_the_first_in_hash_order(rows, count, seed):
    everything = take(rows, options(seed=seed)).examples
    some = take(rows, options(seed=seed, max_rows=count))
    assert tuple(some.examples) == tuple(everything)[:count]
    assert some.counts.get("over-max-rows", 0) == max(0, len(everything) - count)


@given(st.lists(st.tuples(prompts, st.sampled_from(["a", "b", "broken", "empty"])), max_size=40), seeds)
def test_every_row_is_counted_once(rows, seed):
    counts = dict(take(rows, options("validation", seed=seed, max_rows=3), on_error="skip").counts)
    assert counts.pop("read") == len(rows) == sum(counts.values())
    assert counts["broken"] == sum(answer == "broken" for _, answer in rows)


def test_shares_are_as_asked():
    keys = [prompt_key(f"prompt {n}") for n in range(20_000)]
    parts = [part_of(key, options(fractions=(0.05, 0.2))) for key in keys]
    # Five standard deviations of a binomial.
    assert abs(parts.count("test") / 20_000 - 0.05) < 5 * (0.05 * 0.95 / 20_000) ** 0.5
    assert abs(parts.count("validation") / 20_000 - 0.2) < 5 * (0.2 * 0.8 / 20_000) ** 0.5


def test_seed_changes_parts_and_order():
    rows = [(f"prompt {n}", "a") for n in range(200)]
    one, other = (take(rows, options("test", seed=seed)).examples for seed in (0, 1))
    assert {e.id for e in one} != {e.id for e in other}
    assert [e.id for e in take(rows, options()).examples] != [e.id for e in take(rows, options(seed=1)).examples]


def test_first_rows_of_all_are_not_the_test_part():
    rows = [(f"prompt {n}", "a") for n in range(500)]
    first = take(rows, options(fractions=(0.2, 0.2), max_rows=100)).examples
    test = sum(part_of(prompt_key(e.prompt), options(fractions=(0.2, 0.2))) == "test" for e in first)
    assert 5 <= test <= 40


def test_golden_values_keep_old_splits_valid():
    # Made with sha256sum over ["what is a marsupial?", ""] and so on, not with this code.
    assert prompt_key("What is a marsupial?", "") == "36171364d81fc665a085ec04ed5d9407085baf43c94c01beead8af56afd297a5"
    assert content_id("What is a marsupial?", "", answers=["A mammal."]) == "dc24ac8003c7f448-61725232de48"
    assert "".join(part_of(prompt_key(str(n)), options())[1] for n in range(12)) == "aeraerrrrear"


def test_near_copies_of_a_prompt_share_a_part_but_not_an_id():
    assert prompt_key("What is\n KD?") == prompt_key("what is kd? ") != prompt_key("what is kd")
    assert prompt_key("ab", "c") != prompt_key("a", "bc")
    assert content_id("What is KD?") != content_id("what is kd?")
    assert prompt_key((Message("user", "Hi  there"),)) == prompt_key((Message("user", "hi there"),))
    assert prompt_key((Message("user", "hi"),)) != prompt_key((Message("system", "hi"),))


def test_answers_make_ids_of_one_prompt_differ():
    ids = {content_id("p"), content_id("p", answers=["a"]), content_id("p", answers=["a", "b"])}
    assert len(ids) == 3
    assert len({text.split("-")[0] for text in ids}) == 1


def test_identical_rows_are_counted_and_kept_once():
    rows = take([("p", "a"), ("p", "a"), ("p", "b"), ("p", "a")], options())
    assert len(rows.examples) == 2
    assert rows.counts == {"read": 4, "kept": 2, "broken": 0, "duplicate": 2}


def test_one_id_for_two_rows_is_broken():
    rows = [("p", "a", "x"), ("q", "a", "x")]
    with pytest.raises(
        DataError, match=r"^f:1: has the id 'x' of an earlier row with another text; mend the row, or set on_error"
    ):
        take(rows, options())
    assert take(rows, options(), on_error="skip").counts["broken"] == 1


def test_first_broken_row_is_returned():
    source = [SourceRow("f:1", {}, "is not JSON"), SourceRow("f:2", {}, "is a list, not an object")]
    rows, first = collect(source, convert, options(), on_error="skip")
    assert (rows.counts["broken"], first) == (2, "f:1: is not JSON")
    with pytest.raises(DataError, match=r"^f:1: is not JSON"):
        collect(source, convert, options())


def test_hash_order_does_not_follow_file_order():
    rows = [(f"prompt {n}", "a") for n in range(100)]
    shuffled = rows.copy()
    random.Random(3).shuffle(shuffled)
    ordered = take(rows, options()).examples
    assert ordered == take(shuffled, options()).examples
    assert [e.prompt for e in ordered] != [prompt for prompt, _ in rows]


@pytest.mark.parametrize(
    ("given", "path", "message"),
    [
        ({"split": "test", "test_fraction": 0}, "test_fraction", "0 leaves split: test without rows"),
        ({"split": "validation", "validation_fraction": 0}, "validation_fraction", "0 leaves split: validation"),
        ({"test_fraction": 0.5, "validation_fraction": 0.5}, "validation_fraction", "leaves no rows for split: train"),
        ({"test_fraction": 1}, "test_fraction", "less than 1"),
        ({"max_rows": 0}, "max_rows", "greater than or equal to 1"),
        ({"split": "dev"}, "split", "'train', 'validation', 'test' or 'all'"),
    ],
)
def test_options_that_contradict_themselves(given, path, message):
    with pytest.raises(ValueError, match=path) as error:
        SplitOptions.model_validate_json(json.dumps(given))
    (problem,) = error.value.errors()
    assert problem["loc"] == (path,)
    assert message in problem["msg"]


def test_a_part_of_size_zero_is_fine_when_it_is_not_asked_for():
    assert SplitOptions.model_validate_json('{"test_fraction": 0, "validation_fraction": 0}').test_fraction == 0
