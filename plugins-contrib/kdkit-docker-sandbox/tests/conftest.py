"""What the tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_docker import FakeDocker, install

from kdkit_docker_sandbox import sandbox as implementation


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDocker:
    """A docker that works, on a path where nothing else is."""
    fake = install(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(fake.directory))
    monkeypatch.setattr(implementation, "_passed", set())
    return fake
