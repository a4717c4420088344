from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kdkit.host.compat import api_range

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "kdkit").rglob("*.py"))
CONTRIB = sorted((ROOT / "plugins-contrib").glob("*/kdkit_*/**/*.py"))
HEAVY = ("torch", "transformers", "datasets", "accelerate")
# Where an exception of any type may be caught: code and files of strangers are below these.
PLUGIN_BOUNDARY = {"kdkit/host", "kdkit/models/pretrained.py"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of code: the docstring documents the function, it does not make it longer."""
    documented = ast.get_docstring(node) is not None
    start = node.body[0].end_lineno + 1 if documented else node.lineno
    return max(0, node.end_lineno - start + 1) + (node.body[0].lineno - node.lineno if documented else 0)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_files_stay_small():
    long = {
        relative(p): n for p in (*SOURCES, *CONTRIB) if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long


def test_functions_stay_small():
    sizes = {f"{relative(p)}:{f.lineno} {f.name}": length(f) for p in (*SOURCES, *CONTRIB) for f in functions(parse(p))}
    assert not {name: n for name, n in sizes.items() if n > 60}
    share = sum(n < 30 for n in sizes.values()) / len(sizes)
    assert share >= 0.9, f"only {share:.0%} of functions are under 30 lines"


def test_exceptions_of_any_type_are_caught_only_at_the_plugin_boundary():
    found = []
    for path in SOURCES:
        if any(relative(path).startswith(place) for place in PLUGIN_BOUNDARY):
            continue
        for node in ast.walk(parse(path)):
            broad = isinstance(node, ast.ExceptHandler) and (
                node.type is None or getattr(node.type, "id", "") in {"Exception", "BaseException"}
            )
            found += [f"{relative(path)}:{node.lineno}"] if broad else []
    assert not found


@pytest.mark.parametrize("call", ["eval", "exec", "compile", "__import__"])
def test_no_text_becomes_code(call):
    found = [
        f"{relative(path)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == call
    ]
    assert not found


def test_no_pickles_and_no_shell():
    banned = re.compile(r"\bimport pickle|\bdill\b|shell=True|torch\.(load|save)\(|yaml\.load\(|trust_remote_code=True")
    found = [
        f"{relative(p)}:{i}"
        for p in SOURCES
        for i, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1)
        if banned.search(line) and not line.lstrip().startswith("#")
    ]
    assert not found


def light_modules() -> list[str]:
    packages = ("adapters", "api", "host", "recipe", "cli")
    modules = ["kdkit", "kdkit.models.catalogue", "kdkit.models.locate", "kdkit.train.params"]
    for path in SOURCES:
        name = relative(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        if name.split(".")[1:2] and name.split(".")[1] in packages:
            modules.append(name)
        if re.fullmatch(r"kdkit\.plugins\.\w+\.plugin", name):
            modules.append(name)
    return modules


@pytest.mark.parametrize(
    "path", [p for p in CONTRIB if p.name == "plugin.py" and "broken" not in p.parts[-2]], ids=relative
)
def test_contributed_plugins_are_light(path):
    code = f"import sys, {path.parent.name}.plugin\nprint([h for h in {HEAVY!r} if h in sys.modules])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(path.parents[1])])}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert out.stdout.strip() == "[]"


def test_contributed_plugins_use_public_names_of_kdkit_or_say_which_others():
    public = ("kdkit", "kdkit.api", "kdkit.testing", "kdkit.train.divergences", "kdkit.adapters")
    found = []
    for path in CONTRIB:
        package = path.relative_to(ROOT / "plugins-contrib").parts[0]
        readme = (ROOT / "plugins-contrib" / package / "README.md").read_text(encoding="utf-8")
        # Where built-in plugins go, too, and nowhere else.
        told = [n for n in re.findall(r"`(kdkit[.\w]+)`", readme) if n.startswith(("kdkit.models.", "kdkit.train."))]
        for node in ast.walk(parse(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{relative(path)}: {n}" for n in names if n.startswith("kdkit.") and n not in (*public, *told)]
    assert not found


def test_every_contributed_package_is_complete():
    for project in (ROOT / "plugins-contrib").glob("*/pyproject.toml"):
        name = project.parent.name
        settings = tomllib.loads(project.read_text(encoding="utf-8"))
        package = project.parent / name.replace("-", "_")
        assert settings["project"]["name"] == name
        assert settings["build-system"]["build-backend"] == "hatchling.build", ".ci/contrib has no other"
        assert settings["project"]["entry-points"]["kdkit.plugins"], name
        assert (package / "py.typed").is_file(), name
        assert (project.parent / "README.md").is_file(), name
        if name != "kdkit-broken-too-new":
            assert f"kdkit{api_range()}" in settings["project"]["dependencies"], (
                f"{name}: see docs/how-to/api-stability.md"
            )
            assert list((project.parent / "tests").glob("test_*.py")), name
            assert (project.parent / "recipe.yaml").is_file(), name
            assert f"## {name}\n" in (ROOT / "docs" / "how-to" / "contrib.md").read_text(encoding="utf-8")


def test_light_modules_import_nothing_heavy():
    code = (
        "import importlib, sys\n"
        f"for name in {light_modules()!r}: importlib.import_module(name)\n"
        f"print([h for h in {HEAVY!r} if h in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_help_is_light():
    out = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "kdkit", "--help"], capture_output=True, text=True, check=True
    )
    modules = [line.rpartition("|")[2].strip() for line in out.stderr.splitlines() if line.startswith("import time:")]
    assert not [m for m in modules if m.split(".")[0] in HEAVY]
    assert len(modules) < 400, len(modules)


def test_layers_hold():
    tool = Path(sys.executable).with_name("lint-imports")
    if not tool.exists():
        pytest.skip("import-linter is not installed (extra: lint)")
    out = subprocess.run([tool], cwd=ROOT, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout


def test_test_files_have_distinct_names():
    names = [p.name for folder in ("tests", "plugins-contrib") for p in (ROOT / folder).rglob("test_*.py")]
    assert len(names) == len(set(names))
