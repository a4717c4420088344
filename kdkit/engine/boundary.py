"""Where code of components runs: whatever it raises becomes one line that says whose it is and what to do."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Final

from kdkit.api.errors import KdkitError, StageError
from kdkit.api.slots import Found
from kdkit.engine.files import environment_error, is_environment_error
from kdkit.host.runtime import plugin_errors

__all__ = ["ComponentBoundary", "machine_error"]

_NO_SPACE: Final = ("No space left on device", "File too large", "Disk quota exceeded", "PytorchStreamWriter failed")
_NO_MEMORY: Final = ("can't allocate memory", "not enough memory", "CUDA out of memory")
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_MAKE_ROOM: Final = "make room, then resume"
_LESS_MEMORY: Final = (
    "lower per_device_train_batch_size (and raise gradient_accumulation_steps), max_length or max_completion_length, "
    "or set gradient_checkpointing: true"
)


def machine_error(error: BaseException) -> KdkitError | None:
    """The one-line form of an error that is the machine's and not the program's: memory, disk, permissions."""
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _contains(text, _NO_MEMORY):
        return StageError("out of memory", hint=_LESS_MEMORY)
    if isinstance(error, OSError) and is_environment_error(error):
        return environment_error(error, hint=_MAKE_ROOM if error.errno in _FULL else None)
    if _contains(text, _NO_SPACE):
        # safetensors and torch report a full disk as their own error types.
        return environment_error(OSError(errno.ENOSPC, ""), hint=_MAKE_ROOM)
    return None


def _contains(text: str, parts: Iterable[str]) -> bool:
    return any(part in text for part in parts)


class ComponentBoundary:
    """Around a call into ``found``, which may itself call other components.

    Errors of kdkit pass unchanged; errors of the machine become their one-line form; any other error names the
    component whose code is innermost in the traceback, with distribution, version and file.
    """

    def __init__(self, found: Found, nested: Iterable[Found] = ()) -> None:
        self._found = found
        self._nested = tuple(nested)

    def __enter__(self) -> ComponentBoundary:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, KdkitError):
            return
        if (machine := machine_error(error)) is not None:
            raise machine from error
        with plugin_errors(self._blame(error)):
            raise error

    def _blame(self, error: Exception) -> Found:
        candidates = (*self._nested, self._found)
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            owners = [found for found in candidates if _owns(found, Path(frame.filename))]
            if owners:
                # Several components in one place: the one that was called is the one that is known to be involved.
                return self._found if self._found in owners else owners[0]
        return self._found


def _owns(found: Found, file: Path) -> bool:
    """Whether ``file`` belongs to the component: a package has a directory of its own, a single file only itself."""
    defined = Path(found.source.rpartition(":")[0] or found.source)
    packaged = (defined.parent / "__init__.py").is_file() and not found.identity.startswith("sha256:")
    return file.is_relative_to(defined.parent if packaged else defined)
