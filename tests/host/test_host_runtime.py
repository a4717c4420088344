from __future__ import annotations

import re

import pytest

import kdkit
from kdkit.api import DataError, Params, StageError
from kdkit.api.slots import Found
from kdkit.api.specs import LossSpec
from kdkit.host import Catalog, plugin_errors

RAISING = """
from kdkit.api import LossSpec, Params, hookimpl
from {package}impl import fail

def build(p):
    return fail()

@hookimpl
def kdkit_losses():
    yield LossSpec(name="focal", summary="s", params=Params, build=build)
"""


def test_an_error_names_component_distribution_version_and_the_plugins_own_line(install, catalog):
    root = install(
        "kdkit-acme",
        {
            "acme_run.__init__": "",
            "acme_run.plugin": RAISING.format(package="acme_run."),
            "acme_run.impl": "import json\n\ndef fail():\n    json.loads('{')\n",
        },
        version="0.3",
        entry_points={"acme": "acme_run.plugin"},
    )
    found = catalog().find("loss", "focal")
    with pytest.raises(StageError) as info, plugin_errors(found):
        found.spec.build(Params())
    place = f"{root / 'acme_run/impl.py'}:4"
    assert str(info.value).startswith(f"loss 'focal' of kdkit-acme 0.3 ({place}): JSONDecodeError: Expecting property")
    assert info.value.exit_code == 1
    assert type(info.value.__cause__).__name__ == "JSONDecodeError"
    assert info.value.__cause__.__traceback__ is not None


def test_a_single_module_shares_its_directory_with_strangers(install, catalog):
    root = install(
        "kdkit-flat",
        {"flat_plugin": RAISING.format(package="flat_"), "flat_impl": "def fail():\n    raise ValueError('x')"},
        entry_points={"flat": "flat_plugin"},
    )
    found = catalog().find("loss", "focal")
    with (
        pytest.raises(StageError, match=re.escape(f"({root / 'flat_plugin.py'}:6): ValueError: x")),
        plugin_errors(found),
    ):
        found.spec.build(Params())


def test_an_error_in_a_plugin_file(tmp_path, loss_module):
    path = tmp_path / "mine.py"
    path.write_text(loss_module())
    found = Catalog([]).with_files([path]).find("loss", "focal")
    with pytest.raises(StageError) as info, plugin_errors(found):
        found.spec.build(Params())
    assert re.match(
        rf"loss 'focal' of \./mine\.py sha256:[0-9a-f]{{12}} \({re.escape(str(path))}:9\): AssertionError: validation",
        str(info.value),
    )


@pytest.fixture
def built_in() -> Found:
    spec = LossSpec(name="own", summary="s", params=Params, build=print)
    return Found(spec=spec, qualified_name="kdkit/own", identity="v1", source="/nowhere/plugin.py:3")


def test_an_error_outside_the_plugins_files_names_where_it_is_defined(built_in):
    with pytest.raises(StageError) as info, plugin_errors(built_in):
        raise ZeroDivisionError
    assert str(info.value) == f"loss 'own' of kdkit {kdkit.__version__} (/nowhere/plugin.py:3): ZeroDivisionError"


def test_errors_of_kdkit_pass_unchanged(built_in):
    error = DataError("row 3 is empty", where="rows.jsonl:3")
    with pytest.raises(DataError) as info, plugin_errors(built_in), plugin_errors(built_in):
        raise error
    assert info.value is error
    assert info.value.__cause__ is None


def test_the_innermost_component_is_named(built_in):
    outer = Found(spec=built_in.spec, qualified_name="kdkit-a/outer", identity="kdkit-a==1 v1", source="/a.py:1")
    with pytest.raises(StageError, match="loss 'own' of kdkit "), plugin_errors(outer), plugin_errors(built_in):
        raise KeyError("x")


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
def test_requests_to_stop_pass(signal, built_in):
    with pytest.raises(signal), plugin_errors(built_in):
        raise signal


def test_code_without_errors_is_left_alone(built_in):
    with plugin_errors(built_in):
        value = 3
    assert value == 3
