"""Does a stage make what it declares, the same again, and nothing beside it?

Subclass :class:`StageConformance` in a test file and run pytest:

    class TestShorten(StageConformance):
        spec = SPEC

        def params(self, model, rows):
            return {"model": str(model), "data": {"use": "jsonl", "source": str(rows)}, "max_words": 3}

        wrong = ({"max_words": 0},)

The stage runs through kdkit's engine in this process, on a tiny random model and sixteen rows.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Final

import pytest
import torch

from kdkit.api.errors import KdkitError, RecipeError, Stopped
from kdkit.api.hookspecs import hookimpl
from kdkit.api.specs import StageSpec
from kdkit.engine.plan import make_plan
from kdkit.engine.runner import Finished, RunOptions, run_recipe
from kdkit.engine.selection import Selection
from kdkit.engine.store import Store, store_root
from kdkit.host import Catalog
from kdkit.recipe import load_recipe
from kdkit.testing.conformance.checks import one_line, tree, unchanged
from kdkit.testing.rows import tiny_rows
from kdkit.testing.tiny import save_tiny_model

if TYPE_CHECKING:
    from kdkit.recipe import Recipe

__all__ = ["StageConformance"]

_DIST: Final = "conformance"


class StageConformance:
    """What every stage must fulfil.

    Attributes:
        spec: The stage.
        wrong: Changes of the parameters, each of which has to be refused before anything runs.
        deterministic: Two runs write the same bytes into every output.
        resumes: Stopped by a signal, it saves a checkpoint and continues from it.
    """

    spec: ClassVar[StageSpec[Any]]
    wrong: ClassVar[Sequence[Mapping[str, Any]]] = ()
    deterministic: ClassVar[bool] = True
    resumes: ClassVar[bool] = False

    def params(self, model: Path, rows: Path) -> dict[str, Any]:
        """The stage's parameters as a recipe has them, for as little work as possible (a few steps).

        Args:
            model: Directory of a tiny model, with its tokenizer.
            rows: JSON Lines with ``prompt`` and ``completion``.
        """
        raise NotImplementedError

    # -- helpers

    def _desk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Desk:
        """Inputs, a store of its own, and a current directory in which nothing may appear."""
        for name in ("inputs", "here"):
            (tmp_path / name).mkdir()
        model, rows = save_tiny_model(tmp_path / "inputs" / "model"), tmp_path / "inputs" / "rows.jsonl"
        lines = (json.dumps({"prompt": row.prompt, "completion": row.completion}) for row in tiny_rows())
        rows.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        monkeypatch.chdir(tmp_path / "here")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("KDKIT_STORE", str(tmp_path / "store"))
        return _Desk(tmp_path, self.spec, self.params(model, rows), monkeypatch)

    # -- the contract

    def test_it_makes_what_it_declares(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every output is there, of its type, within the stage's own directory; the engine checks each."""
        desk = self._desk(tmp_path, monkeypatch)
        made = desk.run()
        for name, path in made.items():
            assert not path.is_dir() or any(path.iterdir()), f"output {name!r} is an empty directory"

    def test_what_is_done_is_not_done_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same parameters have the same key, in this process and when they are read anew."""
        desk = self._desk(tmp_path, monkeypatch)
        keys = {desk.key() for _ in range(3)}
        assert len(keys) == 1, f"the same parameters have {len(keys)} keys: a default changes from one to the next"
        first = desk.run()
        assert desk.run() == first, "a second run made another result"
        assert desk.calls == 1, f"it ran {desk.calls} times"

    def test_the_same_again_elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another store, another time, other states of global generators: the same bytes."""
        desk = self._desk(tmp_path, monkeypatch)
        if not self.deterministic:
            pytest.skip("it is not deterministic")
        _seed(98)
        first = {name: _content(path) for name, path in desk.run().items()}
        desk.move("again")
        _seed(99)
        second = {name: _content(path) for name, path in desk.run().items()}
        for name, content in first.items():
            changed = sorted(file for file in content if second[name].get(file) != content[file])
            assert second[name].keys() == content.keys(), f"output {name!r} has other files the second time"
            assert not changed, f"output {name!r}: {', '.join(changed[:5])} differ the second time"

    def test_it_writes_into_its_own_directory_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its inputs stay as they are, and nothing appears in the current directory."""
        desk = self._desk(tmp_path, monkeypatch)
        with unchanged(desk.home / "inputs", "running it"), unchanged(desk.home / "here", "running it"):
            desk.run()

    def test_what_it_says_of_itself_makes_sense(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Progress within its total, and metrics that are numbers with a step."""
        desk = self._desk(tmp_path, monkeypatch)
        desk.run()
        for step, total in desk.progress:
            assert 0 <= step <= total, f"progress({step}, {total})"
        for step, values in desk.metrics:
            assert isinstance(step, int), f"metrics of step {step!r}"
            assert step >= 0, f"metrics of step {step!r}"
            for name, value in values.items():
                assert not math.isinf(value), f"metric {name!r} is {value}"

    def test_wrong_parameters_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before anything runs, with the place in the recipe: keys that nobody knows, and ``wrong``."""
        desk = self._desk(tmp_path, monkeypatch)
        for change in ({"no_such_parameter": 1}, *self.wrong):
            try:
                desk.recipe(change)
            except RecipeError as error:
                for problem in error.problems:
                    one_line(KdkitError(problem.message), f"the parameters {change}")
                    assert problem.path.startswith("stages.it"), f"{change}: the error is placed at {problem.path!r}"
            else:
                raise AssertionError(f"parameters that are wrong were accepted: {change}")

    def test_a_signal_stops_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It ends with ``Stopped`` or finishes; afterwards a run brings it to the result of one without a signal."""
        desk = self._desk(tmp_path, monkeypatch)
        whole = {name: _content(path) for name, path in desk.run().items()}
        desk.move("stopped")
        desk.stops = True
        error = desk.finished().error
        assert error is None or isinstance(error, Stopped), f"after a signal it failed: {error}"
        if self.resumes:
            assert isinstance(error, Stopped), "after a signal it ran to its end; it says that it resumes"
        desk.stops = False
        made = desk.run()
        if self.resumes:
            assert desk.resumed, "it started again instead of continuing from its checkpoint"
        if self.deterministic:
            for name, path in made.items():
                assert _content(path) == whole[name], f"output {name!r} is another one after an interruption"


