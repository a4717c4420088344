"""Backend ``gptqmodel``: auto-gptq's maintained successor, in a process of its own.

gptqmodel changes transformers when it is imported and prints a banner; a process of its own keeps both away.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from kdkit.api.errors import DataError, ModelError
from kdkit.plugins.quantizers.backends.environment import command_of, require
from kdkit.plugins.quantizers.backends.peer import (
    Follow,
    PeerJob,
    PeerResult,
    check_common,
    converse,
    environment,
    result,
)

__all__ = ["check", "quantize", "ready"]

_SHORTEST: Final = 10
"""It leaves out rows of at most so many tokens."""
_WORKERS: Final = "GPTQMODEL_CPU_WORKERS"


def ready() -> None:
    """Check that gptqmodel is installed.

    Raises:
        EnvironmentUnmet: It is not, or in a version that is not known to work.
    """
    require("gptqmodel")


def check(job: PeerJob) -> None:
    """Refuse what gptqmodel cannot do, before it starts.

    Raises:
        ModelError: A group size that does not divide, which it would write all the same, damping out of range, or a
            quantised head.
        DataError: No row is long enough.
    """
    check_common(job)
    if job.lm_head:
        raise ModelError(
            "gptqmodel gives the output projection 8 bits and groups of 32, whatever it is asked for",
            allowed="lm_head: false, or backend: reference",
        )
    if not any(len(row) > _SHORTEST for row in job.rows):
        raise DataError(f"no calibration row has more than {_SHORTEST} tokens, and gptqmodel leaves out shorter ones")


def quantize(job: PeerJob, directory: Path, follow: Follow | None = None) -> PeerResult:
    """Quantise with gptqmodel.

    Args:
        job: What to do; :func:`check` has accepted it.
        directory: An empty directory for temporary files, which the caller removes afterwards.
        follow: Progress in decoder blocks, and the wish to stop.

    Raises:
        StageError: gptqmodel failed.
        Stopped: Asked to stop; nothing is kept.
    """
    checkpoint = directory / "checkpoint"
    facts = {**job.settings(), "source": str(job.source), "out": str(checkpoint), "rows": [list(r) for r in job.rows]}
    variables = environment(directory, **{_WORKERS: workers(), "GPTQMODEL_LOG_CALIBRATION_SAMPLES": "0"})
    answer = converse(command_of("gptqmodel"), facts, directory, variables, follow or Follow())
    return result(job, checkpoint, f"gptqmodel {answer['version']}", answer)


def workers() -> str:
    """Threads of gptqmodel's pool for the CPU.

    By default it takes half of the cores, and with one it refuses to work: its loader wants two.
    """
    given = os.environ.get(_WORKERS, "")
    if given.isdecimal():
        return str(max(2, int(given)))
    return str(min(12, max(2, ((os.cpu_count() or 1) + 1) // 2)))
