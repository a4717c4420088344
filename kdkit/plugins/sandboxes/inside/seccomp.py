"""The system call filter, assembled here so that no library is needed.

Everything that is not listed fails with EPERM, so that calls of future kernels are closed, too; a few calls that only
an attack makes kill the process, which the verdict shows. ``clone3`` does not exist (its flags lie in memory, where a
filter cannot look): the C library falls back to ``clone``, whose flags decide whether it is a thread or a process.
"""

from __future__ import annotations

import errno
import functools
import os
import struct
from collections.abc import Iterable
from typing import Final

from .syscalls import ALLOWED, ARCHITECTURES, FATAL, FORKING, number

__all__ = ["assembled", "build"]

_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_AT_LEAST: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_ANY_BIT: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN: Final = 0x06

_ALLOW: Final = 0x7FFF_0000
_KILL: Final = 0x8000_0000
_ERRNO: Final = 0x0005_0000
_REFUSE: Final = _ERRNO | errno.EPERM
_ABSENT: Final = _ERRNO | errno.ENOSYS

_NUMBER: Final = 0
_ARCHITECTURE: Final = 4
_ARGUMENTS: Final = 16
_X32: Final = 0x4000_0000

_CLONE_THREAD: Final = 0x0001_0000
_CLONE_NEW: Final = 0x7E02_0080  # every CLONE_NEW* flag: namespaces
_AF_UNIX: Final = 1

# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ, F_GET_SEALS; not F_SETOWN and its kin,
# which direct signals, nor locks: the files that all programs read would carry a message from one to another.
_FCNTL: Final = (0, 1, 2, 3, 4, 1030, 1032, 1034)
# What terminals and pipes are asked: TCGETS for isatty, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX and FIOCLEX.
_IOCTL: Final = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# PR_SET_NAME, PR_GET_NAME, and PR_SET_VMA with which allocators name their memory
_PRCTL: Final = (15, 16, 0x53564D41)


# Stands for the process id in a filter that was assembled before there was one.
_SOMEBODY: Final = 0x5A17_C0DE


def build(*, forks: bool, executes: bool) -> bytes:
    """The filter for this process, as BPF instructions. See :func:`assembled`."""
    own, somebody = struct.pack("=I", os.getpid()), struct.pack("=I", _SOMEBODY)
    return assembled(forks=forks, executes=executes).replace(somebody, own)


@functools.cache
def assembled(*, forks: bool, executes: bool) -> bytes:
    """The filter for no process in particular. Assembling takes longer than all other confinement: it is done once.

    Args:
        forks: New processes are allowed, for compilers; otherwise only threads are.
        executes: Files may be executed.

    Raises:
        KeyError: The architecture is not in the table.
    """
    _, architecture = ARCHITECTURES[os.uname().machine]
    parts = [
        _step(_LOAD, _ARCHITECTURE),
        _unless(_EQUAL, architecture, _step(_RETURN, _KILL)),
        _step(_LOAD, _NUMBER),
        _when(_AT_LEAST, _X32, _step(_RETURN, _KILL)),
        *_all(ALLOWED, _ALLOW),
        *_all(FATAL, _KILL),
        *_all(["clone3"], _ABSENT),
        *_conditional(_SOMEBODY),
        *_processes(forks=forks),
        *(_all(["execve", "execveat"], _ALLOW) if executes else ()),
        _step(_RETURN, _REFUSE),
    ]
    return b"".join(parts)


def _conditional(own: int) -> Iterable[bytes]:
    """Calls whose arguments decide; ``own`` is the process as it sees itself."""
    yield _argument("fcntl", 1, _FCNTL)
    yield _argument("ioctl", 1, _IOCTL)
    yield _argument("prctl", 0, _PRCTL)
    yield _argument("prlimit64", 0, (0, own))
    yield _argument("socketpair", 0, (_AF_UNIX,))
    for name in ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"):
        yield _argument(name, 0, (own,))


def _processes(*, forks: bool) -> Iterable[bytes]:
    clone = _step(_LOAD, _ARGUMENTS) + _when(_ANY_BIT, _CLONE_NEW, _step(_RETURN, _REFUSE))
    if not forks:
        clone += _unless(_ANY_BIT, _CLONE_THREAD, _step(_RETURN, _REFUSE))
    yield _when(_EQUAL, _known("clone"), clone + _step(_RETURN, _ALLOW))
    if forks:
        yield from _all(FORKING, _ALLOW)


def _all(names: Iterable[str], action: int) -> Iterable[bytes]:
    for name in names:
        found = number(name)
        if found is not None:
            yield _when(_EQUAL, found, _step(_RETURN, action))


def _argument(name: str, index: int, values: Iterable[int]) -> bytes:
    """``name`` is allowed when its argument, taken as 32 bits with an empty upper half, is one of ``values``."""
    low = _ARGUMENTS + 8 * index
    body = _step(_LOAD, low + 4) + _unless(_EQUAL, 0, _step(_RETURN, _REFUSE)) + _step(_LOAD, low)
    for value in values:
        body += _when(_EQUAL, value, _step(_RETURN, _ALLOW))
    return _when(_EQUAL, _known(name), body + _step(_RETURN, _REFUSE))


def _known(name: str) -> int:
    found = number(name)
    if found is None:
        raise KeyError(name)
    return found


def _step(code: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, 0, 0, value)


def _when(code: int, value: int, body: bytes) -> bytes:
    """Run ``body`` when the comparison holds, else go on behind it."""
    return struct.pack("=HBBI", code, 0, len(body) // 8, value) + body


def _unless(code: int, value: int, body: bytes) -> bytes:
    """Run ``body`` when the comparison fails."""
    return struct.pack("=HBBI", code, len(body) // 8, 0, value) + body
