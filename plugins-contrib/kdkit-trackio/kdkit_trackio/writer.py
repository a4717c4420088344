"""The side of trackio: a process that reads lines of JSON and logs them. Ends when its input does.

The first line says which run it is, every other one is ``{"step": ..., "metrics": {...}}``. Exit code 1 and a last line
on standard error say that something is missing in the database.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

__all__ = ["main"]


def main() -> int:
    """Log everything that comes."""
    import trackio

    problems = _listen(Path(trackio.__file__).parent)
    messages = _messages(sys.stdin)
    first = next(messages, None)
    if first is None:
        return 0
    trackio.init(**first, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)
    for message in messages:
        trackio.log(message["metrics"], step=message["step"])
    trackio.finish()
    if problems:
        print(problems[0], file=sys.stderr)
    return int(bool(problems))


def _messages(lines: TextIO) -> Iterator[dict[str, Any]]:
    """Whole lines only: one without its end was cut off when the stage was killed."""
    for line in lines:
        if line.endswith("\n"):
            yield json.loads(line)


def _listen(package: Path) -> list[str]:
    """What trackio warns of from now on. It raises nothing when it loses a line, and warns in its own thread."""
    problems: list[str] = []

    def note(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        del category, lineno, file, line
        if Path(filename).is_relative_to(package):
            problems.append(" ".join(str(message).split()))

    warnings.simplefilter("always")
    warnings.showwarning = note
    return problems


if __name__ == "__main__":
    sys.exit(main())
