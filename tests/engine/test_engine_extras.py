"""What a component needs to be installed is looked up before a run, and when it is built."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError

import pytest

import kdkit
from kdkit.api import EnvironmentUnmet
from kdkit.host import compat
from kdkit.testing.tiny import save_tiny_model


@pytest.fixture
def without_sacrebleu(monkeypatch):
    def version(name):
        if name == "sacrebleu":
            raise PackageNotFoundError(name)
        return real(name)

    real = compat.version
    monkeypatch.setattr(compat, "version", version)


@pytest.fixture
def recipe(tmp_path):
    """A stage that can only fail (the model is not quantised), and one after it that needs an extra."""
    first = {"kind": "dequantize", "model": "./tiny"}
    data = {"use": "instructions", "split": "all"}
    second = {"kind": "evaluate", "models": {"a": "${stages.first.model}"}, "data": data, "metrics": [{"use": "chrf"}]}
    save_tiny_model(tmp_path / "tiny")
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"kdkit": 1, "name": "test", "stages": {"first": first, "second": second}}))
    return file


def test_a_missing_extra_ends_a_run_before_it_begins(recipe, tmp_path, without_sacrebleu):
    with pytest.raises(EnvironmentUnmet) as error:
        kdkit.run(recipe, inline=True, out=tmp_path / "runs")
    assert str(error.value) == (
        "metric 'chrf' needs the extra 'chrf', which lacks sacrebleu>=2.4; install it with: pip install 'kdkit[chrf]'"
    )
    assert error.value.exit_code == 4
    assert not list((tmp_path / "runs").rglob("events.jsonl"))


def test_stages_that_are_left_out_need_nothing(recipe, tmp_path, without_sacrebleu):
    result = kdkit.run(recipe, inline=True, out=tmp_path / "runs", until="first")
    assert result.error is not None
    assert not isinstance(result.error, EnvironmentUnmet)


def test_a_component_that_is_built_alone_says_it_too(without_sacrebleu):
    with pytest.raises(EnvironmentUnmet, match=r"pip install 'kdkit\[chrf\]'"):
        kdkit.build("metric", "chrf")
