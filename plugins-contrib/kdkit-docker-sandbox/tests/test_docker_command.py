"""What docker is asked, and what is said where it is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_docker import FakeDocker

import kdkit
from kdkit.api import EnvironmentUnmet, RecipeError, SandboxCanary, SandboxJob, SandboxLimits, SandboxOutcome
from kdkit.testing.tiny import save_tiny_model
from kdkit_docker_sandbox import canaries
from kdkit_docker_sandbox import docker as command
from kdkit_docker_sandbox import sandbox as implementation
from kdkit_docker_sandbox.docker import Docker
from kdkit_docker_sandbox.session import DockerSession

RECIPE = Path(__file__).parents[1] / "recipe.yaml"
MIB = 2**20
FLAGS = {
    "--network": "none",
    "--ipc": "none",
    "--user": "65534:65534",
    "--cap-drop": "ALL",
    "--security-opt": "no-new-privileges",
    "--pull": "never",
    "--workdir": "/box",
    "--memory": str(180 * MIB),
    "--memory-swap": str(180 * MIB),
    "--pids-limit": "8",
    "--cpus": "1",
    "--log-driver": "none",
    "--entrypoint": "python3",
    "--label": "kdkit-docker-sandbox",
    "--hostname": "box",
}
BARE = {"--rm", "--interactive", "--read-only", "--no-healthcheck"}


def test_the_command_line(docker: FakeDocker) -> None:
    limits = SandboxLimits(memory_bytes=100 * MIB, processes=7)
    session = DockerSession(Docker(docker.program, "python:3.12-slim", "sha256:5f3a"), limits, 2)
    session.run([SandboxJob(program="print('; rm -rf $HOME `id`')", stdin="$(id)")] * 2)
    session.close()
    first, second = docker.asked("run")
    image = first.index("sha256:5f3a")
    given, rest = first[1:image], first[image + 1 :]
    assert rest[:3] == ["-I", "-B", "-c"]
    assert len(rest) == 4
    assert rest[3] == Path(command.__file__).with_name("inside.py").read_text()
    words = iter(given)
    flags: dict[str, list[str]] = {}
    for word in words:
        flags.setdefault(word, []).append("" if word in BARE else next(words))
    assert {name for name, values in flags.items() if values == [""]} == BARE
    assert {name: value for name, (value, *_) in flags.items() if name in FLAGS} == FLAGS
    assert flags["--tmpfs"] == ["/box:rw,noexec,nosuid,nodev,size=16m,nr_inodes=1024,mode=1777"]
    assert flags["--ulimit"] == ["core=0", "nofile=256"]
    assert set(flags) == {*FLAGS, *BARE, "--tmpfs", "--ulimit", "--name"}
    assert flags["--name"] != [second[second.index("--name") + 1]], "containers need names of their own"
    # Nothing of a job is an argument, and nothing of this machine is mounted.
    assert not any("rm -rf" in word or "$(id)" in word for word in (*first, *second))


def test_the_real_command_line_knows_every_flag() -> None:
    """Docker reads its arguments before it asks the daemon, which need not run."""
    docker = next((path for path in ("/usr/bin/docker", "/usr/local/bin/docker") if os.access(path, os.X_OK)), None)
    if docker is None:
        pytest.skip("docker is not installed")
    argv = Docker(docker, "x", "x").run("kdkit-test", SandboxLimits())
    env = {**os.environ, "DOCKER_HOST": "unix:///nowhere/docker.sock"}
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env, check=False)
    assert done.returncode in (1, 125)
    assert "daemon" in done.stderr, done.stderr
    unknown = subprocess.run([*argv[:2], "--no-such-flag"], capture_output=True, text=True, env=env, check=False)
    assert "unknown flag" in unknown.stderr


START = "start it (systemctl start docker), and let this user use it (group docker)"
NO_DAEMON = "Cannot connect to the Docker daemon at unix:///x."
NO_IMAGE = "Error: No such image: python:3.12-slim"
BROKEN: dict[str, tuple[dict[str, str], str, str]] = {
    "no daemon": ({"version": f"sys.exit({NO_DAEMON!r})"}, f"the Docker daemon does not answer: {NO_DAEMON}", START),
    "no image": (
        {"image": f"print(); sys.exit({NO_IMAGE!r})"},
        f"there is no image python:3.12-slim on this machine: {NO_IMAGE}",
        "run: docker pull python:3.12-slim",
    ),
    "no answer": ({"version": "time.sleep(60)"}, "the Docker daemon does not answer: nothing within 1 s", START),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_docker_that_does_not_work_is_refused(what: str, docker: FakeDocker, monkeypatch: pytest.MonkeyPatch) -> None:
    behaviour, reason, hint = BROKEN[what]
    docker.does(**behaviour)
    if what == "no answer":
        monkeypatch.setattr(command, "_ANSWER_S", 1.0)
    sandbox = kdkit.build("sandbox", "docker")
    with pytest.raises(EnvironmentUnmet) as refused:
        sandbox.open(SandboxLimits())
    assert str(refused.value) == f"sandbox docker: {reason}; {hint}"
    assert refused.value.exit_code == 4
    report = sandbox.probe()
    assert (report.usable, report.canaries) == (False, ())
    assert (report.reason, report.hint) == (reason, hint)
    assert not docker.asked("run")


def test_no_docker_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentUnmet) as refused:
        kdkit.build("sandbox", "docker").open(SandboxLimits())
    hint = "install Docker, or use the sandbox auto, which needs none"
    assert str(refused.value) == f"sandbox docker: docker is not installed; {hint}"
    done = subprocess.run(
        [sys.executable, "-m", "kdkit", "sandbox", "check", "docker"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 4
    assert "docker is not installed" in done.stdout


def test_a_recipe_without_docker_ends_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDKIT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PATH", str(tmp_path))
    tiny = str(save_tiny_model(tmp_path / "tiny"))
    short = {"stages.grpo.max_steps": 1, "stages.grpo.max_completion_length": 8, "stages.grpo.max_length": 2000}
    result = kdkit.run(RECIPE, var={"student": tiny}, set=short, out=tmp_path)
    assert not result.ok
    assert "docker is not installed" in str(result.error)


def test_images_that_are_options_are_refused() -> None:
    for image in ("--privileged", "-v/:/host", "a b", ""):
        with pytest.raises(RecipeError, match="image"):
            kdkit.build("sandbox", "docker", image=image)
    kdkit.build("sandbox", "docker", image="registry.example:5000/a/b:c@sha256:0123")


# --- the probe


@pytest.mark.parametrize(
    ("status", "stdout", "passed"),
    [
        ("ok", "killed\n", True),
        ("memory", "", True),
        ("ok", "its processes together used 600 MiB: [0, 0, 0, 0]\n", False),
        ("timeout", "", False),
        ("runtime-error", "", False),
    ],
)
def test_memory_of_processes_is_limited_only_if_one_was_killed(status: Any, stdout: str, *, passed: bool) -> None:
    assert canaries._one_was_killed(SandboxOutcome(status=status, stdout=stdout)) is passed


def test_a_docker_that_isolates_nothing_does_not_pass(docker: FakeDocker) -> None:
    """The stand-in runs programs right here: the canaries have to see it."""
    sandbox = kdkit.build("sandbox", "docker", workers=2)
    report = sandbox.probe()
    assert not report.usable
    passed = {canary.name for canary in report.canaries if canary.passed}
    failed = {canary.name for canary in report.canaries if not canary.passed}
    assert passed >= {"hello", "exit code", "cpu limit", "wall limit", "memory limit", "output limit", "environment"}
    assert failed >= {"privileges", "memory of processes", "processes", "files", "network", "watcher"}
    assert report.reason.startswith("canary 'privileges' failed: ok: ")
    with pytest.raises(EnvironmentUnmet, match="canary 'privileges' failed"):
        sandbox.open(SandboxLimits())


def test_a_docker_that_runs_nothing_says_why(docker: FakeDocker) -> None:
    docker.does(run="print('docker: Error: no space left.\\n\\nRun docker --help', file=sys.stderr); sys.exit(125)")
    report = kdkit.build("sandbox", "docker", workers=2).probe()
    assert not report.usable
    assert report.reason == "canary 'hello' failed: infra-error: docker failed: Error: no space left."


def test_canaries_run_once_for_an_image(docker: FakeDocker, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[object] = []

    def run_canaries(session: object) -> tuple[SandboxCanary, ...]:
        ran.append(session)
        return (SandboxCanary(name="hello", passed=True),)

    monkeypatch.setattr(implementation, "run_canaries", run_canaries)
    for _ in range(2):
        kdkit.build("sandbox", "docker").open(SandboxLimits()).close()
    assert len(ran) == 1
    docker.does(image="print('sha256:0000')")
    kdkit.build("sandbox", "docker").open(SandboxLimits()).close()
    assert len(ran) == 2
    report = kdkit.build("sandbox", "docker").probe()
    assert len(ran) == 3
    assert report.usable
    assert "network" in report.isolates
