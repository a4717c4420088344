"""The side of kdkit: hands every line of metrics to a process of its own, in which trackio works.

Trackio keeps its directory in a global variable, prints to standard output, and writes from a thread that only warns
when it cannot. In a process of its own all of that is harmless, and a stage does not wait for a disk.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from kdkit.api import EnvironmentUnmet, RunInfo

if TYPE_CHECKING:
    from kdkit_trackio.plugin import TrackioParams

__all__ = ["TrackioTracker"]

_RESERVED: Final = frozenset({"project", "run", "timestamp", "step", "time", "metrics"})
_PATIENCE_S: Final = 60.0
_WHERE: Final = "track: trackio"


class TrackioTracker:
    """One run of trackio for one stage. A stage that is resumed goes on in it.

    Raises:
        EnvironmentUnmet: The directory cannot be made, or no process started.
    """

    def __init__(self, params: TrackioParams, run: RunInfo) -> None:
        directory = Path(params.directory).expanduser() if params.directory else run.run_dir / "trackio"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in finish
            self._writer = _start(directory.resolve(), self._said.fileno())
        except OSError as error:
            raise EnvironmentUnmet(f"cannot be written: {error.strerror}", where=str(directory)) from error
        self._finished = False
        self._tell(
            {
                "project": params.project or run.recipe,
                "name": f"{run.run_dir.name}/{run.stage}",
                "group": run.run_dir.name,
                "config": dict(_flat("", run.config)),
            }
        )

    def log(self, metrics: Mapping[str, float], step: int, /) -> None:
        """Hand over a line.

        Raises:
            EnvironmentUnmet: Trackio has failed.
        """
        self._tell({"step": step, "metrics": {_allowed(name): float(value) for name, value in metrics.items()}})

    def artifact(self, path: Path, /) -> None:
        """Nothing to do: the file lies in the run's directory already."""

    def finish(self, status: Literal["ok", "failed", "stopped"], /) -> None:
        """Wait until everything is in the database; a stage that failed keeps its curves. May be called twice.

        Raises:
            EnvironmentUnmet: Trackio could not write all of it.
        """
        del status
        if self._finished:
            return
        self._finished = True
        try:
            _close_input(self._writer)
            self._writer.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._end()
            raise EnvironmentUnmet(f"trackio did not finish within {_PATIENCE_S:.0f} s", where=_WHERE) from None
        problem = self._last_words() if self._writer.returncode else ""
        self._end()
        if problem:
            raise EnvironmentUnmet(problem, where=_WHERE)

    def _tell(self, message: Mapping[str, Any]) -> None:
        if self._finished:
            raise EnvironmentUnmet("it has ended already", where=_WHERE)
        assert self._writer.stdin is not None
        left = memoryview(f"{json.dumps(message)}\n".encode())
        deadline = time.monotonic() + _PATIENCE_S
        try:
            while left:
                _, ready, _ = select.select([], [self._writer.stdin], [], max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise self._failed(f"trackio took nothing for {_PATIENCE_S:.0f} s")
                left = left[os.write(self._writer.stdin.fileno(), left) :]
        except BrokenPipeError:
            self._writer.wait()
            raise self._failed(self._last_words()) from None

    def _failed(self, what: str) -> EnvironmentUnmet:
        self._finished = True
        self._end()
        return EnvironmentUnmet(what, where=_WHERE)

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return "".join(char if char.isprintable() else " " for char in lines[-1])[:400] if lines else "trackio ended"

    def _end(self) -> None:
        _close_input(self._writer)
        self._writer.kill()
        self._writer.wait()
        self._said.close()


def _start(directory: Path, said: int) -> subprocess.Popen[bytes]:
    # Variables of trackio could send metrics elsewhere.
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRACKIO_")}
    env |= {"TRACKIO_DIR": str(directory), "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "kdkit_trackio.writer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=said,
        cwd=directory,
        env=env,
        # Ctrl-C is for kdkit, which ends the stage in order and then this process.
        start_new_session=True,
    )
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    return process


def _close_input(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


def _allowed(name: str) -> str:
    """Trackio has names of its own, which it would change with a warning."""
    return f"metrics/{name}" if name in _RESERVED or name.startswith("__") else name


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The recipe as a table: dotted paths to single values; lists as JSON."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{path}.{key}" if path else str(key), item)
    elif isinstance(value, list | tuple):
        yield path, json.dumps(value, default=str)
    else:
        yield path, value if value is None or isinstance(value, bool | int | float | str) else str(value)
