"""Plugin files that a recipe names under ``plugins:``. Never searched for, never imported implicitly."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Collection
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from kdkit.api.errors import PluginError
from kdkit.host.records import PluginSource

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from _typeshed import StrPath

__all__ = ["file_source"]


class _HashedLoader(SourceFileLoader):
    """Runs exactly the bytes that were hashed.

    Byte-code caches go by size and modification time: an edit within the same second could run code of another hash.
    """

    def __init__(self, name: str, path: Path, source: bytes) -> None:
        super().__init__(name, str(path))
        self._source = source

    def path_stats(self, path: StrPath) -> Mapping[str, Any]:
        raise OSError(f"no byte-code cache for {path!s}")

    def get_data(self, path: StrPath) -> bytes:
        del path
        return self._source


def file_source(path: Path, taken: Collection[str]) -> PluginSource:
    """The source for one plugin file; ``taken`` are the names of files already in the catalogue.

    The identity covers this file only, not modules that it imports.

    Raises:
        PluginError: It is not a readable ``.py`` file.
    """
    if path.suffix != ".py":
        raise PluginError("a plugin file is a Python file", where=str(path), allowed="*.py")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PluginError(f"cannot read the plugin file ({error.strerror})", where=str(path)) from error
    digest = hashlib.sha256(content).hexdigest()
    name = _label(path, taken)
    return PluginSource(
        dist=name,
        version=f"sha256:{digest[:12]}",
        entry_point=name,
        load=lambda: _import(path, content, digest),
        digest=digest,
    )


def _label(path: Path, taken: Collection[str]) -> str:
    """``./NAME.py``, with as many parent directories as it takes to be unique."""
    parts = path.parts[1:]
    for count in range(1, len(parts) + 1):
        label = "./" + "/".join(parts[-count:])
        if label not in taken:
            return label
    return str(path)


def _import(path: Path, content: bytes, digest: str) -> ModuleType:
    place = hashlib.sha256(str(path).encode()).hexdigest()
    name = f"kdkit_plugin_file_{place[:8]}_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    loader = _HashedLoader(name, path, content)
    spec = ModuleSpec(name, loader, origin=str(path))
    spec.has_location = True
    module = importlib.util.module_from_spec(spec)
    # pydantic and dataclasses look their module up by name while it runs.
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
