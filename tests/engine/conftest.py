from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kdkit.engine.plan import Plan, make_plan
from kdkit.engine.selection import Selection
from kdkit.engine.store import Store, store_root
from kdkit.recipe import Recipe, load_recipe

ONE = "  a: {kind: count, steps: 3}"
CHAIN = """\
  a: {kind: count, steps: 3}
  b: {kind: count, steps: 2, source: "${stages.a.data}"}
  c: {kind: sheet, source: "${stages.b.data}"}"""


def _default_signals() -> None:
    """Under nohup, or in a background job, a child would inherit ignored signals."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


@dataclass
class Project:
    """A directory with a recipe and a plugin file; it is the current directory."""

    root: Path
    one: str = ONE
    chain: str = CHAIN

    def recipe(self, stages: str = CHAIN, *, seed: int = 3, name: str = "demo", more: str = "") -> Path:
        path = self.root / "recipe.yaml"
        path.write_text(
            f"kdkit: 1\nname: {name}\nseed: {seed}\nplugins: [./fake_stages.py]\n{more}\nstages:\n{stages}\n"
        )
        return path

    def load(self, stages: str = CHAIN, *sets: str, **options: Any) -> Recipe:
        return load_recipe(self.recipe(stages, **options), sets=sets)

    def plan(self, stages: str = CHAIN, *sets: str, selection: Selection | None = None, **options: Any) -> Plan:
        return make_plan(self.load(stages, *sets, **options), self.store, selection)

    @property
    def store(self) -> Store:
        return Store(store_root())

    def entries(self) -> list[str]:
        """Names of the whole entries of the store."""
        return sorted(p.name for p in store_root().glob("*-*") if p.is_dir() and p.suffix != ".partial")

    def partials(self) -> list[Path]:
        return sorted(store_root().glob("*.partial"))

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        """``kdkit ARGUMENTS`` as a real process."""
        return subprocess.Popen(
            [sys.executable, "-m", "kdkit", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.root,
            env={**os.environ, **environ},
            preexec_fn=_default_signals,  # noqa: PLW1509 - this process starts no threads
        )

    def kdkit(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        with finishing(self.start(*arguments, **environ)) as process:
            out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@contextmanager
def finishing(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    root = tmp_path / "project"
    root.mkdir()
    shutil.copy(Path(__file__).with_name("fake_stages.py"), root)
    monkeypatch.chdir(root)
    return Project(root)
