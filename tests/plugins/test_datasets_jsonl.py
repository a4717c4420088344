from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdkit.api import DataError, Example, Message
from kdkit.models.examples import EXAMPLE_KEYS, example_from_json, example_to_json
from kdkit.plugins.datasets.jsonl import JsonlLoader
from kdkit.plugins.datasets.plugin import JsonlParams


def load(ctx, source, **given):
    params = JsonlParams.model_validate_json(json.dumps({"source": str(source), **given}))
    return JsonlLoader(params).load(ctx)


@pytest.fixture
def file(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def only(rows):
    (example,) = rows.examples
    return example


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


CHAT = turns(("system", "S"), ("user", "1?"), ("assistant", "1!"), ("user", "2?"), ("assistant", "2!"))


def test_messages(load_context, file):
    path = file({"messages": CHAT, "tests": [1, 2], "source": "web"})
    example = only(load(load_context, path))
    assert example.prompt == tuple(Message(m["role"], m["content"]) for m in CHAT[:-1])
    assert (example.completion, example.every_turn) == ("2!", True)
    assert example.extra == {"tests": [1, 2], "source": "web"}
    assert only(load(load_context, path, every_turn=False)).every_turn is False
    assert load_context.lines == [f"{path}: rows with messages"] * 2


def test_prompt_and_completion(load_context, file):
    example = only(load(load_context, file({"prompt": "Once", "completion": " upon a time", "n": 3})))
    assert (example.prompt, example.completion, example.every_turn) == ("Once", " upon a time", False)
    assert example.extra == {"n": 3}
    assert load_context.lines[0].endswith("rows with prompt and completion")


def test_prompt_and_completion_as_messages(load_context, file):
    example = only(load(load_context, file({"prompt": CHAT[:2], "completion": CHAT[2:3]})))
    assert example.prompt == (Message("system", "S"), Message("user", "1?"))
    assert (example.completion, example.every_turn) == ("1!", False)


def test_prompt_only(load_context, file):
    rows = load(load_context, file({"prompt": "One"}, {"prompt": "Two", "answer": 4}))
    assert {(e.prompt, e.completion, e.extra.get("answer")) for e in rows.examples} == {
        ("One", None, None),
        ("Two", None, 4),
    }
    assert only(load(load_context, file({"prompt": CHAT[:2]}))).prompt[-1] == Message("user", "1?")


def test_id_category_and_references_are_used(load_context, file):
    row = {"prompt": "a", "completion": "b", "id": 7, "category": "x", "references": ["b", "c"]}
    example = only(load(load_context, file(row)))
    assert (example.id, example.category, example.references, example.extra) == ("7", "x", ("b", "c"), {})


def test_null_columns_of_a_table_are_absent(load_context, tmp_path):
    table = pa.table({"prompt": ["a", "b"], "completion": pa.array([None, None], pa.string()), "id": [1, 2]})
    pq.write_table(table, tmp_path / "x.parquet")
    assert [e.completion for e in load(load_context, tmp_path / "x.parquet").examples] == [None, None]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"text": "x"}, "has neither 'messages' nor 'prompt' (columns: text); for 'instruction' use the dataset dolly"),
        ({"messages": CHAT, "prompt": "x"}, "has 'messages' and also 'prompt' or 'completion'"),
        ({"messages": "x"}, "'messages' is a text; allowed: a list of {role, content}"),
        ({"messages": []}, "'messages' is an empty list; allowed: a list of {role, content}"),
        ({"messages": ["x"]}, "messages[0] is a text; allowed: {role, content}"),
        ({"messages": turns(("bot", "x"))}, "the role of messages[0] is 'bot'; allowed: system, user, assistant, tool"),
        (
            {"messages": [{"role": ["user"], "content": "x"}]},
            "the role of messages[0] is ['user']; allowed: system, user",
        ),
        ({"messages": [{"content": "x"}]}, "the role of messages[0] is None; allowed: system, user, assistant, tool"),
        ({"messages": [{"role": "user"}]}, "the content of messages[0] is null, not text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "the content of messages[0] is a list, not text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}], "name": None}]},
            "messages[0] has tool_calls; allowed: role and content",
        ),
        ({"messages": CHAT[:2]}, "the last message is of the role 'user': only an answer of the assistant is learned"),
        ({"messages": CHAT[4:]}, "has an answer but no message before it"),
        ({"prompt": 3}, "'prompt' is a number; allowed: text or a list of {role, content}"),
        ({"prompt": CHAT[:3]}, "the last message of 'prompt' is of the assistant, so there is nothing to answer"),
        ({"prompt": "x", "completion": CHAT[2:3]}, "'completion' is a list, not text"),
        (
            {"prompt": CHAT[:2], "completion": "x"},
            "'prompt' is a list of messages and 'completion' a text; both have to be the same",
        ),
        (
            {"prompt": CHAT[:2], "completion": CHAT[2:]},
            "'completion' is not exactly one message of the assistant; use 'messages' for several turns",
        ),
        ({"prompt": "x", "id": 1.5}, "'id' is a number, neither text nor a whole number"),
        ({"prompt": "x", "category": True}, "'category' is true, neither text nor a whole number"),
        ({"prompt": "x", "references": "y"}, "'references' is not a list of texts"),
    ],
)
def test_broken_rows_name_file_and_line(load_context, file, row, what):
    path = file(row)
    with pytest.raises(DataError) as error:
        load(load_context, path)
    assert str(error.value).startswith(f"{path}:1: {what}")
    assert str(error.value).endswith("; mend the row, or set on_error: skip")
    assert load(load_context, path, on_error="skip").counts["broken"] == 1


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_two_shapes_in_one_file_are_never_skipped(load_context, file, on_error):
    path = file({"prompt": "a", "completion": "b"}, {"prompt": "c"})
    with pytest.raises(DataError) as error:
        load(load_context, path, on_error=on_error)
    assert str(error.value) == (f"{path}:2: has the shape 'prompt only', but {path}:1 has 'prompt and completion'")


