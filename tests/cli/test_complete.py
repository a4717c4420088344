"""Completion: what shells are offered, that nothing heavy is loaded for it, and that nothing broken stops it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdkit.cli import complete_names
from kdkit.cli.complete_names import component_names
from kdkit.cli.complete_recipe import read_tree, recipe_files, setting_paths, stage_names, variable_names
from kdkit.host import param_names

ROOT = Path(__file__).parents[2]
RECIPE = """\
kdkit: 1
name: mine
vars: {student: ./tiny, steps: 5}
stages:
  sft: {kind: sft, model: "${vars.student}", data: {use: jsonl, source: ./a.jsonl}, max_steps: 3}
  kd:
    kind: distill
    model: "${stages.sft.model}"
    losses: [{use: forward-kl, weight: 0.5}, {use: cross-entropy}]
"""
MAIN = "from kdkit.cli.app import main\ntry: main()\nfinally:\n import sys; print('loaded', [m for m in {heavy} if m in sys.modules], file=sys.stderr)"  # noqa: E501
HEAVY = ("torch", "transformers", "datasets", "accelerate")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory with one recipe."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def complete(*words: str, shell: str = "bash", site: Path | None = None, heavy=HEAVY) -> list[str]:
    """What a shell gets for the last of ``words``."""
    path = os.pathsep.join([str(ROOT), *([str(site)] if site else [])])
    line = " ".join(["kdkit", *words])
    env = {**os.environ, "PYTHONPATH": path, "_KDKIT_COMPLETE": f"complete_{shell}"}
    if shell == "bash":
        env |= {"COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    else:
        env |= {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = subprocess.run(
        [sys.executable, "-c", MAIN.format(heavy=heavy)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "loaded []\n"
    return [line for line in done.stdout.split("\n") if line]


def test_a_recipe_its_stages_variables_and_settings(here):
    assert complete("run", "r") == ["r.yaml"]
    assert complete("run", "r.yaml", "--from", "") == ["sft", "kd"]
    assert complete("plan", "--until", "k", "r.yaml") == ["r.yaml"]
    assert complete("run", "r.yaml", "--var", "st") == ["student=", "steps="]
    found = complete("validate", "r.yaml", "--set", "stages.kd.l")
    assert {"stages.kd.losses=", "stages.kd.losses.0.weight=", "stages.kd.learning_rate="} <= set(found)
    assert all(path.startswith("stages.kd.l") for path in found)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells(here, shell):
    text = "\n".join(complete("run", "r.yaml", "--only", "s", shell=shell))
    assert "sft" in text
    assert "kd" not in text.replace("kdkit", "")


def test_components_and_models(here):
    assert complete("plugins", "list", "--kind", "r") == ["reward", "rollout"]
    assert complete("plugins", "show", "loss", "forward") == ["forward-kl"]
    shown = complete("plugins", "show", "")
    assert {"loss", "forward-kl", "kdkit"} <= set(shown)
    assert len(shown) == len(set(shown))
    assert complete("plugins", "check", "kd") == ["kdkit"]
    assert complete("new-plugin", "mine", "--kind", "s") == ["stage", "sandbox"]
    assert "auto" in complete("sandbox", "check", "")
    assert complete("models", "pull", "") == ["smollm2-135m-instruct"]
    assert complete("generate", "--model", "base=smol") == ["base=smollm2-135m-instruct"]


def test_runs(here):
    for name, links in (("a/2026-01-01T00-00-00Z", ()), ("a/2026-01-02T00-00-00Z", ("stages/sft/model",))):
        run = here / "runs" / name
        run.mkdir(parents=True)
        (run / "plan.json").write_text("{}")
        for link in links:
            (run / link).mkdir(parents=True)
    (here / "runs/a/latest").symlink_to("2026-01-02T00-00-00Z")
    (run / "report.json").write_text("{}")
    first, second = "a/2026-01-01T00-00-00Z", "a/2026-01-02T00-00-00Z"
    assert complete("runs", "show", "") == ["a", "LAST", second, first]
    assert complete("runs", "diff", "LAST", "a/2026-01-01") == [first]
    assert complete("report", "runs") == [f"runs/{second}"]
    assert complete("generate", "--model", "runs/") == ["runs/a/latest/stages/sft"]
    shutil.move(here / "runs", here / "other")
    assert complete("runs", "show", "--out", "other", "L") == ["LAST"]
    assert complete("runs", "show", "") == []


def test_paths_are_left_to_the_shell(here):
    assert complete("run", "r.yaml", "--out", "r") == []
    assert complete("models", "prune", "x", "r") == []


def test_names_that_are_remembered_load_no_plugin(here):
    first = complete("plugins", "show", "loss", "")
    assert complete("plugins", "show", "loss", "", heavy=(*HEAVY, "kdkit.host", "kdkit.api", "kdkit.plugins")) == first
    assert "forward-kl" in first


BROKEN = (
    b"",
    b"stages: [",
    b"stages: 3",
    b"- a\n- b",
    b"stages: {a: {kind: sft}, 3: x, b: null}",
    b"stages: {a: &a {kind: sft, x: *a, y: [*a, *a]}}",
    b"\x00",
    b"a: &a [*a]",
    b"[" * 3000,
    b"extends: ./r.yaml",
    b"extends: [1]",
    b"stages: {? [a] : b}",
    b"\xff\xfe\x00",
    b"stages: !!python/object:os.system {}",
    # Lists of nine aliases in each other, 43 million places together.
    b"a: &a0 [1]\n"
    + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 9))
    + b"stages: {a: {kind: sft, x: *a8}}",
)


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_recipe_offers_what_can_be_read(here, text):
    (here / "r.yaml").write_bytes(text)
    tree = read_tree(here / "r.yaml")
    assert set(stage_names(tree)) <= {"a", "b"}
    list(setting_paths(tree, component_names()))
    assert variable_names(tree) == []


def test_a_broken_recipe_or_none_breaks_no_shell(here):
    (here / "r.yaml").write_text("stages: [")
    assert complete("run", "r.yaml", "--from", "") == []
    assert complete("run", "gone.yaml", "--set", "") == []
    assert complete("run", "--from", "") == []


def test_broken_plugins_offer_nothing_and_stay_silent(here):
    site = here / "site"
    for number, code in enumerate(
        ("import sys\nprint('noise')\nprint('noise', file=sys.stderr)\nraise SystemExit(3)", "syntax error(")
    ):
        info = site / f"kdkit_bad{number}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: kdkit-bad{number}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[kdkit.plugins]\nmain = bad{number}\n")
        (site / f"bad{number}.py").write_text(code)
    assert complete("plugins", "show", "loss", "forward", site=site) == ["forward-kl"]
    assert complete("plugins", "check", "kdkit-b", site=site) == ["kdkit-bad0", "kdkit-bad1"]


# --- parts ------------------------------------------------------------------------------------------------------------


def test_files_that_are_no_recipes_are_not_offered(here):
    for name in ("sub/a.yaml", "sub/deep/b.yml", "runs/x/t.yaml", ".hidden/c.yaml", "sub/deep/far/d.yaml"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("# a comment\nkdkit: 1\n")
    (here / "sub" / "child.yaml").write_text("extends: ./a.yaml\n")
    (here / "compose.yaml").write_text("services: {}\nnot-kdkit: 1\n")
    (here / "directory.yaml").mkdir()
    assert recipe_files("") == ["r.yaml", "sub/a.yaml", "sub/child.yaml", "sub/deep/b.yml"]
    assert recipe_files("sub/") == ["sub/a.yaml", "sub/child.yaml", "sub/deep/b.yml", "sub/deep/far/d.yaml"]
    assert recipe_files("./sub/ch") == ["./sub/child.yaml"]
    assert recipe_files(f"{here}/r") == [f"{here}/r.yaml"]
    assert recipe_files("nowhere/") == []


def test_what_is_extended_counts(here):
    (here / "base").mkdir()
    (here / "base" / "b.yaml").write_text(RECIPE)
    (here / "child.yaml").write_text("extends: ./base/b.yaml\nstages: {more: {kind: report}, kd: {max_steps: 9}}\n")
    tree = read_tree(here / "child.yaml")
    assert stage_names(tree) == ["sft", "kd", "more"]
    assert tree["stages"]["kd"] == {**read_tree(here / "r.yaml")["stages"]["kd"], "max_steps": 9}
    (here / "other.yaml").write_text(
        "extends: ./base/b.yaml\nstages: {kd: {kind: sft, model: x}, sft: {data: {use: dolly}}}\n"
    )
    other = read_tree(here / "other.yaml")["stages"]
    assert other["kd"] == {"kind": "sft", "model": "x"}, "parameters of another component mean nothing"
    assert (other["sft"]["data"], other["sft"]["max_steps"]) == ({"use": "dolly"}, 3)
    (here / "loop.yaml").write_text("extends: ./loop.yaml\nstages: {a: {kind: sft}}\n")
    assert stage_names(read_tree(here / "loop.yaml")) == ["a"]


def test_settings_are_those_of_each_component(here):
    paths = list(setting_paths(read_tree(here / "r.yaml"), component_names()))
    assert len(paths) == len(set(paths))
    assert {
        "seed",
        "stages.sft.max_steps",
        "stages.sft.learning_rate",
        "stages.sft.data.source",
        "stages.sft.data.test_fraction",
        "stages.kd.losses.0",
        "stages.kd.losses.0.temperature",
        "stages.kd.teacher",
    } <= set(paths)
    assert not {"stages.sft.kind", "stages.sft.data.use", "stages.sft.losses.0.temperature"} & set(paths)
    assert "stages.kd.losses.1.temperature" not in paths, "cross-entropy has none"


def test_every_setting_is_one_that_can_be_set(here):
    """``kdkit validate`` may refuse the value, never the place."""
    from kdkit.recipe import check_recipe

    paths = list(setting_paths(read_tree(here / "r.yaml"), component_names()))
    assert len(paths) > 80
    for path in paths[:: max(1, len(paths) // 12)]:
        for problem in check_recipe(here / "r.yaml", sets=[f"{path}=zzz"]).problems:
            assert "unknown key" not in problem.message, (path, problem.message)


def test_names_of_parameters_run_no_code():
    from kdkit.api import Params

    class Inner(Params):
        depth: int = 1

    class Outer(Params):
        inner: Inner = Inner()
        many: tuple[Inner, ...] = ()
        size: int = 0

    assert param_names(Outer) == ["inner", "inner.depth", "many", "size"]


# --- what is remembered -----------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """How often plugins were looked for."""
    times = []
    real = complete_names._found
    monkeypatch.setattr(complete_names, "_found", lambda: times.append(1) or real())
    return times


def test_a_broken_plugin_is_looked_for_again_soon(counted, monkeypatch, install_plugin):
    """It may be repaired where nothing else changes: within the directory of an editable installation."""
    install_plugin({"acme_inside.plugin": "syntax error("}, entry_points={"it": "acme_inside.plugin"})
    assert component_names().broken == ("acme",)
    assert component_names().broken == ("acme",)
    assert len(counted) == 1
    now = time.time()
    monkeypatch.setattr(complete_names.time, "time", lambda: now + 61)
    component_names()
    assert len(counted) == 2


def test_names_are_found_once(counted):
    first = component_names()
    assert component_names() == first
    assert len(counted) == 1
    assert "forward-kl" in first.of_kind("loss")
    assert first.broken == ()
    assert list(complete_names._file().parent.iterdir()) == [complete_names._file()], "no draft is left"


def test_what_is_installed_since_is_found(counted, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    component_names()
    os.utime(tmp_path, (1, 1))
    component_names()
    assert len(counted) == 2


def test_every_import_path_and_choice_of_plugins_has_a_list_of_its_own(counted, monkeypatch, install_plugin):
    loss = "LossSpec(name='mine', summary='s', params=Params, build=print)"
    text = f"from kdkit.api import LossSpec, Params, hookimpl\n@hookimpl\ndef kdkit_losses():\n    yield {loss}\n"
    first = component_names()
    install_plugin(text)
    assert set(component_names().names) - set(first.names) == {"mine"}
    monkeypatch.setenv("KDKIT_DISABLE_PLUGINS", "kdkit")
    assert component_names().names == ["mine"]
    monkeypatch.delenv("KDKIT_DISABLE_PLUGINS")
    assert "mine" in component_names().names
    assert len(counted) == 3


def test_a_plugin_that_changed_is_found(counted):
    component_names()
    data = json.loads(complete_names._file().read_text())
    (module,) = [path for path in data["state"] if path.endswith("losses/plugin.py")]
    data["state"][module] -= 1
    complete_names._file().write_text(json.dumps(data))
    component_names()
    assert len(counted) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"version": "0"},
        {"time": 0},
        {"time": time.time() + 1e6},
        {"components": 3},
        {"broken": None},
        {"state": []},
        None,
    ],
)
def test_an_old_or_damaged_file_is_made_again(counted, change):
    first = component_names()
    file = complete_names._file()
    file.write_text("{" if change is None else json.dumps({**json.loads(file.read_text()), **change}))
    assert component_names() == first
    assert len(counted) == 2
    assert component_names() == first
    assert len(counted) == 2


def test_without_a_place_to_write_names_are_still_found(counted, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "forward-kl" in component_names().names
    assert "forward-kl" in component_names().names
    assert len(counted) == 2
