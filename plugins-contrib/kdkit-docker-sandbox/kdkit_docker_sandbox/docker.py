"""The command line of docker: lists of arguments, never a shell."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kdkit.api import EnvironmentUnmet, SandboxLimits

__all__ = ["LABEL", "NOBODY", "Docker", "last_line"]

NOBODY: Final = 65534
"""User and group of every program."""
LABEL: Final = "kdkit-docker-sandbox"
_MIB: Final = 2**20
_BOX_MIB: Final = 16
_FILES: Final = 1024
_OWN_BYTES: Final = 64 * _MIB
"""Memory of the process that watches the program, beside the program's and its files'."""
_ANSWER_S: Final = 30.0
_WHERE: Final = "sandbox docker"


@dataclass(frozen=True, slots=True)
class Docker:
    """A docker that answers, and the image that programs run in.

    Attributes:
        program: Path of the command.
        image: As the recipe names it.
        image_id: Its content, which is what runs, whatever the name means later.
    """

    program: str
    image: str
    image_id: str

    @classmethod
    def find(cls, image: str) -> Docker:
        """Look for docker and the image; nothing is pulled.

        Raises:
            EnvironmentUnmet: Docker is not installed or does not answer, or has no such image; says what to do.
        """
        program = shutil.which("docker")
        if program is None:
            raise EnvironmentUnmet(
                "docker is not installed",
                where=_WHERE,
                hint="install Docker, or use the sandbox auto, which needs none",
            )
        _ask(
            [program, "version", "--format", "{{.Server.Version}}"],
            "the Docker daemon does not answer",
            "start it (systemctl start docker), and let this user use it (group docker)",
        )
        image_id = _ask(
            [program, "image", "inspect", "--format", "{{.Id}}", image],
            f"there is no image {image} on this machine",
            f"run: docker pull {image}",
        )
        return cls(program, image, image_id)

    def run(self, name: str, limits: SandboxLimits) -> list[str]:
        """The command that runs one program in the container ``name``; the job is its standard input."""
        memory = str(limits.memory_bytes + _BOX_MIB * _MIB + _OWN_BYTES)
        box = f"/box:rw,noexec,nosuid,nodev,size={_BOX_MIB}m,nr_inodes={_FILES},mode=1777"
        return [
            *(self.program, "run", "--rm", "--interactive", "--pull", "never", "--name", name, "--label", LABEL),
            *("--network", "none", "--ipc", "none", "--hostname", "box", "--user", f"{NOBODY}:{NOBODY}"),
            *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
            *("--read-only", "--tmpfs", box, "--workdir", "/box"),
            *("--memory", memory, "--memory-swap", memory, "--cpus", "1"),
            # One process more watches the program.
            *("--pids-limit", str(limits.processes + 1), "--ulimit", "core=0", "--ulimit", "nofile=256"),
            *("--log-driver", "none", "--no-healthcheck", "--entrypoint", "python3"),
            *(self.image_id, "-I", "-B", "-c", _INSIDE),
        ]

    def remove(self, name: str) -> None:
        """End a container and everything in it; one that is gone already is no error."""
        # What keeps docker from ending it keeps it from saying so, too; the container ends at its own wall limit.
        _quietly([self.program, "rm", "--force", name])


def _ask(command: Sequence[str], what: str, hint: str) -> str:
    """The answer's last line."""
    try:
        done = subprocess.run(  # noqa: S603 - a list of ours, and a name that has passed its pattern
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_ANSWER_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentUnmet(f"{what}: nothing within {_ANSWER_S:.0f} s", where=_WHERE, hint=hint) from None
    except OSError as error:
        raise EnvironmentUnmet(f"docker does not run: {error.strerror}", where=_WHERE, hint="install Docker") from error
    answer = last_line(done.stdout)
    if done.returncode or not answer:
        raise EnvironmentUnmet(f"{what}: {last_line(done.stderr) or 'it says nothing'}", where=_WHERE, hint=hint)
    return answer


def _quietly(command: Sequence[str]) -> None:
    try:
        subprocess.run(  # noqa: S603 - a list of ours
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_ANSWER_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return


def last_line(text: bytes) -> str:
    """The line that says what happened, as a terminal may show it: docker's own, which help follows, else the last."""
    lines = [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip()]
    said = next((line.removeprefix("docker: ") for line in lines if line.startswith("docker: ")), (lines or [""])[-1])
    return "".join(char if char.isprintable() else " " for char in said)[:300]


_INSIDE: Final = Path(__file__).with_name("inside.py").read_text(encoding="utf-8")
