"""The directory of one run: what was asked for, what happened, and links to the results."""

from __future__ import annotations

import contextlib
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kdkit.api.errors import EnvironmentUnmet
from kdkit.engine.env import describe_environment
from kdkit.engine.files import check_writable, environment_error, write_atomic, write_json
from kdkit.engine.resolved import resolved_data, to_yaml

if TYPE_CHECKING:
    from kdkit.engine.plan import Plan
    from kdkit.recipe import Recipe

__all__ = ["EVENTS", "PLAN", "REPORT_FILES", "RunDir", "check_out"]

EVENTS: Final = "events.jsonl"
PLAN: Final = "plan.json"
REPORT_FILES: Final = ("report.json", "report.md", "report.html")
_HINT: Final = "choose another directory with --out"
_TIME: Final = "%Y-%m-%dT%H-%M-%SZ"


def check_out(out: Path, recipe: str) -> Path:
    """The directory of a recipe's runs, tried by really writing to it.

    Raises:
        EnvironmentUnmet: It cannot be written, or leads out of ``out``.
    """
    root = out.absolute()
    directory = root / recipe
    check_writable(directory, hint=_HINT)
    if not directory.resolve().is_relative_to(root.resolve()):
        raise EnvironmentUnmet("is a link that leads elsewhere", where=str(directory), hint=_HINT)
    return directory


class RunDir:
    """``<out>/<recipe>/<UTC time>``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, parent: Path) -> RunDir:
        """A new directory named by the time."""
        stamp = datetime.now(UTC).strftime(_TIME)
        for attempt in range(1, 1000):
            path = parent / (stamp if attempt == 1 else f"{stamp}-{attempt}")
            try:
                (path / "stages").mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise environment_error(error, where=path, hint=_HINT) from error
            return cls(path)
        raise EnvironmentUnmet("a thousand runs started in this second", where=str(parent))

    @property
    def events(self) -> Path:
        """Everything that happened, one JSON object a line."""
        return self.path / EVENTS

    @property
    def resolved(self) -> Path:
        """The recipe as it was run."""
        return self.path / "resolved.yaml"

    def job_file(self, stage: str) -> Path:
        """The worker's instructions for a stage."""
        return self.path / "jobs" / f"{stage}.json"

    def record(self, recipe: Recipe, plan: Plan) -> None:
        """Write what is known before the first stage starts, and make ``latest`` lead here; raises ``OSError``."""
        _link(self.path.parent / "latest", self.path)
        shutil.copyfile(recipe.path, self.path / "recipe.yaml")
        write_atomic(self.resolved, to_yaml(resolved_data(recipe)))
        write_json(self.path / PLAN, plan.to_json())
        write_json(self.path / "env.json", describe_environment())
        (self.path / "jobs").mkdir()

    def link_stage(self, name: str, target: Path) -> None:
        """Make ``stages/<name>`` lead to a store entry, or to the directory in which it is being made."""
        _link(self.path / "stages" / name, target)

    def copy_report(self, directory: Path) -> Path | None:
        """Copy a report's files next to the run's other files; returns the Markdown one."""
        for name in REPORT_FILES:
            if (directory / name).is_file():
                shutil.copyfile(directory / name, self.path / name)
        markdown = self.path / "report.md"
        return markdown if markdown.is_file() else None


def _link(link: Path, target: Path) -> None:
    """Point ``link`` at ``target`` relative to where the link really is, replacing what it pointed at."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()))
    temporary.replace(link)
