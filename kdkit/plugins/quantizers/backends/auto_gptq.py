"""Backend ``auto-gptq``: the original program, in a Python environment of its own.

auto-gptq 0.7.1 has been at its end of life since 2025. It cannot be imported with transformers 5 and never quantises
without CUDA. So it runs with the old packages it needs, in the interpreter that ``KDKIT_AUTO_GPTQ_PYTHON`` names;
``kdkit doctor`` says how to make one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from kdkit.api.artifacts import Model
from kdkit.api.errors import ModelError
from kdkit.models.load import load_model
from kdkit.models.quantized.form import old_names
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

__all__ = ["check", "old_config", "quantize", "ready"]

_CHECK_TOKENS: Final = 128
_TOLERANCE: Final = 0.01
"""Nats per token by which two versions of transformers may differ, both in float32."""
_WEIGHTS: Final = ("*.safetensors", "*.safetensors.index.json")


def ready() -> None:
    """Check that there is an environment with auto-gptq, and a CUDA device.

    Raises:
        EnvironmentUnmet: There is not.
    """
    require("auto-gptq")


def check(job: PeerJob) -> None:
    """Refuse what auto-gptq cannot do, before it starts.

    Raises:
        ModelError: Asymmetric grids, a quantised head, or a group size that does not divide.
    """
    check_common(job)
    if not job.sym:
        raise ModelError(
            "auto-gptq writes asymmetric layers wrongly where a zero point is 0: it destroys the zero points beside it",
            allowed="sym: true, or another backend",
        )
    if job.lm_head:
        raise ModelError("auto-gptq never quantises the output projection", allowed="lm_head: false")


def quantize(job: PeerJob, directory: Path, follow: Follow | None = None) -> PeerResult:
    """Quantise with auto-gptq.

    Args:
        job: What to do; :func:`check` has accepted it.
        directory: An empty directory for temporary files, which the caller removes afterwards.
        follow: Progress in layers, and the wish to stop.

    Raises:
        StageError: auto-gptq failed, or its transformers reads the model in another way than ours.
        Stopped: Asked to stop; nothing is kept.
    """
    source, checkpoint = directory / "source", directory / "checkpoint"
    _for_old_transformers(job.source, source)
    rows = [list(row) for row in job.rows]
    facts = {
        **job.settings(),
        "source": str(source),
        "out": str(checkpoint),
        "rows": rows,
        "layers": len(job.shapes),
        "check": _reading(job.source, max(rows, key=len)[:_CHECK_TOKENS]),
    }
    answer = converse(command_of("auto-gptq"), facts, directory, environment(directory), follow or Follow())
    return result(job, checkpoint, f"auto-gptq {answer['version']}", answer)


def _reading(source: Path, ids: list[int]) -> dict[str, Any]:
    """What this transformers makes of the model: the mean loss of some tokens, which the old one has to repeat."""
    model = load_model(Model(path=source), dtype=torch.float32)
    row = torch.tensor([ids])
    with torch.no_grad():
        loss = float(model(input_ids=row, labels=row).loss)
    return {"ids": ids, "loss": loss, "tolerance": _TOLERANCE}


def _for_old_transformers(source: Path, dest: Path) -> None:
    """A directory that transformers 4 understands: the same weights, and the configuration in its words."""
    dest.mkdir()
    for pattern in _WEIGHTS:
        for file in source.glob(pattern):
            (dest / file.name).symlink_to(file.resolve())
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (dest / "config.json").write_text(json.dumps(old_config(config)), encoding="utf-8")


def old_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` of transformers 5 as transformers 4 reads it.

    auto-gptq trusts every model's own code, which ``auto_map`` names: that entry is left out.
    """
    return {key: value for key, value in config.items() if key != "auto_map"} | old_names(dict(config))
