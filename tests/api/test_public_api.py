"""The public API is what the committed text says; a change of it is a decision, and shows in a review."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import pytest
from packaging.version import Version

import kdkit
from kdkit.api import API_VERSION

sys.path.insert(0, str(Path(__file__).parent))

import public_api


def test_the_public_api_is_the_committed_one():
    written = public_api.FILE.read_text(encoding="utf-8")
    found = public_api.snapshot()
    assert found == written, f"\n{public_api.changes(written, found)}\nIf that is meant: python tests/api/public_api.py"


def test_the_text_is_the_same_in_every_process():
    """Sets, addresses and the order of imports do not show in it."""
    place = str(public_api.FILE.parent)
    code = f"import sys; sys.path.insert(0, {place!r}); import public_api; print(public_api.snapshot(), end='')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == public_api.snapshot()
    assert " at 0x" not in out.stdout


def test_the_version_is_one_that_kdkit_has_reached():
    assert Version(API_VERSION) <= Version(kdkit.__version__)
    assert API_VERSION.count(".") == 1
    assert f"version {API_VERSION}." in public_api.FILE.read_text(encoding="utf-8").splitlines()[0]


def test_every_public_name_is_documented():
    lacking = []
    for module in map(import_module, public_api.MODULES):
        for name in module.__all__:
            value = getattr(module, name)
            # A class does not inherit the words of another one.
            said = vars(value).get("__doc__") if inspect.isclass(value) else inspect.getdoc(value)
            if (inspect.isclass(value) or inspect.isfunction(value)) and not said:
                lacking.append(f"{module.__name__}.{name}")
    assert not lacking


def test_all_of_kdkit_testing_is_in_the_text():
    import kdkit.testing

    found = {f"kdkit.testing.{module.name}" for module in pkgutil.iter_modules(kdkit.testing.__path__)}
    assert found == {name for name in (*public_api.MODULES, public_api.FIXTURES) if name.startswith("kdkit.testing.")}


class Before:
    count: int = 1

    def build(self, seed: int) -> str: ...


class Renamed:
    number: int = 1

    def build(self, seed: int) -> str: ...


class OtherSignature:
    count: int = 1

    def build(self, seed: int, /) -> str: ...


class More:
    count: int = 1

    def build(self, seed: int) -> str: ...
    def close(self) -> None: ...


class OtherDefault:
    count: int = 2

    def build(self, seed: int) -> str: ...


@dataclass
class Fields:
    name: str
    given: dict = field(default_factory=dict)
    count: int = field(default=1, kw_only=True)


def text(cls: type) -> str:
    return "\n".join(public_api.described("Thing", cls))


@pytest.mark.parametrize("after", [Renamed, OtherSignature, OtherDefault])
def test_what_breaks_plugins_is_called_a_break(after):
    found = public_api.changes(text(Before), text(after))
    assert "changed or went: a new MAJOR" in found


def test_an_addition_is_called_one():
    found = public_api.changes(text(Before), text(More))
    assert "additions: a new MINOR" in found
    assert "def close(self)" in found
    assert public_api.changes(text(Before), text(Before)) == "no change"


def test_fields_stand_with_their_types_and_defaults():
    assert text(Fields).splitlines() == [
        "dataclass Thing",
        "    name: str",
        "    given: dict = dict()",
        "    count: int = 1 (by name)",
    ]


def test_the_text_has_what_plugins_rely_on():
    lines = public_api.snapshot().splitlines()
    for wanted in (
        "kdkit_losses(self) -> Iterable[LossSpec[Any]]",
        "protocol Reward(Protocol)",
        "    def __call__(self, rollouts: Sequence[Rollout], /) -> Sequence[RewardScore]",
        "dataclass Rollout",
        "Params: that of kdkit.api",
        "    INVALID = 2",
    ):
        assert wanted in lines, wanted
