"""The model ``tiny``: made the first time that a recipe names it, by another process, since the caller stays light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from kdkit.api.errors import EnvironmentUnmet
from kdkit.models.catalogue import TINY, models_dir
from kdkit.models.files import write_errors

__all__ = ["made_tiny"]


def made_tiny() -> Path:
    """The directory of the model, whole.

    Raises:
        EnvironmentUnmet: It cannot be written, or torch and transformers do not work here.
    """
    target = models_dir() / TINY
    if target.is_dir():  # it appears in one step
        return target
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{TINY}.lock"):
            if not target.is_dir():
                _make(target)
    return target


def _make(target: Path) -> None:
    # -P: without it, modules of the working directory would be found first.
    command = [sys.executable, "-P", "-m", "kdkit.testing.tiny", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise EnvironmentUnmet(f"the model {TINY!r} could not be made: {lines[-1]}", where=str(target))
