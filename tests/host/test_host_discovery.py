from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import kdkit
from kdkit.api import KdkitError, PluginError
from kdkit.host import Catalog

SPECS = "from kdkit.api import LossSpec, RewardSpec, Params, hookimpl\n"
SPEC = "LossSpec(name='x', summary='s', params=Params, build=print)"


def hook(body: str, name: str = "kdkit_losses", arguments: str = "") -> str:
    return f"{SPECS}@hookimpl\ndef {name}({arguments}):\n    {body}\n"


def test_components_of_an_installed_distribution(install, catalog, loss_module):
    root = install("Acme_Losses", {"acme_losses": loss_module()}, version="0.3")
    found = catalog()
    (entry,) = found.entries("loss")
    assert (entry.kind, entry.name, entry.dist, entry.version) == ("loss", "focal", "acme-losses", "0.3")
    assert entry.origin == str(root / "acme_losses.py")
    assert entry.provider == "acme-losses 0.3"
    found = found.find("loss", "focal")
    assert found.qualified_name == "acme-losses/focal"
    assert found.identity == "acme-losses==0.3 v1"
    assert found.source == f"{root / 'acme_losses.py'}:8"
    assert found.spec is entry.spec


def test_identity_of_a_built_in_is_its_own_version_only(install, loss_module):
    source = loss_module().replace("build=build", "build=build, version=4")
    install("kdkit", {"fake_built_ins": source}, version="9.9")
    found = Catalog.discover(disable=["*"]).find("loss", "focal")
    assert found.qualified_name == "kdkit/focal"
    assert found.identity == "v4"


