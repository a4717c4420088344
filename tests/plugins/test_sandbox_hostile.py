from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox_helpers import HERE, PROVIDERS, need

from kdkit.testing.programs import hostile_programs


@pytest.fixture
def directory() -> Iterator[Path]:
    """Every user may reach it, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="kdkit-user-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def started(prefix: list[str], program: str, *arguments: str) -> dict:
    command = [sys.executable, *prefix, str(HERE / program), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path]).strip(os.pathsep)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_there_are_enough_of_them():
    python, cpp = hostile_programs("python"), hostile_programs("cpp")
    assert len(python) >= 34
    assert len(cpp) >= 6
    assert len({p.name for p in (*python, *cpp)}) == len(python) + len(cpp)


@pytest.mark.parametrize("language", ["python", "cpp"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_hostile_programs_started_by_an_ordinary_user(provider, language, directory):
    if os.getuid() != 0:
        pytest.skip("the tests run as an ordinary user anyway")
    need(provider)
    if language == "cpp" and not shutil.which("g++", path="/usr/bin"):
        pytest.skip("no g++")
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no mount namespace, with which a user is given the interpreter: {probe.stderr.strip()}")
    found = started([str(HERE / "as_user.py"), str(directory)], "hostile_run.py", provider, language)
    assert found["uid"] != 0
    assert found["problems"] == []


def test_in_a_container_auto_takes_landlock(directory):
    need("landlock")
    prefix = []
    if os.getuid() == 0:
        probe = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True, check=False)
        if probe.returncode:
            pytest.skip(f"no mount namespace, with which a user is given the interpreter: {probe.stderr.strip()}")
        prefix = [str(HERE / "as_user.py"), str(directory)]
    found = started(prefix, "container_run.py")
    usable, reason, hint = found["bubblewrap"]
    assert not usable
    assert "landlock" in hint or "pip install" in hint, (reason, hint)
    assert found["chosen"] == "landlock"
    assert found["outcomes"] == ["ok", "1\n", "runtime-error"]
