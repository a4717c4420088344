"""``kdkit plugins check DIST``."""

from __future__ import annotations

import json

import pytest

from kdkit.api import PluginError, RecipeError
from kdkit.cli.plugins_check import check_plugin
from kdkit.host import Catalog
from kdkit.host.check import HEAVY, check_distribution
from kdkit.host.compat import api_range

GOOD = '''
from kdkit.api import DatasetSpec, Example, MetricResult, MetricSpec, Params, Rows, TrackerSpec, hookimpl

class P(Params):
    """Nothing much."""

    rows: int = 8
    """How many."""

class Needs(Params):
    """One thing."""

    path: str
    """Where."""

class Loader:
    def __init__(self, params):
        self.count = params.rows

    def load(self, ctx):
        return self.sample()

    def sample(self):
        return Rows(examples=[Example(id=str(n), prompt="p", completion="c") for n in range(self.count)])

class Metric:
    def score(self, predictions):
        return MetricResult(value=0.0, per_example=(), n=0)

def build_metric(params):
    return Metric()

def build_tracker(params, run):
    raise AssertionError("a check opens no tracker")

@hookimpl
def kdkit_datasets():
    yield DatasetSpec(name="few", summary="A few rows", params=P, build=Loader)

@hookimpl
def kdkit_metrics():
    yield MetricSpec(name="none", summary="Nothing", params=Needs, build=build_metric, higher_is_better=None)

@hookimpl
def kdkit_trackers():
    yield TrackerSpec(name="away", summary="A server", params=P, build=build_tracker)
'''
NEEDS_KDKIT = ["kdkit>=0.1,<1"]
FIELD = "__import__('pydantic').Field"
ALONE = "import atexit, os, sys\nif sys.argv[-1].startswith('kdkit-plugins-check'): "
"""What only the process in which a check loads a plugin once more does."""


def failures(dist: str = "acme") -> list[tuple[str, str, str]]:
    results = check_distribution(Catalog.discover(strict=False), dist)
    return [(result.subject, result.what, result.detail) for result in results if not result.ok]


def test_a_good_distribution_passes(install, capsys):
    install("acme", {"acme_mod": GOOD}, requires=NEEDS_KDKIT)
    assert check_plugin("Acme", as_json=False) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["ok"] * 4
    assert "ships a sample of 8 rows or more" in next(line for line in lines if "dataset few" in line)
    assert last == "Acme: 20 checks passed"
    assert check_plugin("acme", as_json=True) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ok"]
    told = {(one["subject"], one["what"]): one["detail"] for one in data["checks"]}
    assert told["acme", "loads"] == "3 components"
    assert told["metric none", "accepts its defaults"] == "needs path"
    assert told["dataset few", "builds with its defaults"] == "Loader"


