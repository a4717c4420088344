"""Throw-away installations: a distribution on the import path, found as any other, without pip."""

from __future__ import annotations

import importlib
import os
import sys
import textwrap
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import pytest

__all__ = ["ThrowAwaySite"]

_GROUP: Final = "kdkit.plugins"


@dataclass(frozen=True, kw_only=True)
class _Distribution:
    name: str
    version: str
    entry_points: Mapping[str, str]
    requires: Sequence[str] = ()
    extras: Sequence[str] = ()

    def write_to(self, root: Path) -> None:
        info = root / f"{self.name.replace('-', '_')}-{self.version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.3", f"Name: {self.name}", f"Version: {self.version}"]
        lines += [f"Requires-Dist: {text}" for text in self.requires]
        lines += [f"Provides-Extra: {text}" for text in self.extras]
        (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if self.entry_points:
            listed = "".join(f"{key} = {value}\n" for key, value in self.entry_points.items())
            (info / "entry_points.txt").write_text(f"[{_GROUP}]\n{listed}", encoding="utf-8")


class ThrowAwaySite:
    """Puts directories first on the import path of this process and of those it starts, until the patch is undone.

    Args:
        new_directory: Makes an empty directory.
        patch: Changes ``sys.path`` and ``PYTHONPATH``.
    """

    def __init__(self, new_directory: Callable[[], Path], patch: pytest.MonkeyPatch) -> None:
        self._new_directory, self._patch = new_directory, patch
        self._paths: dict[str, list[str]] = {}
        self._loaded = frozenset(sys.modules)

    def install(
        self,
        source: str | Path | Mapping[str, str],
        name: str,
        *,
        version: str = "1.0",
        entry_points: Mapping[str, str] | None = None,
        requires: Sequence[str] = (),
        extras: Sequence[str] = (),
    ) -> Path:
        """See ``install_plugin`` of :mod:`kdkit.testing.plugin`; returns the directory that is on the path now."""
        root = self._new_directory()
        if isinstance(source, Path) and source.is_dir():
            distribution, code = _project(source)
            self._put(distribution.name, [root, code])
        else:
            modules = _modules(source, name)
            points = {module: module for module in modules} if entry_points is None else entry_points
            distribution = _Distribution(
                name=name, version=version, entry_points=points, requires=requires, extras=extras
            )  # fmt: skip
            for module, text in modules.items():
                file = root / (module.replace(".", "/") + ".py")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(textwrap.dedent(text), encoding="utf-8")
            self._put(name, [root])
        distribution.write_to(root)
        importlib.invalidate_caches()
        return root

    def close(self) -> None:
        """Forget the modules that were loaded from the directories; undoing the patch takes them off the path."""
        for paths in self._paths.values():
            self._forget(paths)

    def _put(self, name: str, paths: Sequence[Path]) -> None:
        """Directories of a distribution on the path, in place of those it had."""
        old = self._paths.get(name, [])
        self._forget(old)
        new = self._paths[name] = [str(path) for path in paths]
        self._patch.setattr(sys, "path", [*new, *(path for path in sys.path if path not in old)])
        # Worker processes find the plugins as this process does.
        inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in old]
        self._patch.setenv("PYTHONPATH", os.pathsep.join([*new, *inherited]))

    def _forget(self, paths: Sequence[str]) -> None:
        for module in set(sys.modules) - self._loaded:
            loaded = sys.modules[module]
            # A package without __init__.py has no file, only directories.
            places = [getattr(loaded, "__file__", None) or "/", *getattr(loaded, "__path__", ())]
            if any(Path(place).is_relative_to(path) for place in places for path in paths):
                del sys.modules[module]


def _modules(source: str | Path | Mapping[str, str], name: str) -> Mapping[str, str]:
    if isinstance(source, Mapping):
        return source
    text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
    return {name.replace("-", "_").replace(".", "_"): text}


def _project(directory: Path) -> tuple[_Distribution, Path]:
    """What ``pyproject.toml`` says, and the directory that holds the package: ``src`` or the project's own."""
    project: dict[str, Any] = tomllib.loads((directory / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project.get("optional-dependencies", {})
    requires = [*project.get("dependencies", ()), *(_of_extra(r, e) for e, rs in optional.items() for r in rs)]
    distribution = _Distribution(
        name=project["name"],
        version=project.get("version", "0"),
        entry_points=project.get("entry-points", {}).get(_GROUP, {}),
        requires=requires,
        extras=tuple(optional),
    )
    return distribution, directory / "src" if (directory / "src").is_dir() else directory


def _of_extra(requirement: str, extra: str) -> str:
    plain, _, marker = requirement.partition(";")
    return f"{plain.strip()}; {f'({marker.strip()}) and ' if marker else ''}extra == '{extra}'"
