"""Parameters made ready for a stage that may run in any directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kdkit.api.params import Params, iter_fields
from kdkit.api.slots import Component

__all__ = ["anchored"]


def anchored(params: Params, base_dir: Path) -> Params:
    """``params`` with every relative path, also of nested components, made absolute from ``base_dir``."""
    result = _anchored(params, base_dir)
    if not isinstance(result, Params):
        raise TypeError(f"expected Params, got {type(result).__name__}")
    return result


def _anchored(value: Any, base_dir: Path) -> Any:
    if isinstance(value, Path):
        return base_dir / value.expanduser()
    if isinstance(value, Component):
        value.params = _anchored(value.params, base_dir)
        return value
    if isinstance(value, BaseModel):
        changed = {name: new for name, item in iter_fields(value) if (new := _anchored(item, base_dir)) is not item}
        return value.model_copy(update=changed) if changed else value
    if isinstance(value, Mapping):
        return _kept(value, {key: _anchored(item, base_dir) for key, item in value.items()}, value.values())
    if isinstance(value, list | tuple):
        return _kept(value, type(value)([_anchored(item, base_dir) for item in value]), value)
    return value


def _kept(old: Any, new: Any, items: Any) -> Any:
    """``old`` itself when nothing in it changed, so that untouched models are not copied."""
    fresh = new.values() if isinstance(new, dict) else new
    return old if all(a is b for a, b in zip(items, fresh, strict=True)) else new