def test_a_broken_first_row_does_not_decide_the_shape(load_context, file):
    rows = load(load_context, file({"text": "x"}, {"prompt": "a"}, {"prompt": "b"}), on_error="skip")
    assert rows.counts == {"read": 3, "kept": 2, "broken": 1}


def test_empty_prompts_and_answers_are_dropped(load_context, file):
    rows = load(
        load_context,
        file(
            {"messages": CHAT},
            {"messages": turns(("system", "S"), ("user", " "), ("assistant", "x"))},
            {"messages": turns(("user", "x"), ("assistant", ""))},
        ),
    )
    assert rows.counts == {"read": 3, "kept": 1, "broken": 0, "empty-prompt": 1, "empty-completion": 1}


def test_split_is_all_unless_asked_for(load_context, file):
    path = file(*({"prompt": f"prompt {n}"} for n in range(100)))
    assert len(load(load_context, path).examples) == 100
    parts = [load(load_context, path, split=name, test_fraction=0.3).examples for name in ("train", "test")]
    assert 0 < len(parts[1]) < len(parts[0]) < 100


def test_ids_do_not_change_when_rows_are_added(load_context, file):
    row = {"prompt": "a", "completion": "b"}
    alone = only(load(load_context, file(row))).id
    rows = load(load_context, file({"prompt": "a", "completion": "c"}, row)).examples
    assert [e.id for e in rows if e.completion == "b"] == [alone]
    assert len({e.id for e in rows}) == 2


def test_sample():
    rows = JsonlLoader(JsonlParams.model_validate_json('{"source": "./absent.jsonl", "max_rows": 1}')).sample()
    assert len(rows.examples) == 12
    assert all(isinstance(e.prompt, str) and e.completion for e in rows.examples)


# --- examples as JSON -------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=10)
filled = texts.filter(lambda text: bool(text.strip()))
messages = st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), texts)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
examples = st.builds(
    Example,
    id=filled,
    prompt=texts | st.lists(messages, min_size=1, max_size=3).map(tuple),
    completion=st.none() | texts,
    every_turn=st.booleans(),
    references=st.lists(texts, max_size=3).map(tuple),
    category=texts,
    extra=st.dictionaries(texts, json_values, max_size=3),
)


@given(examples)
def test_examples_survive_json(example):
    line = json.dumps(example_to_json(example), allow_nan=False)
    assert example_from_json(json.loads(line)) == example


def test_stage_output_is_recognised(load_context, file):
    written = [
        Example(id="a", prompt=(Message("user", "A?"),), completion="A!", every_turn=True, references=("A!", "a")),
        Example(id="b", prompt="B?", completion="B!", category="x", extra={"n": [1]}),
    ]
    path = file(*map(example_to_json, written))
    rows = load(load_context, path)
    assert sorted(rows.examples, key=lambda e: e.id) == written
    assert load_context.lines == [f"{path}: rows that kdkit wrote"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"id": 1}, "'id' is a number, not text"),
        ({"completion": ["x"]}, "'completion' is a list, not text"),
        ({"every_turn": "yes"}, "'every_turn' is a text, not true or false"),
        ({"references": ["a", None]}, "'references' is not a list of texts"),
        ({"extra": []}, "'extra' is an empty list, not an object"),
        ({"prompt": []}, "'prompt' is an empty list"),
        ({"category": None}, "'category' is null, not text"),
    ],
)
def test_a_stage_output_that_was_edited(load_context, file, change, what):
    path = file({**example_to_json(Example(id="a", prompt="p")), **change})
    with pytest.raises(DataError) as error:
        load(load_context, path)
    assert str(error.value).startswith(f"{path}:1: {what}")


def test_example_keys_are_all_or_an_error():
    data = example_to_json(Example(id="a", prompt="p"))
    assert set(data) == EXAMPLE_KEYS
    with pytest.raises(DataError, match="keys that are missing or unknown: extra"):
        example_from_json({name: value for name, value in data.items() if name != "extra"})
