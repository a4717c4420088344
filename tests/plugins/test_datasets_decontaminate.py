from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from kdkit.api import DataError, Example, Message
from kdkit.api.slots import LOOKUP, Found
from kdkit.engine.hashing import HashMemo
from kdkit.engine.inputs import Inputs
from kdkit.engine.keys import KeyMaker
from kdkit.plugins.datasets import plugin
from kdkit.plugins.datasets.decontaminate import NGrams, RawPrompts, raw_text, words
from kdkit.plugins.datasets.splits import Candidate

SPECS = {spec.name: spec for spec in plugin.kdkit_datasets()}


class Catalogue:
    def find(self, kind, name):
        return Found(SPECS[name], f"kdkit/{name}", "1", "here")


def params(use, **given):
    return SPECS[use].params.model_validate_json(json.dumps(given, default=str), context={LOOKUP: Catalogue()})


def load(ctx, use="dolly", **given):
    return SPECS[use].build(params(use, **given)).load(ctx)


@pytest.fixture
def file(tmp_path):
    def write(name, *rows):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def row(instruction, response="Some answer.", context=""):
    return {"instruction": instruction, "context": context, "response": response, "category": "open_qa"}


def sentence(seed, count=20):
    source = random.Random(seed)
    return " ".join("".join(source.choices("abcdefgh", k=6)) for _ in range(count))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("El año, MAÑANA_1!", ["el", "año", "mañana_1"]),
        ("El an\u0303o", ["el", "año"]),
        ("Straße ｆｕｌｌ ﬁne", ["strasse", "full", "fine"]),
        ("x==a+b", ["x", "a", "b"]),
        ("abc中文de テキ", ["abc", "中", "文", "de", "テ", "キ"]),
        ("привет мир 42", ["привет", "мир", "42"]),
        (" ?!\n", []),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("عَرَبِيّ", ["عَرَبِيّ"]),
        ("ที่", ["ท", "ี", "่"]),
    ],
)
def test_words(text, found):
    assert words(text) == found


def test_exactly_n_words_in_a_row_count():
    grams = NGrams(5)
    grams.add("one two three four five six", ["A B C D E"])
    assert grams.shares("and TWO three,\nfour five six!", [])
    assert not grams.shares("and three four five six", [])
    assert not grams.shares("six five four three two one", [])
    assert grams.shares("-", ["x a b c d e y"])
    # Words of a prompt and of an answer do not join.
    assert not grams.shares("nine one two three", ["four five six seven eight"])


def test_a_prompt_of_fewer_words_counts_as_a_whole():
    grams = NGrams(5)
    grams.add("Name a bird.", ["An owl."])
    assert grams.shares("name a  BIRD", ["A crow."])
    assert not grams.shares("Name a bird please", ["An owl."])
    assert not grams.shares("Name a", ["An owl."])
    assert not grams.shares("An owl.", ["Name a bird."])
    grams.add("?!", [])
    assert not grams.shares("...", [])
    assert grams.shares(" ?! ", [])
    grams.add("🦉 -> 🐁", [])
    assert grams.shares("🦉  -> 🐁", [])
    assert not grams.shares("🦉 -> 🐈", [])


def test_rows_are_removed_counted_and_named(load_context, file):
    shared = sentence(1)
    train = [row(sentence(n)) for n in range(10, 30)]
    train += [row(f"Explain this to me: {shared}"), row("Who?", f"So: {shared.upper()}"), row("Who?", context=shared)]
    train += [row("name a BIRD"), row("Name a fish."), row(f"About {shared}", context="Other things.")]
    rows = load(
        load_context,
        source=file("train", *train),
        split="all",
        decontaminate={
            "against": {"use": "dolly", "source": file("eval", row(shared), row("Name a bird.")), "split": "all"}
        },
    )
    assert rows.counts == {"read": 26, "kept": 21, "broken": 0, "contaminated": 5}
    assert not any(shared in (e.prompt[0].content + e.completion).casefold() for e in rows.examples)
    assert any(e.prompt == (Message("user", "Name a fish."),) for e in rows.examples)
    (line,) = load_context.lines
    assert "train.jsonl: decontaminate: 5 of 26 rows share 13 words in a row, or a whole shorter prompt, with " in line
    names = line.split("removed: ")[1].split(", ")
    assert len(names) == 5
    assert names == sorted(names)
    assert not set(names) & {e.id for e in rows.examples}


def test_the_log_names_only_a_few(load_context, file):
    source = file("train", *(row(sentence(n)) for n in range(9)), row("x"))
    load(load_context, source=source, split="all", decontaminate={
        "against": {"use": "dolly", "source": file("eval", *(row(sentence(n)) for n in range(9))), "split": "all"}
    })  # fmt: skip
    assert load_context.lines[0].split("removed: ")[1].count(", ") == 5
    assert load_context.lines[0].endswith(", ...")


@pytest.mark.parametrize("style", ["chat", "alpaca", "template"])
@pytest.mark.parametrize("other_style", ["chat", "alpaca"])
def test_the_sentences_of_a_prompt_style_are_not_compared(load_context, file, tmp_path, style, other_style):
    template = tmp_path / "t.jinja"
    template.write_text(sentence(7) + " {{ instruction }} {{ context }}")
    given = {"template": template} if style == "template" else {}
    train = [row(sentence(n, 8)) for n in range(20)] + [row("Name a bird.", context="Or two.")]
    one = {"use": "dolly", "source": file("one", row(sentence(3, 8), "Else.")), "prompt_style": other_style}
    two = {"use": "dolly", "source": file("two", train[-1]), "prompt_style": style, **given}
    rows = load(
        load_context,
        source=file("train", *train),
        split="all",
        prompt_style=style,
        decontaminate={"against": [{**one, "split": "all"}, {**two, "split": "all"}]},
        **given,
    )
    assert rows.counts["contaminated"] == 2
    assert "dolly (1 rows), dolly (1 rows)" in load_context.lines[0]


