"""Errors a person can cause or must act on, and the exit codes they map to.

Every error is one line: where it is, what is wrong, what is allowed and what to do next. The command line prints
that line; ``--debug`` adds the traceback.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Final

__all__ = [
    "ConformanceError",
    "DataError",
    "EnvironmentUnmet",
    "ExitCode",
    "KdkitError",
    "ModelError",
    "PluginError",
    "Problem",
    "RecipeError",
    "StageError",
    "Stopped",
    "error_from_json",
]


class ExitCode(IntEnum):
    """Exit status of every ``kdkit`` command."""

    OK = 0
    STAGE_FAILED = 1
    INVALID = 2
    PLUGIN = 3
    ENVIRONMENT = 4
    GATE = 5
    INTERRUPTED = 130
    TERMINATED = 143


class KdkitError(Exception):
    """Base of all errors that kdkit raises on purpose.

    Args:
        what: What is wrong, without a trailing full stop.
        where: File, ``file:line:column`` or recipe path the error belongs to.
        allowed: What would have been accepted.
        hint: What to do next, often a command.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.STAGE_FAILED

    def __init__(
        self, what: str, *, where: str | None = None, allowed: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.allowed = allowed
        self.hint = hint

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        for extra in (self.allowed and f"allowed: {self.allowed}", self.hint):
            if extra:
                line += f"; {extra}"
        return " ".join(line.split())

    def to_json(self) -> dict[str, str | None]:
        """The error as plain data, so that a worker process can hand it to its parent."""
        return {
            "type": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "allowed": self.allowed,
            "hint": self.hint,
        }


@dataclass(frozen=True, slots=True)
class Problem:
    """One located mistake in a recipe.

    ``line`` and ``column`` count from 1; both are 0 when the mistake is not in a file (``--set``, ``--var``).
    """

    file: str
    line: int
    column: int
    path: str
    message: str
    exit_code: ExitCode = ExitCode.INVALID

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


class RecipeError(KdkitError):
    """The recipe, an override or the command line is invalid. Carries every problem found."""

    exit_code: ClassVar[ExitCode] = ExitCode.INVALID

    def __init__(
        self,
        what: str,
        *,
        problems: tuple[Problem, ...] = (),
        where: str | None = None,
        allowed: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what, where=where, allowed=allowed, hint=hint)
        self.problems = problems

    @classmethod
    def of(cls, problems: tuple[Problem, ...]) -> RecipeError:
        """The error for ``problems``, which must not be empty."""
        return cls("\n".join(str(problem) for problem in problems), problems=problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems) if self.problems else super().__str__()


class DataError(KdkitError):
    """A dataset is missing, empty, broken or does not fit the model; found before work is lost."""

    exit_code: ClassVar[ExitCode] = ExitCode.INVALID


class ModelError(KdkitError):
    """A model directory is missing, incomplete or does not fit (no tokenizer, another vocabulary, ...)."""

    exit_code: ClassVar[ExitCode] = ExitCode.INVALID


class PluginError(KdkitError):
    """A plugin is missing, broken, incompatible, or raised while it was used."""

    exit_code: ClassVar[ExitCode] = ExitCode.PLUGIN


class EnvironmentUnmet(KdkitError):
    """The machine lacks something: an extra, a device, disk, network, or a writable path."""

    exit_code: ClassVar[ExitCode] = ExitCode.ENVIRONMENT


class StageError(KdkitError):
    """A stage failed while it ran."""

    exit_code: ClassVar[ExitCode] = ExitCode.STAGE_FAILED


class ConformanceError(KdkitError):
    """A component broke its contract (wrong shape, wrong dtype, wrong count)."""

    exit_code: ClassVar[ExitCode] = ExitCode.STAGE_FAILED


class Stopped(KdkitError):
    """The run was asked to stop by a signal and saved a checkpoint first."""

    exit_code: ClassVar[ExitCode] = ExitCode.INTERRUPTED


_TYPES: Final[dict[str, type[KdkitError]]] = {
    cls.__name__: cls
    for cls in (
        KdkitError,
        RecipeError,
        DataError,
        ModelError,
        PluginError,
        EnvironmentUnmet,
        StageError,
        ConformanceError,
        Stopped,
    )
}


def error_from_json(data: dict[str, str | None]) -> KdkitError:
    """Rebuild an error that :meth:`KdkitError.to_json` wrote; an unknown type becomes a :class:`StageError`."""
    cls = _TYPES.get(data.get("type") or "", StageError)
    return cls(data.get("what") or "failed", where=data["where"], allowed=data["allowed"], hint=data["hint"])
