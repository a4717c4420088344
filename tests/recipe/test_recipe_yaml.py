from __future__ import annotations

import itertools
import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdkit.api import RecipeError
from kdkit.recipe.nodes import MAX_DEPTH, find, plain
from kdkit.recipe.yaml import MAX_BYTES, load_bytes, load_file, load_option


def value(text: str):
    node, problems = load_bytes(text.encode(), "r.yaml")
    assert problems == []
    return plain(node)


def problems(text: str | bytes) -> list[str]:
    data = text.encode() if isinstance(text, str) else text
    try:
        return [str(problem) for problem in load_bytes(data, "r.yaml")[1]]
    except RecipeError as error:
        return [str(problem) for problem in error.problems]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-5", 1e-5),
        ("1E+3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-0.25", -0.25),
        ("17", 17),
        ("+3", 3),
        ("-4", -4),
        ("017", 17),
        ("0o17", 15),
        ("0xfF", 255),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2026-01-01", "2026-01-01"),
        ("0b11", "0b11"),
        ("1e5x", "1e5x"),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("TRUE", True),
        ("tRue", "tRue"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ('"true"', "true"),
        ('"\\ud83d\\ude00 \\u00e9"', "😀 é"),
        ("=", "="),
        ("./a b", "./a b"),
    ],
)
def test_scalars_follow_yaml_1_2(text, expected):
    got = value(f"a: {text}")["a"]
    assert got == expected
    assert type(got) is type(expected)


def test_block_scalars_are_text():
    assert value("a: |\n  1\nb: >-\n  true\n") == {"a": "1\n", "b": "true"}


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**30), 10**30) | st.booleans() | st.none())
def test_json_scalars_keep_value_and_type(expected):
    got = value(f"[{json.dumps(expected)}]")[0]
    assert got == expected
    assert type(got) is type(expected)


JSON_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff\ufffe\uffff"))
JSON_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | JSON_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(JSON_TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(JSON_VALUE)
def test_json_documents_read_as_what_they_are(expected):
    assert value(json.dumps({"a": expected}, indent=1)) == {"a": expected}


def outcome(read):
    """The problems of reading; what is read without one is JSON."""
    try:
        node, found = read()
    except RecipeError as error:
        return error.problems or pytest.fail("an error without a problem")
    json.dumps(plain(node), allow_nan=False)
    return found


@given(st.binary(max_size=80))
def test_arbitrary_bytes_give_a_value_or_a_recipe_error(data):
    found = outcome(lambda: load_bytes(data, "r.yaml"))
    assert all("\n" not in str(problem) for problem in found)


@given(st.text(st.sampled_from(list("{}[]:,-&*!<>|?%@#'\"\\ \n\tabU0x1.~$")), max_size=60))
def test_yaml_like_text_gives_a_value_or_a_recipe_error(text):
    for read in (lambda: load_bytes(text.encode(), "r.yaml"), lambda: load_option(text, "--set #1")):
        assert all(problem.message for problem in outcome(read))


def test_places_of_keys_and_values():
    node, _ = load_bytes(b"a:\n  b: [1, {c: x}]\n", "r.yaml")
    inner = find(node, ("a", "b", 1))
    assert (inner.mark.line, inner.mark.column) == (2, 10)
    assert (inner.keys["c"].line, inner.keys["c"].column) == (2, 11)
    leaf = find(node, ("a", "b", 1, "c"))
    assert (leaf.mark.file, leaf.mark.line, leaf.mark.column) == ("r.yaml", 2, 14)


def test_every_duplicate_key_is_named_with_both_lines():
    assert problems("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\na: 2\n") == [
        "r.yaml:5:3: b.c: duplicate key 'c' on line 5; it is already on line 3",
        "r.yaml:6:1: a: duplicate key 'a' on line 6; it is already on line 1",
    ]


def test_same_key_quoted_is_a_duplicate():
    assert "duplicate key 'a'" in problems("a: 1\n'a': 2")[0]


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("a: .inf", "r.yaml:1:4: a:", "finite"),
        ("a: -.Inf", "r.yaml:1:4: a:", "finite"),
        ("a: .nan", "r.yaml:1:4: a:", "finite"),
        ("a: 1e999", "r.yaml:1:4: a:", "too large"),
        ("a: " + "9" * 5000, "r.yaml:1:4: a:", "5000 digits"),
        ("a: !!python/object/apply:os.system [x]", "r.yaml:1:4: a:", "!!python/object/apply:os.system"),
        ("a: !env HOME", "r.yaml:1:4: a:", "the tag !env"),
        ("a: !!str 5", "r.yaml:1:4: a:", "quote a value"),
        ("b: &x {c: 1}\na: {<<: *x}", "r.yaml:2:5: a:", "merge keys (<<) are not supported; use extends:"),
        ("1: a", "r.yaml:1:1:", "quote it: '1'"),
        ("null: a", "r.yaml:1:1:", "quote it: 'null'"),
        ("true: a", "r.yaml:1:1:", "quote it: 'true'"),
        ("[a]: 1", "r.yaml:1:1:", "a key must be text"),
        ("? {a: 1}\n: 1", "r.yaml:1:3:", "a key must be text"),
        ("a: 1\n---\nb: 2", "r.yaml:2:1:", "second document"),
        ("a: *x", "r.yaml:1:4: a:", "no anchor &x"),
        ("a: &x [*x]", "r.yaml:1:8: a.0:", "contains itself"),
        ("a:\n\tb: 1", "r.yaml:2:1: a:", "indent with spaces"),
        ("a: [1, 2", "r.yaml:1:9: a:", "in the [ that opens at line 1, column 4"),
        ("a: 'x\nb: 1", "r.yaml:1:4: a:", "never closed"),
        ("a: b: c", "r.yaml:1:5:", "a ':' is not allowed here"),
        ("a:\n  b: 1\n c: 2", "r.yaml:3:2:", "indentation"),
        ("a: @b", "r.yaml:1:4: a:", "cannot start with @"),
        ("{a: 1}\nb: 2", "r.yaml:2:1:", "text that belongs to nothing"),
        ("a: {m: ${vars.x}}", "r.yaml:1:9: a:", 'quote a reference: "${vars.x}"'),
        ('a: "\\0"', "r.yaml:1:4: a:", "control character U+0000"),
        ('a: "\\ud800"', "r.yaml:1:4: a:", "surrogate"),
        ('a: "\\U00110000"', "r.yaml:1:7: a:", "escape"),
        (b"a: 1\nb: \xff", "r.yaml:2:4:", "byte 0xff is not UTF-8"),
        (b"a: 1\nb: x\x00", "r.yaml:2:5:", "U+0000"),
        (b"a: \xef\xbb\xbfb", "r.yaml:1:4:", "U+FEFF"),
        ("a: 1".encode("utf-16"), "r.yaml:1:1:", "UTF-16"),
    ],
)
def test_refusals_say_where_and_what(text, place, words):
    found = problems(text)
    assert len(found) == 1
    assert found[0].startswith(place)
    assert words in found[0]
    assert "\n" not in found[0]


