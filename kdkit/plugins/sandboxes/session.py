"""A warm session: some fork servers, and the jobs dealt out to them."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final

from kdkit.api.errors import EnvironmentUnmet, StageError
from kdkit.api.sandboxes import SandboxJob, SandboxLimits, SandboxOutcome
from kdkit.plugins.sandboxes import verdicts
from kdkit.plugins.sandboxes.compiler import COMPILE, Binary, BinaryCache, command, executable_file, find_compiler
from kdkit.plugins.sandboxes.inside.payload import SCRIPT
from kdkit.plugins.sandboxes.inside.task import Reply, Task, read_all
from kdkit.plugins.sandboxes.jails import Jail
from kdkit.plugins.sandboxes.places import SessionDir
from kdkit.plugins.sandboxes.worker import Worker, WorkerFailed

__all__ = ["Session", "default_workers", "unusable"]

_MIB: Final = 2**20
_BOX_BYTES: Final = 16 * _MIB
_FILES_BYTES: Final = 8 * _MIB
_STACK_BYTES: Final = 64 * _MIB
_STDERR_BYTES: Final = 64 * 2**10
_RECYCLE_AFTER: Final = 1000
_ATTEMPTS: Final = 3


def default_workers() -> int:
    """As many as this process may use cores."""
    return len(os.sched_getaffinity(0))


class Session:
    """Fork servers of one jail. Jobs of one call run in parallel; calls wait for each other.

    Args:
        jail: How programs are confined.
        limits: Bounds of every program.
        workers: Number of fork servers, and so of programs at a time.

    Raises:
        EnvironmentUnmet: The first fork server does not start.
    """

    def __init__(self, jail: Jail, limits: SandboxLimits, workers: int) -> None:
        self.name = jail.name
        self._jail = jail
        self._limits = limits
        self._place = SessionDir()
        self._binaries = BinaryCache()
        self._workers: list[Worker | None] = [None] * workers
        self._turn = threading.Lock()
        self._closed = False
        try:
            self._workers[0] = Worker(jail, self._place, 0)
        except WorkerFailed as error:
            self.close()
            raise EnvironmentUnmet(str(error), where=f"sandbox {jail.name}") from error

    @property
    def workers(self) -> int:
        """Programs at a time."""
        return len(self._workers)

    def run(self, jobs: Sequence[SandboxJob], /) -> Sequence[SandboxOutcome]:
        """One outcome per job, in order.

        A failure of the sandbox itself is tried again twice, on other fork servers; only then the outcome is
        ``infra-error``. Programs that were killed at the wall limit while others kept them from computing run once
        more, alone.

        Raises:
            StageError: The session is closed.
            EnvironmentUnmet: A C++ program, and no compiler.
        """
        with self._turn:
            if self._closed:
                raise StageError("the sandbox session is closed")
            if any(job.language == "cpp" for job in jobs):
                find_compiler()
            found = self._deal(jobs)
            for index, (outcome, again) in found.items():
                if again:
                    found[index] = (self._judge(0, jobs[index])[0], False)
                else:
                    found[index] = (outcome, False)
            return [found[index][0] for index in range(len(jobs))]

    def _deal(self, jobs: Sequence[SandboxJob]) -> dict[int, tuple[SandboxOutcome, bool]]:
        waiting = iter(self._compile_first(jobs))
        lock = threading.Lock()
        over = threading.Event()
        found: dict[int, tuple[SandboxOutcome, bool]] = {}

        def work(slot: int) -> None:
            while not over.is_set():
                with lock:
                    index = next(waiting, None)
                if index is None:
                    return
                found[index] = self._judge(slot, jobs[index])

        threads = min(len(self._workers), len(jobs))
        with ThreadPoolExecutor(max(1, threads)) as pool:
            try:
                for done in [pool.submit(work, slot) for slot in range(threads)]:
                    done.result()
            finally:
                # After an interrupt the programs that run are the last ones.
                over.set()
        return found

    def _compile_first(self, jobs: Sequence[SandboxJob]) -> Iterator[int]:
        """Indices such that no two workers compile the same program at the same time, as far as that can be."""
        seen: set[str] = set()
        later: list[int] = []
        for index, job in enumerate(jobs):
            if job.language == "cpp" and job.program in seen:
                later.append(index)
                continue
            seen.add(job.program)
            yield index
        yield from later

    # --- one job ------------------------------------------------------------------------------------------------------

    def _judge(self, slot: int, job: SandboxJob) -> tuple[SandboxOutcome, bool]:
        """The outcome, and whether the program was starved."""
        problem = unusable(job)
        if problem:
            return SandboxOutcome(status="infra-error", reason=problem), False
        outcome, again = SandboxOutcome(status="infra-error"), False
        for _ in range(_ATTEMPTS):
            try:
                outcome, again = self._attempt(slot, job)
            except (WorkerFailed, OSError) as error:
                # OSError: this process is out of descriptors or memory.
                outcome, again = SandboxOutcome(status="infra-error", reason=str(error)), False
            if outcome.status != "infra-error":
                break
            self._retire(slot)
        return outcome, again

    def _attempt(self, slot: int, job: SandboxJob) -> tuple[SandboxOutcome, bool]:
        if job.language == "python":
            return self._run(slot, "python", job, {"program": job.program, "files": dict(job.files)}, None)
        binary = self._binary(slot, job.program)
        if isinstance(binary, SandboxOutcome):
            return binary, False
        if binary.descriptor is None:
            return SandboxOutcome(status="compile-error", stderr=binary.errors), False
        try:
            return self._run(slot, "binary", job, {"files": dict(job.files)}, binary.descriptor)
        finally:
            os.close(binary.descriptor)

    def _run(
        self, slot: int, kind: str, job: SandboxJob, payload: Mapping[str, object], extra: int | None
    ) -> tuple[SandboxOutcome, bool]:
        limits = self._limits
        task = Task(
            kind="python" if kind == "python" else "binary",
            cpu_s=limits.cpu_s,
            wall_s=limits.wall_s,
            memory_bytes=limits.memory_bytes,
            output_bytes=limits.output_bytes,
            file_bytes=_BOX_BYTES,
            processes=limits.processes,
            stack_bytes=min(_STACK_BYTES, limits.memory_bytes),
        )
        with _Streams(job.stdin, payload) as streams:
            reply = self._worker(slot).run(task, [*streams.all, *(() if extra is None else (extra,))])
            return streams.outcome(reply, limits), verdicts.starved(reply, limits)

    def _binary(self, slot: int, source: str) -> Binary | SandboxOutcome:
        key = self._binaries.key(source)
        found = self._binaries.get(key)
        if found is not None:
            return found
        result = executable_file("program")
        try:
            with _Streams(source, {"arguments": command(find_compiler()), "files": {}}) as streams:
                reply = self._worker(slot).run(COMPILE, [*streams.all, result])
                bounds = SandboxLimits(cpu_s=COMPILE.cpu_s, memory_bytes=COMPILE.memory_bytes)
                outcome = streams.outcome(reply, bounds)
            if verdicts.starved(reply, bounds):
                outcome = SandboxOutcome(status="infra-error", reason="the compiler waited too long for a core")
        except (WorkerFailed, OSError):
            os.close(result)
            raise
        if outcome.status == "ok" and os.fstat(result).st_size:
            self._binaries.put(key, Binary(result))
        else:
            os.close(result)
            if outcome.status == "infra-error":
                return outcome
            self._binaries.put(key, Binary(None, outcome.stderr or f"the compiler ended with {outcome.status}"))
        return self._binaries.get(key) or SandboxOutcome(status="infra-error", reason="the compiled program is gone")

    # --- workers ------------------------------------------------------------------------------------------------------

    def _worker(self, slot: int) -> Worker:
        worker = self._workers[slot]
        if worker is not None and (worker.runs >= _RECYCLE_AFTER or not worker.alive):
            self._retire(slot)
            worker = None
        if worker is None:
            worker = self._workers[slot] = Worker(self._jail, self._place, slot)
        return worker

    def _retire(self, slot: int) -> None:
        worker, self._workers[slot] = self._workers[slot], None
        if worker is not None:
            worker.close()

    def close(self) -> None:
        """End all processes and delete the session's files; may be called twice."""
        with self._turn:
            self._closed = True
            for slot in range(len(self._workers)):
                self._retire(slot)
            self._binaries.clear()
            self._place.remove()


