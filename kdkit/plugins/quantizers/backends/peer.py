"""Both backends from kdkit's side: start the program, talk with it, and read what it left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kdkit.api.errors import EnvironmentUnmet, ModelError, StageError, Stopped
from kdkit.models.quantized.checkpoint import read_checkpoint
from kdkit.models.quantized.linear import QuantizedLinear

__all__ = ["Follow", "PeerJob", "PeerResult", "check_common", "converse", "environment", "result"]

_POLL_SECONDS: Final = 0.25
_EXIT_SECONDS: Final = 30.0
_SECRETS: Final = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN"})
_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LOG: Final = "output.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerJob:
    """What is to be quantised, and how; the settings mean what they mean for the backend ``reference``.

    Attributes:
        source: A full ``save_pretrained`` directory with its tokenizer.
        rows: Calibration rows as token ids, without padding.
        shapes: Name to (out, in) of every layer that is to be quantised.
        blocks: Decoder blocks of the model.
        group_size: A number that divides every input width, or -1.
        mse: Exponent of the grid search, 0 for none.
        lm_head: The output projection is among ``shapes``.
        device: ``cpu`` or ``cuda``.
    """

    source: Path
    rows: Sequence[Sequence[int]]
    shapes: Mapping[str, tuple[int, int]]
    blocks: int
    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    static_groups: bool
    damp_percent: float
    true_sequential: bool
    mse: float
    lm_head: bool
    device: str

    def settings(self) -> dict[str, Any]:
        """What both programs need, as plain data."""
        names = (
            "bits", "group_size", "sym", "desc_act", "static_groups", "damp_percent", "true_sequential", "mse",
            "lm_head", "device", "blocks",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerResult:
    """What came back.

    Attributes:
        linears: Name to quantised layer, exactly those that were asked for.
        program: Name and version of what did it, such as ``gptqmodel 7.6.0``.
        losses: Layer to the loss that the program itself reports, in its own unit; empty when it reports none.
        fell_back: Layers that the program rounded to nearest instead.
    """

    linears: Mapping[str, QuantizedLinear]
    program: str
    losses: Mapping[str, float] = field(default_factory=dict)
    fell_back: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Follow:
    """How a caller follows the work: how far it is (done, total), and whether it is asked to stop."""

    progress: Callable[[int, int], None] = lambda _done, _total: None
    stopping: Callable[[], bool] = lambda: False


def environment(directory: Path, **more: str) -> dict[str, str]:
    """Variables for a program that works in ``directory``: offline, without tokens, with its temporary files there."""
    kept = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    return {**kept, "HF_HUB_OFFLINE": "1", "TMPDIR": str(directory), **more}


def converse(
    command: Sequence[str], job: Mapping[str, Any], directory: Path, variables: Mapping[str, str], follow: Follow
) -> dict[str, Any]:
    """Start the program of a backend, give it ``job`` and wait for its last answer.

    Args:
        command: An interpreter, its options, the program, and last ``gptqmodel`` or ``auto-gptq``.
        job: Goes through a pipe: calibration tokens are never written to a file.
        directory: Where it runs and keeps temporary files; belongs to the caller, who removes it.
        variables: The program's environment.
        follow: Progress and the wish to stop.

    Raises:
        StageError: It failed; the text is its last line.
        Stopped: ``follow.stopping`` said so; the program is ended.
        EnvironmentUnmet: It cannot be started.
    """
    backend = command[-1]
    try:
        with (directory / _LOG).open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - our own program, no shell
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=directory,
                env=dict(variables),
            )
    except OSError as error:
        raise EnvironmentUnmet(f"backend {backend} cannot be started: {error.strerror}", where=command[0]) from error
    try:
        answer = _talk(process, job, backend, follow)
        if answer is not None:
            return answer
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_EXIT_SECONDS)
        raise _failed(backend, process.returncode, directory / _LOG)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _talk(
    process: subprocess.Popen[bytes], job: Mapping[str, Any], backend: str, follow: Follow
) -> dict[str, Any] | None:
    """The last answer, or None when the program ended without one. Its standard input stays open meanwhile."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
    for line in _lines(process, backend, follow):
        message = json.loads(line)
        if "done" in message:
            return dict(message["done"])
        done, total = message["step"]
        follow.progress(done, total)
    return None


def _lines(process: subprocess.Popen[bytes], backend: str, follow: Follow) -> Iterator[bytes]:
    """Whole lines of standard output until its end."""
    assert process.stdout is not None
    pipe, rest = process.stdout.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if follow.stopping():
                raise Stopped(f"stopped while {backend} worked; it starts anew when the stage is resumed")
            if not selector.select(_POLL_SECONDS):
                continue
            data = os.read(pipe, 65536)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from lines


def _failed(backend: str, status: int | None, log: Path) -> StageError:
    if status == -9:
        return StageError(f"{backend} was killed, most likely because memory ran out")
    lines = _COLOURS.sub("", log.read_text(encoding="utf-8", errors="replace")).splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {status}")
    return StageError(f"{backend} failed: {last[:500]}")


def result(job: PeerJob, checkpoint: Path, program: str, answer: Mapping[str, Any]) -> PeerResult:
    """Read what the program left in ``checkpoint``.

    Raises:
        StageError: It quantised other layers than it was asked to, or in another way.
        ModelError: What it left cannot be read.
    """
    _, linears = read_checkpoint(checkpoint)
    if differing := sorted(set(linears) ^ set(job.shapes)):
        raise StageError(
            f"{program} did not quantise the layers that it was asked to: {differing[0]} is one of {len(differing)}",
            hint="take backend: reference",
        )
    for name, linear in linears.items():
        out, width = job.shapes[name]
        groups = 1 if job.group_size == -1 else width // job.group_size
        if tuple(linear.codes.shape) != (out, width) or linear.scales.shape[1] != groups or linear.bits != job.bits:
            raise StageError(f"{program} quantised {name} in another way than it was asked to")
    return PeerResult(
        linears={name: linears[name] for name in job.shapes},
        program=program,
        losses={_full(name, job): loss for name, loss in answer["losses"].items()},
        fell_back=tuple(_full(name, job) for name in answer["fallback"]),
    )


def _full(short: str, job: PeerJob) -> str:
    """A layer's name in the model; gptqmodel says the block's number and the name inside of it."""
    return next((name for name in job.shapes if name.endswith(f".{short}")), short)


def check_common(job: PeerJob) -> None:
    """Refuse what neither program can do.

    Raises:
        ModelError: The group size does not divide the width of a layer (both would write a file that then crashes), or
            the damping is out of range.
    """
    if not 0 < job.damp_percent < 1:
        raise ModelError(f"damp_percent is {job.damp_percent:g}", allowed="above 0 and below 1 for this backend")
    for name, (_, width) in job.shapes.items():
        if job.group_size != -1 and (job.group_size < 1 or width % job.group_size):
            raise ModelError(f"group_size {job.group_size} does not divide its {width} inputs", where=name)
