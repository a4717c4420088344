"""The catalogue: every component by kind and name, and who provides it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias, final

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from kdkit.api.errors import PluginError
from kdkit.api.hookspecs import RunFinished, StageFinished, StageStarted
from kdkit.api.slots import Found
from kdkit.api.specs import KINDS
from kdkit.host import missing
from kdkit.host.compat import requirement_problem
from kdkit.host.entry_points import installed_plugins
from kdkit.host.files import file_source
from kdkit.host.manager import call, load_all, new_manager
from kdkit.host.records import BUILT_IN, BrokenPlugin, Entry, LoadedPlugin, PluginSource, file_of, one_line

if TYPE_CHECKING:
    import pluggy

__all__ = ["Catalog"]

Event: TypeAlias = StageStarted | StageFinished | RunFinished

_HOOK_OF_EVENT: Final[Mapping[type[Event], str]] = {
    StageStarted: "kdkit_stage_started",
    StageFinished: "kdkit_stage_finished",
    RunFinished: "kdkit_run_finished",
}
_KIND_ORDER: Final = {kind: index for index, kind in enumerate(KINDS)}


@final
class Catalog:
    """All components that are installed or named by a recipe. Immutable; implements ``kdkit.api.slots.Lookup``.

    Attributes:
        broken: Plugins that could not be loaded. They stop only recipes that use them.
        disabled: ``DIST/ENTRY_POINT`` of the plugins that were left out on request.
    """

    def __init__(
        self,
        plugins: Sequence[LoadedPlugin],
        broken: Sequence[BrokenPlugin] = (),
        disabled: Sequence[str] = (),
    ) -> None:
        self._plugins = tuple(plugins)
        self.broken = tuple(broken)
        self.disabled = tuple(disabled)
        entries = (entry for plugin in self._plugins for entry in plugin.entries)
        self._entries = tuple(sorted(entries, key=_order))
        self._manager = _notified(self._plugins)

    @classmethod
    def discover(cls, *, disable: Sequence[str] | None = None, strict: bool | None = None) -> Catalog:
        """Load every installed plugin.

        Args:
            disable: Distributions, ``DIST/ENTRY_POINT`` or ``*`` (all but the built-ins) to leave out; None reads
                ``KDKIT_DISABLE_PLUGINS``, separated by commas.
            strict: Refuse broken plugins; None reads ``KDKIT_STRICT_PLUGINS``.

        Raises:
            PluginError: ``strict`` and a plugin is broken; names all of them.
        """
        tokens = os.environ.get("KDKIT_DISABLE_PLUGINS", "").split(",") if disable is None else disable
        if strict is None:
            strict = os.environ.get("KDKIT_STRICT_PLUGINS", "").strip().lower() not in {"", "0", "false", "no", "off"}
        sources, unreadable = installed_plugins()
        disabled = [source for source in sources if _is_disabled(source, tokens)]
        plugins, broken = load_all(source for source in sources if source not in disabled)
        catalog = cls(plugins, [*unreadable, *broken], [f"{source.dist}/{source.entry_point}" for source in disabled])
        if strict and catalog.broken:
            raise PluginError(" | ".join(map(str, catalog.broken)), hint="KDKIT_STRICT_PLUGINS allows no broken plugin")
        return catalog

    def with_files(self, paths: Sequence[Path]) -> Catalog:
        """A catalogue with these plugin files added, each known as ``./NAME.py``; a file named twice counts once.

        Raises:
            PluginError: A file is missing or broken; names it.
        """
        plugins = list(self._plugins)
        known = {file_of(plugin.plugin) for plugin in plugins if plugin.source.digest}
        for path in dict.fromkeys(Path(path).resolve() for path in paths):
            if str(path) in known:
                continue
            source = file_source(path, {plugin.source.dist for plugin in plugins})
            loaded, broken = load_all([source], plugins)
            if broken:
                error = PluginError(f"the plugin file is broken: {broken[0].error}", where=str(path))
                if broken[0].traceback:
                    error.add_note(broken[0].traceback)
                raise error
            plugins += loaded
        return Catalog(plugins, self.broken, self.disabled)

    def with_plugin(self, plugin: object, dist: str) -> Catalog:
        """A catalogue with an object whose hooks yield components, as if ``dist`` had provided it; for tests.

        Raises:
            PluginError: The object is no plugin in working order.
        """
        source = PluginSource(dist=_normalised(dist), version="0", entry_point="object", load=lambda: plugin)
        loaded, broken = load_all([source], self._plugins)
        if broken:
            raise PluginError(broken[0].error, where=dist)
        return Catalog([*self._plugins, *loaded], self.broken, self.disabled)

    def entries(self, kind: str | None = None) -> tuple[Entry, ...]:
        """All components, or those of one kind: by kind, built-ins first, then by distribution and name.

        Raises:
            RecipeError: There is no such kind.
        """
        if kind is None:
            return self._entries
        missing.check_kind(kind)
        return tuple(entry for entry in self._entries if entry.kind == kind)

    def find(self, kind: str, name: str, /) -> Found:
        """The component of ``kind`` called ``name`` (short or ``DIST/NAME``).

        Raises:
            RecipeError: No such kind or name, or the short name is ambiguous.
            PluginError: The distribution named is missing or disabled, or a broken plugin may provide the name.
        """
        return self.entry(kind, name).found()

    def entry(self, kind: str, name: str) -> Entry:
        """As :meth:`find`, with everything the catalogue knows."""
        dist, _, short = name.rpartition("/")
        candidates = self.entries(kind)
        if dist:
            wanted = _normalised(dist)
            matches = [entry for entry in candidates if entry.dist == wanted and entry.name == short]
        else:
            matches = [entry for entry in candidates if entry.name == short]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise missing.ambiguous(kind, short, matches)
        if dist:
            raise missing.unknown_qualified(self, kind, _normalised(dist), short)
        raise missing.unknown(self, kind, short)

    def is_ambiguous(self, entry: Entry) -> bool:
        """Whether the short name of ``entry`` alone does not say which component is meant."""
        return sum(other.name == entry.name for other in self.entries(entry.kind)) > 1

    def notify(self, event: Event) -> list[str]:
        """Call the notification hooks of all plugins, built-ins first; one line for each that raised."""
        hook: pluggy.HookCaller = getattr(self._manager.hook, _HOOK_OF_EVENT[type(event)])
        errors = []
        for implementation in reversed(hook.get_hookimpls()):
            try:
                with redirect_stdout(sys.stderr):
                    call(implementation, event)
            except KeyboardInterrupt:
                raise
            except BaseException as exc:  # noqa: BLE001 - a notification never stops a run
                errors.append(f"{implementation.plugin_name}: {hook.name}: {one_line(exc)}")
        return errors

    def check_requires(self, requirements: Iterable[str]) -> list[str]:
        """One line for each of a recipe's ``requires:`` that is not met: versions, extras, broken plugins."""
        problems = []
        for text in requirements:
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                problems.append(f"{text!r} is not a requirement; write it as in kdkit-acme>=0.2,<1")
                continue
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                problem = requirement_problem(requirement) or self._unusable(canonicalize_name(requirement.name))
                problems += [problem] if problem else []
        return problems

    def _unusable(self, dist: str) -> str | None:
        """Why an installed distribution is of no use here."""
        for broken in self.broken:
            if broken.dist == dist:
                return str(broken)
        if dist in {name.rpartition("/")[0] for name in self.disabled}:
            return f"{dist} is disabled by KDKIT_DISABLE_PLUGINS"
        return None


def _order(entry: Entry) -> tuple[int, bool, str, str]:
    return _KIND_ORDER[entry.kind], not entry.built_in, entry.dist, entry.name


def _normalised(dist: str) -> str:
    return dist if dist.startswith((".", "/")) else canonicalize_name(dist)


def _is_disabled(source: PluginSource, tokens: Iterable[str]) -> bool:
    for token in tokens:
        dist, _, entry_point = token.strip().partition("/")
        if dist == "*" and source.dist != BUILT_IN:
            return True
        if canonicalize_name(dist) == source.dist and entry_point in {"", source.entry_point}:
            return True
    return False


def _notified(plugins: Sequence[LoadedPlugin]) -> pluggy.PluginManager:
    """A manager with all plugins; pluggy calls the last one registered first, so built-ins register last.

    Their authors were warned when the plugins were loaded.
    """
    manager = new_manager(warn=False)
    for plugin in reversed(plugins):
        manager.register(plugin.plugin, name=f"{plugin.source.label} (entry point {plugin.source.entry_point!r})")
    return manager
