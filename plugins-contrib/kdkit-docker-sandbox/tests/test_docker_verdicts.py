"""What becomes of programs, with a stand-in for docker that runs harmless ones right here; the suite for a real one."""

from __future__ import annotations

import base64
import json
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_docker import HERE, FakeDocker

import kdkit
from kdkit.api import EnvironmentUnmet, Sandbox, SandboxJob, SandboxLimits, SandboxOutcome, StageError
from kdkit.testing.conformance import SandboxConformance
from kdkit_docker_sandbox import session as implementation
from kdkit_docker_sandbox.docker import Docker
from kdkit_docker_sandbox.session import DockerSession
from kdkit_docker_sandbox.verdicts import Ended, outcome_of, report_bytes

LIMITS = SandboxLimits(wall_s=20.0, cpu_s=1.0, memory_bytes=256 * 2**20, output_bytes=100_000)
Open = Callable[..., DockerSession]


class TestDocker(SandboxConformance):
    # In a container of its own a program may start others, use its own /proc, and sockets among them; what it asks of
    # the kernel beyond that is refused, not punished.
    spares = frozenset(
        (
            *("fork bomb", "vfork and clone", "children share memory out", "daemon", "child holds stdout", "shell"),
            *("exec", "memory files", "accounts", "set-uid", "devices", "environment of others", "kills others"),
            *("proc and sys switches", "traces the judge", "reads the judge's memory", "loads a BPF program"),
            *("other system calls", "32-bit system calls", "listens", "odd socket families"),
        )
    )

    def build(self) -> Sandbox:
        built: Sandbox = kdkit.build("sandbox", "docker")
        return built

    @pytest.fixture(autouse=True)
    def _surroundings(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        # Where kdkit's own sandboxes must work, docker still need not be there.
        monkeypatch.delenv("KDKIT_REQUIRE_SANDBOX", raising=False)
        if request.node.name == "test_it_fails_closed":
            monkeypatch.setenv("PATH", str(tmp_path))

    def build_unusable(self) -> Sandbox | None:
        return self.build()

    def left(self) -> list[str]:
        program = shutil.which("docker")
        command = [str(program), "ps", "--quiet", "--filter", "label=kdkit-docker-sandbox"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture
def opened(docker: FakeDocker) -> Iterator[Open]:
    sessions: list[DockerSession] = []

    def opened(limits: SandboxLimits = LIMITS, workers: int = 2) -> DockerSession:
        sessions.append(DockerSession(Docker(docker.program, "x", "sha256:x"), limits, workers))
        return sessions[-1]

    yield opened
    for session in sessions:
        session.close()


PROGRAMS: dict[str, tuple[SandboxJob, str, dict[str, Any]]] = {
    "input and output": (
        SandboxJob(program="print('é', input())", stdin="ü"),
        "ok",
        {"stdout": "é ü\n", "exit_code": 0},
    ),
    "files": (SandboxJob(program="import a; print(a.b)", files={"a.py": "b = 7"}), "ok", {"stdout": "7\n"}),
    "nothing": (SandboxJob(program=""), "ok", {"stdout": ""}),
    "an exception": (SandboxJob(program="print(1)\n1 / 0"), "runtime-error", {"stdout": "1\n", "exit_code": 1}),
    "an exit code": (SandboxJob(program="raise SystemExit(137)"), "runtime-error", {"exit_code": 137, "signal": None}),
    "a signal": (
        SandboxJob(program="import os; print(1, flush=True); os.kill(os.getpid(), 9)"),
        "runtime-error",
        {"stdout": "1\n", "signal": 9, "exit_code": None},
    ),
    "no Python": (SandboxJob(program="def f(:"), "compile-error", {"stdout": ""}),
    "brackets": (SandboxJob(program="(" * 5000 + ")" * 5000), "compile-error", {}),
    "a null byte": (SandboxJob(program="print(1)\0"), "compile-error", {}),
    "half a character": (SandboxJob(program="print('\ud800')"), "compile-error", {}),
    "an error by that name": (SandboxJob(program="raise SyntaxError('no')"), "runtime-error", {}),
    "a loop": (SandboxJob(program="while True: pass"), "timeout", {"signal": int(signal.SIGXCPU)}),
    "too much memory": (SandboxJob(program="bytearray(10 << 30)"), "memory", {"exit_code": 1}),
    "a flood": (SandboxJob(program="while True: print('x' * 1000)"), "output-limit", {"signal": 9}),
    "a flood of errors": (
        SandboxJob(program="import sys\nwhile True: sys.stderr.write('x' * 1000)"),
        "output-limit",
        {"signal": 9},
    ),
    "a flood that ends": (SandboxJob(program="print('x' * 100_001)"), "output-limit", {}),
    "a large file": (SandboxJob(program="open('x', 'wb').write(b'x' * (17 << 20))"), "runtime-error", {}),
    "claims": (SandboxJob(program="import os; os._exit(125)"), "runtime-error", {"exit_code": 125}),
    "unread input": (SandboxJob(program="print(1)", stdin="x" * 2**20), "ok", {"stdout": "1\n"}),
    "its own interpreter": (
        SandboxJob(program="import sys; print(sys.argv, __name__, len(sys._current_frames()))"),
        "ok",
        {"stdout": "['main.py'] __main__ 1\n"},
    ),
}


@pytest.mark.parametrize("what", PROGRAMS)
def test_programs(what: str, opened: Open) -> None:
    job, status, facts = PROGRAMS[what]
    (outcome,) = opened().run([job])
    assert outcome.status == status, outcome
    assert {name: getattr(outcome, name) for name in facts} == facts
    assert len(outcome.stdout) <= LIMITS.output_bytes
    assert len(outcome.stderr) <= 65536
    assert min(outcome.wall_s, outcome.cpu_s, outcome.memory_bytes) > 0


def test_a_program_that_sleeps_is_late(opened: Open) -> None:
    limits = SandboxLimits(wall_s=1.0, cpu_s=1.0)
    (outcome,) = opened(limits).run([SandboxJob(program="import time; print(1, flush=True); time.sleep(60)")])
    assert (outcome.status, outcome.signal, outcome.stdout) == ("timeout", 9, "1\n")
    assert 1 <= outcome.wall_s < 30


def test_a_child_that_holds_the_output_is_not_waited_for(opened: Open) -> None:
    program = "import os, time\nif os.fork() == 0: time.sleep(30)\nprint('done', flush=True); os._exit(0)"
    started = time.monotonic()
    (outcome,) = opened().run([SandboxJob(program=program)])
    assert (outcome.status, outcome.stdout) == ("ok", "done\n")
    assert time.monotonic() - started < 25


def test_programs_get_four_variables_and_three_descriptors(opened: Open) -> None:
    program = "import os; print(sorted(os.environ)); print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1])"
    (outcome,) = opened().run([SandboxJob(program=program)])
    assert outcome.stdout == "['LANG', 'OMP_NUM_THREADS', 'PATH', 'TMPDIR']\n[0, 1, 2]\n"


def test_outcomes_are_in_order(opened: Open) -> None:
    program = "import time\nn = int(input())\ntime.sleep(0.3 * (n % 2 == 0))\nprint(n)"
    session = opened()
    assert [o.stdout for o in session.run([SandboxJob(program=program, stdin=str(n)) for n in range(5)])] == [
        f"{n}\n" for n in range(5)
    ]
    assert session.run([]) == []


def test_cpp_is_refused(opened: Open, docker: FakeDocker) -> None:
    with pytest.raises(EnvironmentUnmet, match="runs Python only; use the sandbox auto"):
        opened().run([SandboxJob(program="print(1)"), SandboxJob(program="int main() {}", language="cpp")])
    assert not docker.asked("run")


@pytest.mark.parametrize("name", ["", ".", "a/b", "main.py", "x" * 256, "a\0b"])
def test_files_that_cannot_lie_beside_a_program(name: str, opened: Open, docker: FakeDocker) -> None:
    (outcome,) = opened().run([SandboxJob(program="", files={name: ""})])
    assert outcome.status == "infra-error"
    assert "is no name for a file" in outcome.reason
    (outcome,) = opened().run([SandboxJob(program="", files={"a": "x" * (9 << 20)})])
    assert "at most 8388608" in outcome.reason
    assert not docker.asked("run")


# --- when docker fails


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (
            "print('WARNING: x\\ndocker: Error: no.\\n\\nRun help', file=sys.stderr); sys.exit(125)",
            "docker failed: Error: no.",
        ),
        ("sys.exit(125)", "docker failed: it says nothing"),
        ("print('exec: \"python3\": not found', file=sys.stderr); sys.exit(127)", "the image has no python3: exec"),
        ("print('not JSON')", "the container ended with 0: it says nothing"),
        ("sys.exit(3)", "the container ended with 3: it says nothing"),
        ("os.kill(os.getpid(), 9)", "the container ended with -9"),
    ],
)
def test_a_failure_of_docker_is_not_the_programs(run: str, reason: str, opened: Open, docker: FakeDocker) -> None:
    docker.does(run=run)
    (outcome,) = opened().run([SandboxJob(program="print(1)")])
    assert outcome.status == "infra-error"
    assert outcome.reason.startswith(reason)
    assert len(docker.asked("run")) == 3


