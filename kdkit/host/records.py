"""What the host knows about plugins: where one comes from, what it provides, why it is broken."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from kdkit.api.slots import Found
from kdkit.api.specs import Spec, StageSpec

__all__ = ["BUILT_IN", "BrokenPlugin", "Entry", "LoadedPlugin", "PluginFault", "PluginSource", "file_of", "one_line"]

BUILT_IN: Final = "kdkit"
"""The distribution of the built-in components."""


class PluginFault(Exception):
    """A plugin broke a rule of the host; the message is the whole reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginSource:
    """A plugin that can be loaded: an entry point of a distribution, or a plugin file.

    Attributes:
        dist: Normalised distribution name, or ``./FILE.py`` for a plugin file.
        version: Version of the distribution; for a plugin file the start of its hash.
        entry_point: Name of the entry point; the same as ``dist`` for a plugin file.
        load: Imports and returns the plugin object. Raises whatever the plugin raises.
        requires: The distribution's requirements, one string each.
        digest: SHA-256 of a plugin file in hex; empty for distributions.
    """

    dist: str
    version: str
    entry_point: str
    load: Callable[[], object]
    requires: tuple[str, ...] = ()
    digest: str = ""

    @property
    def label(self) -> str:
        """Name and version for messages."""
        return f"{self.dist} {self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One component of the catalogue.

    Attributes:
        kind: Component kind, such as ``loss``.
        name: Short name.
        spec: What the plugin declared.
        dist: Normalised distribution name; ``kdkit`` for built-ins, ``./FILE.py`` for a plugin file.
        version: Version of that distribution.
        origin: File of the module that provides the component.
        digest: SHA-256 of a plugin file in hex; empty for distributions.
    """

    kind: str
    name: str
    spec: Spec[Any]
    dist: str
    version: str
    origin: str
    digest: str = ""

    @property
    def qualified_name(self) -> str:
        """``DIST/NAME``, which is never ambiguous."""
        return f"{self.dist}/{self.name}"

    @property
    def built_in(self) -> bool:
        """Whether kdkit itself provides the component."""
        return self.dist == BUILT_IN

    @property
    def provider(self) -> str:
        """Who provides the component, for people: ``built-in``, ``DIST VERSION`` or the plugin file."""
        if self.built_in:
            return "built-in"
        return self.dist if self.digest else f"{self.dist} {self.version}"

    @property
    def source(self) -> str:
        """``file:line`` of the function that builds or runs the component; its module's file when that is unknown."""
        target: Any = self.spec.run if isinstance(self.spec, StageSpec) else getattr(self.spec, "build", None)
        while isinstance(target, partial):
            target = target.func
        target = getattr(target, "__func__", target)
        code = getattr(target, "__code__", None) or getattr(getattr(target, "__init__", None), "__code__", None)
        return f"{code.co_filename}:{code.co_firstlineno}" if code else self.origin

    def found(self) -> Found:
        """The entry as validation and the engine want it."""
        version = f"v{self.spec.version}"
        if self.digest:
            identity = f"sha256:{self.digest} {version}"
        else:
            identity = version if self.built_in else f"{self.dist}=={self.version} {version}"
        return Found(spec=self.spec, qualified_name=self.qualified_name, identity=identity, source=self.source)


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenPlugin:
    """A plugin that could not be loaded.

    Attributes:
        dist: As in :class:`Entry`.
        version: As in :class:`Entry`.
        entry_point: Name of the entry point.
        error: The reason on one line.
        traceback: The full traceback; empty when the reason says everything.
        kinds: Component kinds it may provide; None when it failed before that was known.
    """

    dist: str
    version: str
    entry_point: str
    error: str
    traceback: str = ""
    kinds: frozenset[str] | None = None

    @classmethod
    def of(cls, source: PluginSource, exc: BaseException, kinds: frozenset[str] | None = None) -> BrokenPlugin:
        """The record for ``exc``, raised while ``source`` was loaded."""
        fault = isinstance(exc, PluginFault)
        return cls(
            dist=source.dist,
            version=source.version,
            entry_point=source.entry_point,
            error=" ".join(str(exc).split()) if fault else one_line(exc),
            traceback="" if fault else "".join(traceback.format_exception(exc)),
            kinds=kinds,
        )

    @property
    def label(self) -> str:
        """Name and version for messages."""
        return f"{self.dist} {self.version}"

    def may_provide(self, kind: str) -> bool:
        """Whether a component of ``kind`` may be missing because of this plugin."""
        return self.kinds is None or kind in self.kinds

    def __str__(self) -> str:
        return f"{self.label} (entry point {self.entry_point!r}) is broken: {self.error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPlugin:
    """A plugin in working order: where it came from, the object that holds its hooks, its components."""

    source: PluginSource
    plugin: object
    entries: tuple[Entry, ...]


def one_line(exc: BaseException) -> str:
    """``Type: message`` without line breaks, also for exceptions that cannot print themselves."""
    try:
        text = " ".join(str(exc).split())
    except Exception:  # noqa: BLE001 - a plugin's __str__ must not hide the error it belongs to
        text = "(its message cannot be printed)"
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__


def file_of(plugin: object) -> str:
    """The file that holds ``plugin``, or its type's module when it has none."""
    module = plugin if isinstance(plugin, ModuleType) else None
    path = getattr(module, "__file__", None)
    return str(Path(path)) if path else str(getattr(plugin, "__module__", type(plugin).__module__))
