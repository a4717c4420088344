"""Which plugins are installed. Reads metadata only: nothing is imported here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Final

from packaging.utils import canonicalize_name

import kdkit
from kdkit.api.hookspecs import ENTRY_POINT_GROUP
from kdkit.host.records import BUILT_IN, BrokenPlugin, PluginSource, one_line

__all__ = ["installed_plugins"]

_UNKNOWN: Final = "(no name)"


def installed_plugins() -> tuple[list[PluginSource], list[BrokenPlugin]]:
    """All entry points of the group ``kdkit.plugins``: built-ins first, then by distribution and entry-point name.

    A distribution found twice on the import path counts once, where it comes first. One whose metadata cannot be read
    is returned as broken.
    """
    sources: dict[tuple[str, str], PluginSource] = {}
    broken: list[BrokenPlugin] = []
    seen: set[str] = set()
    for distribution in distributions():
        if ENTRY_POINT_GROUP not in _entry_point_text(distribution):
            continue
        name = _name(distribution)
        if name in seen:
            continue
        if name != _UNKNOWN:
            seen.add(name)
        try:
            sources.update({(name, found.entry_point): found for found in _sources(name, distribution)})
        except Exception as exc:  # noqa: BLE001 - whatever is wrong with a stranger's metadata, it is named
            broken.append(BrokenPlugin(dist=name, version="?", entry_point="?", error=f"bad metadata: {one_line(exc)}"))
    return sorted(sources.values(), key=_order), sorted(broken, key=lambda item: item.dist)


def _entry_point_text(distribution: Distribution) -> str:
    try:
        return distribution.read_text("entry_points.txt") or ""
    except (OSError, ValueError):
        return ""


def _name(distribution: Distribution) -> str:
    try:
        name = distribution.metadata["Name"]
    except Exception:  # noqa: BLE001 - importlib.metadata raises different things for a missing METADATA file
        name = None
    return canonicalize_name(name) if name else _UNKNOWN


def _sources(name: str, distribution: Distribution) -> Iterator[PluginSource]:
    version = kdkit.__version__ if name == BUILT_IN else distribution.metadata["Version"]
    if not version:
        raise ValueError(f"no version in {distribution.locate_file('')}")
    for entry_point in distribution.entry_points.select(group=ENTRY_POINT_GROUP):
        yield PluginSource(
            dist=name,
            version=version,
            entry_point=entry_point.name,
            load=_loader(entry_point),
            requires=tuple(distribution.requires or ()),
        )


def _loader(entry_point: EntryPoint) -> Callable[[], object]:
    def load() -> object:
        loaded: object = entry_point.load()
        return loaded

    return load


def _order(source: PluginSource) -> tuple[bool, str, str]:
    return source.dist != BUILT_IN, source.dist, source.entry_point