@dataclass
class _Desk:
    """Runs the stage with its parameters, and watches it."""

    home: Path
    spec: StageSpec[Any]
    params: dict[str, Any]
    monkeypatch: pytest.MonkeyPatch
    calls: int = 0
    stops: bool = False
    resumed: bool = False

    def __post_init__(self) -> None:
        self.progress: list[tuple[int, int]] = []
        self.metrics: list[tuple[int, Mapping[str, float]]] = []
        # Extras are looked up in the distribution that declares them.
        watched = replace(self.spec, run=self._watched, extras=())

        def kdkit_stages() -> Iterator[StageSpec[Any]]:
            yield watched

        self._catalog = Catalog.discover(strict=False).with_plugin(
            SimpleNamespace(kdkit_stages=hookimpl(kdkit_stages)), _DIST
        )

    def move(self, store: str) -> None:
        """Forget what was made."""
        self.monkeypatch.setenv("KDKIT_STORE", str(self.home / store))

    def recipe(self, changes: Mapping[str, Any] | None = None) -> Recipe:
        """The recipe of the stage alone; raises ``RecipeError``."""
        file = self.home / "recipe.yaml"
        stage = {"kind": f"{_DIST}/{self.spec.name}", **self.params, **(changes or {})}
        file.write_text(json.dumps({"kdkit": 1, "name": _DIST, "stages": {"it": stage}}), encoding="utf-8")
        return load_recipe(file, catalog=self._catalog)

    def key(self) -> str:
        """Content key of the stage."""
        store = Store(store_root())
        store.prepare()
        return make_plan(self.recipe(), store, Selection()).stage("it").key

    def finished(self) -> Finished:
        """Run it, however that ends."""
        return run_recipe(self.recipe(), RunOptions(out=self.home / "runs", inline=True))

    def run(self) -> dict[str, Path]:
        """Run it to its end: output to path."""
        finished = self.finished()
        if finished.error is not None:
            raise AssertionError(f"the stage failed: {finished.error}") from finished.error
        return {name: artifact.path for name, artifact in finished.artifacts["it"].items()}

    def _watched(self, params: Any, ctx: Any) -> Any:
        self.calls += 1
        # Names with a dot are the engine's own notes.
        saved = ctx.checkpoints.iterdir() if ctx.checkpoints.is_dir() else ()
        self.resumed = any(not path.name.startswith(".") for path in saved)
        return self.spec.run(params, _Watching(ctx, self))


class _Watching:
    """A ``StageContext`` that notes what the stage says, and pretends that a signal came."""

    def __init__(self, ctx: Any, desk: _Desk) -> None:
        self._ctx, self._desk = ctx, desk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def stopping(self) -> bool:
        return self._desk.stops or self._ctx.stopping()

    def progress(self, step: int, total: int, /, **values: float) -> None:
        self._desk.progress.append((step, total))
        self._ctx.progress(step, total, **values)

    def metrics(self, values: Mapping[str, float], /, *, step: int) -> None:
        self._desk.metrics.append((step, dict(values)))
        self._ctx.metrics(values, step=step)


def _seed(number: int) -> None:
    """Put generators that no stage should draw from into some state."""
    random.seed(number)
    torch.manual_seed(number)


def _content(path: Path) -> dict[str, Any]:
    """Hashes of what an output holds."""
    return tree(path) if path.is_dir() else {path.name: path.read_bytes()}