def unusable(job: SandboxJob) -> str:
    """Why the judge's own part of a job cannot be used; empty when it can."""
    for name in job.files:
        if not name or name in {".", ".."} or "/" in name or "\0" in name or len(name.encode(errors="replace")) > 255:
            return f"{name!r} is no file name"
        if name == SCRIPT:
            return f"{name!r} is the program's own name"
    size = sum(len(text.encode(errors="surrogatepass")) for text in job.files.values())
    return f"files of {size} bytes; at most {_FILES_BYTES}" if size > _FILES_BYTES else ""


class _Streams:
    """Memory files of one run: bounded by the program's file size limit, readable after its end, nobody's to hold."""

    def __init__(self, stdin: str, payload: Mapping[str, object]) -> None:
        self.all: list[int] = []
        with contextlib.ExitStack() as undo:
            undo.callback(self._close)
            for name, content in (
                ("stdin", stdin.encode(errors="surrogatepass")),
                ("stdout", b""),
                ("stderr", b""),
                ("job", json.dumps(payload).encode()),
            ):
                descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
                self.all.append(descriptor)
                _write(descriptor, content)
            os.lseek(self.all[0], 0, os.SEEK_SET)
            undo.pop_all()

    def __enter__(self) -> _Streams:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        for descriptor in self.all:
            os.close(descriptor)
        self.all.clear()

    def outcome(self, reply: Reply, limits: SandboxLimits) -> SandboxOutcome:
        """What happened, with what the program wrote."""
        out, err = self.all[1], self.all[2]
        size = max(os.fstat(out).st_size, os.fstat(err).st_size)
        tail = os.pread(err, _STDERR_BYTES, max(0, os.fstat(err).st_size - _STDERR_BYTES)).decode(errors="replace")
        status = verdicts.status_of(reply, limits, output_bytes=size, stderr_tail=tail.encode())
        failed = SandboxOutcome(
            status=status,
            exit_code=reply.exit_code,
            signal=reply.signal,
            wall_s=reply.wall_s,
            cpu_s=reply.cpu_s,
            memory_bytes=reply.memory_bytes,
        )
        if status == "infra-error":
            return replace(failed, reason=reply.reason or tail.strip().rpartition("\n")[2] or "no reason given")
        return replace(failed, stdout=read_all(out, limits.output_bytes).decode(errors="replace"), stderr=tail)


def _write(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
