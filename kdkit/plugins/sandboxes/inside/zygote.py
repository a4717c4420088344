"""The fork server: an interpreter that has done its imports, and forks once for every program.

It never reads what it runs (see ``task``), so that no program finds anything of an earlier one in its memory. It ends
when the judge closes the connection or dies; with namespaces everything below it ends with it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
from typing import Final

from . import linux, seccomp
from .confine import fresh_box
from .supervise import copy_output, run
from .task import MESSAGE_BYTES, Config, Reply, Task

__all__ = ["main"]

HELLO: Final = b"ready"
_DESCRIPTORS: Final = 5
_PR_SET_CHILD_SUBREAPER: Final = 36
# What programs for contests import: loading it once here is most of the speed of a fork server.
_IMPORTS: Final = """
abc array ast bisect calendar cmath collections collections.abc contextlib copy csv ctypes dataclasses datetime
decimal enum fractions functools hashlib heapq inspect io itertools json locale math numbers operator pathlib
platform pprint queue random re resource select shutil signal socket statistics string struct tempfile textwrap
threading time timeit traceback types typing unicodedata uuid warnings weakref zlib
"""


def main(text: str, own_path: str) -> None:
    """Serve until the judge is gone.

    Args:
        text: The configuration as JSON.
        own_path: Directory this package was imported from; programs shall not find it on their path.
    """
    config = Config(**json.loads(text))
    sys.path.remove(own_path)
    sys.dont_write_bytecode = True
    for name in _IMPORTS.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    _builtins()
    seccomp.assembled(forks=False, executes=False)
    seccomp.assembled(forks=False, executes=True)
    linux.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    gc.disable()
    gc.freeze()
    control = socket.socket(fileno=config.control)
    control.send(HELLO)
    own = os.pidfd_open(os.getpid())
    while _serve(config, control, own):
        pass


def _builtins() -> None:
    """``exit`` and ``quit``: the rest of the module site, which adds paths of this machine, is not wanted."""
    import site

    site.setquit()


def _serve(config: Config, control: socket.socket, own: int) -> bool:
    """One program; False when there is no judge any more."""
    # Children of the judge may hold copies of its end of the socket, so that its death does not always close it.
    poll = select.poll()
    poll.register(config.control, select.POLLIN)
    poll.register(config.parent, select.POLLIN)
    if config.parent in [descriptor for descriptor, _ in poll.poll()]:
        return False
    try:
        message, descriptors, _, _ = socket.recv_fds(control, MESSAGE_BYTES, _DESCRIPTORS)
    except ConnectionError:
        return False
    if not message:
        return False
    task = Task(**json.loads(message))
    try:
        reply = (
            _in_namespaces(config, task, descriptors, own) if config.namespaces else _here(config, task, descriptors)
        )
    except OSError as error:
        reply = Reply(state="failed", reason=str(error))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    if reply is None:
        return False
    try:
        control.send(reply.to_json())
    except ConnectionError:
        return False
    return True


def _here(config: Config, task: Task, descriptors: list[int]) -> Reply | None:
    reply = run(config, task, descriptors)
    if task.kind == "compile":
        copy_output(config.box, descriptors[4], task.file_bytes)
    for name in os.listdir(config.box):
        path = f"{config.box}/{name}"
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    return reply


def _in_namespaces(config: Config, task: Task, descriptors: list[int], own: int) -> Reply | None:
    """A first process per program is the init of its PID namespace: when it ends, the kernel ends all the others."""
    readable, writable = os.pipe()
    linux.call("unshare", linux.CLONE_NEWPID)
    try:
        pid = os.fork()
        if pid == 0:
            _init(config, task, descriptors, writable)
    finally:
        # Later children shall not be born into the namespace whose init is about to end.
        linux.call("setns", own, linux.CLONE_NEWPID)
    os.close(writable)
    with open(readable, "rb") as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    if not text:
        return Reply(state="failed", reason="the first process of the namespace was killed")
    found = json.loads(text)
    return Reply(**found) if found else None


def _init(config: Config, task: Task, descriptors: list[int], writable: int) -> None:
    """The first process of a PID namespace; never returns."""
    reply: Reply | None = Reply(state="failed", reason="the namespace could not be set up")
    try:
        fresh_box(config, task)
        reply = run(config, task, descriptors)
        if task.kind == "compile":
            copy_output(config.box, descriptors[4], task.file_bytes)
    except OSError as error:
        reply = Reply(state="failed", reason=str(error))
    finally:
        os.write(writable, reply.to_json() if reply is not None else b"{}")
        os._exit(0)
