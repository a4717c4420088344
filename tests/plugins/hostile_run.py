"""Runs the hostile programs in one sandbox and prints, as JSON, everything that went otherwise than it should.

Usage: python hostile_run.py SANDBOX (python | cpp). Needs kdkit on the path; tests start it as root and as a user.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Literal

from kdkit.plugins.sandboxes.places import private_user
from kdkit.plugins.sandboxes.providers import bubblewrap, landlock
from kdkit.testing.programs import HONEST, LIMITS, hostile_host, hostile_programs, wrong

PROVIDERS = {"bubblewrap": bubblewrap, "landlock": landlock}


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


def main(provider: str, language: Literal["python", "cpp"]) -> list[str]:
    problems: list[str] = []
    programs, honest = hostile_programs(language), HONEST[language]
    # An earlier test of this user may have left nothing either.
    before = leftovers()
    with hostile_host() as world:
        session = PROVIDERS[provider](2).open(LIMITS)
        try:
            outcomes = session.run([job for program in programs for job in (world.job(program), honest)])
            for program, outcome, after in zip(programs, outcomes[::2], outcomes[1::2], strict=True):
                problems += wrong(program, outcome)
                if (after.status, after.stdout) != ("ok", "42\n"):
                    problems.append(
                        f"after {program.name}: {after.status} {after.stdout!r} {after.reason} {after.stderr!r}"
                    )
        finally:
            session.close()
        problems += world.harm()
    # What was killed takes a moment to be gone, on a busy machine a long one.
    deadline = time.monotonic() + 10
    while (left := leftovers() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    problems += [f"process left: {line}" for line in left]
    return problems


if __name__ == "__main__":
    print(json.dumps({"uid": os.getuid(), "problems": main(sys.argv[1], sys.argv[2])}))
