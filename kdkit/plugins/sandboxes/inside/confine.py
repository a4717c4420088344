"""Takes everything away from the process that is about to become the program, in an order that leaves no gap."""

from __future__ import annotations

import math
import os
import resource

from . import landlock, linux, seccomp
from .task import Config, Task

__all__ = ["confine", "fresh_box"]

_SLACK = 64 * 2**20  # address space of the interpreter or C library itself
_FILES = {"python": 64, "binary": 64, "compile": 256}
_BOX_INODES = 1000
_PR_SET_PDEATHSIG = 1
_SIGKILL = 9
_DEVICES = (("/dev/null", landlock.READ | landlock.WRITE), ("/dev/zero", landlock.READ))
_RANDOM = (("/dev/urandom", landlock.READ), ("/dev/random", landlock.READ))
_NOSUID_NODEV_NOEXEC = 2 | 4 | 8


def fresh_box(config: Config, task: Task) -> None:
    """Mount an empty, bounded file system over the box, in namespaces that only this program will see.

    Raises:
        OSError: The kernel refused.
    """
    linux.call("unshare", linux.CLONE_NEWNS | linux.CLONE_NEWIPC)
    options = f"size={task.file_bytes},nr_inodes={_BOX_INODES},mode=0700"
    linux.mount("box", config.box, "tmpfs", _NOSUID_NODEV_NOEXEC, options)


def confine(config: Config, task: Task) -> None:
    """Limits, then privileges, then files, then system calls.

    Raises:
        OSError: Something was refused; the program must not start.
    """
    if not config.namespaces:
        # The namespace dies with its first process; here the fork server's end has to be noticed otherwise. The filter
        # below keeps the program from taking this back.
        linux.prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    _limit(config, task)
    linux.no_new_privileges()
    linux.drop_capabilities()
    if not config.namespaces:
        landlock.restrict(_rules(config, task))
    linux.set_filter(seccomp.build(forks=task.kind == "compile", executes=task.kind != "python"))


def _limit(config: Config, task: Task) -> None:
    cpu = max(1, math.ceil(task.cpu_s))
    _at_most(resource.RLIMIT_CPU, cpu, cpu + 1)
    _at_most(resource.RLIMIT_AS, task.memory_bytes + _SLACK)
    # One byte more than is allowed: a full file is then told from one that was to become larger.
    _at_most(resource.RLIMIT_FSIZE, (task.file_bytes if task.kind == "compile" else task.output_bytes) + 1)
    _at_most(resource.RLIMIT_NOFILE, _FILES[task.kind])
    _at_most(resource.RLIMIT_NPROC, config.processes + task.processes)
    _at_most(resource.RLIMIT_STACK, task.stack_bytes)
    _at_most(resource.RLIMIT_MEMLOCK, 0)
    _at_most(resource.RLIMIT_MSGQUEUE, 0)
    # 1 and not 0: with a crash handler behind a pipe, only 1 keeps the kernel from starting it.
    _at_most(resource.RLIMIT_CORE, 1)


def _at_most(which: int, soft: int, hard: int | None = None) -> None:
    """Lower a limit for good; a limit that is lower already stays."""
    _, ceiling = resource.getrlimit(which)
    bounds = (soft, soft if hard is None else hard)
    if ceiling != resource.RLIM_INFINITY:
        bounds = (min(bounds[0], ceiling), min(bounds[1], ceiling))
    resource.setrlimit(which, bounds)


def _rules(config: Config, task: Task) -> list[tuple[str, int]]:
    rules = [(path, landlock.READ) for path in (*config.readable, config.box)]
    rules += [*_DEVICES, *_RANDOM]
    if task.kind != "python":
        rules += [(path, landlock.EXECUTE) for path in config.executable]
    if task.kind == "compile":
        # A file system of its own bounds what namespaces let it write. Here only a compiler may, which the program's
        # text cannot make write anything but its output.
        rules += [(config.box, landlock.WRITE), ("/usr", landlock.EXECUTE), ("/etc/alternatives", landlock.READ)]
    return [(path, rights) for path, rights in rules if os.path.exists(path)]
