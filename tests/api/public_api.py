"""The public API as text: names, signatures, fields, hooks and methods. Rewrite the committed text with

python tests/api/public_api.py
"""

from __future__ import annotations

import difflib
import enum
import inspect
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Any

from pydantic import BaseModel

FILE = Path(__file__).with_name("public_api.txt")
MODULES = (
    "kdkit",
    "kdkit.api",
    "kdkit.adapters",
    "kdkit.testing.conformance",
    "kdkit.testing.fakes",
    "kdkit.testing.hostile",
    "kdkit.testing.install",
    "kdkit.testing.network",
    "kdkit.testing.programs",
    "kdkit.testing.rows",
    "kdkit.testing.teachers",
    "kdkit.testing.tiny",
    "kdkit.train.divergences",
)
FIXTURES = "kdkit.testing.plugin"
LONGEST = 60
"""Characters of a value that is worth showing."""


def snapshot() -> str:
    """The whole text."""
    from kdkit.api import API_VERSION

    blocks = [f"# The public API, version {API_VERSION}. Rewrite with: python tests/api/public_api.py"]
    for name in MODULES:
        module = import_module(name)
        blocks.append(f"== {name}")
        known = import_module("kdkit.api").__all__ if name == "kdkit" else ()
        blocks += [
            f"{member}: that of kdkit.api" if member in known else "\n".join(described(member, getattr(module, member)))
            for member in names(module)
        ]
    blocks.append("== hooks")
    blocks.append("\n".join(hooks()))
    if find_spec(FIXTURES) is not None:
        blocks.append("== fixtures of pytest")
        blocks.append("\n".join(fixtures(import_module(FIXTURES))))
    return "\n\n".join(blocks) + "\n"


def names(module: Any) -> list[str]:
    """What a module says is public. Its version is another one in every release."""
    return sorted(name for name in getattr(module, "__all__", ()) if name != "__version__")


class Plain(str):
    """An annotation as it was written: ``inspect`` puts quotes around texts."""

    __slots__ = ()
    __repr__ = str.__str__


def signature(function: Any) -> str:
    """The signature on one line."""

    def plainly(annotation: Any) -> Any:
        return Plain(annotation) if isinstance(annotation, str) else annotation

    def shortly(default: Any) -> Any:
        return Plain("...") if isinstance(default, str) and len(default) > LONGEST else default

    found = inspect.signature(function)
    given = [
        given.replace(annotation=plainly(given.annotation), default=shortly(given.default))
        for given in found.parameters.values()
    ]
    return str(found.replace(parameters=given, return_annotation=plainly(found.return_annotation)))


def described(name: str, value: Any) -> Iterator[str]:
    """One public name, and what a plugin can rely on below it."""
    if inspect.isclass(value):
        yield from described_class(name, value)
    elif inspect.isfunction(value):
        yield f"def {name}{signature(value)}"
    elif hasattr(value, "__origin__") or isinstance(value, UnionType):
        # What stands beside the type in an Annotated checks values, and shows addresses.
        yield f"type {name} = {plain(value.__origin__ if hasattr(value, '__metadata__') else value)}"
    else:
        short = isinstance(value, str | int | tuple) and len(repr(value)) <= LONGEST
        yield f"{name}: {type(value).__name__}" + (f" = {value!r}" if short else "")


def described_class(name: str, cls: type) -> Iterator[str]:
    bases = [base.__name__ for base in cls.__bases__ if base not in (object,) and base.__name__ != "Generic"]
    kind = "protocol" if getattr(cls, "_is_protocol", False) else "dataclass" if is_dataclass(cls) else "class"
    yield f"{kind} {name}" + (f"({', '.join(bases)})" if bases else "")
    lines = [*members(cls)]
    yield from (f"    {line}" for line in lines)


