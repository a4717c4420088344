"""``env.json``: where and with what a run happened. No host name, no secrets."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from kdkit.engine.hardware import cpu_name, cuda_devices, memory_bytes, resolve_precision, threads

__all__ = ["describe_environment", "versions"]

_PACKAGES: Final = (
    "kdkit",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "accelerate",
    "safetensors",
    "numpy",
    "pydantic",
    "gptqmodel",
    "optimum",
)
_VARIABLES: Final = (
    "CUDA_VISIBLE_DEVICES",
    "HF_DATASETS_OFFLINE",
    "HF_HUB_OFFLINE",
    "KDKIT_AUTO_GPTQ_PYTHON",
    "KDKIT_DISABLE_PLUGINS",
    "KDKIT_MODELS",
    "KDKIT_STORE",
    "KDKIT_STRICT_PLUGINS",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "TRANSFORMERS_OFFLINE",
)
"""The only variables that are recorded."""


def versions() -> dict[str, str]:
    """Python and the installed packages that decide results, without importing any."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe_environment() -> dict[str, Any]:
    """The content of ``env.json``."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": threads(),
        "memory_bytes": memory_bytes(),
        "gpus": [name for name, _ in cuda_devices()],
        "precision": resolve_precision("auto"),
        "git": _git(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _git() -> dict[str, Any] | None:
    """Commit of the current directory and whether it has changes; None outside a repository."""
    commit = _ask_git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "changed": bool(_ask_git("status", "--porcelain", "--untracked-files=no"))}


def _ask_git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(  # noqa: S603 - fixed arguments, no shell
            ["git", *arguments],  # noqa: S607 - git is found as any command is
            capture_output=True, text=True, timeout=5, check=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
