"""The pytest plugin of kdkit: fixtures for tests of plugins. Active wherever kdkit is installed.

Loads pytest and the standard library only; everything else is imported by the fixture that needs it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from kdkit.api import Example
    from kdkit.engine.facade import RunResult
    from kdkit.host import Catalog
    from kdkit.testing.teachers import ScriptedTeacher

__all__ = ["InstallPlugin", "RunRecipe"]

# Asserts of the suites tell their values, as those of test files do.
pytest.register_assert_rewrite("kdkit.testing.conformance")


class InstallPlugin(Protocol):
    """The type of the fixture ``install_plugin``."""

    def __call__(
        self,
        source: str | Path | Mapping[str, str],
        name: str = "acme",
        *,
        version: str = "1.0",
        entry_points: Mapping[str, str] | None = None,
        requires: Sequence[str] = (),
        extras: Sequence[str] = (),
    ) -> Catalog:
        """Install and discover; see :func:`install_plugin`."""


class RunRecipe(Protocol):
    """The type of the fixture ``run_recipe``."""

    def __call__(self, recipe: str | Path | Mapping[str, Any], /, **changes: Any) -> RunResult:
        """Run a recipe; see :func:`run_recipe`."""


@pytest.fixture
def catalog() -> Catalog:
    """The catalogue of what is installed, broken plugins among ``catalog.broken``."""
    from kdkit.host import Catalog

    return Catalog.discover(strict=False)


@pytest.fixture
def install_plugin(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[InstallPlugin]:
    """Makes a plugin visible for one test, as if it were installed, and returns the catalogue that sees it.

    ``install_plugin(source, name="acme", version="1.0", entry_points=None, requires=(), extras=())``, where ``source``
    is the text of a module, a ``.py`` file, several modules by name, or a project directory whose ``pyproject.toml``
    then says everything else. A distribution with metadata is put on the import path, so that the host finds it the
    way it finds any other; worker processes find it, too. Installing the same name again replaces it. A plugin that
    cannot be loaded raises nothing: it is among ``broken`` of the catalogue.
    """
    from kdkit.testing.install import ThrowAwaySite

    site = ThrowAwaySite(lambda: tmp_path_factory.mktemp("installed"), monkeypatch)

    def install(source: str | Path | Mapping[str, str], name: str = "acme", **metadata: Any) -> Catalog:
        from kdkit.host import Catalog

        site.install(source, name, **metadata)
        return Catalog.discover(strict=False)

    yield install
    site.close()


@pytest.fixture
def run_recipe(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> RunRecipe:
    """Runs a recipe in a directory and a store of its own, as ``kdkit run`` does, offline; returns a ``RunResult``.

    ``run_recipe(recipe, **changes)``, where ``recipe`` is a file, YAML text or a mapping (``kdkit: 1`` and a name are
    added when it has none), and changes are overrides by path: ``run_recipe(text, **{"stages.kd.max_steps": 2})``.
    Runs of one test share the store, so that a second one finds the stages of the first done. A stage that fails
    raises nothing: look at ``result.ok`` and ``result.error``. ``inline=True`` runs it in this process, for debuggers,
    coverage and patches.
    """
    home = tmp_path_factory.mktemp("run_recipe")
    monkeypatch.setenv("KDKIT_STORE", str(home / "store"))
    monkeypatch.setenv("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "1"))

    def run(recipe: str | Path | Mapping[str, Any], /, *, inline: bool = False, **changes: Any) -> RunResult:
        import kdkit

        file = recipe if isinstance(recipe, Path) else home / "recipe.yaml"
        if isinstance(recipe, str):
            file.write_text(recipe, encoding="utf-8")
        elif isinstance(recipe, Mapping):
            # JSON is YAML.
            file.write_text(json.dumps({"kdkit": 1, "name": "test", **recipe}, default=str), encoding="utf-8")
        return kdkit.run(file, set=changes, out=home / "runs", inline=inline)

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Llama with its tokenizer: two layers, 259 tokens. Shared, so never write to it."""
    from kdkit.testing.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of ``tiny_model``: bytes and three special tokens, so that every text round-trips."""
    from kdkit.testing.tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture
def tiny_rows() -> tuple[Example, ...]:
    """Sixteen short rows with prompt, answer, references and category; no two alike."""
    from kdkit.testing.rows import tiny_rows

    return tiny_rows()


@pytest.fixture
def scripted_teacher() -> Callable[..., ScriptedTeacher]:
    """Makes teachers that need no model: ``scripted_teacher({"2+2?": "4"}, confidence=0.9, top_k=None)``.

    One gives the answers of the script, and distributions in which the tokens of the batch have ``confidence``.
    """
    from kdkit.testing.teachers import ScriptedTeacher

    return ScriptedTeacher


@pytest.fixture
def no_network() -> Iterator[None]:
    """Fails the test if its process tries to reach another machine."""
    from kdkit.testing.network import network_refused

    with network_refused():
        yield
