"""Runs the hostile programs in one sandbox and prints, as JSON, everything that went otherwise than it should.

Usage: python hostile_run.py SANDBOX (python | cpp). Needs kdkit on the path; tests start it as root and as a user.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kdkit.api import SandboxJob, SandboxLimits, SandboxOutcome
from kdkit.plugins.sandboxes.places import private_user
from kdkit.plugins.sandboxes.providers import bubblewrap, landlock

sys.path.insert(0, str(Path(__file__).parent))
from hostile_programs import CPP, EXACT, HEAD, PYTHON, Hostile

# Two programs sleep; all others end by themselves or by the CPU limit, also on a busy machine.
LIMITS = SandboxLimits(wall_s=8.0, cpu_s=1.0, memory_bytes=128 * 2**20, output_bytes=2**18, processes=8)
PROVIDERS = {"bubblewrap": bubblewrap, "landlock": landlock}
TOKEN = "canary5f3a"
HONEST = {
    "python": ("a, b = map(int, input().split())\nprint(a + b)", "python"),
    "cpp": (
        "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }",
        "cpp",
    ),
}
PLACES = ("/", "/tmp", "/var/tmp", "/dev/shm", "/usr/lib", "/etc", str(Path.home()), str(Path.cwd()))


class Host:
    """What hostile programs may want, and whether they got it."""

    def __init__(self, directory: Path) -> None:
        directory.chmod(0o755)
        self.directory = directory
        self.secret = directory / "secret"
        self.secret.write_text(TOKEN)
        self.secret.chmod(0o644)
        (directory / "expected-output").write_text(TOKEN)
        self.private = directory / "private"
        self.private.write_text(TOKEN)
        self.private.chmod(0o600)
        self.outside = directory / "outside"
        self.outside.mkdir()
        self.outside.chmod(0o777)
        self.victim = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        self.servers = []
        for family, address in (
            (socket.AF_INET, ("127.0.0.1", 0)),
            (socket.AF_UNIX, str(directory / "socket")),
            (socket.AF_UNIX, f"\0kdkit-{os.getpid()}"),
        ):
            server = socket.socket(family)
            server.bind(address)
            server.listen(8)
            server.settimeout(0)
            self.servers.append(server)
        (directory / "socket").chmod(0o777)

    def given(self) -> str:
        return json.dumps(
            {
                "secret": str(self.secret),
                "private": str(self.private),
                "judge": os.getpid(),
                "victim": self.victim.pid,
                "port": self.servers[0].getsockname()[1],
                "unix": str(self.directory / "socket"),
                "abstract": f"kdkit-{os.getpid()}",
                "outside": str(self.outside),
                "token": TOKEN,
            }
        )

    def filled(self, source: str) -> str:
        return source.replace("@SECRET@", str(self.secret)).replace("@PRIVATE@", str(self.private))

    def harm(self) -> Iterator[str]:
        if self.victim.poll() is not None:
            yield "the victim is dead"
        for server in self.servers:
            try:
                server.accept()
                yield f"a connection to {server.getsockname()!r}"
            except OSError:
                pass
        for path in (self.secret, self.private):
            if path.read_text() != TOKEN:
                yield f"{path.name} was changed"
        if list(self.outside.iterdir()):
            yield "something was written outside"
        for place in PLACES:
            if Path(place, "kdkit-hostile").exists():
                yield f"something was written to {place}"

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        for server in self.servers:
            server.close()


@contextmanager
def host() -> Iterator[Host]:
    with tempfile.TemporaryDirectory(prefix="kdkit-hostile-", dir="/tmp") as name, ExitStack() as stack:
        found = Host(Path(name))
        stack.callback(found.close)
        yield found


def wrong(program: Hostile, outcome: SandboxOutcome) -> Iterator[str]:
    said = outcome.stdout + outcome.stderr
    if outcome.status != program.status:
        yield f"{program.name}: {outcome.status} instead of {program.status}: {outcome.reason or said[-300:]!r}"
    if "PWNED" in outcome.stdout or TOKEN in said:
        yield f"{program.name}: {said[-300:]!r}"
    if program.name in EXACT and EXACT[program.name] != (outcome.exit_code, outcome.signal):
        yield f"{program.name}: exit code {outcome.exit_code}, signal {outcome.signal}"


def leftovers() -> set[str]:
    """Processes of this run's sandboxes: as root those of their private users, else by the fork server's command line,
    which its children share.
    """
    users = {os.getuid()} if os.getuid() else {0, *(private_user(slot) for slot in range(2))}
    found = set()
    for path in Path("/proc").iterdir():
        try:
            uid = path.stat().st_uid
            if path.name.isdigit() and int(path.name) != os.getpid() and uid in users:
                line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if (
                    (uid and not os.getuid())
                    or (uid and "inside.zygote" in line)
                    or f"kdkit-sandbox-{os.getpid()}-" in line
                ):
                    found.add(f"{path.name}: {line[:200]}")
        except OSError:
            continue
    return found


def main(provider: str, language: str) -> list[str]:
    problems: list[str] = []
    os.environ["KDKIT_TEST_SECRET"] = TOKEN
    programs = PYTHON if language == "python" else CPP
    source, kind = HONEST[language]
    honest = SandboxJob(program=source, language=kind, stdin="20 22")
    # An earlier test of this user may have left nothing either.
    before = leftovers()
    with host() as world:
        session = PROVIDERS[provider](2).open(LIMITS)
        try:
            jobs = []
            for program in programs:
                given = world.given() if program.source.startswith(HEAD) else ""
                jobs += [
                    SandboxJob(program=world.filled(program.source), language=kind, stdin=given),
                    honest,
                ]
            outcomes = session.run(jobs)
            for program, outcome, after in zip(programs, outcomes[::2], outcomes[1::2], strict=True):
                problems += wrong(program, outcome)
                if (after.status, after.stdout) != ("ok", "42\n"):
                    problems.append(
                        f"after {program.name}: {after.status} {after.stdout!r} {after.reason} {after.stderr!r}"
                    )
        finally:
            session.close()
        problems += world.harm()
    problems += [f"process left: {line}" for line in leftovers() - before]
    return problems


if __name__ == "__main__":
    print(json.dumps({"uid": os.getuid(), "problems": main(sys.argv[1], sys.argv[2])}))
