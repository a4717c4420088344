from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any, List, Literal, Optional  # noqa: UP035 - plugins may use either spelling

import pytest
import yaml
from pydantic import Field
from typing_extensions import TypeAliasType

from kdkit.api import (
    Component,
    DatasetLoader,
    Loss,
    Model,
    OneOrMore,
    Params,
    Precision,
    Ref,
    Reward,
    Runtime,
    Sampling,
    Sandbox,
    Teacher,
    Weighted,
)
from kdkit.api.artifacts import KeepLayers
from kdkit.host import ParamDoc, describe_params


class Colour(Enum):
    RED = "red"
    TWO = 2


class Case(Params):
    name: str
    """The case."""
    again: Optional[Case] = None  # noqa: UP045
    """Refers to itself."""


def row(annotation: Any, default: Any = ...) -> ParamDoc:
    namespace = {"__annotations__": {"x": annotation}, "__module__": __name__}
    if default is not ...:
        namespace["x"] = default
    return describe_params(type("P", (Params,), namespace))[0]


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (bool, "bool"),
        (Path, "path"),
        (Any, "any"),
        (int | None, "int | null"),
        (Optional[str], "str | null"),  # noqa: UP045
        (list[str], "list of str"),
        (List[str], "list of str"),  # noqa: UP006
        (list, "list"),
        (dict[str, float], "mapping of str to float"),
        (tuple[int, ...], "list of int"),
        (tuple[float, float], "[float, float]"),
        (frozenset[int], "list of int"),
        (Literal["auto", 3, None], '"auto" | 3 | null'),
        (Literal["auto"] | int, '"auto" | int'),
        (Precision, '"auto" | "bf16" | "fp32"'),
        (KeepLayers, "int | str | list of int"),
        (Colour, '"red" | 2'),
        (TypeAliasType("Count", Annotated[int, Field(ge=0)]), "int (>= 0)"),
        (type[int], "type[int]"),
        (Sampling, "mapping"),
        (Component[Teacher], "teacher component"),
        (Component[Sandbox] | None, "sandbox component | null"),
        (list[Component[Reward]], "list of reward component"),
        (OneOrMore[Weighted[Loss]], "weighted loss component or list of them"),
        (OneOrMore[Component[DatasetLoader]] | None, "dataset component or list of them | null"),
        (Ref[Model], "model reference"),
        (dict[str, Ref[Model]], "mapping of str to model reference"),
        (Annotated[int, Field(ge=1)] | None, "int (>= 1) | null"),
        (list[Annotated[float, Field(gt=0, lt=1)]], "list of float (> 0, < 1)"),
    ],
)
def test_types(annotation, text):
    assert row(annotation).type == text


@pytest.mark.parametrize(
    ("annotation", "default", "text"),
    [
        (float, Field(gt=0, le=1), "> 0, <= 1"),
        (int, Field(multiple_of=8), "multiple of 8"),
        (str, Field(pattern="a+", min_length=2, max_length=5), "length >= 2, length <= 5, matches a+"),
        (list[int], Field(min_length=1), "length >= 1"),
        (OneOrMore[Weighted[Loss]], ..., ""),
        (Annotated[int, Runtime()], Field(10, ge=1), "runtime, >= 1"),
        (Precision, "auto", ""),
        (int, ..., ""),
    ],
)
def test_constraints(annotation, default, text):
    assert set(row(annotation, default).constraint.split(", ")) == set(text.split(", "))


@pytest.mark.parametrize(
    ("annotation", "default", "text"),
    [
        (int, ..., "required"),
        (int | None, None, "null"),
        (bool, True, "true"),
        (float, 1e-5, "1e-05"),
        (str, "cosine", "cosine"),
        (str, "on", "'on'"),
        (str, "two\nlines", '"two\\nlines"'),
        (tuple[float, float], (0.9, 0.999), "[0.9, 0.999]"),
        (list[int], Field(default_factory=lambda: [1]), "[1]"),
        (int, Field(default_factory=lambda data: 3), "from other parameters"),
        (int, Field(default_factory=lambda: int("x")), "raises ValueError"),
        (Path, Path("a/b"), "a/b"),
        (Colour, Colour.RED, "red"),
        (frozenset[str], frozenset({"b", "a"}), "[a, b]"),
        (Sampling, Sampling(do_sample=True, top_k=5), "{do_sample: true, top_k: 5}"),
    ],
)
def test_defaults(annotation, default, text):
    assert row(annotation, default).default == text
    if text not in ("required", "from other parameters"):
        yaml.safe_load(text)


def test_components_as_defaults(install, catalog, loss_module):
    install("kdkit-acme", {"acme_default": loss_module()})
    found = catalog().find("loss", "focal")
    component = Weighted("loss", found, found.spec.params(gamma=3.0), {"weight": 0.5})
    assert row(list[Weighted[Loss]], [component]).default == "[{use: focal, weight: 0.5, gamma: 3.0}]"


def test_nested_parameters_follow_the_one_that_holds_them():
    class P(Params):
        sampling: Sampling = Sampling(do_sample=True, temperature=0.5)
        """How to
        decode."""
        cases: tuple[Case, ...] = ()
        """Cases."""
        named: dict[str, Case] | None = None
        """By name."""

    rows = {doc.name: doc for doc in describe_params(P)}
    assert list(rows)[:3] == ["sampling", "sampling.do_sample", "sampling.temperature"]
    assert rows["sampling"].doc == "How to decode."
    assert rows["sampling.temperature"].default == "0.5"
    assert rows["sampling.temperature"].constraint == "> 0"
    assert rows["sampling.top_p"].default == "1.0"
    assert rows["cases[].name"].doc == "The case."
    assert rows["cases[].name"].default == "required"
    assert rows["named.NAME.name"].type == "str"
    assert "cases[].again" in rows
    assert "cases[].again.name" not in rows


def test_a_key_that_is_no_python_name():
    class P(Params):
        source: str = Field(alias="from")
        """Where."""

    assert describe_params(P) == [ParamDoc(name="from", type="str", default="required", constraint="", doc="Where.")]


def test_no_parameters():
    assert describe_params(Params) == []