def test_a_failure_that_passes_is_forgotten(opened: Open, docker: FakeDocker) -> None:
    mark = docker.directory / "mark"
    docker.does(run=f"if not os.path.exists({str(mark)!r}):\n open({str(mark)!r}, 'w'); sys.exit(125)\n{HERE}")
    (outcome,) = opened().run([SandboxJob(program="print(1)")])
    assert (outcome.status, outcome.stdout) == ("ok", "1\n")
    assert len(docker.asked("run")) == 2


def test_a_container_that_does_not_end_is_removed(
    opened: Open, docker: FakeDocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(implementation, "_START_S", 1.0)
    monkeypatch.setattr(implementation, "_ATTEMPTS", 1)
    docker.does(run="time.sleep(60)")
    (outcome,) = opened(SandboxLimits(wall_s=1.0)).run([SandboxJob(program="print(1)")])
    assert (outcome.status, outcome.reason) == ("infra-error", "the container did not end in time")
    (run,) = docker.asked("run")
    assert docker.asked("rm") == [["rm", "--force", run[run.index("--name") + 1]]]


def test_a_report_is_read_up_to_its_limit(opened: Open, docker: FakeDocker) -> None:
    docker.does(
        run="sys.stdin.read()\nfor _ in range(300): sys.stdout.write('x' * 2**20)\nsys.stderr.write('y' * 2**20)"
    )
    session = opened()
    process = session._start("kdkit-test")
    assert process is not None
    ended = session._watch("kdkit-test", process, b"{}")
    assert (len(ended.report), len(ended.errors)) == (report_bytes(LIMITS), 16_384)


def test_closing_ends_what_runs(opened: Open, docker: FakeDocker) -> None:
    docker.does(run="time.sleep(300)")
    session = opened()
    found: list[SandboxOutcome] = []
    thread = threading.Thread(target=lambda: found.extend(session.run([SandboxJob(program="")] * 5)))
    thread.start()
    deadline = time.monotonic() + 60
    while len(docker.asked("run")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    session.close()
    session.close()
    thread.join(60)
    assert not thread.is_alive()
    names = {run[run.index("--name") + 1] for run in docker.asked("run")}
    assert {name for _, _, name in docker.asked("rm")} == names
    assert len(names) == 2
    with pytest.raises(StageError, match="closed"):
        session.run([SandboxJob(program="")])


# --- verdicts


def report(**changes: Any) -> bytes:
    facts = {"state": "ran", "exit_code": 0, "signal": None, "late": False, "output_bytes": 1, "wall_s": 0.1}
    texts = {name: base64.b64encode(changes.pop(name, b"")).decode() for name in ("stdout", "stderr")}
    return json.dumps({**facts, "cpu_s": 0.1, "memory_bytes": 1, **texts, **changes}).encode()


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "ok"),
        ({"exit_code": 1}, "runtime-error"),
        ({"exit_code": None, "signal": 11}, "runtime-error"),
        ({"output_bytes": 100_001}, "output-limit"),
        ({"exit_code": 1, "output_bytes": 100_001}, "output-limit"),
        ({"exit_code": 1, "memory_bytes": 256 * 2**20}, "memory"),
        ({"memory_bytes": 256 * 2**20}, "ok"),
        ({"exit_code": 1, "stderr": b"Traceback\nMemoryError\n"}, "memory"),
        ({"exit_code": 1, "stderr": b"MemoryError\nValueError\n"}, "runtime-error"),
        ({"stderr": b"MemoryError\n"}, "ok"),
        ({"exit_code": None, "signal": 9, "late": True, "memory_bytes": 256 * 2**20}, "timeout"),
        ({"exit_code": None, "signal": int(signal.SIGXCPU)}, "timeout"),
        ({"cpu_s": 1.01}, "timeout"),
        ({"exit_code": 1, "state": "no-compile", "late": True}, "compile-error"),
        ({"exit_code": None, "signal": int(signal.SIGSYS)}, "security-violation"),
        ({"exit_code": 125, "state": "failed", "stderr": b"OSError: no\n"}, "infra-error"),
    ],
)
def test_the_first_verdict_that_holds(changes: dict[str, Any], status: str) -> None:
    outcome = outcome_of(Ended(0, report(**changes), b""), LIMITS)
    assert outcome.status == status
    assert outcome.reason == ("the program was not started: OSError: no" if status == "infra-error" else "")


def test_a_container_that_is_killed_is_no_way_out() -> None:
    """The first process only dies of memory or of an attack: neither leaves the baseline."""
    outcome = outcome_of(Ended(137, b"", b""), LIMITS)
    assert (outcome.status, outcome.signal, outcome.exit_code) == ("memory", 9, None)