def members(cls: type) -> Iterator[str]:
    """Fields, attributes and methods that the class itself brings."""
    if issubclass(cls, enum.Enum):
        yield from (f"{member.name} = {member.value!r}" for member in cls)
        return
    if issubclass(cls, BaseModel):
        yield from (model_field(name, cls) for name in cls.model_fields if name in inspect.get_annotations(cls))
    elif is_dataclass(cls):
        yield from (dataclass_field(field) for field in fields(cls))
    else:
        yield from attributes(cls)
    if not is_dataclass(cls) and "__init__" in vars(cls) and not getattr(cls, "_is_protocol", False):
        yield f"def __init__{signature(cls.__init__)}"
    for name, member in vars(cls).items():
        yield from method(name, member)


def attributes(cls: type) -> Iterator[str]:
    for name, annotation in inspect.get_annotations(cls).items():
        if not name.startswith("_"):
            default = vars(cls).get(name, MISSING)
            simple = isinstance(default, str | int | float | tuple | frozenset | type(None))
            yield f"{name}: {annotation}" + (f" = {stable(default)}" if simple else "")


def method(name: str, member: Any) -> Iterator[str]:
    """A public method. Checks of conformance suites may grow in every version, so that they are not listed."""
    if (name.startswith("_") and name != "__call__") or name.startswith("test_"):
        return
    if isinstance(member, property):
        yield f"property {name} -> {inspect.signature(member.fget).return_annotation}"
    elif isinstance(member, classmethod | staticmethod):
        yield f"{type(member).__name__} {name}{signature(member.__func__)}"
    elif inspect.isfunction(member):
        yield f"def {name}{signature(member)}"


def model_field(name: str, cls: type[BaseModel]) -> str:
    field = cls.model_fields[name]
    default = "" if field.is_required() else f" = {field.get_default(call_default_factory=True)!r}"
    return f"{name}: {inspect.get_annotations(cls)[name]}{default}"


def dataclass_field(field: Field[Any]) -> str:
    default = "" if field.default is MISSING else f" = {stable(field.default)}"
    if field.default_factory is not MISSING:
        default = f" = {field.default_factory.__name__}()"
    return f"{field.name}: {field.type}{default}" + (" (by name)" if field.kw_only else "")


def stable(value: Any) -> str:
    """``repr`` without the order of sets, which is another one in every process."""
    return f"frozenset({sorted(value)})" if isinstance(value, frozenset) else repr(value)


def plain(value: Any) -> str:
    return repr(value).replace("typing.", "").replace("collections.abc.", "")


def hooks() -> Iterator[str]:
    from kdkit.api.hookspecs import HookSpecs

    for name, function in vars(HookSpecs).items():
        if name.startswith("kdkit_"):
            deprecated = function.kdkit_spec["warn_on_impl_args"] or {}
            marks = "".join(f" (deprecated: {argument})" for argument in deprecated)
            yield f"{name}{signature(function)}{marks}"


def fixtures(module: Any) -> Iterator[str]:
    for name, value in sorted(vars(module).items()):
        if type(value).__name__ == "FixtureFunctionDefinition":
            yield f"{name} -> {inspect.signature(value._get_wrapped_function()).return_annotation}"


def changes(old: str, new: str) -> str:
    """What another text changes: lines that went or changed break plugins, new ones do not."""
    lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0))
    body = [line for line in lines if line[:1] in "+-" and line[:3] not in {"+++", "---"}]
    gone = [line for line in body if line[0] == "-" and not line.startswith("-# ")]
    verdict = (
        "names or signatures changed or went: a new MAJOR (before 1.0: MINOR)" if gone else "additions: a new MINOR"
    )
    return "\n".join([*body, f"-> {verdict} of API_VERSION, and a line in CHANGELOG.md"]) if body else "no change"


def main() -> None:
    """Rewrite the file and say what that means."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    old = FILE.read_text(encoding="utf-8") if FILE.exists() else ""
    new = snapshot()
    FILE.write_text(new, encoding="utf-8")
    print(changes(old, new))


if __name__ == "__main__":
    main()