@pytest.mark.parametrize(
    ("change", "subject", "what", "detail"),
    [
        (('"""How many."""', ""), "dataset few", "documents its parameters", "no text for rows"),
        (("rows: int = 8", 'rows: int = "8"'), "dataset few", "accepts its defaults", "rows is '8': "),
        (("rows: int = 8", "rows: int = None"), "tracker away", "accepts its defaults", "rows is None: "),
        (("rows: int = 8", f"rows: int = {FIELD}(default_factory=lambda: 1 // 0)"), "dataset few",
         "accepts its defaults", "ZeroDivisionError"),
        (('    """Where."""', '    """Where."""\n    times: int = "3"\n    """How often."""'), "metric none",
         "accepts its defaults", "times is '3': "),
        (("range(self.count)", "range(7)"), "dataset few", "ships a sample of 8 rows or more", "7 rows"),
        (("id=str(n)", 'id="x"'), "dataset few", "ships a sample of 8 rows or more", "two rows have the same id"),
        (('Example(id=str(n), prompt="p", completion="c")', "n"), "dataset few", "ships a sample of 8 rows or more",
         "a row is a int, not an Example"),
        (("def sample", "def simple"), "dataset few", "builds with its defaults", "what it builds has no sample"),
        (("self.count = params.rows", "1 / 0"), "dataset few", "builds with its defaults", "ZeroDivisionError"),
        (("build=Loader", "build=Loader, extras=('fast',)"), "dataset few", "declares its extras", "declares no extra"),
        (("build=build_metric", "build=eval('lambda params: Metric()')"), "metric none", "says where its code is",
         "<string>:1 is no file; give a function"),
        (("from kdkit.api", "import no_such_module\nfrom kdkit.api"), "acme", "loads", "acme_mod: ModuleNotFoundError"),
        (("from kdkit.api", f"{ALONE}sys.exit('a lock is taken')\nfrom kdkit.api"), "acme", "imports nothing heavy",
         "it cannot be loaded in a process of its own: a lock is taken"),
        (("from kdkit.api", f"{ALONE}os._exit(0)\nfrom kdkit.api"), "acme", "imports nothing heavy",
         "it cannot be loaded in a process of its own: no message"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(install, change, subject, what, detail):
    install("acme", {"acme_mod": GOOD.replace(*change)}, requires=NEEDS_KDKIT)
    found = failures()
    assert (subject, what) in {one[:2] for one in found}, found
    assert any(detail in one[2] for one in found if one[:2] == (subject, what)), found


@pytest.mark.parametrize("name", HEAVY)
def test_each_heavy_package_is_named(install, name):
    """Alone: the real ones load one another."""
    light = "from kdkit import hookimpl\n@hookimpl\ndef kdkit_losses():\n    return []\n"
    modules = {"acme_light": light, "acme_mod": f"import {name}\n{GOOD}", "acme_last": light, name: ""}
    points = {"a": "acme_light", "b": "acme_mod", "c": "acme_last"}
    install("acme", modules, requires=NEEDS_KDKIT, entry_points=points)
    found = [detail for _, what, detail in failures() if what == "imports nothing heavy"]
    assert found == [f"acme_mod loads {name}; import it inside the function that needs it"]


def test_what_builds_on_a_wrong_default_is_left_out(install):
    install("acme", {"acme_mod": GOOD.replace("rows: int = 8", "rows: int = None")}, requires=NEEDS_KDKIT)
    results = check_distribution(Catalog.discover(strict=False), "acme")
    assert [one.what for one in results if one.subject == "dataset few"][-1] == "accepts its defaults"


def test_a_plugin_may_print_whenever_it_likes(install):
    noise = "print('\\xff loading')\nsys.stdout.flush()\nos.write(1, b'\\xff\\n')\n"
    late = f"{ALONE}atexit.register(print, 'bye')\n"
    install("acme", {"acme_mod": late + noise + GOOD}, requires=NEEDS_KDKIT)
    assert failures() == []


@pytest.mark.parametrize("requirement", ["kdkit>=0.1,<1; python_version >= '3'", "KDKit[gguf]>=0.1"])
def test_other_ways_to_say_which_kdkit(install, requirement):
    install("acme", {"acme_mod": GOOD}, requires=[requirement])
    assert failures() == []


@pytest.mark.parametrize(
    ("requires", "detail"),
    [
        ([], f"it does not name kdkit; add kdkit{api_range()} to its dependencies"),
        (["kdkit"], f"it takes any kdkit; name a version, as in kdkit{api_range()}"),
        (["kdkit>=0.1; python_version < '3'"], "it does not name kdkit"),
        (["kdkit>=0.1; extra == 'test'"], "it does not name kdkit"),
        (["kdkit-other>=1"], "it does not name kdkit"),
    ],
)
def test_a_distribution_says_which_kdkit_it_needs(install, requires, detail):
    install("acme", {"acme_mod": GOOD}, requires=requires)
    ((subject, what, found),) = failures()
    assert (subject, what) == ("acme", "says which kdkit it needs")
    assert found.startswith(detail)


def test_an_extra_that_is_not_installed_is_no_fault(install):
    text = GOOD.replace("build=Loader", "build=Loader, extras=('fast',)")
    install("acme", {"acme_mod": text}, requires=[*NEEDS_KDKIT, "no-such-thing; extra == 'fast'"], extras=["fast"])
    assert failures() == []
    results = check_distribution(Catalog.discover(strict=False), "acme")
    of_few = {one.what: one.detail for one in results if one.subject == "dataset few"}
    assert "not installed here: dataset 'few' needs the extra 'fast'" in of_few["declares its extras"]
    assert "builds with its defaults" not in of_few


def test_a_failure_has_exit_code_3_and_stands_last(install, capsys):
    install("acme", {"acme_mod": GOOD.replace("range(self.count)", "range(3)")}, requires=NEEDS_KDKIT)
    assert check_plugin("acme", as_json=False) == 3
    *_, failed, last = capsys.readouterr().out.splitlines()
    assert failed.startswith("FAILED  dataset few")
    assert failed.endswith("ships a sample of 8 rows or more: 3 rows")
    assert last == "acme: 1 of 20 checks failed"


@pytest.mark.parametrize(
    ("dist", "message"),
    [("nobody-has-this", "is not installed; install it with: pip install"), ("pluggy", "provides no plugin of kdkit")],
)
def test_what_cannot_be_checked_is_one_line(dist, message):
    with pytest.raises(PluginError, match=message):
        check_distribution(Catalog.discover(strict=False), dist)


def test_a_disabled_distribution_is_not_checked(install):
    install("acme", {"acme_mod": GOOD})
    with pytest.raises(PluginError, match="acme is disabled"):
        check_distribution(Catalog.discover(disable=["acme"], strict=False), "acme")


def test_the_built_ins_pass():
    assert failures("kdkit") == []


def test_an_object_with_hooks_is_a_plugin_for_tests(catalog):
    from types import SimpleNamespace

    from kdkit.api import LossSpec, Params, hookimpl

    def kdkit_losses():
        return [LossSpec(name="mine", summary="A loss", params=Params, build=lambda params: None)]

    found = catalog().with_plugin(SimpleNamespace(kdkit_losses=hookimpl(kdkit_losses)), "Test_Only")
    assert found.find("loss", "test-only/mine").qualified_name == "test-only/mine"
    with pytest.raises(PluginError, match="implements no hook"):
        catalog().with_plugin(SimpleNamespace(), "test-only")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("away", "'away' is a component, and no distribution; did you mean acme?"),
        ("./acme/", "'./acme/' is no name of a distribution; did you mean acme?"),
        ("acme/away", "'acme/away' is no name of a distribution; did you mean acme?"),
        ("a b", "'a b' is no name of a distribution; give one such as kdkit-acme"),
        ("", "'' is no name of a distribution; give one such as kdkit-acme"),
    ],
)
def test_what_names_no_distribution_is_refused_with_the_one_that_was_meant(install, text, line):
    install("acme", {"acme_mod": GOOD}, requires=NEEDS_KDKIT)
    with pytest.raises(RecipeError) as error:
        check_plugin(text, as_json=False)
    assert str(error.value) == line


def test_a_distribution_that_shares_its_name_with_a_component_is_checked(install, capsys):
    install("acme", {"acme_mod": GOOD}, requires=NEEDS_KDKIT)
    install("few", {"few_mod": GOOD}, requires=NEEDS_KDKIT)
    assert check_plugin("few", as_json=False) == 0
    assert "few: 20 checks passed" in capsys.readouterr().out
