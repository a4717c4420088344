"""What a component needs of the machine is looked up before a run, and packages also when it is built."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError

import pytest

import kdkit
from kdkit.api import EnvironmentUnmet
from kdkit.api.errors import StageError
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


# --- programs and devices ---------------------------------------------------------------------------------------------

PLUGIN = """
from kdkit.api import EnvironmentUnmet, MetricSpec, Params, hookimpl

class Level(Params):
    level: int

def ready(params):
    if params.level < 0:
        raise ValueError("no level")
    if params.level > 1:
        raise EnvironmentUnmet("no device of that level", hint="take level: 1")

@hookimpl
def kdkit_metrics():
    yield MetricSpec(
        name="level", summary="A level", params=Level, build=lambda params: None, ready=ready, higher_is_better=True
    )
"""


@pytest.fixture
def leveled(tmp_path, recipe):
    """The recipe with a metric for a machine of a certain level in the second stage; the run ends with an error."""
    (tmp_path / "level.py").write_text(PLUGIN)

    def run(level: int):
        data = json.loads(recipe.read_text())
        data["stages"]["second"]["metrics"] = [{"use": "level", "level": level}]
        recipe.write_text(json.dumps({**data, "plugins": ["./level.py"]}))
        return kdkit.run(recipe, inline=True, out=tmp_path / "runs")

    return run


@pytest.mark.parametrize(
    ("level", "error", "said"),
    [
        (2, EnvironmentUnmet, "no device of that level; take level: 1"),
        (-1, StageError, "metric 'level' of .*level.py.*: no level"),
    ],
)
def test_a_machine_that_does_not_do_ends_a_run_before_it_begins(leveled, tmp_path, level, error, said):
    with pytest.raises(error, match=said):
        leveled(level)
    assert not list((tmp_path / "runs").rglob("events.jsonl"))


def test_a_machine_that_does_is_not_refused(leveled):
    assert "is not quantised" in str(leveled(1).error)


COPIES = """
import shutil
from pathlib import Path
from kdkit.api import EnvironmentUnmet, Params, QuantizerSpec, hookimpl
from kdkit.api.data import QuantizedInfo

class Copies:
    def quantize(self, model_dir, calibration, out_dir, ctx):
        shutil.copytree(model_dir, out_dir)
        return QuantizedInfo(bits=16, group_size=1, bytes_on_disk=1, layer_errors={})

def ready(params):
    if Path(__file__).with_name("unplugged").exists():
        raise EnvironmentUnmet("the device is gone")

@hookimpl
def kdkit_quantizers():
    yield QuantizerSpec(name="copies", summary="Copies", params=Params, build=lambda params: Copies(), ready=ready)
"""


def test_what_is_done_already_needs_no_machine(tmp_path):
    (tmp_path / "copies.py").write_text(COPIES)
    save_tiny_model(tmp_path / "tiny")
    stages = {"q": {"kind": "quantize", "model": "./tiny", "quantizer": {"use": "copies"}}}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"kdkit": 1, "name": "test", "plugins": ["./copies.py"], "stages": stages}))
    assert kdkit.run(file, inline=True, out=tmp_path / "runs").ok
    (tmp_path / "unplugged").touch()
    assert kdkit.run(file, inline=True, out=tmp_path / "runs").ok
    with pytest.raises(EnvironmentUnmet, match="the device is gone"):
        kdkit.run(file, inline=True, out=tmp_path / "runs", force=["q"])
