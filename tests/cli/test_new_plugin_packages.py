"""What ``kdkit new-plugin`` writes passes its own tests, ruff and mypy, for every kind, straight away."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from docs_blocks import blocks

import kdkit
from kdkit.cli.new_plugin import new_plugin
from kdkit.cli.options import Kind
from kdkit.host.check import check_distribution

KINDS = get_args(Kind)
ROOT = Path(__file__).parents[2]
# Short and long ones: lines are wrapped otherwise. `token` and `none` are names that need care.
NAMES = ["a", "none", "token", "x" * 30]
SLOW = "TestSandbox or test_sampling_follows_the_distribution"
"""A minute of programs that try to break out, which kdkit's own sandboxes run anyway; and two seconds of sampling."""


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> list[Path]:
    """One of every kind."""
    home = tmp_path_factory.mktemp("packages")
    for kind in KINDS:
        new_plugin(f"my-{kind}", kind, home)
    return sorted(home.iterdir())


def environment(**values: str) -> dict[str, str]:
    """Where kdkit is found as it is here, installed or not."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", **values}


def ran(*command: str, cwd: Path, **values: str) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment(**values))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


def tool(name: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        pytest.skip(f"{name} is not installed (extra: lint)")
    return found


def test_ruff_finds_nothing(packages, tmp_path):
    ruff, here = tool("ruff"), packages[0].parent
    for name in NAMES:
        for kind in KINDS:
            new_plugin(name, kind, tmp_path / kind)
    for place in (here, tmp_path):
        # Each package is checked with its own settings: the nearest pyproject.toml counts.
        ran(ruff, "check", "--no-cache", ".", cwd=place)
        ran(ruff, "format", "--no-cache", "--check", ".", cwd=place)


def test_mypy_finds_nothing(packages, tmp_path):
    mypy = tool("mypy")
    places = [str(path / folder) for path in packages for folder in ("src", "tests")]
    # Errors in kdkit itself are not the packages'; where it is installed, mypy leaves them out by itself.
    said = ran(
        mypy, "--config-file", str(packages[0] / "pyproject.toml"), "--follow-imports", "silent",
        "--cache-dir", str(tmp_path), *places, cwd=tmp_path, MYPYPATH=str(ROOT),
    )  # fmt: skip
    assert f"no issues found in {5 * len(KINDS)} source files" in said


def test_mypy_sees_a_wrong_type(packages, tmp_path):
    """The settings leave torch out, but not what is written."""
    mypy = tool("mypy")
    package = tmp_path / "kdkit-wrong"
    new_plugin("wrong", "reward", tmp_path)
    file = package / "src/kdkit_wrong/reward.py"
    file.write_text(file.read_text().replace("RewardScore.of(0.0)", '"nothing"'))
    done = subprocess.run(
        [mypy, "--follow-imports", "silent", "--cache-dir", str(tmp_path / "cache"), "src"],
        cwd=package, capture_output=True, text=True, check=False, env=environment(MYPYPATH=f"src:{ROOT}"),
    )  # fmt: skip
    assert "Incompatible return value type" in done.stdout


def test_recipes_are_valid_once_the_packages_are_installed(packages, install_plugin):
    for package in packages:
        install_plugin(package)
    for package in packages:
        assert kdkit.validate(package / "recipe.yaml") == [], package.name


def test_kdkit_plugins_check_finds_nothing(packages, install_plugin):
    for package in packages:
        catalog = install_plugin(package)
    for package in packages:
        results = check_distribution(catalog, package.name)
        assert [result for result in results if not result.ok] == []
        assert any(package.name.removeprefix("kdkit-") in result.subject for result in results)


def test_their_own_tests_pass_together(packages, tmp_path):
    sources = os.pathsep.join([*(str(package / "src") for package in packages), environment()["PYTHONPATH"]])
    out = ran(
        sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", f"not ({SLOW})", "--rootdir", ".",
        *(str(package / "tests") for package in packages),
        cwd=packages[0].parent, PYTHONPATH=sources,
    )  # fmt: skip
    assert " passed" in out
    assert "failed" not in out


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_tests_of_a_package_pass_alone_with_its_own_settings(kind, packages):
    (package,) = [path for path in packages if path.name == f"kdkit-my-{kind}"]
    assert " passed" in ran(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=package)


def test_its_settings_find_the_package_without_installing_it(packages):
    (package,) = [path for path in packages if path.name == "kdkit-my-metric"]
    names = ran(sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", cwd=package)
    assert "tests/test_my_metric.py::TestMetric::test_a_result_is_whole" in names


def methods(text: str) -> dict[str, ast.FunctionDef]:
    (found,) = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
    return {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}


def test_the_edit_that_the_page_shows_fails_the_old_values_only(tmp_path):
    page = blocks(ROOT / "docs" / "how-to" / "new-plugin.md")
    (shown,) = [block.text for block in page if block.title == "reward.py"]
    new_plugin("acme", "reward", tmp_path)
    package = tmp_path / "kdkit-acme"
    file = package / "src/kdkit_acme/reward.py"
    text, lines = file.read_text(), shown.splitlines()
    old, new = methods(text)["score"], methods(shown)["score"]
    edited = text.splitlines()
    edited[old.lineno - 1 : old.end_lineno] = lines[new.lineno - 1 : new.end_lineno]
    file.write_text("\n".join(edited) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", "tests/test_acme.py"],
        cwd=package, capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert failed, done.stdout + done.stderr
    assert all("::test_values[" in line for line in failed)
    assert " passed" in done.stdout


# What an author may get wrong with the one edit that the README names: the package's tests have to see it.
MISTAKES = {
    "loss": ("loss.py", ".sum(-1)", ".mean(-1)"),
    "reward": ("reward.py", "RewardScore.of(0.0)", "RewardScore.of(2.0)"),
    "dataset": ("dataset.py", "rows.examples[: self._params.max_rows]", "rows.examples[:5]"),
    "metric": ("metric.py", "return 100.0 *", "return 200.0 *"),
    "quantizer": ("quantizer.py", "codes.to(torch.uint8)", "(codes * 0).to(torch.uint8)"),
    "stage": ("stage.py", 'file = ctx.out / "data.jsonl"', 'file = ctx.run_dir / "data.jsonl"'),
    "rollout": ("rollout.py", "torch.manual_seed(seed)", "torch.manual_seed(7)"),
    "teacher": ("teacher.py", "self._signals.block(start, stop)", "self._signals.block(0, stop - start)"),
    "tracker": ("tracker.py", "repr(float(value))", "str(round(value, 1))"),
    "sandbox": ("sandbox.py", "if key not in self._known", "if key"),
}


@pytest.mark.slow
def test_their_tests_see_mistakes(packages, tmp_path):
    assert set(MISTAKES) == set(KINDS)
    places, sources = [], []
    for package in packages:
        kind = package.name.removeprefix("kdkit-my-")
        copy = Path(shutil.copytree(package, tmp_path / package.name))
        name, right, wrong = MISTAKES[kind]
        file = copy / f"src/kdkit_my_{kind}/{name}"
        text = file.read_text()
        assert text.count(right) >= 1, kind
        file.write_text(text.replace(right, wrong))
        places.append(str(copy / "tests" / f"test_my_{kind}.py"))
        sources.append(str(copy / "src"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"not ({SLOW})", "--tb=no",
         "--rootdir", ".", *places],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env=environment(PYTHONPATH=os.pathsep.join([*sources, environment()["PYTHONPATH"]])),
    )  # fmt: skip
    for kind in KINDS:
        assert f"FAILED kdkit-my-{kind}/tests/test_my_{kind}.py" in done.stdout, f"{kind}: {done.stdout[-4000:]}"
