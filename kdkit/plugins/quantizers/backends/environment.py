"""Is what a backend needs here? Answers in milliseconds, without importing torch or the backend. Light."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement
from packaging.version import Version

from kdkit.api.errors import EnvironmentUnmet
from kdkit.plugins.quantizers.backends.peer_process import has_device

__all__ = [
    "AUTO_GPTQ_PYTHON",
    "CHILD",
    "State",
    "auto_gptq_state",
    "command_of",
    "gptqmodel_state",
    "require",
    "states",
]

CHILD: Final = Path(__file__).with_name("peer_process.py")
"""The program that runs beside a backend's package. It imports nothing of kdkit."""
AUTO_GPTQ_PYTHON: Final = "KDKIT_AUTO_GPTQ_PYTHON"
"""Where auto-gptq's interpreter is. A variable, not a parameter: the place changes nothing about the result."""
GPTQMODEL: Final = Requirement("gptqmodel>=7.4,<7.7")
"""7.7 wants a newer torch than 2.13."""
AUTO_GPTQ_PINS: Final = tuple(
    Requirement(text)
    for text in (
        "auto-gptq==0.7.1",
        "transformers>=4.36,<4.54",
        "numpy<2",
        "pyarrow<19",
        "peft<0.11",
        "accelerate<1",
        "datasets<3",
    )
)
"""What auto-gptq 0.7.1 works with, found by trying: decoder layers of transformers return a tensor since 4.54."""
_PROBE_SECONDS: Final = 30.0
_EXTRA_HINT: Final = "run: pip install 'kdkit[gptq]'"


@dataclass(frozen=True, slots=True)
class State:
    """Whether a backend works on this machine.

    Attributes:
        usable: Nothing is missing.
        found: What is there, or what is missing, in words.
        hint: What would meet it.
    """

    usable: bool
    found: str
    hint: str = ""


def states() -> dict[str, State]:
    """Every backend that needs something, by name."""
    return {name: state() for name, state in _STATES.items()}


def require(backend: str) -> None:
    """Check that a backend other than ``reference`` works here, before anything else is done.

    Raises:
        EnvironmentUnmet: It does not; the hint is what would meet it.
    """
    state = _STATES[backend]()
    if not state.usable:
        raise EnvironmentUnmet(f"backend {backend} cannot work here: {state.found}", hint=state.hint)


def gptqmodel_state() -> State:
    """The state of gptqmodel in this interpreter."""
    try:
        found = version("gptqmodel")
    except PackageNotFoundError:
        return State(usable=False, found="not installed", hint=_EXTRA_HINT)
    if not GPTQMODEL.specifier.contains(found, prereleases=True):
        return State(usable=False, found=f"version {found} is not {GPTQMODEL.specifier}", hint=_EXTRA_HINT)
    return State(usable=True, found=found)


def auto_gptq_python() -> str | None:
    """The interpreter that the environment variable names, or None."""
    return os.environ.get(AUTO_GPTQ_PYTHON) or None


def auto_gptq_state() -> State:
    """The state of auto-gptq in the interpreter that ``KDKIT_AUTO_GPTQ_PYTHON`` names, and of a GPU for it."""
    wrong = [] if has_device() else ["it never quantises without CUDA, and this machine has no CUDA device"]
    python = auto_gptq_python()
    answer = _probe(python) if python else None
    if python is None:
        wrong.append(f"{AUTO_GPTQ_PYTHON} is not set")
    elif answer is None:
        wrong.append(f"{AUTO_GPTQ_PYTHON}={python} is no working Python")
    else:
        wrong += _misfits(answer)
    if wrong or answer is None:
        return State(usable=False, found="; ".join(wrong), hint=how_to_make())
    versions = answer["versions"]
    return State(usable=True, found=f"{versions['auto-gptq']} with transformers {versions['transformers']}")


_STATES: Final = {"gptqmodel": gptqmodel_state, "auto-gptq": auto_gptq_state}


def _misfits(answer: Mapping[str, Any]) -> list[str]:
    """What does not fit in the environment that answered."""
    versions = answer["versions"]
    wrong = [problem for pin in AUTO_GPTQ_PINS if (problem := _problem(pin, versions.get(pin.name)))]
    if not answer["cuda"]:
        wrong.append("its torch is not built for CUDA" if "torch" in versions else "torch is not installed")
    return [f"in its environment {problem}" for problem in wrong]


def how_to_make() -> str:
    """The line that makes an environment for auto-gptq."""
    packages = " ".join(f"'{pin}'" for pin in AUTO_GPTQ_PINS)
    return (
        "take backend reference or gptqmodel, or, on a machine with CUDA, run: python3.11 -m venv DIR && "
        f"DIR/bin/pip install torch && DIR/bin/pip install {packages} && export {AUTO_GPTQ_PYTHON}=DIR/bin/python"
    )


def _problem(pin: Requirement, have: str | None) -> str | None:
    if have is None:
        return f"{pin.name} is not installed"
    if not pin.specifier.contains(Version(have), prereleases=True):
        return f"{pin.name} {have} is not {pin.specifier}"
    return None


def _probe(python: str) -> dict[str, Any] | None:
    """Versions in that interpreter, and whether it sees a CUDA device; None when it does not answer."""
    command = [python, "-I", str(CHILD), "probe"]
    try:
        done = subprocess.run(  # noqa: S603 - the interpreter that the user named, no shell
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=_PROBE_SECONDS, check=True
        )
        answer = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return answer if isinstance(answer, dict) and isinstance(answer.get("versions"), dict) else None


def command_of(backend: str) -> list[str]:
    """The command line that starts :data:`CHILD` for ``backend``.

    auto-gptq's interpreter is isolated from variables and packages that are meant for this one.
    """
    if backend == "auto-gptq":
        return [auto_gptq_python() or "", "-I", str(CHILD), backend]
    # Without -P the modules beside the program would shadow the package of the same name.
    return [sys.executable, "-P", str(CHILD), backend]
