from __future__ import annotations

import hashlib
import os

import pytest

from kdkit.api import PluginError, RecipeError
from kdkit.host import Catalog


@pytest.fixture
def empty() -> Catalog:
    return Catalog([])


def test_a_plugin_file_adds_its_components(tmp_path, empty, loss_module):
    path = tmp_path / "my_losses.py"
    path.write_text(loss_module())
    catalog = empty.with_files([path])
    assert not empty.entries()
    found = catalog.find("loss", "focal")
    assert found == catalog.find("loss", "./my_losses.py/focal")
    assert found.qualified_name == "./my_losses.py/focal"
    assert found.identity == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()} v1"
    assert found.source == f"{path}:8"
    (entry,) = catalog.entries("loss")
    assert (entry.provider, entry.origin) == ("./my_losses.py", str(path))


def test_an_edit_changes_code_and_identity_even_within_one_tick_of_the_clock(tmp_path, empty, loss_module):
    path = tmp_path / "edited.py"
    identities, names = set(), []
    for name in ("one", "two"):
        path.write_text(loss_module(name))
        os.utime(path, ns=(10**18, 10**18))
        (entry,) = empty.with_files([path]).entries()
        identities.add(entry.found().identity)
        names.append(entry.name)
    assert names == ["one", "two"]
    assert len(identities) == 2
    assert not list(tmp_path.rglob("*.pyc"))


def test_the_same_file_twice_counts_once(tmp_path, empty, loss_module, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text(loss_module())
    monkeypatch.chdir(tmp_path)
    catalog = empty.with_files([path, tmp_path / "." / "mine.py"]).with_files([path])
    assert len(catalog.entries()) == 1


def test_two_catalogues_share_one_module(tmp_path, empty, loss_module):
    path = tmp_path / "mine.py"
    path.write_text(loss_module())
    first, second = (empty.with_files([path]).entries()[0].spec.params for _ in range(2))
    assert first is second


def test_files_of_one_name_in_two_directories(tmp_path, empty, loss_module):
    paths = [tmp_path / folder / "mine.py" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(loss_module())
    catalog = empty.with_files(paths)
    assert [entry.dist for entry in catalog.entries()] == ["./b/mine.py", "./mine.py"]
    with pytest.raises(RecipeError, match=r"write \./b/mine\.py/focal or \./mine\.py/focal"):
        catalog.find("loss", "focal")


def test_a_file_cannot_take_the_name_of_an_installed_component(tmp_path, install, catalog, loss_module):
    install("kdkit-a", {"plugin_a": loss_module()})
    path = tmp_path / "mine.py"
    path.write_text(loss_module())
    with pytest.raises(RecipeError, match=r"ambiguous: \./mine\.py and kdkit-a 1\.0 provide it"):
        catalog().with_files([path]).find("loss", "focal")


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("mine.py", "import no_such_module_here", "ModuleNotFoundError"),
        ("mine.py", "x = 1", "implements no hook of kdkit"),
        ("mine.py", None, "cannot read the plugin file (No such file or directory)"),
        ("mine.txt", "", "a plugin file is a Python file; allowed: *.py"),
        ("mine.py", "\0", "the plugin file is broken: "),
    ],
)
def test_a_file_that_fails_is_named(name, source, reason, tmp_path, empty):
    path = tmp_path / name
    if source is not None:
        path.write_text(source)
    with pytest.raises(PluginError) as info:
        empty.with_files([path])
    assert str(info.value).startswith(f"{path}: ")
    assert reason in str(info.value)
    assert info.value.exit_code == 3


def test_a_file_that_fails_can_be_mended(tmp_path, empty, loss_module):
    path = tmp_path / "mine.py"
    path.write_text(loss_module() + "raise RuntimeError")
    for _ in range(2):
        with pytest.raises(PluginError, match="RuntimeError"):
            empty.with_files([path])
    path.write_text(loss_module())
    assert empty.with_files([path]).entries()


def test_a_file_has_no_extras(tmp_path, empty, loss_module):
    path = tmp_path / "mine.py"
    path.write_text(loss_module().replace("build=build", "build=build, extras=('gpu',)"))
    with pytest.raises(PluginError, match="loss 'focal': a plugin file has no extras"):
        empty.with_files([path])


def test_annotations_of_a_file_resolve(tmp_path, empty, loss_module):
    path = tmp_path / "mine.py"
    later = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass D:\n    x: int\n"
    path.write_text(later + loss_module())
    (entry,) = empty.with_files([path]).entries()
    assert entry.spec.params(gamma=1.0).gamma == 1.0


def test_a_name_in_a_file_that_is_not_listed(tmp_path, empty, loss_module):
    with pytest.raises(RecipeError, match=r"list the plugin file: plugins: \[\./mine\.py\]"):
        empty.find("loss", "./mine.py/focal")
    path = tmp_path / "mine.py"
    path.write_text(loss_module())
    with pytest.raises(RecipeError, match=r"no loss '\./mine\.py/fokal'; allowed: focal; did you mean 'focal'\?"):
        empty.with_files([path]).find("loss", "./mine.py/fokal")


def test_broken_and_disabled_plugins_stay_known(install, tmp_path, loss_module):
    install("kdkit-bad", {"faulty": "raise SystemExit"})
    install("kdkit-off", {"off": loss_module()})
    path = tmp_path / "mine.py"
    path.write_text(loss_module())
    before = Catalog.discover(disable=["kdkit", "kdkit-off"])
    after = before.with_files([path])
    assert (after.broken, after.disabled) == (before.broken, before.disabled)
    assert [broken.dist for broken in after.broken] == ["kdkit-bad"]
