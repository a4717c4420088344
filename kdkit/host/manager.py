"""Loads plugins one by one, so that a broken one harms nobody else."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from difflib import get_close_matches
from typing import Any, Final

import pluggy

from kdkit.api.hookspecs import COMPONENT_HOOKS, PROJECT, HookSpecs
from kdkit.host.compat import kdkit_problem
from kdkit.host.records import BrokenPlugin, Entry, LoadedPlugin, PluginFault, PluginSource, file_of
from kdkit.host.spec_check import check_spec

__all__ = ["call", "load_all", "load_plugin", "new_manager"]

HOOKS: Final = tuple(name for name in vars(HookSpecs) if name.startswith("kdkit_"))


def new_manager(*, warn: bool = True) -> pluggy.PluginManager:
    """A pluggy manager that knows the hooks of kdkit and no plugin.

    Args:
        warn: Whether plugins that use what the hook specifications call deprecated are warned when they register.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(HookSpecs)
    for name in () if warn else HOOKS:
        spec: Any = getattr(manager.hook, name).spec
        spec.warn_on_impl = spec.warn_on_impl_args = None
    return manager


def call(implementation: pluggy.HookImpl, event: Any = None) -> Any:
    """Call one hook implementation with the arguments that it names, deprecated ones included.

    A deprecated argument is a field of the event that took its place; None where there is no such field.
    """
    values = [event if name == "event" else getattr(event, name, None) for name in implementation.argnames]
    return implementation.function(*values)


def load_all(
    sources: Iterable[PluginSource], earlier: Sequence[LoadedPlugin] = ()
) -> tuple[list[LoadedPlugin], list[BrokenPlugin]]:
    """Load ``sources`` in order, after ``earlier``; returns the new ones in working order and the broken ones."""
    loaded: list[LoadedPlugin] = []
    broken: list[BrokenPlugin] = []
    for source in sources:
        result = load_plugin(source, [*earlier, *loaded])
        if isinstance(result, LoadedPlugin):
            loaded.append(result)
        else:
            broken.append(result)
    return loaded, broken


def load_plugin(source: PluginSource, earlier: Sequence[LoadedPlugin]) -> LoadedPlugin | BrokenPlugin:
    """Import one plugin and collect its specs. Never raises for a fault of the plugin, ``SystemExit`` included.

    What a plugin prints meanwhile goes to stderr: stdout belongs to the results of the command.
    """
    kinds: frozenset[str] | None = None
    try:
        if problem := kdkit_problem(source.requires):
            raise PluginFault(problem)
        with redirect_stdout(sys.stderr):
            plugin = source.load()
            _refuse_clash(plugin, source, earlier)
            manager = _register(plugin, source)
            kinds = frozenset(kind for kind, hook in COMPONENT_HOOKS.items() if _implementations(manager, hook))
            entries = tuple(_entries(manager, source, file_of(plugin), earlier))
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # noqa: BLE001 - the plugin boundary: a plugin may even call sys.exit at import
        return BrokenPlugin.of(source, exc, kinds)
    return LoadedPlugin(source=source, plugin=plugin, entries=entries)


def _refuse_clash(plugin: object, source: PluginSource, earlier: Sequence[LoadedPlugin]) -> None:
    for other in earlier:
        if other.plugin is plugin:
            raise PluginFault(
                f"entry point {source.entry_point!r} loads {file_of(plugin)}, which entry point "
                f"{other.source.entry_point!r} of {other.source.label} already provides; "
                "two distributions may use the same module name"
            )


def _register(plugin: object, source: PluginSource) -> pluggy.PluginManager:
    """A manager that holds only ``plugin``, so that what pluggy complains about is its fault."""
    if inspect.isclass(plugin):
        raise PluginFault(f"entry point {source.entry_point!r} is the class {plugin.__name__}; name a module instead")
    for problem in _naming_problems(plugin):
        raise PluginFault(problem)
    manager = new_manager()
    manager.register(plugin, name=f"{source.dist}/{source.entry_point}")
    callers = manager.get_hookcallers(plugin)
    if not callers:
        raise PluginFault(f"{file_of(plugin)} implements no hook of kdkit")
    for caller in callers:
        required = [impl for impl in caller.get_hookimpls() if not impl.optionalhook]
        if not caller.has_spec() and required:
            raise PluginFault(_unknown_hook(caller.name))
        if any(impl.wrapper or impl.hookwrapper for impl in required):
            raise PluginFault(f"{caller.name} is a hook wrapper, which kdkit does not call")
    manager.check_pending()
    return manager


def _naming_problems(plugin: object) -> Iterator[str]:
    """Functions that look like hooks and would never be called."""
    for name in dir(plugin):
        if not name.startswith("kdkit_"):
            continue
        function = inspect.getattr_static(plugin, name)
        function = getattr(function, "__func__", function)
        if inspect.isroutine(function) and not hasattr(function, f"{PROJECT}_impl"):
            yield f"{name} is not marked with @kdkit.hookimpl" if name in HOOKS else _unknown_hook(name)


def _unknown_hook(name: str) -> str:
    close = get_close_matches(name, HOOKS, n=1)
    return f"there is no hook {name!r}; " + (f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(HOOKS)}")


def _implementations(manager: pluggy.PluginManager, hook: str) -> list[pluggy.HookImpl]:
    caller: pluggy.HookCaller = getattr(manager.hook, hook)
    return caller.get_hookimpls()


def _entries(
    manager: pluggy.PluginManager, source: PluginSource, origin: str, earlier: Sequence[LoadedPlugin]
) -> Iterator[Entry]:
    taken = {(e.kind, e.name) for other in earlier if other.source.dist == source.dist for e in other.entries}
    for kind, hook in COMPONENT_HOOKS.items():
        for implementation in _implementations(manager, hook):
            for item in _yielded(call(implementation), hook, kind):
                spec = check_spec(item, kind, hook)
                if (kind, spec.name) in taken:
                    raise PluginFault(f"{source.dist} provides {kind} {spec.name!r} twice")
                if spec.extras and source.digest:
                    raise PluginFault(f"{kind} {spec.name!r}: a plugin file has no extras")
                taken.add((kind, spec.name))
                yield Entry(
                    kind=kind,
                    name=spec.name,
                    spec=spec,
                    dist=source.dist,
                    version=source.version,
                    origin=origin,
                    digest=source.digest,
                )


def _yielded(result: object, hook: str, kind: str) -> Iterable[object]:
    if isinstance(result, Iterable) and not isinstance(result, str | bytes):
        return result
    what = "None" if result is None else f"a value of type {type(result).__name__}"
    raise PluginFault(f"{hook} returned {what}; allowed: an iterable of {kind} specs, such as a generator")
