"""Throw-away installations: a distribution on the import path, found as any other, without pip."""

from __future__ import annotations

import importlib
import os
import sys
import textwrap
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

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


@dataclass
class ThrowAwaySite:
    """Directories put first on the import path of this process and of those it starts; ``close`` takes them back.

    Modules that are loaded from them meanwhile are forgotten with them.

    Args:
        new_directory: Makes an empty directory.
    """

    new_directory: Callable[[], Path]
    _paths: dict[str, list[Path]] = field(default_factory=dict)
    _loaded: frozenset[str] = field(default_factory=lambda: frozenset(sys.modules))
    _before: str | None = field(default_factory=lambda: os.environ.get("PYTHONPATH"))

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
        root = self.new_directory()
        if isinstance(source, Path) and source.is_dir():
            distribution, code = _project(source)
            self._remove(distribution.name)
            self._add(distribution.name, [root, code])
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
            self._remove(name)
            self._add(name, [root])
        distribution.write_to(root)
        importlib.invalidate_caches()
        return root

    def close(self) -> None:
        """Uninstall everything and forget its modules."""
        for name in list(self._paths):
            self._remove(name)

    def _add(self, name: str, paths: list[Path]) -> None:
        self._paths[name] = paths
        sys.path[:0] = [str(path) for path in paths]
        self._set_environment()

    def _remove(self, name: str) -> None:
        for path in self._paths.pop(name, ()):
            sys.path.remove(str(path))
            for module in set(sys.modules) - self._loaded:
                if Path(getattr(sys.modules[module], "__file__", None) or "/").is_relative_to(path):
                    del sys.modules[module]
        self._set_environment()

    def _set_environment(self) -> None:
        """Worker processes find the plugins as this process does."""
        ours = [str(path) for paths in reversed(self._paths.values()) for path in paths]
        if ours:
            os.environ["PYTHONPATH"] = os.pathsep.join([*ours, *([self._before] if self._before else [])])
        elif self._before is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = self._before


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
