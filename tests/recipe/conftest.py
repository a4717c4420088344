from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pretend_plugins import PretendCatalog

from kdkit.recipe import Checked, Recipe, check_recipe


class Desk:
    """A directory with recipes, and shortcuts to check them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "model").mkdir()

    def write(self, name: str, text: str) -> Path:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return Path(name)

    def check(self, text: str, **options: Any) -> Checked:
        return check_recipe(self.write("r.yaml", text), catalog=PretendCatalog(), **options)

    def problems(self, text: str, **options: Any) -> list[str]:
        return [str(problem) for problem in self.check(text, **options).problems]

    def good(self, text: str, **options: Any) -> Recipe:
        checked = self.check(text, **options)
        assert checked.recipe is not None, "\n".join(map(str, checked.problems))
        return checked.recipe

    def stages(self, text: str) -> list[str]:
        """The problems of a recipe with these stages, without the file name; the stages start on line 4."""
        return [line.removeprefix("r.yaml:") for line in self.problems(HEAD + text)]


HEAD = "kdkit: 1\nname: test\nstages:\n"


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    return Desk(tmp_path)


@pytest.fixture
def stages(desk: Desk) -> Callable[[str], list[str]]:
    return desk.stages
