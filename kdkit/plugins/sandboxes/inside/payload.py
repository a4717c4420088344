"""The confined process becomes the program. What happens here can be seen and changed by the program: nothing that
decides a verdict is done in this process.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import random
import signal
import sys
import threading
from importlib.abc import InspectLoader
from types import CodeType, ModuleType

from .confine import confine
from .task import Config, Task, read_all

__all__ = ["NO_COMPILE", "NO_EXECUTE", "READY", "SCRIPT", "become"]

READY, NO_COMPILE, NO_EXECUTE = b"R", b"C", b"X"
SCRIPT = "main.py"
_STATUS = 3
_EXTRA = 4
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1"}


class _Program(InspectLoader):
    """Source text as the module ``__main__``."""

    def __init__(self, source: str, path: str) -> None:
        self._source = source
        self._code = InspectLoader.source_to_code(source, path)

    def get_source(self, fullname: str) -> str:  # noqa: ARG002 - the interface has it
        return self._source

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002 - the interface has it
        return self._code


def become(config: Config, task: Task, descriptors: list[int], status: int) -> None:
    """Turn this process into the program; never returns.

    ``status`` gets one byte when the confinement is complete and one more when the program could not start; it is
    closed before any of the program's code runs. Whatever fails before the first byte is the sandbox's failure.
    """
    ready = False
    try:
        job = _arrange(descriptors, status, config.box)
        confine(config, task)
        os.write(_STATUS, READY)
        ready = True
        if task.kind == "python":
            _interpret(job["program"], config.box)
        _execute(task, job, config.box)
    finally:
        if not ready:
            sys.__excepthook__(*sys.exc_info())
            sys.stderr.flush()
        os._exit(125)


def _arrange(descriptors: list[int], status: int, box: str) -> dict[str, object]:
    """Descriptors 0 to 2 are the program's streams, 3 the status, 4 what is to be executed; no other is left."""
    os.setsid()
    job = json.loads(read_all(descriptors[3]))
    kept = [*descriptors[:3], status, *descriptors[4:5]]
    # Moved out of the way first, so that none is overwritten before it is copied.
    high = [os.dup2(descriptor, 100 + place) for place, descriptor in enumerate(kept)]
    for place, descriptor in enumerate(high):
        os.dup2(descriptor, place, inheritable=place < _STATUS)
    os.closerange(len(kept), 4096)
    os.chdir(box)
    files = dict(job["files"])
    if "program" in job:
        files[SCRIPT] = job["program"]  # for tracebacks, which quote it
    for name, text in files.items():
        with open(name, "x", encoding="utf-8", errors="surrogatepass", newline="") as file:
            file.write(text)
    return dict(job)


def _interpret(source: object, box: str) -> None:
    path = f"{box}/{SCRIPT}"
    program = None
    try:
        program = _Program(str(source), path)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        os.write(_STATUS, NO_COMPILE)
        os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="backslashreplace"))
        os._exit(1)
    os.close(_STATUS)
    _new_streams()
    module = ModuleType("__main__")
    module.__spec__ = None
    module.__dict__.update(__file__=path, __builtins__=__builtins__)
    sys.modules["__main__"] = module
    sys.argv = [SCRIPT]
    sys.path.insert(0, box)
    random.seed(0)
    gc.enable()
    _run(program, module)


def _new_streams() -> None:
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]


def _run(program: _Program, module: ModuleType) -> None:
    """Run it and end as the interpreter would, without the time that taking the interpreter down costs."""
    code = 1
    try:
        program.exec_module(module)
        code = 0
    except SystemExit as stop:
        code = _exit_code(stop)
    finally:
        kind, error, trace = sys.exc_info()
        if kind is not None and error is not None:
            while trace is not None and trace.tb_frame.f_code.co_filename != module.__file__:
                trace = trace.tb_next
            sys.excepthook(kind, error.with_traceback(trace), trace)
        os._exit(_finish(code))


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code & 0xFF
    print(stop.code, file=sys.stderr)
    return 1


def _finish(code: int) -> int:
    threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001 - as the interpreter does at its end
    atexit._run_exitfuncs()  # noqa: SLF001
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
    except (OSError, ValueError, AttributeError):
        return code or 120
    return code


def _execute(task: Task, job: dict[str, object], box: str) -> None:
    # The interpreter ignores these, which a program executed from it would inherit.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        if task.kind == "compile":
            arguments = [str(argument) for argument in job["arguments"]]  # type: ignore[attr-defined]
            os.execve(arguments[0], arguments, {**_ENVIRONMENT, "TMPDIR": box})
        os.execve(_EXTRA, ["main"], _ENVIRONMENT)
    except OSError as error:
        os.write(_STATUS, NO_EXECUTE)
        os.write(2, f"cannot execute: {error.strerror}\n".encode())
