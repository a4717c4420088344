"""The system calls that Python has no function for, through ctypes."""

from __future__ import annotations

import ctypes
import os
from typing import Final

from .syscalls import number

__all__ = [
    "CLONE_NEWIPC",
    "CLONE_NEWNS",
    "CLONE_NEWPID",
    "call",
    "drop_capabilities",
    "mount",
    "no_new_privileges",
    "prctl",
    "set_filter",
]

CLONE_NEWNS: Final = 0x0002_0000
CLONE_NEWIPC: Final = 0x0800_0000
CLONE_NEWPID: Final = 0x2000_0000

_PR_SET_SECCOMP: Final = 22
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_MODE_FILTER: Final = 2
_CAPABILITY_VERSION_3: Final = 0x2008_0522
_LAST_CAPABILITY: Final = 63

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _checked(result: int, name: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def call(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """The system call ``name``; integers are passed as 64 bits, bytes as pointers.

    Raises:
        OSError: The kernel refused it, or this architecture has no such call.
    """
    found = number(name)
    if found is None:
        raise OSError(38, f"{name} does not exist here")
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(_libc.syscall(ctypes.c_long(found), *wide), name)


def prctl(option: int, *arguments: int) -> int:
    """Raise ``OSError`` when the kernel refuses."""
    padded = [*arguments, 0, 0, 0, 0][:4]
    return _checked(_libc.prctl(option, *(ctypes.c_ulong(value) for value in padded)), f"prctl({option})")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """Raise ``OSError`` when the kernel refuses."""
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    result = _libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])
    _checked(result, f"mount {target}")


def no_new_privileges() -> None:
    """From here on no set-uid file gives this process anything."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """Give up every capability, also for programs executed later."""
    for capability in range(_LAST_CAPABILITY + 1):
        # Fails for capabilities that this kernel does not know, and where CAP_SETPCAP is already gone.
        if _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0:
            break
    header = ctypes.create_string_buffer(_CAPABILITY_VERSION_3.to_bytes(4, "little") + bytes(4), 8)
    call("capset", header, bytes(24))


def set_filter(program: bytes) -> None:
    """Install a seccomp filter made of 8-byte BPF instructions. Raises ``OSError``."""
    buffer = ctypes.create_string_buffer(program, len(program))
    block = _Program(len(program) // 8, ctypes.addressof(buffer))
    prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(block))
