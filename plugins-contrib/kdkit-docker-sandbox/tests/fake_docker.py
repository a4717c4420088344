"""A stand-in for docker: a program of that name on the path, which notes what it is asked and does what a test says.

It isolates nothing: only harmless programs may be run with it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["HERE", "FakeDocker", "install"]

SERVER = "print('27.3.1')"
IMAGE = "print('sha256:5f3a')"
HERE = """
import tempfile
with tempfile.TemporaryDirectory() as box:
    code = subprocess.run([sys.executable, *argv[argv.index('-I'):]], cwd=box, env={}).returncode
sys.exit(code if code >= 0 else 128 - code)
"""
"""`docker run` that runs the command right here instead of in a container."""
_PROGRAM = """#!{python}
import json, os, subprocess, sys, time
argv = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(argv) + "\\n")
behaviour = json.load(open({behaviour!r}))
exec(behaviour[argv[0]])
"""


@dataclass(frozen=True)
class FakeDocker:
    """What it does, and what it was asked."""

    directory: Path

    @property
    def program(self) -> str:
        return str(self.directory / "docker")

    def does(self, **behaviour: str) -> None:
        """Python for each of docker's commands."""
        told = {"version": SERVER, "image": IMAGE, "run": HERE, "rm": "", **behaviour}
        (self.directory / "behaviour.json").write_text(json.dumps(told))

    def asked(self, command: str) -> list[list[str]]:
        """The arguments of every call of a command."""
        log = self.directory / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return [argv for argv in map(json.loads, lines) if argv[0] == command]


def install(directory: Path) -> FakeDocker:
    """A docker that works, in a directory where nothing else is."""
    directory.mkdir()
    program = directory / "docker"
    texts = {"log": str(directory / "log.jsonl"), "behaviour": str(directory / "behaviour.json")}
    program.write_text(_PROGRAM.format(python=sys.executable, **texts))
    program.chmod(0o755)
    fake = FakeDocker(directory)
    fake.does()
    return fake
