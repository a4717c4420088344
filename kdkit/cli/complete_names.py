"""Names of all components for completion, remembered between commands.

To find them takes half a second of CPU: every plugin is imported. So they are kept in a file, together with what they
depend on: the directories that packages are found in, and the modules that provide them. Any change there has them
found anew, and so does an hour's time. Where the module of a broken plugin is nobody knows, so that with one of them it
is a minute's time: whoever repairs it wants to see it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Iterable
from contextlib import redirect_stderr, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import kdkit
from kdkit.models.catalogue import cache_dir

__all__ = ["Component", "Names", "component_names"]

_SECONDS: Final = 3600.0
_SECONDS_BROKEN: Final = 60.0


@dataclass(frozen=True, slots=True)
class Component:
    """A component: its kind, name and distribution, and the paths of its parameters."""

    kind: str
    name: str
    dist: str
    params: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Names:
    """What is installed."""

    kinds: tuple[str, ...]
    components: tuple[Component, ...]
    broken: tuple[str, ...] = ()
    """Distributions with plugins that cannot be loaded."""

    @property
    def names(self) -> list[str]:
        """Names of components of every kind."""
        return [component.name for component in self.components]

    @property
    def dists(self) -> list[str]:
        """Distributions that provide something."""
        return [component.dist for component in self.components]

    def of_kind(self, kind: str) -> list[str]:
        """Names of components of one kind."""
        return [component.name for component in self.components if component.kind == kind]

    def params_of(self, name: str, *, stage: bool) -> list[str]:
        """Parameters of every component called ``name`` or ``DIST/NAME``: of stages, or of all other kinds."""
        found = (c for c in self.components if name in {c.name, f"{c.dist}/{c.name}"} and (c.kind == "stage") == stage)
        return [param for component in found for param in component.params]


def component_names() -> Names:
    """All components that are installed. Never raises for a fault of a plugin, and lets none of them print."""
    file = _file()
    names = _remembered(file)
    if names is None:
        names, modules = _found()
        with suppress(OSError):  # without a cache the next time takes as long again
            _write(file, names, modules)
    return names


def _file() -> Path:
    """One for each environment, so that they do not take turns in one."""
    environment = "\n".join([sys.prefix, *sys.path, os.environ.get("KDKIT_DISABLE_PLUGINS", "")])
    return cache_dir() / "completion" / f"{hashlib.sha256(environment.encode()).hexdigest()[:16]}.json"


def _remembered(file: Path) -> Names | None:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        broken = tuple(map(str, data["broken"]))
        seconds = _SECONDS_BROKEN if broken else _SECONDS
        fresh = 0 <= time.time() - data["time"] < seconds and data["version"] == kdkit.__version__
        if not fresh or data["state"] != _state(data["state"]):
            return None
        components = tuple(Component(**{**c, "params": tuple(c["params"])}) for c in data["components"])
        return Names(tuple(data["kinds"]), components, broken)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(file: Path, names: Names, modules: Iterable[str]) -> None:
    state = _state([*sys.path, *modules])
    data = {"version": kdkit.__version__, "time": time.time(), "state": state, **asdict(names)}
    file.parent.mkdir(parents=True, exist_ok=True)
    # Another shell may read at this moment.
    draft = file.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(data), encoding="utf-8")
    draft.replace(file)


def _state(paths: Iterable[str]) -> dict[str, int]:
    """When each file or directory last changed; 0 for what is not there."""
    return {path: _changed(path) for path in paths}


def _changed(path: str) -> int:
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return 0


def _found() -> tuple[Names, list[str]]:
    """All components, and the files of their modules."""
    with redirect_stderr(io.StringIO()):
        from kdkit.api.specs import KINDS
        from kdkit.host import Catalog, param_names

        catalog = Catalog.discover(strict=False)
        entries: Any = catalog.entries()
        components = (Component(e.kind, e.name, e.dist, tuple(param_names(e.spec.params))) for e in entries)
        broken = dict.fromkeys(item.dist for item in catalog.broken)
        names = Names(tuple(KINDS), tuple(components), tuple(broken))
    return names, list(dict.fromkeys(entry.origin for entry in entries))
