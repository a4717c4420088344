"""Metrics as TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from kdkit.api.errors import EnvironmentUnmet
from kdkit.api.protocols import RunInfo

__all__ = ["TensorboardTracker"]


class TensorboardTracker:
    """Scalars of one stage below ``tensorboard/STAGE``, so that the stages of a run are separate curves.

    Raises:
        EnvironmentUnmet: The package ``tensorboard`` is missing, or the directory cannot be written.
    """

    def __init__(self, run: RunInfo) -> None:
        directory = run.run_dir / "tensorboard" / run.stage
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            hint = "run: pip install 'kdkit[tensorboard]'"
            raise EnvironmentUnmet(
                "the package tensorboard is missing", where="track: tensorboard", hint=hint
            ) from error
        try:
            self._writer = SummaryWriter(str(directory))
        except OSError as error:
            raise EnvironmentUnmet(f"cannot be written: {error.strerror}", where=str(directory)) from error

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)

    def artifact(self, path: Path) -> None:
        """Nothing to do: event files hold numbers, and the file lies in the run's directory already."""

    def finish(self, status: Literal["ok", "failed", "stopped"]) -> None:
        """Write what is buffered and close; a stage that failed keeps its curves."""
        del status
        self._writer.close()
