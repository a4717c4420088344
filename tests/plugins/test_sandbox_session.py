from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from sandbox_helpers import LIMITS, PROVIDERS, need

from kdkit.api import EnvironmentUnmet, SandboxJob, SandboxLimits, SandboxOutcome, StageError
from kdkit.plugins.sandboxes import compiler
from kdkit.plugins.sandboxes import session as session_module
from kdkit.plugins.sandboxes.inside.task import Reply
from kdkit.plugins.sandboxes.jails import LandlockJail, Launch
from kdkit.plugins.sandboxes.session import Session, unusable
from kdkit.plugins.sandboxes.verdicts import starved, status_of

MIB = 2**20


@pytest.fixture(scope="module", params=PROVIDERS)
def session(request):
    need(request.param)
    opened = PROVIDERS[request.param](2).open(LIMITS)
    yield opened
    opened.close()


def run(session: Session, program: str, stdin: str = "", **rest) -> SandboxOutcome:
    (outcome,) = session.run([SandboxJob(program=program, stdin=stdin, **rest)])
    return outcome


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def descendants(pid: int) -> set[int]:
    parents = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found: set[int] = set()
    new = {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new}
        found |= new
    return found


def fork_servers(session: Session) -> list[int]:
    return [worker._process.pid for worker in session._workers if worker is not None]


# --- programs ---------------------------------------------------------------------------------------------------------


def test_outcomes_stand_in_the_order_of_the_jobs(session):
    jobs = [SandboxJob(program="print(int(input()) ** 2)", stdin=str(n)) for n in range(40)]
    outcomes = session.run(jobs)
    assert [outcome.stdout for outcome in outcomes] == [f"{n * n}\n" for n in range(40)]
    assert {outcome.status for outcome in outcomes} == {"ok"}
    assert all(outcome.exit_code == 0 and 0 < outcome.cpu_s < 2 for outcome in outcomes)
    assert session.run([]) == []


@pytest.mark.parametrize(
    ("program", "stdout"),
    [
        ("import sys; print(sys.stdin.readline().strip(), sys.stdin.read())", "é 😀\n"),
        ("print(open(0, encoding='utf-8').read())", "é\n😀\n"),
        ("import sys; sys.stdout.buffer.write(b'\\xff')", "\ufffd"),
        (
            "def main():\n    print(__name__, __file__[-7:])\nif __name__ == '__main__':\n    main()",
            "__main__ main.py\n",
        ),
        ("exit()", ""),
        ("import sys; print('x', end=''); sys.exit(0)", "x"),
        ("import atexit; atexit.register(print, 'bye'); print('hello')", "hello\nbye\n"),
        ("import threading\nt = threading.Thread(target=print, args=(1,)); t.start()", "1\n"),
        ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\nprint(A(1))", "A(x=1)\n"),
        ("import sys; sys.setrecursionlimit(10**6)\ndef f(n): return n and f(n - 1)\nprint(f(50000))", "0\n"),
        ("import asyncio\nasync def f(): print(1)\nasyncio.run(f())", "1\n"),
        ("from functools import lru_cache; import heapq, bisect, math; print(math.gcd(4, 6))", "2\n"),
        ("import sys; sys.stdout.close(); sys.stderr.close()", ""),
        ("import os; print('no flush'); os._exit(0)", ""),
    ],
)
def test_programs_run_as_a_script_would(session, program, stdout):
    outcome = run(session, program, "é\n😀")
    assert (outcome.status, outcome.stdout, outcome.stderr) == ("ok", stdout, "")


def test_a_traceback_shows_the_program_and_nothing_of_the_sandbox(session):
    outcome = run(session, "def f():\n    return 1 / 0\nf()\n")
    assert outcome.status == "runtime-error"
    assert "ZeroDivisionError" in outcome.stderr
    assert "return 1 / 0" in outcome.stderr
    assert "payload" not in outcome.stderr


def test_the_same_program_does_the_same_every_time(session):
    program = "import random; print(random.random(), hash('x'), {'a', 'b', 'c'})"
    assert len({run(session, program).stdout for _ in range(4)}) == 1


