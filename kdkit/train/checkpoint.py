"""Checkpoints that survive a kill at any moment.

A checkpoint is written to a temporary sibling, flushed, described by a manifest with the hash of every file, and
renamed. A directory without a manifest, or whose files do not match it, is not a checkpoint. Only safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kdkit.api.errors import EnvironmentUnmet, StageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

__all__ = [
    "Progress",
    "State",
    "check_space",
    "latest",
    "load",
    "load_best",
    "load_state",
    "problem_of",
    "save",
    "save_best",
    "write",
]

KEEP: Final = 2
_MANIFEST: Final = "manifest.json"


@dataclass(slots=True)
class Progress:
    """Where training is, besides tensors.

    Attributes:
        step: Optimiser steps done; the data position and the learning rate are functions of it.
        total_steps: Planned steps, so that a resumed schedule cannot silently be another one.
        tokens: Learned tokens so far, all ranks.
        skipped: Steps left out because of a non-finite gradient; ``skipped_in_row`` of them just now.
        best: Best value of the watched metric; ``best_step`` is its step, ``best_values`` the whole evaluation.
        patience: Evaluations since the best one.
    """

    total_steps: int
    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    best: float | None = None
    best_step: int = 0
    patience: int = 0
    best_values: dict[str, float] = field(default_factory=dict)
    rng: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class State:
    """What a source of rows keeps in a checkpoint, in files of its own: tensors, and facts that JSON can hold."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def save(
    root: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    log: Callable[[str], None],
    states: Mapping[str, State],
) -> bool:
    """Write the checkpoint of ``progress.step`` below ``root`` and remove all but the newest two.

    Args:
        root: Where checkpoints are.
        module: The model.
        optimizer: Its optimiser.
        progress: Where training is; the RNG states are put into it.
        log: Is told when the checkpoint cannot be written.
        states: What else is kept, by the name of its files.

    Returns:
        Whether it was written: a full disk is logged, and the older checkpoints stay as they are.
    """
    progress.rng = _rng_state()
    tensors = {"model": _weights(module), "optimizer": _optimizer_tensors(module, optimizer)}
    tensors |= {name: dict(state.tensors) for name, state in states.items()}
    facts = {"progress": asdict(progress), **{name: state.facts for name, state in states.items()}}
    written = write(root / f"step-{progress.step:06d}", tensors, facts, log)
    if written:
        for old in sorted(root.glob("step-*"))[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)
    return written


def save_best(root: Path, module: nn.Module, step: int, log: Callable[[str], None]) -> bool:
    """Keep the weights of ``step`` as the best so far; False, with a line in the log, when they cannot be written."""
    return write(root / "best", {"model": _weights(module)}, {"progress": {"step": step}}, log)


def load_best(root: Path, module: nn.Module) -> None:
    """Restore the weights that :func:`save_best` kept.

    Raises:
        StageError: They were never written, or are damaged.
    """
    problem = problem_of(root / "best")
    if problem is not None:
        raise StageError(f"the best weights cannot be restored: {problem}", where=str(root / "best"))
    _restore_weights(module, load_file(root / "best" / "model.safetensors"))


def write(
    final: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, Mapping[str, Any]],
    log: Callable[[str], None],
) -> bool:
    """Write a directory with one file for every group of tensors and of facts and a manifest, whole or not at all.

    Returns:
        Whether it was written; if not, the log says why.
    """
    temporary = final.with_name(f".tmp-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, group in tensors.items():
            save_file({key: t.detach().contiguous() for key, t in group.items()}, temporary / f"{name}.safetensors")
        for name, values in facts.items():
            (temporary / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
        _commit(temporary, final)
    except (OSError, RuntimeError, SafetensorError) as error:
        # safetensors and torch report a full disk as their own error types.
        shutil.rmtree(temporary, ignore_errors=True)
        log(f"{final.name} not written: {error}")
        return False
    return True


def latest(root: Path, log: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint below ``root``; damaged ones are named and passed over."""
    for path in sorted(root.glob("step-*"), reverse=True):
        problem = problem_of(path)
        if problem is None:
            return path
        log(f"checkpoint {path.name} is damaged ({problem}), passed over")
    return None


def load(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, *, total_steps: int) -> Progress:
    """Restore weights, optimiser and RNG states in place and return where training was.

    Raises:
        StageError: The checkpoint belongs to another schedule or another model.
    """
    progress = Progress(**json.loads((path / "progress.json").read_text(encoding="utf-8")))
    if progress.total_steps != total_steps:
        raise StageError(
            f"the checkpoint was made for {progress.total_steps} steps, now {total_steps} are planned",
            where=str(path),
            hint="run with --fresh",
        )
    try:
        _restore_weights(module, load_file(path / "model.safetensors"))
        _restore_optimizer(module, optimizer, load_file(path / "optimizer.safetensors"))
    except (KeyError, RuntimeError) as error:
        raise StageError(f"the checkpoint does not fit the model: {error}", where=str(path)) from error
    _restore_rng(progress.rng)
    return progress


def load_state(path: Path, name: str) -> State | None:
    """What :func:`save` was given under this name; None when it was given nothing."""
    facts = path / f"{name}.json"
    if not facts.exists():
        return None
    return State(load_file(path / f"{name}.safetensors"), json.loads(facts.read_text(encoding="utf-8")))


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a tied tensor appears once."""
    return {
        **{name: p.data for name, p in module.named_parameters()},
        **{f"buffer:{name}": b for name, b in module.named_buffers()},
    }


@torch.no_grad()
def _restore_weights(module: nn.Module, stored: Mapping[str, Tensor]) -> None:
    for name, parameter in _weights(module).items():
        parameter.copy_(stored[name])


def _optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": torch.as_tensor(value).contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _restore_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, stored: Mapping[str, Tensor]) -> None:
    by_name = dict(module.named_parameters())
    for flat, value in stored.items():
        name, _, key = flat.rpartition("/")
        parameter = by_name[name]
        optimizer.state[parameter][key] = value.to(parameter.device)


def _rng_state() -> dict[str, Any]:
    version, state, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "python": [version, list(state), gauss],
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}},
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def _restore_rng(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    key = np.asarray(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([torch.tensor(s, dtype=torch.uint8) for s in state["cuda"]])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _commit(temporary: Path, final: Path) -> None:
    files = sorted(p for p in temporary.iterdir() if p.is_file())
    listing = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
    (temporary / _MANIFEST).write_text(json.dumps({"files": listing, "torch": torch.__version__}), encoding="utf-8")
    for path in [*files, temporary / _MANIFEST, temporary]:
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def problem_of(path: Path) -> str | None:
    """What is wrong with a directory that :func:`write` may have written; None when it is whole."""
    try:
        listing = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, facts in listing.items():
            file = path / name
            if file.stat().st_size != facts["bytes"] or _sha256(file) != facts["sha256"]:
                return f"{name} does not match its hash"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return None


def check_space(root: Path, module: nn.Module) -> None:
    """Refuse to start when the kept checkpoints (weights and two moments each) would not fit.

    Those that are there already count: a resume needs the space that is missing, not all of it.

    Raises:
        EnvironmentUnmet: Less space is free than that.
    """
    root.mkdir(parents=True, exist_ok=True)
    there = sum(file.stat().st_size for file in root.glob("step-*/*"))
    need = KEEP * 3 * sum(t.numel() * t.element_size() for t in _weights(module).values()) - there
    free = shutil.disk_usage(root).free
    if free < need:
        raise EnvironmentUnmet(
            f"checkpoints need {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
            where=str(root),
            hint="free space, or set KDKIT_STORE to a larger disk",
        )
