from __future__ import annotations

import pytest

import kdkit
from kdkit.api import EnvironmentUnmet, PluginError
from kdkit.host import Catalog, check_extras


@pytest.fixture
def with_extras(install, catalog, loss_module):
    """Finds a loss that needs the given extra of a distribution with several."""

    def with_extras(*extras: str):
        install(
            "kdkit-acme",
            {"plugin_acme": loss_module().replace("build=build", f"build=build, extras={extras!r}")},
            requires=[
                "pluggy>=1; extra == 'met'",
                "no-such-dist-a>=2; extra == 'gone'",
                "no-such-dist-b; extra == 'gone' and python_version < '3'",
                "pluggy>=999; extra == 'old'",
                "kdkit-acme[gone]; extra == 'all'",
                "kdkit-acme[circle]; extra == 'circle'",
                "no-such-dist-c>=1",
            ],
            extras=["met", "gone", "old", "all", "circle"],
        )
        return catalog().find("loss", "focal")

    return with_extras


@pytest.mark.parametrize("extras", [(), ("met",), ("circle",)])
def test_extras_that_are_installed(extras, with_extras):
    check_extras(with_extras(*extras))


@pytest.mark.parametrize(
    ("extras", "lacks"),
    [
        (("gone",), "no-such-dist-a>=2"),
        (("old",), "pluggy>=999"),
        (("all",), "no-such-dist-a>=2"),
        (("met", "gone"), "no-such-dist-a>=2"),
    ],
)
def test_extras_that_are_missing(extras, lacks, with_extras):
    with pytest.raises(EnvironmentUnmet) as info:
        check_extras(with_extras(*extras))
    names = ",".join(extras)
    assert str(info.value) == (
        f"loss 'focal' needs the extra {names!r}, which lacks {lacks}; "
        f"install it with: pip install 'kdkit-acme[{names}]'"
    )
    assert info.value.exit_code == 4


def test_an_extra_that_nobody_declares(with_extras):
    with pytest.raises(PluginError, match=r"kdkit-acme 1\.0 declares no extra 'nope'; allowed: all, circle, gone"):
        check_extras(with_extras("nope"))


def test_an_installed_version_that_is_none_satisfies_nothing(install, catalog):
    install("odd-dist", {}, version="latest")
    assert catalog().check_requires(["odd-dist"]) == []
    (line,) = catalog().check_requires(["odd-dist>=1"])
    assert "odd-dist latest is installed" in line


def test_a_plugin_whose_requirement_on_kdkit_cannot_be_read(install, only_broken, loss_module):
    install("kdkit-odd", {"odd": loss_module()}, requires=["kdkit >>= 1"])
    assert only_broken().error == "its requirement 'kdkit >>= 1' is not valid"


@pytest.mark.parametrize(
    "requirement",
    [
        f"kdkit=={kdkit.__version__}",
        "kdkit-acme>=0.2,<1",
        "KDKit_Acme",
        "nothing; python_version < '3'",
        "kdkit-acme[met]",
    ],
)
def test_requirements_of_a_recipe_that_are_met(requirement, install, loss_module):
    install("kdkit-acme", {"a": loss_module()}, version="0.3", requires=["pluggy; extra == 'met'"], extras=["met"])
    assert Catalog.discover(strict=False).check_requires([requirement]) == []


@pytest.mark.parametrize(
    ("requirement", "problem"),
    [
        (
            "kdkit-acme>=0.5",
            "kdkit-acme>=0.5 is required and kdkit-acme 0.3 is installed; install it with: pip install",
        ),
        ("no-such-dist>=1", "no-such-dist>=1 is not installed; install it with: pip install 'no-such-dist>=1'"),
        ("kdkit>=99", f"kdkit>=99 is required and kdkit {kdkit.__version__} is installed"),
        ("kdkit-acme[gone]", "kdkit-acme[gone] is required and lacks no-such-dist-a"),
        ("kdkit-acme[nope]", "declares no extra 'nope'"),
        ("kdkit acme !", "'kdkit acme !' is not a requirement; write it as in kdkit-acme>=0.2,<1"),
        ("kdkit-bad", "kdkit-bad 1.0 (entry point 'faulty') is broken: SystemExit"),
        ("kdkit-off", "kdkit-off is disabled by KDKIT_DISABLE_PLUGINS"),
    ],
)
def test_requirements_of_a_recipe_that_are_not_met(requirement, problem, install, loss_module):
    install(
        "kdkit-acme", {"a": loss_module()}, version="0.3", requires=["no-such-dist-a; extra == 'gone'"], extras=["gone"]
    )
    install("kdkit-bad", {"faulty": "raise SystemExit"})
    install("kdkit-off", {"off": loss_module("other")})
    catalog = Catalog.discover(disable=["kdkit-off"], strict=False)
    (line,) = catalog.check_requires(["pluggy", requirement])
    assert problem in line
