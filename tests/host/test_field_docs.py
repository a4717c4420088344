"""The string below a field of ``Params`` is its description, wherever the class stands."""

from __future__ import annotations

import ast
import sys
from typing import Annotated

import pytest
from pydantic import Field

from kdkit.api import Params
from kdkit.api.field_docs import field_docs


class Outer(Params):
    size: int = 1
    """How many
    there are."""
    plain: int = 2
    said: Annotated[int, Field(description="in the field")] = 3
    """Below it."""
    """Not about a field."""
    renamed: int = Field(4, alias="re-named")
    "Has another key."

    class Inner(Params):
        depth: int = 0
        "Of a class within a class."


class Child(Outer):
    own: int = 5
    """The child's own."""


if len(sys.argv) > 10_000:

    class Chosen(Params):
        x: int = 0
        """Never made."""

else:
    try:
        raise ImportError
    except ImportError:

        class Chosen(Params):
            y: int = 0
            """Made where something is missing."""


def texts(model):
    return {name: field.description for name, field in model.model_fields.items()}


def test_texts_below_fields_are_descriptions():
    assert texts(Outer) == {
        "size": "How many\nthere are.",
        "plain": None,
        "said": "in the field",
        "renamed": "Has another key.",
    }


def test_children_inherit_texts():
    assert texts(Child) == {**texts(Outer), "own": "The child's own."}


def test_classes_stand_anywhere():
    class Local(Params):
        x: int = 0
        """Of a class within a function."""

    assert texts(Local) == {"x": "Of a class within a function."}
    assert texts(Outer.Inner) == {"depth": "Of a class within a class."}
    assert texts(Chosen) == {"y": "Made where something is missing."}


def test_json_schemas_have_the_texts():
    properties = Child.model_json_schema()["properties"]
    assert {key: entry.get("description") for key, entry in properties.items()} == {
        "size": "How many\nthere are.",
        "plain": None,
        "said": "in the field",
        "re-named": "Has another key.",
        "own": "The child's own.",
    }


def test_what_has_no_source_has_no_text(install):
    made: dict = {"Params": Params, "__name__": "no_such_module"}
    exec("class P(Params):\n    x: int = 0\n    'A text.'\n", made)
    assert texts(made["P"]) == {"x": None}


@pytest.mark.parametrize("order", ["first then second", "second then first"])
def test_modules_that_import_each_other_keep_their_own_texts(install, order):
    """The latest module is remembered: another one in between must not take its place."""
    head = "from kdkit.api import Params\n"
    one = "class {name}(Params):\n    x: int = 0\n    '{name} of {module}.'\n"
    between = "import second\n" if order.startswith("first") else ""
    first = head + one.format(name="A", module="first") + between + one.format(name="B", module="first")
    second = head + one.format(name="A", module="second")
    install("kdkit-two", {"first": first, "second": second}, entry_points={})
    import first
    import second

    assert [texts(cls)["x"] for cls in (first.A, first.B, second.A)] == ["A of first.", "B of first.", "A of second."]


def test_a_module_is_parsed_once(install, monkeypatch):
    parsed = []
    real = ast.parse
    monkeypatch.setattr("kdkit.api.field_docs.ast.parse", lambda source: parsed.append(source) or real(source))
    code = "from kdkit.api import Params\n" + "".join(
        f"class P{n}(Params):\n    x: int = 0\n    'T.'\n" for n in range(5)
    )
    install("kdkit-many", {"many_classes": code}, entry_points={})
    import many_classes

    assert texts(many_classes.P4) == {"x": "T."}
    assert len(parsed) == 1
    assert field_docs(int) == {}
