"""The probe: all canaries, and what to do when one dies. Success is remembered until the next boot."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Final

from kdkit.api.errors import EnvironmentUnmet
from kdkit.api.sandboxes import SandboxCanary, SandboxReport
from kdkit.plugins.sandboxes.canaries import LIMITS, run_canaries
from kdkit.plugins.sandboxes.jails import Jail, find_bwrap
from kdkit.plugins.sandboxes.session import Session

__all__ = ["probe", "remembered"]

_CONTAINER: Final = "in a container use the sandbox landlock, or start it with a seccomp profile that allows namespaces"
_APPARMOR: Final = (
    "allow user namespaces for bwrap in AppArmor, or sysctl kernel.apparmor_restrict_unprivileged_userns=0"
)
_LANDLOCK: Final = "Linux 6.2 or later with landlock among the security modules (kernel parameter lsm=)"
_PYTHON: Final = "use a Python that every user may read, or run as an ordinary user"
# What the tools say when they fail, in the order in which it is looked for.
_HINTS: Final = (
    ("interpreter", _PYTHON),
    ("uid map", _APPARMOR),
    ("RTM_NEWADDR", _APPARMOR),
    ("amespace", _CONTAINER),
    ("unshare", _CONTAINER),
    ("mount", _CONTAINER),
    ("Landlock", _LANDLOCK),
    ("landlock", _LANDLOCK),
)


def probe(jail: Jail, workers: int) -> SandboxReport:
    """Open a session as a stage would and run every canary in it; a success is remembered."""
    path = _path(jail)
    path.unlink(missing_ok=True)
    try:
        jail.check()
        session = Session(jail, LIMITS, workers)
    except EnvironmentUnmet as error:
        return SandboxReport(usable=False, reason=error.what, hint=error.hint or _hint(error.what))
    try:
        canaries = run_canaries(session)
    finally:
        session.close()
    dead = next((canary for canary in canaries if not canary.passed), None)
    if dead is not None:
        reason = f"canary {dead.name!r} failed: {dead.found or 'no detail'}"
        return SandboxReport(usable=False, reason=reason, hint=_hint(dead.found), canaries=canaries)
    _remember(path, canaries)
    return SandboxReport(usable=True, isolates=jail.isolates, canaries=canaries)


def _hint(text: str) -> str:
    return next((hint for words, hint in _HINTS if words in text), "kdkit sandbox check shows every canary")


def remembered(jail: Jail) -> SandboxReport | None:
    """The success of an earlier probe since the machine started, in the same surroundings; None when there is none."""
    try:
        data = json.loads(_path(jail).read_text(encoding="utf-8"))
        canaries = tuple(SandboxCanary(**canary) for canary in data["canaries"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if not canaries or not all(canary.passed for canary in canaries):
        return None
    return SandboxReport(usable=True, isolates=jail.isolates, canaries=canaries)


def _remember(path: Path, canaries: tuple[SandboxCanary, ...]) -> None:
    # A cache that cannot be written costs two seconds at the next start, no more.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"canaries": [asdict(canary) for canary in canaries]}), encoding="utf-8")
        temporary.replace(path)


def _path(jail: Jail) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "kdkit" / "sandbox" / f"{jail.name}-{_surroundings()}.json"


def _surroundings() -> str:
    """What decides whether the canaries live: boot, kernel, container, user, interpreter, tool, this code."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    facts = [
        _text("/proc/sys/kernel/random/boot_id"),
        platform.release(),
        code.hexdigest(),
        sys.base_prefix,
        sys.version,
    ]
    facts += [str(os.geteuid())]
    for namespace in ("user", "mnt", "pid", "net"):
        with contextlib.suppress(OSError):
            facts.append(str(Path(f"/proc/self/ns/{namespace}").readlink()))
    facts += [line for line in _text("/proc/self/status").splitlines() if line.startswith(("Cap", "Seccomp:", "NoNew"))]
    if (bwrap := find_bwrap()) is not None:
        facts += [str(bwrap), str(bwrap.stat().st_mtime_ns)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
