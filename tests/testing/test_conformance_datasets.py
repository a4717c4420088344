"""The built-in datasets keep the contract, and the suite catches datasets that do not."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from suites import check, checks_of, variant

from kdkit.api import DataError, Example, Message, Rows
from kdkit.plugins.datasets import plugin
from kdkit.testing.conformance import DatasetConformance
from kdkit.testing.rows import tiny_rows

SPECS = {spec.name: spec for spec in plugin.kdkit_datasets()}
DATA = Path(plugin.__file__).parent / "data"


class BuiltIn(DatasetConformance):
    name = ""
    given = {}  # noqa: RUF012

    def build(self):
        return self.built(self.given)

    def built(self, given):
        return SPECS[self.name].build(SPECS[self.name].params.model_validate_json(json.dumps(given)))

    def build_on(self, path):
        return self.built({**self.given, "source": str(path)}) if "source" in self.given else None


def of_sample(name, file, **given):
    return {"name": name, "given": {"source": str(DATA / file), "split": "all", **given}}


class TestDolly(BuiltIn):
    locals().update(of_sample("dolly", "dolly_sample_en.jsonl"))


class TestJsonl(BuiltIn):
    name = "jsonl"

    @pytest.fixture(autouse=True)
    def _source(self, tmp_path_factory):
        file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
        rows = (json.dumps({"prompt": row.prompt, "completion": row.completion}) for row in tiny_rows())
        file.write_text("".join(row + "\n" for row in rows))
        self.given = {"source": str(file)}


class TestInstructions(BuiltIn):
    name, rows = "instructions", SPECS["instructions"].rows


class TestBugNet(BuiltIn):
    locals().update(of_sample("bugnet", "bugnet_sample.jsonl"))


class TestPyTorrent(BuiltIn):
    locals().update(of_sample("pytorrent", "pytorrent_sample.jsonl"))


class TestCodeforces(BuiltIn):
    locals().update(of_sample("codeforces", "codeforces_sample.jsonl", task="sft"))


class TestIOProblems(BuiltIn):
    name, rows = "io-problems", SPECS["io-problems"].rows


class TestMbpp(BuiltIn):
    locals().update(of_sample("mbpp", "mbpp_sample.jsonl"))


class TestOfTheHub(BuiltIn):
    """A dataset that is not here: without the network it is refused."""

    name, downloads = "dolly", True

    @pytest.fixture(autouse=True)
    def _no_cache(self, tmp_path, monkeypatch):
        pytest.importorskip("datasets")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


# -- wrong datasets


class Right:
    """Reads JSON Lines with ``prompt`` and ``completion``; for others to spoil."""

    def __init__(self, path=None):
        self.path = path

    def load(self, ctx):
        return self.rows(list(self.read(ctx)))

    def read(self, ctx):
        if self.path is None:
            return tiny_rows()
        return (self.example(index, line) for index, line in enumerate(self.lines()))

    def lines(self):
        try:
            return self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise DataError("cannot be read", where=str(self.path)) from error

    def example(self, index, line):
        try:
            row = json.loads(line)
            row["prompt"].encode()
            return Example(id=str(index), prompt=row["prompt"], completion=row["completion"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError("is no row", where=f"{self.path}:{index + 1}") from error

    def sample(self):
        return self.rows(list(tiny_rows()))

    def rows(self, examples):
        return Rows(examples=examples, counts={"read": len(examples)})


def spoilt(**changes):
    """A dataset that changes each of its rows."""
    return type("Wrong", (Right,), {"rows": lambda self, given: Rows(examples=[replace(e, **changes) for e in given])})


class SevenRows(Right):
    def sample(self):
        return self.rows(list(tiny_rows(7)))


class SampleFromHere(Right):
    def sample(self):
        return self.rows([Example(id=p.name, prompt="p", completion="c") for p in Path("tests/testing").iterdir()])


class SampleFromTheHub(Right):
    def sample(self):
        import socket

        socket.create_connection(("192.0.2.1", 443), timeout=1)


class DrawnSample(Right):
    def sample(self):
        return self.rows(random.sample(tiny_rows(), 8))


class SampleOfTheInstance(Right):
    def sample(self):
        return self.rows([replace(row, category=str(id(self))) for row in tiny_rows()])


class Generator(Right):
    def rows(self, examples):
        return Rows(examples=(example for example in examples))


class Dictionaries(Right):
    def rows(self, examples):
        return Rows(examples=[{"prompt": example.prompt} for example in examples])


class AList(Right):
    def sample(self):
        return list(tiny_rows())


def counting(counts):
    return type("Wrong", (Right,), {"rows": lambda self, examples: Rows(examples=examples, counts=counts)})


class ShuffledGlobally(Right):
    def read(self, ctx):
        random.seed(ctx.seed)
        return random.sample(tiny_rows(), 16)


class ShuffledBySomething(Right):
    def read(self, ctx):
        return random.Random(id(self)).sample(tiny_rows(), 16)


class CountsCalls(Right):
    calls = 0

    def read(self, ctx):
        self.calls += 1
        return [replace(row, category=str(self.calls)) for row in tiny_rows()]


class IdsByPlace(Right):
    def read(self, ctx):
        shuffled = random.Random(ctx.seed).sample(tiny_rows(), 16)
        return [replace(row, id=str(place)) for place, row in enumerate(shuffled)]


class LooksForNews(Right):
    def read(self, ctx):
        import contextlib
        import socket

        with contextlib.suppress(OSError):
            socket.create_connection(("192.0.2.1", 443), timeout=1)
        return super().read(ctx)


class EmptyWhenMissing(Right):
    def lines(self):
        return super().lines() if self.path.exists() else []


class SaysNothing(Right):
    def lines(self):
        try:
            return super().lines()
        except DataError as error:
            raise DataError(" ") from error


class RaisesAsItComes(Right):
    def example(self, index, line):
        row = json.loads(line)
        return Example(id=str(index), prompt=row["prompt"], completion=row["completion"])


class QuotesTheLine(Right):
    def example(self, index, line):
        try:
            return super().example(index, line)
        except DataError as error:
            raise DataError(f"is no row: {line}") from error


class KeepsHalfCharacters(Right):
    def example(self, index, line):
        try:
            row = json.loads(line)
            return Example(
                id=str(index), prompt=row.get("prompt", "p") if isinstance(row, dict) else "p", completion="c"
            )
        except (ValueError, RecursionError) as error:
            raise DataError("is no row", where=f"{self.path}:{index + 1}") from error


class IndexBesideTheSource(Right):
    def lines(self):
        self.path.with_suffix(".index").write_text("")
        return super().lines()


class WritesHere(Right):
    def read(self, ctx):
        Path("cache.bin").write_bytes(b"x")
        return super().read(ctx)


EIGHT, ALWAYS = "test_the_sample_has_eight_rows_and_needs_nothing", "test_the_sample_is_always_the_same"
TYPED, UNIQUE = "test_rows_are_typed", "test_ids_are_unique"
SEED, SAME = "test_loading_depends_on_the_seed_alone", "test_an_id_names_the_same_row_whatever_the_seed"
OFFLINE, MISSING = "test_loading_stays_offline", "test_a_missing_file_is_refused"
HOSTILE, STAY = "test_no_file_makes_it_raise_anything_else", "test_files_stay_as_they_are"
WRONG = [
    (SevenRows, EIGHT, "the sample has 7 rows"),
    (SampleFromHere, EIGHT, "No such file"),
    (SampleFromTheHub, EIGHT, "the network was used"),
    (DrawnSample, ALWAYS, "a second call gives another sample"),
    (SampleOfTheInstance, ALWAYS, "another instance gives another sample"),
    (Generator, TYPED, "no sequence"),
    (Dictionaries, TYPED, "is a dict, not an Example"),
    (counting({"dropped": -1}), TYPED, "the count 'dropped' is -1"),
    (AList, TYPED, "list is no Rows"),
    (counting({3: 1}), TYPED, "a count is called 3"),
    (counting({"read": "all"}), TYPED, "the count 'read' is 'all'"),
    (spoilt(id=7), TYPED, "its id is 7"),
    (spoilt(category=None), TYPED, "None is no text"),
    (spoilt(extra=["a"]), TYPED, r"extra is \['a'\]"),
    (spoilt(extra={1: "a"}), TYPED, "a column is called 1"),
    (spoilt(id=""), TYPED, "has no id"),
    (spoilt(prompt=()), TYPED, "a prompt without messages"),
    (spoilt(prompt=({"role": "user"},)), TYPED, "a tuple of Message"),
    (spoilt(prompt=(Message("human", "x"),)), TYPED, "no role 'human'"),
    (spoilt(completion=None), TYPED, "has no answer; the spec says prompt-completion"),
    (spoilt(completion="\ud83d"), TYPED, "half of a character"),
    (spoilt(references=["a"]), TYPED, "references are a tuple"),
    (spoilt(extra={"when": {1, 2}}), TYPED, "holds no JSON value"),
    (spoilt(extra={"loss": float("nan")}), TYPED, "holds no JSON value"),
    (spoilt(id="same"), UNIQUE, "two rows have the id 'same'"),
    (ShuffledGlobally, SEED, "uses the generator of the module random"),
    (ShuffledBySomething, SEED, "another instance gives other rows"),
    (CountsCalls, SEED, "a second load with the same seed gives other rows"),
    (IdsByPlace, SAME, "names another row with another seed"),
    (LooksForNews, OFFLINE, r"the network was used: connect to 192\.0\.2\.1:443"),
    (EmptyWhenMissing, MISSING, "a missing file was not refused"),
    (SaysNothing, MISSING, "a missing file: the error says nothing"),
    (RaisesAsItComes, HOSTILE, "KeyError|Expecting value|'int' object|'prompt'"),
    (KeepsHalfCharacters, HOSTILE, "half of a surrogate pair: row 0: .* holds half of a character"),
    (QuotesTheLine, HOSTILE, "more than one line|control characters|characters"),
    (IndexBesideTheSource, STAY, r"rows\.index changed"),
    (WritesHere, STAY, r"cache\.bin changed"),
]


def suite(dataset):
    return variant(DatasetConformance, build=dataset, build_on=dataset)


@pytest.mark.parametrize(("dataset", "test", "reason"), WRONG)
def test_a_wrong_dataset_fails(dataset, test, reason, tmp_path):
    with pytest.raises((AssertionError, OSError, ValueError, KeyError, TypeError), match=reason):
        check(suite(dataset), test, tmp_path)


@pytest.mark.parametrize("test", checks_of(DatasetConformance))
def test_a_right_dataset_passes_and_no_test_is_idle(test, tmp_path):
    assert test in {caught for _, caught, _ in WRONG}
    check(suite(Right), test, tmp_path)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ("prompt-only", "has an answer; the spec says prompt-only"),
        ("messages", "the prompt is a text; the spec says messages"),
    ],
)
def test_the_form_of_rows_is_the_declared_one(rows, reason, tmp_path):
    with pytest.raises(AssertionError, match=reason):
        check(variant(DatasetConformance, build=Right, rows=rows), TYPED, tmp_path)


def test_a_dataset_that_says_it_downloads_must_be_refused(tmp_path):
    with pytest.raises(AssertionError, match="a dataset that is not here was not refused"):
        check(variant(DatasetConformance, build=Right, downloads=True), OFFLINE, tmp_path)
