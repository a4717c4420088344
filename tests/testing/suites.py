"""Runs single checks of a suite of conformance by hand, so that tests can see how a component fails."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest


def checks_of(suite: type) -> list[str]:
    """Names of the checks of a suite."""
    return sorted(name for name in dir(suite) if name.startswith("test_"))


def check(suite: type, name: str, tmp_path: Path) -> None:
    """Run one check of a suite."""
    method = getattr(suite(), name)
    with pytest.MonkeyPatch.context() as patch:
        given: Mapping[str, object] = {"tmp_path": tmp_path, "monkeypatch": patch}
        method(**{name: given[name] for name in inspect.signature(method).parameters})


def variant(suite: type, **changes: object) -> type:
    """The suite for another component."""
    made = {name: value if not callable(value) else _method(value) for name, value in changes.items()}
    return type("Suite", (suite,), made)


def _method(function: Callable[..., object]) -> Callable[..., object]:
    return lambda self, *args: function(*args)
