"""``kdkit new-plugin``: names, messages, and what is written. ``test_new_plugin_packages.py`` runs what is written."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import yaml
from packaging.requirements import Requirement

import kdkit
from kdkit import api
from kdkit.api import EnvironmentUnmet, RecipeError
from kdkit.api.hookspecs import COMPONENT_HOOKS
from kdkit.cli import new_plugin as command
from kdkit.cli.new_plugin import NewPlugin, new_plugin, rendered
from kdkit.cli.options import Kind

KINDS = get_args(Kind)
NAMES = ["x", "acme", "acme-acme", "a-1-b2", "class", "none", "kdkit", "test-it", "params", "about", "y" * 30]
TEMPLATES = Path(command.__file__).parents[1] / "templates"


def package(name: str, kind: str) -> dict[str, str]:
    return rendered(NewPlugin(name=name, kind=kind, use=name))


def test_every_kind_of_component_has_a_template():
    assert set(KINDS) == set(COMPONENT_HOOKS)
    assert {path.name for path in TEMPLATES.iterdir()} == {*KINDS, "package"}


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "proposed"),
    [
        ("My_Loss", "my-loss"),
        ("myLoss", "my-loss"),
        ("-loss", "loss"),
        ("loss-", "loss"),
        ("two--hyphens", "two-hyphens"),
        ("4bit", "bit"),
        ("kdkit-My Loss", "my-loss"),
        ("a.b/../c", "a-b-c"),
        ("x" * 31, "x" * 30),
        ("naïve — Café", "naive-cafe"),
    ],
)
def test_a_name_that_is_none_is_refused_with_one_that_is(text, proposed, tmp_path):
    with pytest.raises(RecipeError) as error:
        new_plugin(text, "loss", tmp_path)
    line = str(error.value)
    assert "\n" not in line
    assert "lower-case letters, digits and single hyphens" in line
    assert line.endswith(f"; did you mean {proposed}?")
    assert not list(tmp_path.iterdir())
    new_plugin(proposed, "loss", tmp_path)


@pytest.mark.parametrize("text", ["", "-", "kdkit-", "42", "名前", "{{7*7}}", "${vars.x}", "$(touch x)", "x" * 10_000])
def test_hostile_names_are_refused_in_one_short_line(text, tmp_path):
    with pytest.raises(RecipeError) as error:
        new_plugin(text, "reward", tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert not list(tmp_path.iterdir())


def test_the_prefix_may_be_given(tmp_path):
    new_plugin("kdkit-acme", "metric", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kdkit-acme"]
    assert '"acme"' in (tmp_path / "kdkit-acme/src/kdkit_acme/plugin.py").read_text()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_names_are_put_in_everywhere_and_nothing_else_is(name, kind):
    files = package(name, kind)
    module = f"kdkit_{name.replace('-', '_')}"
    code = {path for path in files if path.endswith(".py")}
    assert {f"src/{module}/__init__.py", f"src/{module}/plugin.py", f"src/{module}/{kind}.py"} < code
    assert {path.rpartition("/")[0] for path in code} == {f"src/{module}", "tests"}
    assert {"pyproject.toml", "README.md", ".gitignore", "recipe.yaml", f"src/{module}/py.typed"} < set(files)
    for path in code:
        ast.parse(files[path], path)
    left = "\n".join([*files, *files.values()])
    for mark in ("COMPONENT_KIND", "KDKIT_RANGE", "ABOUT", *([] if "acme" in name else ["acme", "Acme"])):
        assert mark not in left, mark
    assert yaml.safe_load(files["recipe.yaml"])["requires"] == [f"kdkit-{name}"]
    for line in files.get("rows.jsonl", "").splitlines():
        assert {"prompt", "completion", "references"} == set(json.loads(line))


@pytest.mark.parametrize("kind", KINDS)
def test_pyproject_declares_the_plugin(kind):
    project = tomllib.loads(package("acme-2", kind)["pyproject.toml"])["project"]
    assert project["name"] == "kdkit-acme-2"
    assert project["entry-points"] == {"kdkit.plugins": {"acme-2": "kdkit_acme_2.plugin"}}
    (requirement,) = map(Requirement, project["dependencies"])
    assert requirement.name == "kdkit"
    assert requirement.specifier.contains(kdkit.__version__, prereleases=True)
    assert not requirement.specifier.contains("99")


@pytest.mark.parametrize(
    ("running", "wanted"),
    [
        ("0.1.0", ">=0.1,<0.2"),
        ("0.9.3", ">=0.9,<0.10"),
        ("1.4.2", ">=1.4,<2"),
        ("0.2.0.dev3+local", ">=0.2.0.dev3,<0.3"),
        ("2.0rc1", ">=2.0rc1,<3"),
    ],
)
def test_the_range_of_versions(running, wanted, monkeypatch):
    monkeypatch.setattr(kdkit, "__version__", running)
    assert f'"kdkit{wanted}"' in package("x", "loss")["pyproject.toml"]


@pytest.mark.parametrize("name", ["token", "policy", "hidden", "row", "sandbox", "signal"])
def test_no_class_has_a_name_of_the_public_api(name):
    """``TokenLoss`` would hide the protocol that the same module imports."""
    for kind in KINDS:
        code = [text for path, text in package(name, kind).items() if path.startswith("src/") and path.endswith(".py")]
        classes = {n.name for text in code for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ClassDef)}
        assert classes
        assert not classes & set(api.__all__)


def test_the_ends_of_class_names_are_those_of_the_templates():
    trees = [ast.parse(path.read_text()) for path in TEMPLATES.rglob("src/**/*.py")]
    names = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    assert {name.removeprefix("Acme") for name in names if name.startswith("Acme")} == set(command._ENDS)


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "kdkit", "new-plugin", *arguments]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, check=False)


def test_it_prints_the_next_three_commands(tmp_path):
    done = run("acme", "--kind", "reward", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "pip install -e './kdkit-acme[dev]'",
        "pytest kdkit-acme",
        "kdkit run kdkit-acme/recipe.yaml",
    ]
    assert done.stderr == "kdkit-acme has a reward that works: change it, one step at a time\n"
    again = run("acme", "--kind", "loss", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == "error: kdkit-acme: is there already; choose another name, or another --dir\n"
    assert not list(tmp_path.rglob("loss.py"))


def test_a_kind_that_is_none_or_missing_is_one_line_with_those_that_there_are(tmp_path):
    for arguments, start, end in (
        (["--kind", "lose"], "error: no component kind 'lose'; allowed: ", "; did you mean 'loss'?\n"),
        ([], "error: --kind: is missing; allowed: ", "\n"),
    ):
        done = run("acme", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"{start}{', '.join(KINDS)}{end}"
    assert not list(tmp_path.iterdir())


def test_wrong_usage_has_exit_code_two(tmp_path):
    for arguments in (["--kind", "loss"], ["A B", "--kind", "loss"], ["a", "b", "--kind", "loss"]):
        done = run(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["with space", "semi;colon $(x)", "-dash", "quote'"])
def test_odd_directories_are_quoted(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    new_plugin("acme", "loss", Path(folder))
    lines = capsys.readouterr().out.splitlines()
    place = f"./{folder}" if folder.startswith("-") else folder
    for line, start in zip(lines, (["pip", "install", "-e"], ["pytest"], ["kdkit", "run"]), strict=True):
        script = f'for word in {line}; do printf "%s\\n" "$word"; done'
        words = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
        assert words[:-1] == start
        named = Path(words[-1].removesuffix("[dev]"))
        assert named == Path(place) / "kdkit-acme" / ("recipe.yaml" if start[0] == "kdkit" else "")
        assert named.exists()
        # Without a slash pip would look for a distribution of that name.
        assert start[0] != "pip" or (words[-1].startswith("./") and words[-1].endswith("[dev]"))


def test_a_directory_that_nobody_can_write_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", Path("/proc/none")):
        with pytest.raises(EnvironmentUnmet, match="cannot be written") as error:
            new_plugin("acme", "loss", place)
        assert error.value.where == str(place)


def test_nothing_is_left_of_a_package_that_was_interrupted(tmp_path, monkeypatch):
    written = []

    def write(self, *_, **__):
        written.append(self)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", write)
    with pytest.raises(KeyboardInterrupt):
        new_plugin("acme", "loss", tmp_path)
    assert len(written) == 3
    assert not list(tmp_path.iterdir())


def test_an_existing_file_or_dangling_link_is_left_alone(tmp_path):
    (tmp_path / "kdkit-a").write_text("mine")
    (tmp_path / "kdkit-b").symlink_to("nowhere")
    for name in "ab":
        with pytest.raises(RecipeError, match="is there already"):
            new_plugin(name, "loss", tmp_path)
    assert (tmp_path / "kdkit-a").read_text() == "mine"
    assert (tmp_path / "kdkit-b").is_symlink()


def test_a_name_that_is_taken_is_told_and_the_recipe_says_which(tmp_path, capsys):
    new_plugin("think", "reward", tmp_path)
    assert capsys.readouterr().err.startswith(
        "warning: there is a reward 'think' already (built-in): recipes have to write kdkit-think/think for yours\n"
    )
    recipe = yaml.safe_load((tmp_path / "kdkit-think/recipe.yaml").read_text())
    assert recipe["stages"]["grpo"]["rewards"][0]["use"] == "kdkit-think/think"
    # The same name is free for another kind.
    new_plugin("jsd", "reward", tmp_path)
    assert "warning" not in capsys.readouterr().err
    recipe = yaml.safe_load((tmp_path / "kdkit-jsd/recipe.yaml").read_text())
    assert recipe["stages"]["grpo"]["rewards"][0]["use"] == "jsd"


def test_a_distribution_that_is_installed_is_told(install_plugin, tmp_path, capsys):
    install_plugin("", name="kdkit-acme", version="3.1")
    new_plugin("acme", "reward", tmp_path)
    assert "warning: kdkit-acme 3.1 is installed here already: installing yours" in capsys.readouterr().err


def test_nothing_heavy_is_imported(tmp_path):
    code = (
        "import sys; from pathlib import Path; from kdkit.cli.new_plugin import new_plugin;"
        f"new_plugin('acme', 'loss', Path({str(tmp_path)!r}));"
        "print([m for m in ('torch', 'transformers', 'datasets', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_ctrl_c_while_kdkit_is_imported_says_nothing_and_has_exit_code_130():
    code = (
        "import sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'kdkit.api.errors':\n"
        "            raise KeyboardInterrupt\n"
        "from kdkit.cli.app import main\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "sys.argv = ['kdkit', 'plugins', 'list']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