def test_files_of_a_job(session):
    outcome = run(
        session,
        "import helper; print(open('data.txt').read(), helper.X)",
        files={"data.txt": "é", "helper.py": "X = 2"},
    )
    assert (outcome.status, outcome.stdout) == ("ok", "é 2\n")
    outcome = run(session, "import os; print(os.listdir('.'))")
    assert (outcome.status, outcome.stdout) == ("ok", "['main.py']\n")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/x", "\0", "x" * 300, "main.py"])
def test_file_names_that_would_leave_the_box_are_refused(name):
    assert repr(name) in unusable(SandboxJob(program="", files={name: ""}))


def test_large_input_that_nobody_reads_and_large_input_that_is_read(session):
    text = "x" * (4 * MIB)
    assert run(session, "print('done')", text).status == "ok"
    assert run(session, "import sys; print(len(sys.stdin.read()))", text).stdout == f"{4 * MIB}\n"


def test_output_up_to_the_limit_is_kept_whole(session):
    size = LIMITS.output_bytes
    assert len(run(session, f"import os; os.write(1, b'x' * {size})").stdout) == size
    outcome = run(session, f"import os; os.write(1, b'x' * {size + 1})")
    assert (outcome.status, len(outcome.stdout)) == ("output-limit", size)


def test_memory_up_to_the_limit_is_given(session):
    assert run(session, f"x = bytearray({160 * MIB})\nx[::4096] = b'1' * len(x[::4096])").status == "ok"


def test_cpp(session):
    source = (
        "#include <iostream>\nint main() { long long n; std::cin >> n; std::cout << n * n << '\\n'; return n == 7; }"
    )
    jobs = [SandboxJob(program=source, language="cpp", stdin=str(n)) for n in (3, 5, 7)]
    try:
        outcomes = session.run(jobs)
    except EnvironmentUnmet as error:
        pytest.skip(str(error))
    assert [(o.status, o.stdout) for o in outcomes] == [("ok", "9\n"), ("ok", "25\n"), ("runtime-error", "49\n")]
    broken = run(session, "int main() { return x; }", language="cpp")
    assert broken.status == "compile-error"
    assert "not declared" in broken.stderr


def test_cpp_is_compiled_once(session, monkeypatch):
    kinds = []
    original = session_module.Worker.run
    monkeypatch.setattr(
        session_module.Worker, "run", lambda self, task, fds: kinds.append(task.kind) or original(self, task, fds)
    )
    jobs = [SandboxJob(program="int main() { return 0; } // once", language="cpp")] * 3
    try:
        session.run(jobs[:1])
    except EnvironmentUnmet as error:
        pytest.skip(str(error))
    session.run(jobs)
    assert sorted(kinds) == ["binary"] * 4 + ["compile"]


# --- between programs -------------------------------------------------------------------------------------------------

LEAVE = """
import sys, os, builtins, random, math
sys.modules["left"] = math
builtins.left = 1
math.pi = 3
os.environ["LEFT"] = "1"
random.random = lambda: 4
for place in (".", "/tmp", "/dev/shm", "/box", "/var/tmp", "/kdkit", "/python"):
    try: open(place + "/left-here", "w").write("x")
    except OSError: pass
secret = input()
"""
FIND = """
import sys, os, gc, math, random, builtins
found = [n for n in ("left",) if n in sys.modules or hasattr(builtins, n)]
found += ["env"] if "LEFT" in os.environ else []
found += ["patched"] if math.pi == 3 or random.random() == 4 else []
for place in (".", "/tmp", "/dev/shm", "/box", "/var/tmp", "/kdkit", "/python"):
    if os.path.exists(place + "/left-here"): found.append(place)
print(found)
"""


def test_programs_never_see_each_other(session):
    for _ in range(2):
        session.run([SandboxJob(program=LEAVE, stdin="x")] * 4)
        assert {outcome.stdout for outcome in session.run([SandboxJob(program=FIND)] * 4)} == {"[]\n"}


LOCK = """
import ctypes, os, struct, sys, time
file = open(os.__file__, "rb")
who = input()
time.sleep(0 if who == "first" else 0.7)
locked = []
libc = ctypes.CDLL(None, use_errno=True)
if not libc.flock(file.fileno(), 6): locked.append("flock")
area = ctypes.create_string_buffer(struct.pack("hhqqi4x", 0, 0, 0, 0, 0))
for command in (6, 37):
    if not libc.fcntl(file.fileno(), command, area): locked.append(command)
time.sleep(2 if who == "first" else 0)
print(locked)
"""


