from __future__ import annotations

import os
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from hypothesis import settings

from kdkit.testing.fakes import FakeBuildContext

# A checkout that was installed before it had a pytest plugin, or that is only on the path, has it as well.
pytest_plugins = [] if entry_points(group="pytest11", name="kdkit") else ["kdkit.testing.plugin"]

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


@pytest.fixture
def load_context() -> FakeBuildContext:
    return FakeBuildContext()
