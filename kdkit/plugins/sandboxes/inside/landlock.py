"""Landlock: file access by path for this process and all it starts, without any privilege (Linux >= 6.2).

Earlier versions (Linux 5.13) cannot keep a program from truncating what its user may write, so that they do not count.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterable
from typing import Final

from .linux import call

__all__ = ["EXECUTE", "READ", "WRITE", "abi", "restrict"]

_VERSION_FLAG: Final = 1
_PATH_BENEATH: Final = 1

_EXECUTE: Final = 1 << 0
_WRITE_FILE: Final = 1 << 1
_READ_FILE: Final = 1 << 2
_READ_DIR: Final = 1 << 3
_TRUNCATE: Final = 1 << 14
_IOCTL_DEV: Final = 1 << 15
_FOR_FILES: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV

# What each version of the interface added to the rights over files.
_FILE_RIGHTS: Final = {1: (1 << 13) - 1, 2: 1 << 13, 3: _TRUNCATE, 5: _IOCTL_DEV}
_NEEDED: Final = 3
_NETWORK_SINCE: Final = 4
_SCOPES_SINCE: Final = 6
_NETWORK: Final = 0b11  # bind and connect over TCP
_SCOPES: Final = 0b11  # abstract UNIX sockets and signals to processes outside

READ: Final = _READ_FILE | _READ_DIR
EXECUTE: Final = READ | _EXECUTE
WRITE: Final = READ | ((1 << 15) - 1) & ~_EXECUTE


def abi() -> int:
    """The version of Landlock that this kernel speaks; 0 when there is none."""
    try:
        return call("landlock_create_ruleset", None, 0, _VERSION_FLAG)
    except OSError as error:
        if error.errno in {errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}:
            return 0
        raise


def restrict(rules: Iterable[tuple[str, int]]) -> None:
    """Deny this process, for good, every file access but ``rules`` (path, rights), TCP, and signals to others.

    Paths that do not exist are left out. ``no_new_privs`` must be set.

    Raises:
        OSError: The kernel has no Landlock, or refused.
    """
    version = abi()
    if version < _NEEDED:
        raise OSError(errno.ENOSYS, f"this kernel has no Landlock of version {_NEEDED}, or it is switched off")
    handled = sum(rights for since, rights in _FILE_RIGHTS.items() if version >= since)
    fields = [handled]
    if version >= _NETWORK_SINCE:
        fields.append(_NETWORK)
    if version >= _SCOPES_SINCE:
        fields.append(_SCOPES)
    attributes = ctypes.create_string_buffer(struct.pack(f"={len(fields)}Q", *fields), 8 * len(fields))
    ruleset = call("landlock_create_ruleset", attributes, len(attributes), 0)
    try:
        for path, rights in rules:
            _allow(ruleset, path, rights & handled)
        call("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            rights &= _FOR_FILES
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, place), 12)
        call("landlock_add_rule", ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(place)
