from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from kdkit.api import Dataset

# The Hub libraries read this once, when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("kdkit", deadline=None, database=None, derandomize=True)
settings.load_profile("kdkit")


@pytest.fixture(autouse=True)
def isolated_environment(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and neither the store nor the caches of the person who runs the tests."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("KDKIT_STORE", str(tmp_path_factory.mktemp("store")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of real data beside the checkout; tests that use it carry the mark ``shared``."""
    directory = Path(__file__).resolve().parents[1] / "../shared/data"
    if not directory.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return directory.resolve()


@dataclass
class FakeLoadContext:
    """A ``LoadContext`` that takes references for paths and keeps what is logged."""

    seed: int = 0
    offline: bool = True
    lines: list[str] = field(default_factory=list)

    def resolve(self, ref: Any, /) -> Any:
        return Dataset(path=Path(str(ref.source)))

    def build(self, component: Any, /, *args: Any) -> Any:
        return component.found.spec.build(component.params, *args)

    def log(self, message: str, /) -> None:
        self.lines.append(message)


@pytest.fixture
def load_context() -> FakeLoadContext:
    return FakeLoadContext()
