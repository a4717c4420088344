"""What the suites share: errors of one line, and directories that must stay as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdkit.api.errors import KdkitError

__all__ = ["json_value", "refused", "tree", "unchanged"]

_LONGEST = 1000


@contextmanager
def refused(what: str) -> Iterator[None]:
    """The block has to raise a ``KdkitError`` of one line that a terminal can show."""
    try:
        yield
    except KdkitError as error:
        one_line(error, what)
        return
    raise AssertionError(f"{what} was not refused")


def one_line(error: KdkitError, what: str) -> None:
    """Fails unless the message is one printable line that says something."""
    text = error.what
    assert text.strip(), f"{what}: the error says nothing"
    assert "\n" not in text, f"{what}: the error has more than one line: {text!r}"
    assert text.isprintable(), f"{what}: the error holds control characters: {text[:200]!r}"
    assert len(str(error)) <= _LONGEST, f"{what}: the error has {len(str(error)):,} characters"


def tree(directory: Path) -> dict[str, str]:
    """Path of everything below a directory to its content's hash; directories have none."""
    found = sorted(directory.rglob("*"))
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in found
    }


@contextmanager
def unchanged(directory: Path, what: str) -> Iterator[None]:
    """Nothing below the directory may change in the block."""
    before = tree(directory)
    yield
    after = tree(directory)
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    assert not changed, f"{what}: {', '.join(changed[:5])} changed"


def json_value(value: Any) -> bool:
    """Whether a value survives JSON as it is: finite numbers, text, lists, mappings with text as keys."""
    if value is None or isinstance(value, bool | int | str):
        return True
    if isinstance(value, float):
        return value - value == 0
    if isinstance(value, dict):
        return all(isinstance(key, str) and json_value(item) for key, item in value.items())
    return isinstance(value, list | tuple) and all(map(json_value, value))