def test_programs_cannot_signal_by_locks(session):
    """All of them may read the standard library, and a lock on one of its files would be seen by the others."""
    session.run([SandboxJob(program="import time; time.sleep(0.3)")] * 2)
    outcomes = session.run([SandboxJob(program=LOCK, stdin=who) for who in ("first", "second")])
    assert [(outcome.status, outcome.stdout) for outcome in outcomes] == [("ok", "[]\n")] * 2


def test_compiled_programs_that_are_large_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(compiler, "_KEPT_BYTES", 3000)
    cache = compiler.BinaryCache()
    for number in range(5):
        descriptor = compiler.executable_file("program")
        os.ftruncate(descriptor, 1000)
        cache.put(f"{number}", compiler.Binary(descriptor))
    cache.put("broken", compiler.Binary(None, "no"))
    assert [cache.get(f"{number}") is not None for number in range(5)] == [False, False, True, True, True]
    huge = compiler.executable_file("program")
    os.ftruncate(huge, 9000)
    cache.put("huge", compiler.Binary(huge))
    assert cache.get("huge") is not None
    assert cache.get("4") is None
    cache.clear()


def memory(pid: int) -> bytes:
    parts = []
    process = Path(f"/proc/{pid}")
    with (process / "maps").open() as maps, (process / "mem").open("rb", buffering=0) as mem:
        for line in maps:
            place, rights = line.split()[:2]
            start, end = (int(number, 16) for number in place.split("-"))
            if rights.startswith("rw"):
                mem.seek(start)
                parts.append(mem.read(end - start))
    return b"".join(parts)


def test_fork_servers_never_hold_what_they_run(session):
    """What is not in the memory of the fork server cannot be found by the next program, which inherits that."""
    marker = "NEEDLE-IN-A-HAYSTACK"
    session.run([SandboxJob(program=f"input() # {marker}", stdin=marker, files={"x": marker})] * 4)
    checked = 0
    for pid in fork_servers(session):
        for process in {pid, *descendants(pid)}:
            try:
                held = memory(process)
            except PermissionError as error:
                pytest.skip(f"memory of another process cannot be read here: {error}")
            checked += b"inside.zygote" in held
            assert marker.encode() not in held
    assert checked


def test_memory_of_the_fork_server_does_not_grow(session):
    def size() -> list[int]:
        return [run(session, "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)").memory_bytes]

    session.run([SandboxJob(program="print(input())", stdin="x" * 1000)] * 50)
    before = size()[0]
    session.run([SandboxJob(program="print(input())", stdin="x" * 1000)] * 200)
    assert size()[0] < before + MIB


# --- failures of the sandbox ------------------------------------------------------------------------------------------


def test_a_dead_fork_server_is_replaced_and_the_program_judged(session):
    session.run([SandboxJob(program="pass")] * 4)
    pids = fork_servers(session)
    assert pids
    for worker in session._workers:
        if worker is not None:
            if worker._init is not None:
                signal.pidfd_send_signal(worker._init, signal.SIGKILL)
            else:
                worker._process.kill()
            worker._process.wait()
    outcomes = session.run([SandboxJob(program="print(1)")] * 4)
    assert [(outcome.status, outcome.stdout) for outcome in outcomes] == [("ok", "1\n")] * 4
    assert not set(fork_servers(session)) & set(pids)


def test_a_fork_server_killed_in_the_middle_is_no_verdict(session, monkeypatch):
    """The program is tried again on another one, twice; then it is the sandbox's failure, not the program's."""
    tries = []
    original = session_module.Worker.run

    def dies(self, task, descriptors):
        tries.append(task.kind)
        if len(tries) <= deaths:
            self._socket.close()
        return original(self, task, descriptors)

    monkeypatch.setattr(session_module.Worker, "run", dies)
    deaths = 2
    assert run(session, "print(1)").stdout == "1\n"
    assert len(tries) == 3
    tries.clear()
    deaths = 3
    outcome = run(session, "print(1)")
    assert outcome.status == "infra-error"
    assert outcome.reason
    assert len(tries) == 3
    assert run(session, "print(2)").stdout == "2\n"


