"""One stage to execute, as data that travels to a worker process, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kdkit.api.errors import ExitCode, KdkitError, Stopped, error_from_json
from kdkit.api.slots import Component, walk
from kdkit.engine.files import read_json, write_json
from kdkit.engine.store import CHECKPOINTS, STAGE_LOG

if TYPE_CHECKING:
    from kdkit.recipe import Stage

__all__ = ["Outcome", "StageJob", "code_identity"]


def code_identity(stage: Stage) -> list[str]:
    """What identifies the code of a stage and of all components it uses, in the order of its parameters."""
    nested = [slot.found for _, slot in walk(stage.params) if isinstance(slot, Component)]
    return [f"{found.qualified_name} {found.identity}" for found in (stage.found, *nested)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageJob:
    """Everything a stage needs to run elsewhere. Paths are absolute strings.

    Attributes:
        recipe: The resolved recipe that the plan was made from.
        base_dir: Directory of the original recipe, from which relative paths start.
        out: The partial store entry to work in.
        pins: Where literal inputs were found, so that the stage reads exactly what its key was computed from.
        upstream: Store entry of every stage it refers to.
        code: Identity of the code that the key stands for, from :func:`code_identity`.
        resumed: ``out`` holds checkpoints.
    """

    recipe: str
    base_dir: str
    stage: str
    key: str
    out: str
    run_dir: str
    precision: str
    pins: Mapping[str, str]
    upstream: Mapping[str, str]
    code: Sequence[str]
    resumed: bool

    @property
    def checkpoints(self) -> Path:
        """Where the stage keeps what it resumes from."""
        return Path(self.out) / CHECKPOINTS

    @property
    def log_file(self) -> Path:
        """Where everything goes that the worker's libraries print."""
        return Path(self.out) / STAGE_LOG

    def write(self, path: Path) -> None:
        """Write the job for a worker."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> StageJob:
        """The job that :meth:`write` wrote."""
        return cls(**read_json(path))


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a stage ended.

    Attributes:
        outputs: Artifacts as :func:`kdkit.engine.manifest.describe_artifact` writes them, when it ended well.
        error: Why it did not.
        exit_code: The command's exit status because of it.
    """

    status: Literal["ok", "failed", "stopped"]
    outputs: Mapping[str, Mapping[str, Any]] | None = None
    error: KdkitError | None = None
    exit_code: ExitCode = ExitCode.OK

    @classmethod
    def of(cls, error: KdkitError) -> Outcome:
        """The outcome for an error that a stage raised."""
        status: Literal["failed", "stopped"] = "stopped" if isinstance(error, Stopped) else "failed"
        return cls(status, error=error, exit_code=ExitCode(error.exit_code))

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain data; the exit code is kept even when the error's type is a plugin's own."""
        error = None if self.error is None else self.error.to_json()
        return {"status": self.status, "outputs": self.outputs, "error": error, "exit_code": int(self.exit_code)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """The outcome that :meth:`to_json` wrote."""
        error = None if data["error"] is None else error_from_json(data["error"])
        return cls(data["status"], data["outputs"], error, ExitCode(data["exit_code"]))