def test_a_byte_order_mark_at_the_start_is_harmless():
    assert plain(load_bytes(b"\xef\xbb\xbfa: 1\n", "r.yaml")[0]) == {"a": 1}


def test_recoverable_mistakes_are_reported_together():
    assert len(problems("a: .inf\nb: 1\nb: 2\nc: !x 1\n3: d\n")) == 4


def test_anchors_are_ordinary_values():
    assert value("a: &x {b: [1]}\nc: *x\nd: *x") == {"a": {"b": [1]}, "c": {"b": [1]}, "d": {"b": [1]}}


def test_an_alias_has_its_own_place_and_its_content_that_of_the_anchor():
    node, _ = load_bytes(b"a: &x {b: 1}\nc: *x", "r.yaml")
    assert find(node, ("c",)).mark.line == 2
    assert find(node, ("c", "b")).mark.line == 1


def test_an_alias_bomb_is_refused_while_it_is_read():
    names = string.ascii_lowercase
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise(names)]
    found = problems("\n".join(lines))
    assert "more than 100,000 values" in found[0]
    assert found[0].startswith("r.yaml:6:")


def test_nesting_is_bounded_with_and_without_aliases():
    assert "levels deep" in problems("[" * 5000)[0]
    half = MAX_DEPTH // 2 + 1
    text = "a: &a " + "[" * half + "]" * half + "\nb: " + "[" * half + "*a" + "]" * half
    assert "levels deep" in problems(text)[0]


def test_large_files_are_refused():
    assert problems(b"#" * (MAX_BYTES + 1)) == ["r.yaml:1:1: the file is larger than 1 MB; a recipe is not data"]
    assert problems(b"a: 1 #" + b"x" * (MAX_BYTES - 6)) == []


def test_unreadable_files_are_recipe_errors(tmp_path):
    with pytest.raises(RecipeError, match=r"nothing\.yaml: cannot read the recipe: no such file"):
        load_file(tmp_path / "nothing.yaml")
    with pytest.raises(RecipeError, match="is a directory"):
        load_file(tmp_path)


def test_options_are_placed_at_their_label():
    node, found = load_option("{a: 1, a: .inf}", "--set #2")
    assert (node.mark.file, node.mark.line) == ("--set #2", 0)
    assert [str(problem) for problem in found] == [
        "--set #2: a: duplicate key 'a'",
        "--set #2: a: .inf is not allowed; write a finite number",
    ]
    with pytest.raises(RecipeError, match=r"^--set #2: not valid YAML"):
        load_option("[1", "--set #2")
    with pytest.raises(RecipeError, match="--var #1"):
        load_option("\ud800", "--var #1")
    assert plain(load_option("", "--set #1")[0]) is None
