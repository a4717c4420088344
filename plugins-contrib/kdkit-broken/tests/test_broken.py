"""What people see who installed these packages; what is said of each fault is tested with kdkit's host."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from pathlib import Path

import pytest

import kdkit
from kdkit.testing.tiny import save_tiny_model

RECIPE = Path(__file__).parents[1] / "recipe.yaml"
IN_ORDER = {"name-clash", "raises-in-validator", "slow-import"}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = [sys.executable, "-m", "kdkit", *arguments]
    return subprocess.run(done, capture_output=True, text=True, check=False)


def faults() -> set[str]:
    """The entry points of these packages that are broken."""
    ours = {"kdkit-broken", "kdkit-broken-too-new"}
    points = [point for point in entry_points(group="kdkit.plugins") if point.dist and point.dist.name in ours]
    return {point.name for point in points} - IN_ORDER


@pytest.fixture(autouse=True)
def too_new() -> None:
    """Both packages are installed, as pip does it when it is told not to look at requirements."""
    try:
        distribution("kdkit-broken-too-new")
    except PackageNotFoundError:
        pytest.skip("pip install --no-deps kdkit-broken-too-new")


def test_the_list_has_everything_else_and_names_each_fault() -> None:
    done = command("plugins", "list", "--json")
    assert done.returncode == 0
    listed = json.loads(done.stdout)
    assert {item["entry_point"] for item in listed["broken"]} == faults()
    assert len(faults()) == 6
    assert not [item for item in listed["broken"] if "\n" in item["error"]]
    names = {item["qualified_name"] for item in listed["components"]}
    assert {"kdkit/forward-kl", "kdkit-broken/forward-kl", "kdkit-broken/broken-slow-import"} <= names


def test_one_line_and_exit_code_3_for_a_recipe_that_uses_a_fault() -> None:
    assert command("plugins", "show", "kdkit-broken").returncode == 3
    done = command("validate", str(RECIPE), "--set", "stages.kd.losses=[{use: kdkit-broken/broken-generator}]")
    assert done.returncode == 3
    assert "no loss 'kdkit-broken/broken-generator'; kdkit-broken 0.1.0 (" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert len((done.stdout + done.stderr).strip().splitlines()) == 1


def test_a_recipe_that_uses_none_of_them_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDKIT_STORE", str(tmp_path / "store"))
    tiny = str(save_tiny_model(tmp_path / "tiny"))
    small = {"stages.kd.per_device_train_batch_size": 2}
    result = kdkit.run(RECIPE, var={"model": tiny}, set=small, out=tmp_path)
    assert result.ok, result.error