def test_only_the_chosen_parts_are_compared(load_context, file):
    source = file("rows", *(row(sentence(n)) for n in range(300)))
    test = load(load_context, source=source, split="test", test_fraction=0.2)
    against = {"use": "dolly", "source": source, "split": "test", "test_fraction": 0.2}
    clean = load(load_context, source=source, split="train", test_fraction=0.2, decontaminate={"against": against})
    assert "contaminated" not in clean.counts
    everything = load(load_context, source=source, split="all", test_fraction=0.2, decontaminate={"against": against})
    assert everything.counts["contaminated"] == len(test.examples)
    assert not {e.id for e in everything.examples} & {e.id for e in test.examples}


def test_max_rows_counts_clean_rows(load_context, file):
    train = file("train", *(row(sentence(n)) for n in range(60)))
    against = {"use": "dolly", "source": file("eval", *(row(sentence(n)) for n in range(30))), "split": "all"}
    rows = load(load_context, source=train, split="all", max_rows=25, decontaminate={"against": against})
    assert rows.counts == {"read": 60, "kept": 25, "broken": 0, "contaminated": 30, "over-max-rows": 5}


def test_other_loaders_take_part(load_context, file):
    shared = "Why does ice float on water? Explain in two sentences."
    own = file("own", {"prompt": shared, "completion": "So."}, {"prompt": "Else?", "completion": "So."})
    rows = load(load_context, "jsonl", source=own, decontaminate={
        "against": {"use": "instructions", "prompt_style": "alpaca", "split": "all"}, "ngram": 8})  # fmt: skip
    assert rows.counts["contaminated"] == 1
    bundled = load(
        load_context, "instructions", split="all", decontaminate={"against": {"use": "jsonl", "source": own}}
    )
    assert bundled.counts["contaminated"] == 1
    assert len(bundled.examples) == 479


def test_an_evaluation_set_without_rows_is_an_error(load_context, file):
    against = {"use": "dolly", "source": file("eval", row("x")), "split": "all", "categories": ["closed_qa"]}
    with pytest.raises(DataError, match="decontaminate against dataset dolly: no row is left to compare with"):
        load(load_context, source=file("train", row("y")), decontaminate={"against": against})


def test_a_broken_evaluation_set_is_named(load_context, file):
    against = {"use": "dolly", "source": file("eval", {"instruction": 3, "response": "x"})}
    with pytest.raises(DataError, match=r"eval\.jsonl:1: 'instruction' is a number, not text"):
        load(load_context, source=file("train", row("y")), on_error="skip", decontaminate={"against": against})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"against": []}, "at least 1 item"),
        ({"against": {"use": "dolly"}, "ngram": 2}, "greater than or equal to 3"),
        ({"against": {"use": "dolly"}, "ngram": 65}, "less than or equal to 64"),
        ({"ngram": 13}, "Field required"),
        ({"against": "./x.jsonl"}, "valid array"),
    ],
)
def test_parameters_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match=message):
        params("dolly", decontaminate=given)


def test_the_content_of_the_evaluation_set_is_part_of_the_key(file, tmp_path):
    train, evaluation = file("train", row("a")), file("eval", row("b"))

    def key(ngram=13, **against):
        memo = HashMemo(tmp_path / f"memo{time.monotonic_ns()}")
        maker = KeyMaker(Inputs(tmp_path, memo), memo, tmp_path, "fp32")
        given = params("dolly", source=train, decontaminate={
            "against": [{"use": "dolly", "source": evaluation, **against}], "ngram": ngram})  # fmt: skip
        return maker.key({}, given, {}, lambda loc: (str(loc), 0, 0))

    first = key()
    assert key() == first
    assert str(first.explained["decontaminate.against[0].source"]).startswith("input:")
    assert len({first.key, key(ngram=12).key, key(split="test").key}) == 3
    file("eval", row("c"))
    changed = key()
    assert changed.key != first.key
    assert [name for name, value in changed.explained.items() if value != first.explained[name]] == [
        "decontaminate.against[0].source"
    ]


def test_the_context_handed_on_is_a_whole_one(load_context):
    raw = RawPrompts(load_context)
    raw.log("line")
    assert (raw.seed, raw.offline, load_context.lines) == (0, True, ["line"])
    nested = params("jsonl", source="./x", decontaminate={"against": {"use": "dolly", "source": "./y"}})
    (component,) = nested.decontaminate.against
    assert raw.resolve(component.params.source).path == Path("y")
    assert type(raw.build(component)).__name__ == "DollyLoader"


def test_the_own_words_of_a_prompt():
    example = Example(
        id="1", prompt=(Message("system", "S"), Message("user", "Fix: x"), Message("user", "y")), echo="x"
    )
    assert raw_text(Candidate("k", example, text="z")) == "z"
    assert raw_text(Candidate("k", example)) == "x"
    assert raw_text(Candidate("k", Example(id="1", prompt=example.prompt))) == "Fix: x\ny"
