from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from kdkit.host import BrokenPlugin, Catalog

Install = Callable[..., Path]

LOSS = """
from kdkit.api import LossSpec, Params, hookimpl

class P(Params):
    gamma: float = 2.0
    "Focusing exponent."

def build(p):
    raise AssertionError("validation must not build")

@hookimpl
def kdkit_losses():
    yield LossSpec(name="{name}", summary="A loss", params=P, build=build)
"""


@pytest.fixture
def loss_module() -> Callable[..., str]:
    """Source of a plugin module with one loss."""

    def loss_module(name: str = "focal") -> str:
        return LOSS.format(name=name)

    return loss_module


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a throw-away distribution first on the import path."""

    def install(
        name: str,
        modules: Mapping[str, str],
        *,
        version: str = "1.0",
        entry_points: Mapping[str, str] | None = None,
        requires: Sequence[str] = (),
        extras: Sequence[str] = (),
        folder: str | None = None,
    ) -> Path:
        root = tmp_path / (folder or name)
        info = root / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.3", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {text}" for text in requires] + [f"Provides-Extra: {text}" for text in extras]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        points = entry_points if entry_points is not None else {module: module for module in modules}
        if points:
            listed = "".join(f"{key} = {value}\n" for key, value in points.items())
            (info / "entry_points.txt").write_text(f"[kdkit.plugins]\n{listed}")
        for module, source in modules.items():
            path = root / (module.replace(".", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(source))
        monkeypatch.setattr(sys, "path", [str(root), *sys.path])
        importlib.invalidate_caches()
        return root

    yield install
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def catalog() -> Callable[[], Catalog]:
    """The catalogue without the built-ins, so that tests see their own plugins only."""
    return lambda: Catalog.discover(disable=["kdkit"], strict=False)


@pytest.fixture
def only_broken(catalog: Callable[[], Catalog]) -> Callable[[], BrokenPlugin]:
    def only_broken() -> BrokenPlugin:
        found = catalog()
        assert not found.entries()
        (broken,) = found.broken
        return broken

    return only_broken