FAULTS = {
    "import error": ("import no_such_module_here", "ModuleNotFoundError: No module named 'no_such_module_here'"),
    "exit at import": ("raise SystemExit(7)", "SystemExit: 7"),
    "syntax error": ("def broken(:", "SyntaxError: invalid syntax (faulty.py, line 1)"),
    "unprintable error": (
        "class E(Exception):\n    def __str__(self): raise ValueError\nraise E",
        "E: (its message cannot be printed)",
    ),
    "no hook": ("x = 1", "implements no hook of kdkit"),
    "misspelt, marked": (hook(f"yield {SPEC}", "kdkit_loses"), "no hook 'kdkit_loses'; did you mean 'kdkit_losses'?"),
    "misspelt, unmarked": (
        hook(f"yield {SPEC}") + "def kdkit_reward(): pass",
        "no hook 'kdkit_reward'; did you mean 'kdkit_rewards'?",
    ),
    "no prefix": (hook(f"yield {SPEC}", "losses"), "no hook 'losses'"),
    "misspelt specname": (
        SPECS + "@hookimpl(specname='kdkit_loses')\ndef mine(): pass",
        "no hook 'kdkit_loses'; did you mean 'kdkit_losses'?",
    ),
    "unmarked": (
        SPECS + f"def kdkit_losses():\n    yield {SPEC}",
        "kdkit_losses is not marked with @kdkit.hookimpl",
    ),
    "other project's marker": (
        f"import pluggy\n{SPECS}@pluggy.HookimplMarker('pytest')\ndef kdkit_losses():\n    yield {SPEC}",
        "kdkit_losses is not marked with @kdkit.hookimpl",
    ),
    "wrong argument": (hook(f"yield {SPEC}", arguments="catalog"), "{'catalog'} are declared in the hookimpl"),
    "wrapper": (
        f"{SPECS}@hookimpl(wrapper=True)\ndef kdkit_losses():\n    return (yield)",
        "kdkit_losses is a hook wrapper",
    ),
    "returns none": (hook("pass"), "kdkit_losses returned None; allowed: an iterable of loss specs"),
    "returns a spec": (hook(f"return {SPEC}"), "kdkit_losses returned a value of type LossSpec"),
    "returns text": (hook("return 'focal'"), "kdkit_losses returned a value of type str"),
    "yields no spec": (hook("yield 3"), "kdkit_losses yielded a value of type int; allowed: LossSpec"),
    "wrong kind": (hook(f"yield {SPEC}", "kdkit_rewards"), "kdkit_rewards yielded LossSpec 'x'; allowed: RewardSpec"),
    "generator raises": (hook(f"yield {SPEC}\n    raise KeyError('later')"), "KeyError: 'later'"),
    "name twice": (hook(f"yield {SPEC}\n    yield {SPEC}"), "provides loss 'x' twice"),
    "bad name": (hook(f"yield {SPEC.replace(chr(39) + 'x', chr(39) + 'X y')}"), "'X y' is not kebab-case"),
    "params no class": (hook(f"yield {SPEC.replace('=Params', '=dict')}"), "must be a subclass of kdkit.Params"),
    "params raises": (
        hook(f"yield {SPEC}") + "class P(Params):\n    x: int = 1 / 0",
        "ZeroDivisionError: division by zero",
    ),
    "params unresolved": (
        "from __future__ import annotations\n"
        + hook(f"yield {SPEC.replace('=Params', '=P')}")
        + "class P(Params):\n    x: Missing",
        "loss 'x': an annotation of P cannot be resolved: ",
    ),
    "params open": (
        hook(f"yield {SPEC.replace('=Params', '=P')}") + "class P(Params, extra='allow'):\n    x: int = 1",
        "P accepts unknown keys",
    ),
    "params reserved": (
        hook(f"yield {SPEC.replace('=Params', '=P')}") + "class P(Params):\n    weight: float = 1.0",
        "P has a field 'weight', which recipes use for something else",
    ),
    "misspelt need": (
        hook(f"yield {SPEC.replace('build', 'needs=frozenset({' + chr(39) + 'logit' + chr(39) + '}), build')}"),
        "needs is frozenset({'logit'}); allowed: ('logits', 'topk', 'hidden')",
    ),
    "needs no set": (
        hook(f"yield {SPEC.replace('build', 'needs=' + chr(39) + 'logits' + chr(39) + ', build')}"),
        "needs is 'logits'",
    ),
    "unknown loss kind": (
        hook(f"yield {SPEC.replace('build', 'loss_kind=' + chr(39) + 'tokens' + chr(39) + ', build')}"),
        "loss_kind is 'tokens'; allowed: ('token', 'policy', 'representation', 'aligned')",
    ),
    "extras no tuple": (
        hook(f"yield {SPEC.replace('build', 'extras=' + chr(39) + 'gpu' + chr(39) + ', build')}"),
        "extras is 'gpu'",
    ),
    "ready not callable": (hook(f"yield {SPEC.replace('build', 'ready=3, build')}"), "ready is not callable"),
    "build not callable": (hook(f"yield {SPEC.replace('build=print', 'build=3')}"), "build is not callable"),
    "stage output": (
        SPECS.replace("RewardSpec", "StageSpec")
        + "@hookimpl\ndef kdkit_stages():\n"
        + "    yield StageSpec(name='x', summary='s', params=Params, run=print, outputs={'model': str})",
        "output 'model' is <class 'str'>; allowed: an artifact type",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_plugin_is_named_and_harms_nobody_else(fault, install, catalog, loss_module):
    source, reason = FAULTS[fault]
    install("kdkit-bad", {"faulty": source})
    install("kdkit-good", {"good": loss_module("good")})
    found = catalog()
    (broken,) = found.broken
    assert (broken.dist, broken.version, broken.entry_point) == ("kdkit-bad", "1.0", "faulty")
    assert reason in broken.error
    assert "\n" not in str(broken)
    assert [entry.name for entry in found.entries()] == ["good"]


def test_the_traceback_of_an_import_error_is_kept(install, only_broken):
    install("kdkit-bad", {"faulty": "def helper():\n    raise RuntimeError('deep')\nhelper()"})
    assert "in helper" in only_broken().traceback


@pytest.mark.parametrize(
    ("entry_point", "reason"),
    [
        ("holder:NUMBER", "implements no hook of kdkit"),
        ("holder:Plugin", "is the class Plugin; name a module instead"),
        ("holder:missing", "AttributeError"),
        ("no_such_module_here", "ModuleNotFoundError"),
        ("json", "implements no hook of kdkit"),
    ],
)
def test_entry_points_that_are_no_plugin_module(entry_point, reason, install, only_broken):
    install("kdkit-bad", {"holder": "NUMBER = 3\nclass Plugin: pass"}, entry_points={"it": entry_point})
    assert reason in only_broken().error


def test_an_object_can_be_a_plugin(install, catalog, loss_module):
    source = loss_module().replace("@hookimpl\ndef kdkit_losses():", "class H:\n  @hookimpl\n  def kdkit_losses(self):")
    install("kdkit-object", {"holder": source + "\nPLUGIN = H()"}, entry_points={"it": "holder:PLUGIN"})
    assert [entry.name for entry in catalog().entries()] == ["focal"]


def test_a_plugin_that_needs_another_kdkit_is_not_imported(install, only_broken, loss_module):
    install("kdkit-new", {"too_new": loss_module()}, requires=["numpy>=1", "KDKit[gguf] >= 99"])
    assert only_broken().error == f"needs kdkit>=99, this is kdkit {kdkit.__version__}"
    assert "too_new" not in sys.modules


@pytest.mark.parametrize(
    "requires",
    [
        [f"kdkit=={kdkit.__version__}"],
        ["kdkit>=99; extra == 'dev'"],
        ["kdkit>=99; python_version < '3'"],
        ["kdkit-other>=99", "not a requirement !!"],
    ],
)
def test_requirements_that_do_not_stand_in_the_way(requires, install, catalog, loss_module):
    install("kdkit-fine", {"fine": loss_module()}, requires=requires, extras=["dev"])
    assert [entry.name for entry in catalog().entries()] == ["focal"]


def test_interrupting_a_slow_import_stops_the_command(install):
    install("kdkit-slow", {"slow": "raise KeyboardInterrupt"})
    with pytest.raises(KeyboardInterrupt):
        Catalog.discover(disable=["kdkit"])


def test_what_plugins_print_stays_off_stdout(install, catalog, capsys, loss_module):
    install("kdkit-chatty", {"chatty": "print('importing')\n" + loss_module() + "    print('yielding')\n"})
    assert len(catalog().entries()) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "importing\nyielding\n"


def test_kinds_narrow_what_a_broken_plugin_may_provide(install, only_broken):
    install("kdkit-bad", {"faulty": hook("pass", "kdkit_rewards")})
    broken = only_broken()
    assert broken.may_provide("reward")
    assert not broken.may_provide("loss")


def test_one_module_name_in_two_distributions(install, catalog, loss_module):
    install("kdkit-b", {"same_name": loss_module("second")})
    install("kdkit-a", {"same_name": loss_module("first")})
    found = catalog()
    assert [entry.qualified_name for entry in found.entries()] == ["kdkit-a/first"]
    (broken,) = found.broken
    assert broken.dist == "kdkit-b"
    assert "entry point 'same_name' of kdkit-a 1.0 already provides" in broken.error


def test_one_name_twice_in_one_distribution(install, catalog, loss_module):
    install("kdkit-twice", {"one": loss_module(), "two": loss_module()})
    found = catalog()
    assert [entry.name for entry in found.entries()] == ["focal"]
    assert [(b.entry_point, b.error) for b in found.broken] == [("two", "kdkit-twice provides loss 'focal' twice")]


def test_the_first_of_two_copies_of_a_distribution_counts(install, catalog, loss_module):
    install("kdkit-copy", {"copied": loss_module("old")}, version="1.0", folder="old")
    install("kdkit_copy", {"copied": loss_module("new")}, version="2.0", folder="new")
    assert [(entry.name, entry.version) for entry in catalog().entries()] == [("new", "2.0")]
    assert not catalog().broken


def test_damaged_metadata_is_named_and_harms_nobody_else(install, catalog, loss_module):
    root = install("kdkit-bad", {"faulty": loss_module()})
    (root / "kdkit_bad-1.0.dist-info" / "entry_points.txt").write_text("[kdkit.plugins]\nno equals sign\n")
    install("kdkit-good", {"good": loss_module("good")})
    found = catalog()
    assert [entry.name for entry in found.entries()] == ["good"]
    assert [broken.dist for broken in found.broken] == ["kdkit-bad"]
    assert "bad metadata" in found.broken[0].error


def test_an_unreadable_list_of_entry_points_of_a_stranger(install, catalog, loss_module):
    root = install("stranger", {})
    (root / "stranger-1.0.dist-info" / "entry_points.txt").write_bytes(b"\xff\xfe[kdkit.plugins]")
    install("kdkit-good", {"good": loss_module("good")})
    assert [entry.name for entry in catalog().entries()] == ["good"]


@pytest.mark.parametrize(
    ("build", "line"),
    [
        ("build=__import__('functools').partial(build, 3)", 8),
        ("build=type('T', (), {'m': classmethod(build)}).m", 8),
        ("build=dict", None),
    ],
)
def test_the_source_of_other_callables(build, line, install, catalog, loss_module):
    root = install("kdkit-acme", {"other_build": loss_module().replace("build=build", build)})
    place = f"{root / 'other_build.py'}"
    assert catalog().find("loss", "focal").source == (f"{place}:{line}" if line else place)


def test_a_distribution_without_metadata_is_named(install, only_broken, loss_module):
    root = install("kdkit-bad", {"faulty": loss_module()})
    (root / "kdkit_bad-1.0.dist-info" / "METADATA").unlink()
    assert "bad metadata" in only_broken().error


def test_order_is_built_ins_then_distributions_then_names(install, loss_module):
    modules = [("kdkit-b", "b1"), ("kdkit", "k1"), ("kdkit-a", "a1")]
    for dist, module in modules:
        install(dist, {module: loss_module(f"{module}-z"), f"{module}x": loss_module(f"{module}-a")})
    names = [entry.qualified_name for entry in Catalog.discover(strict=False).entries("loss")]
    assert names == [f"{d}/{n}" for d, m in (modules[1], modules[2], modules[0]) for n in (f"{m}-a", f"{m}-z")]


@pytest.mark.parametrize(
    ("disable", "left"),
    [
        ("", {"kdkit/own", "kdkit-a/one", "kdkit-a/two", "kdkit-b/three"}),
        ("kdkit-a", {"kdkit/own", "kdkit-b/three"}),
        (" KDKIT_A , nobody", {"kdkit/own", "kdkit-b/three"}),
        ("kdkit-a/m1", {"kdkit/own", "kdkit-a/two", "kdkit-b/three"}),
        ("*", {"kdkit/own"}),
        ("kdkit,kdkit-b", {"kdkit-a/one", "kdkit-a/two"}),
    ],
)
def test_disabling_plugins(disable, left, install, monkeypatch, loss_module):
    install("kdkit", {"m0": loss_module("own")})
    install("kdkit-a", {"m1": loss_module("one"), "m2": loss_module("two")})
    install("kdkit-b", {"m3": loss_module("three")})
    monkeypatch.setenv("KDKIT_DISABLE_PLUGINS", disable)
    assert {entry.qualified_name for entry in Catalog.discover().entries()} == left
    by_argument = Catalog.discover(disable=disable.split(","))
    assert {entry.qualified_name for entry in by_argument.entries()} == left
    assert len(by_argument.disabled) == 4 - len(left)


def test_a_disabled_plugin_is_not_imported(install):
    install("kdkit-bad", {"faulty": "raise SystemExit"})
    assert not Catalog.discover(disable=["*", "kdkit"]).broken
    assert "faulty" not in sys.modules


@pytest.mark.parametrize(("value", "fatal"), [("1", True), ("true", True), ("0", False), ("", False), ("off", False)])
def test_strict_mode_names_every_broken_plugin(value, fatal, install, monkeypatch):
    install("kdkit-bad", {"faulty": "raise RuntimeError('one')"})
    install("kdkit-worse", {"worse": "raise RuntimeError('two')"})
    monkeypatch.setenv("KDKIT_STRICT_PLUGINS", value)
    if not fatal:
        assert len(Catalog.discover(disable=["kdkit"]).broken) == 2
        return
    with pytest.raises(
        PluginError, match=r"kdkit-bad 1\.0 .*one.*kdkit-worse 1\.0 .*two.*KDKIT_STRICT_PLUGINS"
    ) as info:
        Catalog.discover(disable=["kdkit"])
    assert info.value.exit_code == 3


def test_strict_mode_accepts_plugins_in_working_order(install, loss_module):
    install("kdkit-good", {"good": loss_module()})
    assert len(Catalog.discover(disable=["kdkit"], strict=True).entries()) == 1


def test_listing_plugins_loads_no_framework(install, loss_module):
    root = install("kdkit-acme", {"kdkit_acme_light": loss_module()})
    code = (
        "import sys\n"
        "from kdkit.cli.plugins import list_plugins, show_plugin\n"
        "assert list_plugins(json=True, kind=None) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'pandas', 'pyarrow'}\n"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(root), "KDKIT_DISABLE_PLUGINS": "kdkit"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [item["name"] for item in json.loads(done.stdout)["components"]] == ["focal"]


def test_an_unknown_kind_is_refused(catalog):
    with pytest.raises(KdkitError, match=r"no component kind 'los'; allowed: loss, .*; did you mean 'loss'\?") as info:
        catalog().entries("los")
    assert info.value.exit_code == 2
