from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

import kdkit
from kdkit.api import EnvironmentUnmet, Model
from kdkit.models import tiny
from kdkit.models.locate import locate


@pytest.fixture(autouse=True)
def found_without_installing(monkeypatch):
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


def test_tiny_is_made_once_and_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("KDKIT_MODELS", str(tmp_path / "models"))
    commands = []
    real = subprocess.run
    monkeypatch.setattr(tiny.subprocess, "run", lambda *a, **k: commands.append(a) or real(*a, **k))
    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(lambda _: locate("tiny", base_dir=tmp_path, offline=True), range(3)))
    assert found == {tmp_path / "models" / "tiny"}
    assert len(commands) == 1
    assert sorted(path.name for path in (tmp_path / "models").iterdir() if path.name[0] != ".") == ["tiny"]
    import torch

    from kdkit.models.load import load_model, load_tokenizer

    artifact = Model(path=found.pop())
    assert load_model(artifact, dtype=torch.float32).num_parameters() < 50_000
    assert load_tokenizer(artifact).decode([104, 105]) != ""


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KDKIT_MODELS", str(tmp_path / "file"))
    with pytest.raises(EnvironmentUnmet, match="cannot be written"):
        locate("tiny", base_dir=tmp_path, offline=True)


def test_what_goes_wrong_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("KDKIT_MODELS", str(tmp_path))
    monkeypatch.setattr(tiny.sys, "executable", "/bin/false")
    with pytest.raises(EnvironmentUnmet, match="'tiny' could not be made: no message"):
        locate("tiny", base_dir=tmp_path, offline=True)
    assert not (tmp_path / "tiny").exists()


def test_recipes_may_name_it_and_a_slip_is_found(tmp_path):
    def problems(model: str) -> list[str]:
        stage = {"kind": "sft", "model": model, "data": {"use": "instructions"}}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump({"kdkit": 1, "name": "r", "stages": {"s": stage}}))
        return [problem.message for problem in kdkit.validate(tmp_path / "r.yaml")]

    assert problems("tiny") == []
    (message,) = problems("tinny")
    assert "did you mean 'tiny'?" in message


def test_naming_it_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from pathlib import Path; from kdkit.models.locate import locate;"
        "locate('tiny', base_dir=Path(), offline=True); print('torch' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env={**os.environ, "KDKIT_MODELS": str(tmp_path)},
    )  # fmt: skip
    assert out.stdout.strip() == "False"
