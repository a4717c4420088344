"""The top level of a recipe: everything but the stages' parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kdkit.recipe.compose import TOP_LEVEL
from kdkit.recipe.nodes import Loc, Node, Report, find, plain
from kdkit.recipe.paths import placed
from kdkit.recipe.variables import STAGE_REFERENCE
from kdkit.recipe.words import did_you_mean, shown

__all__ = ["FORMAT", "NAME_PATTERN", "STAGE_PATTERN", "Header", "read_header"]

FORMAT: Final = 1
"""The recipe format this version reads."""
NAME_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
STAGE_PATTERN: Final = r"[A-Za-z][A-Za-z0-9_-]*"
_DEFAULT_SEED: Final = 17
_REQUIRED: Final = {"kdkit": f"; write kdkit: {FORMAT}", "name": "", "stages": ""}


@dataclass(frozen=True, slots=True)
class Header:
    """The plain values of the top level; defaults where they are missing or wrong.

    Attributes:
        name: Of the recipe.
        seed: Of the recipe.
        requires: ``(path, requirement)`` of each entry.
        plugins: ``(path, plugin file)`` of each entry.
        stages: Stage names with a valid name, in written order.
    """

    name: str
    seed: int
    requires: tuple[tuple[Loc, str], ...]
    plugins: tuple[tuple[Loc, Path], ...]
    stages: tuple[str, ...]


def read_header(report: Report, base_dir: Path) -> Header:
    """Check the top level and report what is wrong with it."""
    entries = report.root.value
    assert isinstance(entries, Mapping)
    for key in entries:
        if key not in TOP_LEVEL:
            report.add((key,), f"unknown key {key!r}{did_you_mean(key, TOP_LEVEL)}", at_key=True)
    for key, hint in _REQUIRED.items():
        if key not in entries:
            report.add((), f"missing key {key!r}{hint}", unwritten=(key,))
    _format(report)
    files = _texts(report, "plugins", "paths such as ./losses.py")
    return Header(
        name=_name(report),
        seed=_seed(report),
        requires=tuple(_texts(report, "requires", "requirements such as kdkit-acme>=0.2")),
        plugins=tuple((loc, placed(text, base_dir)) for loc, text in files),
        stages=tuple(_stages(report)),
    )


def _format(report: Report) -> None:
    node = report.root.child("kdkit")
    if node is None or (node.value == FORMAT and type(node.value) is int):
        return
    if type(node.value) is int:
        report.add(("kdkit",), f"recipe format {node.value} is not known; this version reads kdkit: {FORMAT}")
    else:
        report.add(("kdkit",), f"wants {FORMAT} (the recipe format), got {shown(plain(node))}")


def _checked(report: Report, key: str, default: Any, accepts: Callable[[Any], bool], wants: str) -> Any:
    node = report.root.child(key)
    if node is None:
        return default
    value = plain(node)
    if accepts(value):
        return value
    if isinstance(value, str) and STAGE_REFERENCE.fullmatch(value):
        wants += " and no stage's output"
    report.add((key,), f"wants {wants}, got {shown(value)}")
    return default


def _name(report: Report) -> str:
    wants = "a name of 1 to 64 letters, digits, '.', '_' and '-' that starts with a letter or digit"
    return str(_checked(report, "name", "", lambda v: isinstance(v, str) and _matches(NAME_PATTERN, v), wants))


def _seed(report: Report) -> int:
    return int(_checked(report, "seed", _DEFAULT_SEED, lambda v: type(v) is int and v >= 0, "a whole number from 0"))


def _matches(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text) is not None


def _texts(report: Report, key: str, wants: str) -> list[tuple[Loc, str]]:
    node = report.root.child(key)
    if node is None:
        return []
    if not isinstance(node.value, tuple):
        report.add((key,), f"wants a list of {wants}, got {shown(plain(node))}")
        return []
    found: list[tuple[Loc, str]] = []
    for index, item in enumerate(node.value):
        if isinstance(item.value, str) and item.value.strip() and not item.broken:
            found.append(((key, index), item.value))
        else:
            report.add((key, index), f"wants text, one of the {wants}, got {shown(plain(item))}")
    return found


def _stages(report: Report) -> list[str]:
    node = find(report.root, ("stages",))
    if node is None or node.broken:
        return []
    if not isinstance(node.value, Mapping) or not node.value:
        got = shown(plain(node)) if not isinstance(node.value, Mapping) else "none"
        report.add(("stages",), f"wants at least one stage such as sft: {{kind: sft, ...}}, got {got}")
        return []
    for name in node.value:
        _check_stage_name(report, name, node)
    return list(node.value)


def _check_stage_name(report: Report, name: str, stages: Node) -> None:
    if not _matches(STAGE_PATTERN, name):
        message = f"a stage's name is letters, digits, - and _, and starts with a letter; got {name!r}"
        report.add(("stages", name), message, at_key=True)
    stage = stages.child(name)
    if stage is not None and not isinstance(stage.value, Mapping):
        report.add(("stages", name), f"wants a mapping such as {{kind: sft, ...}}, got {shown(plain(stage))}")
