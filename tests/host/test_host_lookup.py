from __future__ import annotations

import pytest

from kdkit.api import KdkitError, PluginError, RecipeError
from kdkit.host import Catalog


def error_of(found: Catalog, kind: str, name: str) -> KdkitError:
    with pytest.raises(KdkitError) as info:
        found.find(kind, name)
    assert "\n" not in str(info.value)
    return info.value


@pytest.fixture
def two(install, catalog, loss_module):
    """Two distributions that both provide ``focal``; one of them ``only-a`` as well."""
    install("kdkit-a", {"plugin_a": loss_module(), "plugin_a2": loss_module("only-a")}, version="0.3")
    install("kdkit-b", {"plugin_b": loss_module()}, version="2.0")
    return catalog()


def test_an_ambiguous_name_is_refused_with_both_ways_out(two):
    error = error_of(two, "loss", "focal")
    assert isinstance(error, RecipeError)
    assert str(error) == (
        "loss 'focal' is ambiguous: kdkit-a 0.3 and kdkit-b 2.0 provide it; write kdkit-a/focal or kdkit-b/focal"
    )


@pytest.mark.parametrize("name", ["kdkit-b/focal", "KDKit_B/focal", "only-a", "kdkit-a/only-a"])
def test_unambiguous_names(name, two):
    assert two.find("loss", name).spec.name == name.rpartition("/")[2]


def test_ambiguity_is_per_kind(two):
    entries = {entry.qualified_name: two.is_ambiguous(entry) for entry in two.entries()}
    assert entries == {"kdkit-a/focal": True, "kdkit-a/only-a": False, "kdkit-b/focal": True}


def test_an_unknown_name_with_a_close_one(two):
    error = error_of(two, "loss", "only-b")
    assert isinstance(error, RecipeError)
    assert str(error).startswith("no loss 'only-b'; did you mean 'only-a'?")


def test_an_unknown_name_with_no_close_one_lists_what_there_is(two):
    assert "no loss 'zzz'; allowed: focal, only-a" in str(error_of(two, "loss", "zzz"))


def test_a_name_of_another_kind(two):
    error = error_of(two, "reward", "only-a")
    assert isinstance(error, RecipeError)
    assert "allowed: none is installed; there is a loss of that name" in str(error)


def test_an_unknown_name_mentions_disabled_plugins(install, loss_module):
    install("kdkit-off", {"off": loss_module()})
    error = error_of(Catalog.discover(disable=["*", "kdkit"]), "loss", "focal")
    assert isinstance(error, RecipeError)
    assert "disabled by KDKIT_DISABLE_PLUGINS: " in str(error)
    assert "kdkit-off/off" in str(error)


def test_an_unknown_name_that_a_broken_plugin_may_provide(install, catalog):
    install("kdkit-bad", {"faulty": "import no_such_module_here"}, version="0.9")
    error = error_of(catalog(), "loss", "focal")
    assert isinstance(error, PluginError)
    assert error.exit_code == 3
    assert "kdkit-bad 0.9 (faulty) is broken and may provide it: ModuleNotFoundError" in str(error)
    assert str(error).endswith("see kdkit plugins show kdkit-bad")


def test_a_plugin_broken_in_another_kind_is_no_candidate(install, catalog):
    install("kdkit-bad", {"faulty": "from kdkit.api import hookimpl\n@hookimpl\ndef kdkit_rewards():\n    return None"})
    assert isinstance(error_of(catalog(), "loss", "focal"), RecipeError)
    assert isinstance(error_of(catalog(), "reward", "focal"), PluginError)


def test_a_broken_plugin_is_no_obstacle_to_others(install, catalog, loss_module):
    install("kdkit-bad", {"faulty": "raise SystemExit"})
    install("kdkit-good", {"good": loss_module()})
    assert catalog().find("loss", "focal").qualified_name == "kdkit-good/focal"


def test_a_qualified_name_of_a_distribution_that_is_not_installed(two):
    error = error_of(two, "loss", "kdkit-aa/focal")
    assert isinstance(error, PluginError)
    assert "kdkit-aa is not installed; did you mean 'kdkit-a'?; install it with: pip install kdkit-aa" in str(error)


def test_a_qualified_name_of_a_distribution_without_plugins(two):
    error = error_of(two, "loss", "pluggy/focal")
    assert isinstance(error, PluginError)
    assert "is installed and provides no component of kdkit" in str(error)


def test_a_qualified_name_that_the_distribution_does_not_have(two):
    error = error_of(two, "loss", "kdkit-a/fokal")
    assert isinstance(error, RecipeError)
    assert str(error) == "no loss 'kdkit-a/fokal'; allowed: focal, only-a; did you mean 'focal'?"


def test_a_qualified_name_of_a_broken_distribution(install, catalog, loss_module):
    install("kdkit-half", {"whole": loss_module(), "broken_half": "raise OSError('disk')"})
    found = catalog()
    assert found.find("loss", "kdkit-half/focal")
    error = error_of(found, "loss", "kdkit-half/other")
    assert isinstance(error, PluginError)
    assert "OSError: disk" in str(error)


def test_a_qualified_name_of_a_disabled_distribution(install, loss_module):
    install("kdkit-off", {"off": loss_module()})
    error = error_of(Catalog.discover(disable=["kdkit-off"], strict=False), "loss", "kdkit-off/focal")
    assert isinstance(error, PluginError)
    assert "disabled by KDKIT_DISABLE_PLUGINS: kdkit-off/off" in str(error)


@pytest.mark.parametrize("name", ["a b/focal", "x;rm/focal", "a/b/focal"])
def test_a_qualified_name_that_pip_could_not_install(name, two):
    error = error_of(two, "loss", name)
    assert isinstance(error, RecipeError)
    assert "pip install" not in str(error)
    assert "allowed: NAME or DISTRIBUTION/NAME" in str(error)


def test_the_catalogue_serves_validation(two):
    from kdkit.api import Component, Loss, Params
    from kdkit.api.slots import LOOKUP

    class Stage(Params):
        loss: Component[Loss]

    stage = Stage.model_validate_json('{"loss": {"use": "only-a", "gamma": 3.0}}', context={LOOKUP: two})
    assert stage.loss.found.identity == "kdkit-a==0.3 v1"
    assert stage.loss.params.gamma == 3.0


def test_a_name_is_ambiguous_within_its_kind_only(install, loss_module):
    built_in = Catalog.discover(disable=["*"])
    assert not any(built_in.is_ambiguous(built_in.entry(kind, "length")) for kind in ("reward", "metric"))
    install("kdkit-acme", {"acme": loss_module("jsd")})
    found = Catalog.discover(strict=False)
    assert [found.is_ambiguous(entry) for entry in found.entries("loss") if entry.name == "jsd"] == [True, True]
