from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from kdkit.host import BrokenPlugin, Catalog
from kdkit.testing.install import ThrowAwaySite

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
    """Puts a throw-away distribution first on the import path, even if one of its name is there already."""
    sites: list[ThrowAwaySite] = []

    def install(name: str, modules: Mapping[str, str], *, folder: str | None = None, **metadata: Any) -> Path:
        sites.append(ThrowAwaySite(lambda: tmp_path / (folder or name), monkeypatch))
        return sites[-1].install(modules, name, **metadata)

    yield install
    for site in sites:
        site.close()


@pytest.fixture
def catalog() -> Callable[[], Catalog]:
    """Instead of kdkit's own fixture: the catalogue without the built-ins, so that tests see their plugins only."""
    return lambda: Catalog.discover(disable=["kdkit"], strict=False)


@pytest.fixture
def only_broken(catalog: Callable[[], Catalog]) -> Callable[[], BrokenPlugin]:
    def only_broken() -> BrokenPlugin:
        found = catalog()
        assert not found.entries()
        (broken,) = found.broken
        return broken

    return only_broken
