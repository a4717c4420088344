from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kdkit.api.artifacts import Model
from kdkit.models.pretrained import quiet
from kdkit.serve.app import TeacherApi
from kdkit.serve.batcher import Batcher
from kdkit.serve.limits import Limits
from kdkit.serve.model import ServedModel
from kdkit.serve.run import HttpServer, listen
from kdkit.testing.tiny import save_tiny_model


@dataclass(frozen=True)
class Running:
    """A real server on a real port of this machine."""

    url: str
    batcher: Batcher


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with quiet():
        return save_tiny_model(tmp_path_factory.mktemp("served") / "teacher", layers=3, seed=1)


@pytest.fixture(scope="session")
def served(teacher_dir: Path) -> ServedModel:
    return ServedModel(Model(path=teacher_dir, name="t"), dtype=torch.float32, device="cpu")


@pytest.fixture
def start(served: ServedModel) -> Iterator[Callable[..., Running]]:
    """Starts servers: ``start(key=..., model=..., **limits)``."""
    ends = []

    def run(*, key: str | None = None, model: ServedModel = served, **limits: int) -> Running:
        bounds = Limits(**limits)
        batcher = Batcher(model, bounds)
        server = HttpServer(TeacherApi(model, batcher, name="t", key=key, limits=bounds).app())
        found = listen("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [found]}, daemon=True)
        thread.start()
        ends.append((server, thread, found, batcher))
        return Running(f"http://127.0.0.1:{found.getsockname()[1]}/v1", batcher)

    yield run
    for server, thread, found, batcher in ends:
        server.stop_at_once()
        thread.join(30)
        found.close()
        assert batcher.close(30)


@pytest.fixture
def url(start: Callable[..., Running]) -> str:
    return start().url
