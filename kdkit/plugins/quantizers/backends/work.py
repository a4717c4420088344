"""How the quantizer ``gptq`` hands its work to a backend."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from kdkit.models.files import write_errors
from kdkit.plugins.quantizers.backends import find
from kdkit.plugins.quantizers.backends.peer import Follow, PeerJob, PeerResult

if TYPE_CHECKING:
    from kdkit.api import StageContext

__all__ = ["work_elsewhere"]


def work_elsewhere(backend: str, job: PeerJob, ctx: StageContext) -> PeerResult:
    """Let ``backend`` quantise; its temporary files are gone afterwards, whatever happens.

    Raises:
        EnvironmentUnmet: It cannot work on this machine.
        ModelError: It cannot do what the job asks for.
        DataError: It cannot use the calibration rows.
        StageError: It failed.
        Stopped: The stage was asked to stop.
    """
    module = find(backend)
    module.ready()
    module.check(job)
    directory = ctx.checkpoints / "backend"
    # Of an attempt that was killed.
    shutil.rmtree(directory, ignore_errors=True)
    try:
        with write_errors(directory):
            directory.mkdir(parents=True)
            follow = Follow(progress=ctx.progress, stopping=ctx.stopping)
            result: PeerResult = module.quantize(job, directory, follow)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    for name in result.fell_back:
        ctx.log(f"{name}: {result.program} rounded it to nearest")
    return result