def test_a_judge_without_descriptors_gives_no_verdict(session, monkeypatch):
    def none_left(*_):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(session_module.os, "memfd_create", none_left)
        outcome = run(session, "print(1)")
    assert (outcome.status, outcome.reason) == ("infra-error", "[Errno 24] Too many open files")
    assert run(session, "print(1)").status == "ok"


def test_a_compiler_that_got_no_core_is_no_compile_error(session, monkeypatch):
    if not shutil.which("g++", path="/usr/bin"):
        pytest.skip("no g++")
    late = Reply("ran", None, signal.SIGKILL, late=True, preempted=99, wall_s=40.0)
    job = SandboxJob(program="int main() { return 0; } // starved", language="cpp")
    with monkeypatch.context() as patch:
        patch.setattr(session_module.Worker, "run", lambda *_: late)
        assert session.run([job])[0].status == "infra-error"
    assert session.run([job])[0].status == "ok"


def test_the_work_of_a_compiler_that_was_killed_is_counted(session, monkeypatch):
    """It is done by its children; without it a compiler that waits for a core cannot be told from one that works."""
    replies = []
    original = session_module.Worker.run

    def remembered(self, task, descriptors):
        replies.append(original(self, task, descriptors))
        return replies[-1]

    monkeypatch.setattr(session_module.Worker, "run", remembered)
    monkeypatch.setattr(session_module, "COMPILE", replace(session_module.COMPILE, wall_s=5.0))
    bomb = (
        "template<int n, int m> struct A { static const long v = A<n-1, 2*m>::v + A<n-1, 2*m+1>::v; };\n"
        "template<int m> struct A<0, m> { static const long v = m; };\nint main() { return A<22, 0>::v & 1; }"
    )
    try:
        run(session, bomb, language="cpp")
    except EnvironmentUnmet as error:
        pytest.skip(str(error))
    assert replies[0].late
    # The driver alone takes 0.005 s; a busy machine may give its child little more.
    assert replies[0].cpu_s > 0.03


def test_fork_servers_are_renewed(session, monkeypatch):
    monkeypatch.setattr(session_module, "_RECYCLE_AFTER", 3)
    seen = set()
    for _ in range(5):
        session.run([SandboxJob(program="pass")] * 6)
        seen |= set(fork_servers(session))
    assert len(seen) > 4


def test_a_closed_session_refuses_and_leaves_nothing(session):
    opened = PROVIDERS[session.name](1).open(LIMITS)
    opened.run([SandboxJob(program="pass")])
    (pid,) = fork_servers(opened)
    directory = opened._place.path
    opened.close()
    opened.close()
    assert not Path(f"/proc/{pid}").exists()
    assert not directory.exists()
    with pytest.raises(StageError, match="closed"):
        opened.run([SandboxJob(program="pass")])


PARENT = """
import os, sys, threading
from kdkit.api import SandboxJob, SandboxLimits
from kdkit.plugins.sandboxes.providers import bubblewrap, landlock
session = {"bubblewrap": bubblewrap, "landlock": landlock}[sys.argv[1]](2).open(SandboxLimits(wall_s=100, cpu_s=100))
session.run([SandboxJob(program="pass")] * 2)
# A child that holds copies of all descriptors must not keep the fork servers alive.
child = os.fork()
if child == 0:
    import time; time.sleep(1000)
print(child, flush=True)
session.run([SandboxJob(program="import time\\nwhile True: time.sleep(0.1)")])
"""


