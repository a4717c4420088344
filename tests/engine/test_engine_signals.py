from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdkit.engine.store import store_root

SLOW = "  a: {kind: count, steps: 400, seconds: 0.05}"
RESUME = "kdkit run recipe.yaml"


@pytest.fixture
def slow(project):
    """A run that would take 20 seconds, seen to have saved a checkpoint."""
    project.recipe(SLOW)
    process = project.start("run", "recipe.yaml")
    wait_for(lambda: checkpoints(project), process)
    yield process
    end(process)


def end(process):
    if process.poll() is None:
        process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def checkpoints(project):
    return [path for partial in project.partials() for path in (partial / "checkpoints").glob("step-*")]


def workers():
    """Command lines of this test's workers that are still alive."""
    alive = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().decode()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            continue
        if "kdkit.engine.worker" in command and str(Path.cwd()) in command and state != "Z":
            alive.append(command)
    return alive


def gone():
    deadline = time.monotonic() + 30
    while workers() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not workers()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_the_first_signal_saves_and_stops(project, slow, signum, code):
    slow.send_signal(signum)
    _, err = slow.communicate(timeout=60)
    assert slow.returncode == code
    assert "a  stopped after" in err
    assert "checkpoint saved" in err
    assert err.rstrip().splitlines()[-1] == RESUME
    assert checkpoints(project)
    assert project.entries() == []
    assert gone()
    done = project.kdkit("run", "recipe.yaml", "--set", "stages.a.seconds=0.0")
    assert done.returncode == 0
    assert "a  resumed (checkpoint step-" in done.stderr


def test_the_second_signal_stops_at_once(project):
    project.recipe("  a: {kind: count, steps: 3, seconds: 30.0}")
    process = project.start("run", "recipe.yaml")
    try:
        wait_for(lambda: "from step" in events(project), process)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: "a second signal stops at once" in events(project), process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    finally:
        end(process)
    assert process.returncode == 130
    assert err.rstrip().splitlines()[-1] == RESUME
    assert gone()


def events(project):
    return "".join(p.read_text() for p in project.root.glob("runs/*/*/events.jsonl"))


def test_a_stage_that_ends_anyway_is_kept_and_the_next_is_not_started(project):
    project.recipe()
    done = project.kdkit("run", "recipe.yaml", "--set", "stages.a.fault=interrupt:3")
    assert done.returncode == 130
    assert "a  done in" in done.stderr
    assert "b  started" not in done.stderr
    assert "error: stopped before stage 'b'" in done.stderr
    assert len(project.entries()) == 1


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stage_in_the_parent_stops_the_same_way(project, signum, code):
    project.recipe(SLOW)
    process = project.start("run", "recipe.yaml", "--inline")
    try:
        wait_for(lambda: checkpoints(project), process)
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == code
    assert err.rstrip().splitlines()[-1] == f"{RESUME} --inline"


def test_a_second_run_is_refused_and_a_killed_one_frees_the_lock(project, slow):
    refused = project.kdkit("run", "recipe.yaml")
    assert refused.returncode == 4
    line = next(line for line in refused.stderr.splitlines() if line.startswith("error: "))
    assert f"another run works on it (pid {slow.pid} on " in line
    slow.kill()
    slow.wait()
    assert gone(), "the worker outlived its parent"
    third = project.kdkit("run", "recipe.yaml", "--set", "stages.a.seconds=0.0")
    assert third.returncode == 0
    assert "resumed (checkpoint step-" in third.stderr


def test_a_silent_worker_ends_with_its_parent(project):
    project.recipe("  a: {kind: count, steps: 3, seconds: 60.0}")
    process = project.start("run", "recipe.yaml")
    try:
        wait_for(lambda: "from step" in events(project), process)
    finally:
        end(process)
    assert gone(), "the worker outlived its parent"


def test_a_killed_worker_is_a_failed_stage(project, slow):
    (command,) = [entry for entry in Path("/proc").iterdir() if is_worker(entry)]
    os.kill(int(command.name), signal.SIGKILL)
    _, err = slow.communicate(timeout=60)
    assert slow.returncode == 1
    assert "the worker was killed (SIGKILL); often the system ran out of memory" in err
    assert err.rstrip().splitlines()[-1] == RESUME


def is_worker(entry):
    try:
        command = (entry / "cmdline").read_bytes().decode()
    except OSError:
        return False
    return "kdkit.engine.worker" in command and str(Path.cwd()) in command


def test_what_a_stage_started_ends_with_it(project):
    plugin = project.root / "fake_stages.py"
    plugin.write_text(
        plugin.read_text().replace(
            'ctx.log(f"from step {step}")',
            'import subprocess; subprocess.Popen(["sleep", "4242"]); ctx.log(f"from step {step}")',
        )
    )
    project.recipe("  a: {kind: count, steps: 1}")
    assert project.kdkit("run", "recipe.yaml").returncode == 0
    assert not [p for p in Path("/proc").iterdir() if command_of(p) == "sleep\x004242\x00"]


def command_of(entry):
    try:
        return (entry / "cmdline").read_bytes().decode()
    except OSError:
        return ""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_goes_away_stops_nothing(project, stream):
    project.recipe(project.chain)
    read, write = os.pipe()
    os.close(read)
    other = subprocess.DEVNULL
    pipes = {"stdout": write, "stderr": other} if stream == "stdout" else {"stdout": other, "stderr": write}
    process = subprocess.run([sys.executable, "-m", "kdkit", "run", "recipe.yaml"], **pipes, check=False, timeout=120)
    os.close(write)
    assert process.returncode == 0
    assert len(project.entries()) == 3
    assert store_root().exists()


def test_head_sees_one_line_and_nobody_sees_a_traceback(project):
    project.recipe(project.chain)
    shell = f"{sys.executable} -m kdkit run recipe.yaml 2>err | head -1"
    out = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False, timeout=120)
    assert out.stdout.startswith("run     runs/demo/")
    assert "Traceback" not in Path("err").read_text()
    assert "BrokenPipe" not in Path("err").read_text()
