"""Starts a fork server: the step between the judge, who may be root, and a process that is not.

It is a program of its own because the judge is large and has threads, where forking is slow and unsafe.
"""

from __future__ import annotations

import json
import os

from . import linux

__all__ = ["main"]

_MS_RDONLY = 1
_MS_REMOUNT = 32
_MS_BIND = 4096
_MS_REC = 16384
_MS_PRIVATE = 1 << 18


def main(text: str) -> None:
    """Become ``argv`` as user ``uid``, with ``environment`` and nothing else of the judge's.

    ``bind`` (source, target) makes a directory that only root can reach visible elsewhere, for this process tree only.

    Raises:
        OSError: A step was refused; nothing is started then.
    """
    plan = json.loads(text)
    os.chdir("/")
    os.umask(0o077)
    if plan["bind"]:
        try:
            _bind(*plan["bind"])
        except OSError as error:
            what = f"only root can reach the interpreter in {plan['bind'][0]}, and mounting is not allowed here"
            raise PermissionError(error.errno, f"{what} ({error})") from error
    if plan["uid"] is not None:
        uid = int(plan["uid"])
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        if os.getresuid() != (uid, uid, uid) or os.getgroups():
            raise PermissionError(1, "root's rights could not be given up")
    if plan["sealed"]:
        linux.no_new_privileges()
    os.execve(plan["argv"][0], plan["argv"], plan["environment"])


def _bind(source: str, target: str) -> None:
    linux.call("unshare", linux.CLONE_NEWNS)
    linux.mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    linux.mount(source, target, None, _MS_BIND | _MS_REC)
    linux.mount("none", target, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY)
