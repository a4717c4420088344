"""What is said of each fault of plugins-contrib/kdkit-broken, and that everything else goes on working."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import kdkit
from kdkit.api import PluginError, RecipeError
from kdkit.cli.plugins import list_plugins, show_plugin
from kdkit.host import Catalog

CONTRIB = Path(__file__).parents[2] / "plugins-contrib"
FAULTS = {
    "import-error": "ModuleNotFoundError: No module named 'a_module_that_nobody_has'",
    "misspelt-hook": "there is no hook 'kdkit_loses'; did you mean 'kdkit_losses'?",
    "raises-in-generator": "OSError: no second loss",
    "raises-in-params": "KeyError: 'beta'",
    "wrong-signature": "{'config'} are declared in the hookimpl",
    "too-new": f"needs kdkit>=99, this is kdkit {kdkit.__version__}",
}
RECIPE = """\
kdkit: 1
name: other
stages:
  kd:
    kind: distill
    model: some/student
    teacher: {{use: local, model: some/teacher}}
    data: {{use: io-problems}}
    losses: [{{use: jsd}}, {{use: {loss}}}]
    max_steps: 1
"""


@pytest.fixture(autouse=True)
def packages(install, monkeypatch):
    """Both packages of faults, installed from their sources beside the built-ins."""
    monkeypatch.delenv("KDKIT_DISABLE_PLUGINS", raising=False)
    monkeypatch.delenv("KDKIT_STRICT_PLUGINS", raising=False)
    monkeypatch.setattr("time.sleep", lambda _: None)
    for folder in ("kdkit-broken", "kdkit-broken-too-new"):
        project = tomllib.loads((CONTRIB / folder / "pyproject.toml").read_text())["project"]
        package = CONTRIB / folder / folder.replace("-", "_")
        install(
            project["name"],
            {f"{package.name}.{path.stem}": path.read_text() for path in package.glob("*.py")},
            version=project["version"],
            entry_points=project["entry-points"]["kdkit.plugins"],
            requires=project["dependencies"],
        )


@pytest.fixture
def problems(tmp_path):
    """The problems of a recipe that uses a loss, as text and exit codes."""

    def problems(loss: str) -> list[tuple[str, int]]:
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(loss=loss))
        return [(problem.message, int(problem.exit_code)) for problem in kdkit.validate(path)]

    return problems


def test_every_fault_is_named_in_one_line():
    found = {broken.entry_point: broken for broken in Catalog.discover().broken}
    assert found.keys() == FAULTS.keys()
    for fault, reason in FAULTS.items():
        dist = "kdkit-broken-too-new" if fault == "too-new" else "kdkit-broken"
        assert str(found[fault]).startswith(f"{dist} 0.1.0 (entry point '{fault}') is broken: ")
        assert reason in str(found[fault])
        assert "\n" not in str(found[fault])


def test_a_plugin_for_another_kdkit_is_not_imported():
    (broken,) = [broken for broken in Catalog.discover().broken if broken.entry_point == "too-new"]
    assert "should have looked" not in broken.traceback + broken.error


def test_what_works_of_the_package_is_listed(capsys):
    assert list_plugins(json=False, kind="loss") == 0
    lines = capsys.readouterr().out.splitlines()
    names = {line.split()[1] for line in lines if line.startswith("loss ")}
    assert {"broken-slow-import", "broken-validator", "kdkit-broken/forward-kl", "kdkit/forward-kl"} <= names
    assert not names & {"broken-generator", "broken-params", "broken-misspelt-hook", "broken-wrong-signature"}
    assert sum(line.startswith("broken: kdkit-broken") for line in lines) == len(FAULTS)
    assert show_plugin("kdkit-broken", None, json=True) == 3


@pytest.mark.parametrize("loss", ["reverse-kl", "kdkit/forward-kl", "kdkit-broken/forward-kl", "broken-slow-import"])
def test_other_recipes_go_on(loss, problems):
    assert problems(loss) == []


def test_a_name_that_two_provide_is_refused_with_both_ways_out(problems):
    ((message, code),) = problems("forward-kl")
    assert "ambiguous: built-in and kdkit-broken 0.1.0 provide it" in message
    assert "write kdkit/forward-kl or kdkit-broken/forward-kl" in message
    assert code == RecipeError.exit_code


@pytest.mark.parametrize("loss", ["kdkit-broken/broken-generator", "broken-params", "broken-wrong-signature"])
def test_a_recipe_that_uses_a_broken_plugin_names_it(loss, problems):
    ((message, code),) = problems(loss)
    assert f"no loss '{loss}'" in message
    assert "kdkit-broken 0.1.0 (raises-in-generator) is broken and may provide it: OSError: no second loss" in message
    assert code == PluginError.exit_code


def test_a_validator_that_raises_is_the_plugins_fault(problems):
    assert problems("broken-validator") == []
    ((message, code),) = problems("broken-validator, beta: 0.1")
    assert "loss 'kdkit-broken/broken-validator' (" in message
    assert message.endswith(": its parameters raise ZeroDivisionError: float division by zero")
    assert code == PluginError.exit_code


def test_a_plugin_for_another_kdkit_is_shown_in_one_line(install, capsys):
    install("kdkit-later", {"later": ""}, requires=["kdkit>=99"])
    assert show_plugin("kdkit-later", None, json=False) == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("broken: kdkit-later")
    assert "needs kdkit>=99" in line
