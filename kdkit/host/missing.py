"""Errors for names that the catalogue cannot resolve: what was meant, who may provide it, what to do next."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Final

from kdkit.api.errors import KdkitError, PluginError, RecipeError
from kdkit.api.specs import KINDS
from kdkit.host.records import BUILT_IN, BrokenPlugin, Entry

if TYPE_CHECKING:
    from kdkit.host.catalog import Catalog

_DIST: Final = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def check_kind(kind: str) -> None:
    """Refuse a component kind that does not exist.

    Raises:
        RecipeError: With a suggestion.
    """
    if kind not in KINDS:
        raise RecipeError(f"no component kind {kind!r}", allowed=", ".join(KINDS), hint=_did_you_mean(kind, KINDS))


def ambiguous(kind: str, name: str, matches: Sequence[Entry]) -> RecipeError:
    """Several distributions provide the short name."""
    providers = " and ".join(entry.provider for entry in matches)
    return RecipeError(
        f"{kind} {name!r} is ambiguous: {providers} provide it",
        hint=f"write {' or '.join(entry.qualified_name for entry in matches)}",
    )


def unknown(catalog: Catalog, kind: str, name: str) -> KdkitError:
    """No distribution provides the short name."""
    names = sorted({entry.name for entry in catalog.entries(kind)})
    suggestion = _did_you_mean(name, names)
    elsewhere = [entry.kind for entry in catalog.entries() if entry.name == name]
    hints = [suggestion, f"there is a {elsewhere[0]} of that name" if elsewhere else None]
    if broken := [item for item in catalog.broken if item.may_provide(kind)]:
        hints.append(_may_provide(broken))
    elif catalog.disabled:
        hints.append(f"disabled by KDKIT_DISABLE_PLUGINS: {', '.join(catalog.disabled)}")
    error = PluginError if broken else RecipeError
    allowed = None if suggestion else ", ".join(names) or "none is installed"
    return error(f"no {kind} {name!r}", allowed=allowed, hint=_joined(hints))


def unknown_qualified(catalog: Catalog, kind: str, dist: str, name: str) -> KdkitError:
    """The distribution named does not provide the component."""
    what = f"no {kind} '{dist}/{name}'"
    if dist.startswith((".", "/")):
        return _unknown_in_file(catalog, kind, dist, name)
    if not _DIST.fullmatch(dist):
        return RecipeError(what, allowed="NAME or DISTRIBUTION/NAME")
    if broken := [item for item in catalog.broken if item.dist == dist and item.may_provide(kind)]:
        return PluginError(what, hint=_may_provide(broken))
    if disabled := [item for item in catalog.disabled if item.startswith(f"{dist}/")]:
        return PluginError(what, hint=f"disabled by KDKIT_DISABLE_PLUGINS: {', '.join(disabled)}")
    provided = [entry for entry in catalog.entries() if entry.dist == dist]
    if provided:
        names = sorted(entry.name for entry in provided if entry.kind == kind)
        return RecipeError(what, allowed=", ".join(names) or "none", hint=_did_you_mean(name, names))
    try:
        return PluginError(what, hint=f"{dist} {version(dist)} is installed and provides no component of kdkit")
    except PackageNotFoundError:
        known = {entry.dist for entry in catalog.entries() if not entry.digest}
        hints = [_did_you_mean(dist, sorted(known - {BUILT_IN})), f"install it with: pip install {dist}"]
        return PluginError(f"{what}: {dist} is not installed", hint=_joined(hints))


def unknown_anywhere(catalog: Catalog, name: str) -> KdkitError:
    """``name`` is neither a component of any kind nor a distribution with plugins."""
    if name in KINDS:
        return RecipeError(
            f"{name!r} is a component kind", hint=f"name a component too: kdkit plugins show {name} NAME"
        )
    known = {word for entry in catalog.entries() for word in (entry.name, entry.dist)}
    suggestion = _did_you_mean(name, sorted(known))
    if catalog.broken:
        hints = [suggestion, _may_provide(catalog.broken)]
        return PluginError(f"no component or plugin {name!r}", hint=_joined(hints))
    return RecipeError(f"no component or plugin {name!r}", hint=suggestion or "see kdkit plugins list")


def _unknown_in_file(catalog: Catalog, kind: str, dist: str, name: str) -> RecipeError:
    provided = [entry for entry in catalog.entries() if entry.dist == dist]
    names = sorted(entry.name for entry in provided if entry.kind == kind)
    if not provided:
        return RecipeError(f"no {kind} '{dist}/{name}'", hint=f"list the plugin file: plugins: [{dist}]")
    return RecipeError(
        f"no {kind} '{dist}/{name}'", allowed=", ".join(names) or "none", hint=_did_you_mean(name, names)
    )


def _may_provide(broken: Sequence[BrokenPlugin]) -> str:
    reasons = "; ".join(
        f"{item.label} ({item.entry_point}) is broken and may provide it: {item.error}" for item in broken
    )
    shown = " and ".join(dict.fromkeys(f"kdkit plugins show {item.dist}" for item in broken))
    return f"{reasons}; see {shown}"


def _did_you_mean(name: str, names: Iterable[str]) -> str | None:
    close = get_close_matches(name, list(names), n=1)
    return f"did you mean {close[0]!r}?" if close else None


def _joined(hints: Sequence[str | None]) -> str | None:
    return "; ".join(hint for hint in hints if hint) or None
