"""Private caches and model directories for these tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import make_llama, make_tokenizer, write_gguf

from kdkit.models.catalogue import models_dir

# Before any fixture moves the caches away.
REAL_MODELS = models_dir()


@pytest.fixture(autouse=True)
def private_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolated_environment: None) -> None:
    """No test reads or writes the caches of the person who runs it; nothing here needs a network either."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "KDKIT_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def smollm2() -> Path:
    """The real model, for tests marked slow."""
    path = REAL_MODELS / "smollm2-135m-instruct"
    if not path.is_dir():
        pytest.skip("run: kdkit models pull smollm2-135m-instruct")
    return path


@pytest.fixture(scope="session")
def saved_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model directory. Do not change it; copy it."""
    path = tmp_path_factory.mktemp("llama") / "model"
    make_llama().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def hollow(tmp_path: Path) -> Callable[..., Path]:
    """Makes a directory that looks like a model to everything that does not load it."""

    def make(path: Path | None = None, *, without: str = "", weights: bytes = b"weights") -> Path:
        path = tmp_path / "hollow" if path is None else path
        path.mkdir(parents=True, exist_ok=True)
        contents = {
            "config.json": json.dumps({"model_type": "llama"}).encode(),
            "tokenizer.json": b"{}",
            "model.safetensors": weights,
        }
        for name, data in contents.items():
            if name != without:
                (path / name).write_bytes(data)
        return path

    return make


@pytest.fixture
def gguf_writer() -> Callable[..., None]:
    pytest.importorskip("gguf")
    return write_gguf