def test_a_killed_judge_leaves_no_process(session, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PARENT, session.name], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    helper = int(process.stdout.readline())
    # The helper, two fork servers (of them one idle) behind two processes of bwrap each, and the program with its init.
    wanted = {"bubblewrap": 1 + 2 * 3 + 2, "landlock": 1 + 2 + 1}[session.name]
    deadline = time.monotonic() + 60
    while len(descendants(process.pid)) < wanted and time.monotonic() < deadline:
        time.sleep(0.05)
    children = descendants(process.pid) - {helper}
    process.kill()
    process.wait()
    process.stdout.close()
    while not all(map(gone, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in children if not gone(pid)]
    os.kill(helper, signal.SIGKILL)
    assert len(children) >= wanted - 1
    assert not left


# --- starting ---------------------------------------------------------------------------------------------------------


class BrokenJail(LandlockJail):
    """Its fork server ends at once with a message."""

    name = "broken"

    def launch(self, place, slot, uid, control, parent, info) -> Launch:
        launch = super().launch(place, slot, uid, control, parent, info)
        return Launch(("/bin/sh", "-c", "echo no such luck >&2; exit 3"), {}, None, None, launch.sealed)


def test_a_fork_server_that_does_not_start_says_why():
    with pytest.raises(EnvironmentUnmet, match="sandbox broken: the fork server did not start: no such luck") as caught:
        Session(BrokenJail(), LIMITS, 2)
    assert caught.value.exit_code == 4


# --- verdicts ---------------------------------------------------------------------------------------------------------

BOUNDS = SandboxLimits(wall_s=4, cpu_s=1, memory_bytes=100 * MIB, output_bytes=1000)


@pytest.mark.parametrize(
    ("reply", "output", "tail", "status"),
    [
        (Reply("ran", 0), 0, b"", "ok"),
        (Reply("ran", 1), 0, b"", "runtime-error"),
        (Reply("ran", None, signal.SIGKILL), 0, b"", "runtime-error"),
        (Reply("ran", 137), 0, b"Killed", "runtime-error"),
        (Reply("ran", 0), 1001, b"", "output-limit"),
        (Reply("ran", 1), 1001, b"", "output-limit"),
        (Reply("ran", None, signal.SIGXFSZ), 1000, b"", "output-limit"),
        (Reply("ran", 1, memory_bytes=99 * MIB), 0, b"", "memory"),
        (Reply("ran", 0, memory_bytes=99 * MIB), 0, b"", "ok"),
        (Reply("ran", 1), 2000, b"x\nMemoryError", "memory"),
        (Reply("ran", None, signal.SIGABRT), 0, b"terminate\n  what():  std::bad_alloc\n", "memory"),
        (Reply("ran", 0), 0, b"MemoryError", "ok"),
        (Reply("ran", 0, cpu_s=1.1), 0, b"", "timeout"),
        (Reply("ran", None, signal.SIGXCPU), 0, b"", "timeout"),
        (Reply("ran", None, signal.SIGKILL, late=True, memory_bytes=99 * MIB), 2000, b"", "timeout"),
        (Reply("no-compile", 1, cpu_s=5), 0, b"", "compile-error"),
        (Reply("ran", None, signal.SIGSYS, late=True), 2000, b"", "security-violation"),
        (Reply("failed", None, signal.SIGSYS), 2000, b"", "infra-error"),
        (Reply("failed", 0), 0, b"", "infra-error"),
    ],
)
def test_the_first_of_several_verdicts_counts(reply, output, tail, status):
    assert status_of(reply, BOUNDS, output_bytes=output, stderr_tail=tail) == status


@pytest.mark.parametrize(
    ("cpu", "preempted", "late", "expected"),
    [(0.2, 50, True, True), (0.2, 0, True, False), (0.2, 50, False, False), (1.0, 50, True, False)],
)
def test_only_a_program_that_waited_for_a_core_runs_again(cpu, preempted, late, expected):
    reply = Reply("ran", None, signal.SIGKILL, late=late, preempted=preempted, wall_s=4.0, cpu_s=cpu)
    assert starved(reply, BOUNDS) is expected


def test_a_starved_program_runs_once_more_alone(session, monkeypatch):
    calls = []
    original = session_module.Worker.run

    def first_is_late(self, task, descriptors):
        calls.append(self)
        reply = original(self, task, descriptors)
        if len(calls) > 1:
            return reply
        return Reply(**{**json.loads(reply.to_json()), "late": True, "preempted": 99, "wall_s": task.wall_s})

    monkeypatch.setattr(session_module.Worker, "run", first_is_late)
    assert run(session, "print(1)").stdout == "1\n"
    assert len(calls) == 2
