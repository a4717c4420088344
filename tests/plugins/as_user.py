"""Starts a Python program as an ordinary user, from root. Usage: python as_user.py DIRECTORY PROGRAM ARGUMENT...

The interpreter, this checkout and the installed packages may lie where only root can reach them: in a mount namespace
of its own the new process finds them below DIRECTORY.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pydantic

from kdkit.plugins.sandboxes.inside import linux
from kdkit.plugins.sandboxes.places import interpreter

UID = 61_000 + os.getpid() % 1_000
"""Of this run alone: another one at the same time may leave processes of its own."""
ROOT = Path(__file__).parents[2]


def main(directory: Path, arguments: list[str]) -> None:
    python = interpreter()
    binds = {"python": python.prefix, "checkout": ROOT, "packages": Path(pydantic.__file__).parents[1]}
    for name in binds:
        (directory / name).mkdir()
    for name in ("home", "cache"):
        (directory / name).mkdir()
        os.chown(directory / name, UID, UID)
    linux.call("unshare", linux.CLONE_NEWNS)
    linux.mount("none", "/", None, (1 << 18) | 16384)  # MS_PRIVATE | MS_REC
    for name, source in binds.items():
        linux.mount(str(source), str(directory / name), None, 4096 | 16384)  # MS_BIND | MS_REC
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)
    os.chdir(directory / "home")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(directory / "home"),
        "XDG_CACHE_HOME": str(directory / "cache"),
        "PYTHONPATH": f"{directory}/checkout:{directory}/packages",
        "LD_LIBRARY_PATH": f"{directory}/python/lib",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    program = str(directory / "checkout" / Path(arguments[0]).resolve().relative_to(ROOT))
    executable = str(directory / "python" / python.executable)
    os.execve(executable, [executable, program, *arguments[1:]], environment)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
