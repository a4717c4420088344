"""A plugin that uses a deprecated hook, or a deprecated argument of one, works and is warned once."""

from __future__ import annotations

import warnings

import pytest

from kdkit.api import StageStarted
from kdkit.api.hookspecs import HookSpecs, deprecated, hookspec
from kdkit.host import Catalog, manager

TEXT = "the argument 'key' of kdkit_stage_started is deprecated since kdkit 1.2 and goes with 2.0; use event.key"
NOTED = """
from pathlib import Path
from kdkit import hookimpl

@hookimpl
def kdkit_stage_started({arguments}):
    with Path({file!r}).open("a") as out:
        out.write({body})
"""


@pytest.fixture
def later(monkeypatch):
    """A later kdkit, that gives ``key`` in its event and has a hook that it would rather not have."""

    class LaterSpecs(HookSpecs):
        @hookspec(
            warn_on_impl_args={
                "key": deprecated(
                    "the argument 'key' of kdkit_stage_started", since="1.2", until="2.0", instead="event.key"
                )
            }
        )
        def kdkit_stage_started(self, event, key): ...

        @hookspec(
            warn_on_impl_args={
                "seed": deprecated("the argument 'seed' of kdkit_losses", since="1.2", until="2.0", instead="nothing")
            }
        )
        def kdkit_losses(self, seed): ...

        @hookspec(
            warn_on_impl=deprecated("the hook kdkit_run_finished", since="1.2", until="2.0", instead="another hook")
        )
        def kdkit_run_finished(self, event): ...

    monkeypatch.setattr(manager, "HookSpecs", LaterSpecs)


@pytest.fixture
def event(tmp_path):
    return StageStarted(recipe="r", stage="s", kind="sft", key="abc", run_dir=tmp_path)


def discovered(catalog):
    """The catalogue, and the warnings while it was made."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = catalog()
    assert not found.broken, found.broken
    return found, caught


@pytest.mark.parametrize("arguments", ["event, key", "key, event", "key"])
def test_a_plugin_with_a_deprecated_argument_works_and_is_warned_once(
    later, install, catalog, event, tmp_path, arguments
):
    body = "f'{key} ' + " + ("event.stage" if "event" in arguments else "'s'")
    root = install("acme", {"acme_old": NOTED.format(arguments=arguments, file=str(tmp_path / "log"), body=body)})
    found, caught = discovered(catalog)
    (warning,) = caught
    assert warning.category is DeprecationWarning
    assert str(warning.message) == TEXT
    # It points at the author's own function.
    assert (warning.filename, warning.lineno) == (str(root / "acme_old.py"), 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found.notify(event) == []
        assert found.with_files([]).notify(event) == []
    assert (tmp_path / "log").read_text() == "abc sabc s"


def test_a_component_hook_may_have_a_deprecated_argument(later, install, catalog, loss_module):
    install("acme", {"acme_old": loss_module().replace("def kdkit_losses():", "def kdkit_losses(seed):")})
    found, (warning,) = discovered(catalog)
    assert "'seed' of kdkit_losses is deprecated" in str(warning.message)
    assert [entry.name for entry in found.entries("loss")] == ["focal"]


def test_a_deprecated_hook_is_still_called(later, install, catalog):
    install("acme", {"acme_old": "from kdkit import hookimpl\n@hookimpl\ndef kdkit_run_finished(event): pass\n"})
    _, (warning,) = discovered(catalog)
    assert "the hook kdkit_run_finished is deprecated" in str(warning.message)


def test_a_plugin_that_uses_nothing_deprecated_is_not_warned(later, install, catalog, event, tmp_path):
    install("acme", {"acme_new": NOTED.format(arguments="event", file=str(tmp_path / "log"), body="event.key")})
    found, caught = discovered(catalog)
    assert not caught
    assert found.notify(event) == []
    assert (tmp_path / "log").read_text() == "abc"


def test_an_argument_that_never_was_is_still_refused(later, install, catalog):
    install("acme", {"acme_bad": NOTED.format(arguments="event, kex", file="log", body="''")})
    (broken,) = catalog().broken
    assert "'kex'" in broken.error


def test_nothing_is_deprecated_unnoticed():
    """The built-ins use no deprecated hook; discovering them warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not Catalog.discover(disable=["*"]).broken
