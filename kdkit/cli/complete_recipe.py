"""What completion reads from recipes: loosely, since a recipe that is being edited is rarely valid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

if TYPE_CHECKING:
    from kdkit.cli.complete_names import Names

__all__ = ["read_tree", "recipe_files", "setting_paths", "stage_names", "variable_names"]

_MAX_BYTES: Final = 2**20
_MAX_CHAIN: Final = 8
"""Recipes that extend one another, as when a recipe is loaded."""
_HEAD_BYTES: Final = 4096
_MAX_FILES: Final = 500
_MAX_PATHS: Final = 2000
_MAX_DEPTH: Final = 12
_PLACES: Final = ("*.yaml", "*.yml", "*/*.yaml", "*/*.yml", "*/*/*.yaml", "*/*/*.yml")
_LEFT_OUT: Final = frozenset({"runs", "node_modules", "site-packages"})
_TOP_LEVEL: Final = ("seed", "name", "track")


def recipe_files(incomplete: str) -> list[str]:
    """Recipes whose path starts with ``incomplete``, as it is written."""
    directory = incomplete.rpartition("/")[0] + "/" if "/" in incomplete else ""
    root = Path(directory or ".").expanduser()
    found = []
    for pattern in _PLACES:
        for path in sorted(root.glob(pattern))[:_MAX_FILES]:
            below = path.relative_to(root)
            text = f"{directory}{below.as_posix()}"
            hidden = any(part.startswith(".") or part in _LEFT_OUT for part in below.parts)
            if text.startswith(incomplete) and not hidden and _is_recipe(path):
                found.append(text)
    return found


def _is_recipe(path: Path) -> bool:
    """Whether ``kdkit:`` or ``extends:``, one of which every recipe has, stands near its start."""
    try:
        with path.open("rb") as stream:
            head = b"\n" + stream.read(_HEAD_BYTES)
    except OSError:
        return False
    return b"\nkdkit:" in head or b"\nextends:" in head


def read_tree(path: Path, chain: int = 1) -> dict[str, Any]:
    """A recipe laid over what it extends, as plain data; empty when it cannot be read."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            return {}
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    if not isinstance(data, dict):
        return {}
    base = data.get("extends")
    if isinstance(base, str) and chain < _MAX_CHAIN:
        return _merged(read_tree(path.parent / Path(base).expanduser(), chain + 1), data)
    return data


def _merged(base: Any, over: Any) -> Any:
    """As recipes are laid over one another: parameters of another component do not stay."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if any(key in base and key in over and base[key] != over[key] for key in ("use", "kind")):
        return over
    return {**base, **{key: _merged(base.get(key), value) for key, value in over.items()}}


def stage_names(tree: Mapping[str, Any]) -> list[str]:
    """Stages in the order of the recipe."""
    return _keys(tree.get("stages"))


def variable_names(tree: Mapping[str, Any]) -> list[str]:
    """Variables in the order of the recipe."""
    return _keys(tree.get("vars"))


def _keys(node: Any) -> list[str]:
    return [key for key in node if isinstance(key, str)] if isinstance(node, dict) else []


def setting_paths(tree: Mapping[str, Any], known: Names) -> Iterator[str]:
    """Every place that ``--set`` can change: what the recipe says, and what its components take besides."""
    yield from (key for key in _TOP_LEVEL)
    for stage in stage_names(tree):
        yield from islice(_paths(tree["stages"][stage], f"stages.{stage}", known), _MAX_PATHS)


def _paths(node: Any, path: str, known: Names) -> Iterator[str]:
    if path.count(".") > _MAX_DEPTH:  # an alias of YAML may stand within itself
        return
    if isinstance(node, list):
        for index, item in enumerate(node):
            # One path for every step, so that whoever takes a number of them ends: aliases of YAML grow like powers.
            yield f"{path}.{index}"
            yield from _paths(item, f"{path}.{index}", known)
    elif isinstance(node, dict):
        written = _keys(node)
        for key in written:
            if key not in {"kind", "use"}:
                yield f"{path}.{key}"
                yield from _paths(node[key], f"{path}.{key}", known)
        name = node.get("kind", node.get("use"))
        yield from (f"{path}.{key}" for key in known.params_of(str(name), stage="kind" in node) if key not in written)
