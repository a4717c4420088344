"""What a stage sees of kdkit while it runs."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from kdkit.api.artifacts import Artifact, Model
from kdkit.api.data import Rows
from kdkit.api.errors import DataError, StageError
from kdkit.api.protocols import DatasetLoader
from kdkit.api.slots import Component, Ref, StageOutput, walk
from kdkit.engine.boundary import ComponentBoundary
from kdkit.engine.events import Event, Sink
from kdkit.engine.hardware import pick_device, resolve_precision
from kdkit.engine.inputs import Inputs, artifact_at
from kdkit.engine.job import StageJob
from kdkit.engine.manifest import Manifest
from kdkit.engine.metrics import MetricsFile, Trackers
from kdkit.host import check_extras

if TYPE_CHECKING:
    from kdkit.api.slots import Found

__all__ = ["Builder", "Context"]

A = TypeVar("A", bound=Artifact)
T = TypeVar("T")
_REFERENCE: Final = re.compile(r"\$\{stages\.([^.{}]+)\.([^.{}]+)\}")
_WITH_CONTEXT: Final = frozenset({"reward", "teacher", "rollout"})


def derive_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose, 0 to 2**63 - 1. Stages share it, so that SFT and KD see their data in the same order."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "big") % 2**63


class Builder:
    """Builds components and resolves references; a ``BuildContext`` and ``LoadContext``.

    Attributes:
        seed: The recipe's seed.
        offline: Whether network access is forbidden.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, seed: int, inputs: Inputs, *, log: Callable[[str], None]) -> None:
        self.seed = seed
        self.offline = inputs.offline
        self.device = pick_device()
        self._inputs = inputs
        self._log = log

    def log(self, message: str, /) -> None:
        """One line for the person who runs the recipe; another stage's output is called as in the results of a run."""
        self._log(" ".join(_REFERENCE.sub(r"\1.\2", message).split()))

    def precision(self, requested: str, /) -> Literal["bf16", "fp32"]:
        """``auto`` resolved for this machine."""
        return resolve_precision(requested)

    def resolve(self, ref: Ref[A], /) -> A:
        """The local artifact behind a reference."""
        artifact = artifact_at(ref, self._inputs.path(ref))
        if not isinstance(artifact, ref.artifact):
            raise StageError(f"{ref} is no {ref.artifact.type_name}")
        return artifact

    def build(self, component: Component[T], /, *args: Any) -> T:
        """Build a nested component; errors name its plugin."""
        spec: Any = component.found.spec
        check_extras(component.found)
        with ComponentBoundary(component.found, _founds(component.params)):
            context = (self,) if component.kind in _WITH_CONTEXT else ()
            built: T = spec.build(component.params, *context, *args)
        return built


def _founds(params: Any) -> list[Found]:
    return [slot.found for _, slot in walk(params) if isinstance(slot, Component)]


class Context(Builder):
    """A ``StageContext``: one stage's view of its recipe, inputs, directories and observers.

    Args:
        job: The stage to run.
        recipe: Name of the recipe.
        seed: Its seed.
        emit: Receives events.
        trackers: Receive metrics.
        stopping: Whether a signal asked for an orderly end.
    """

    PROGRESS_SECONDS: Final = 0.2

    def __init__(
        self, job: StageJob, *, recipe: str, seed: int, emit: Sink, trackers: Trackers, stopping: Callable[[], bool]
    ) -> None:
        self.base_dir = Path(job.base_dir)
        inputs = Inputs(self.base_dir, pins=job.pins)
        super().__init__(seed, inputs, log=lambda message: emit(Event("log", job.stage, {"message": message})))
        self.name = job.stage
        self.recipe = recipe
        self.out = Path(job.out)
        self.checkpoints = job.checkpoints
        self.run_dir = Path(job.run_dir)
        self._job = job
        self._emit = emit
        self._trackers = trackers
        self._metrics = MetricsFile(self.out / "metrics.jsonl", resumed=job.resumed)
        self._stopping = stopping
        self._shown = -math.inf

    def precision(self, requested: str, /) -> Literal["bf16", "fp32"]:
        """``auto`` as the plan resolved it, which is part of the key."""
        return resolve_precision(self._job.precision if requested == "auto" else requested)

    def resolve(self, ref: Ref[A], /) -> A:
        """The local artifact behind a reference: an earlier stage's output, or what the plan found for a literal."""
        if not isinstance(ref.source, StageOutput):
            return super().resolve(ref)
        entry = Path(self._job.upstream[ref.source.stage])
        artifact = Manifest.read(entry).artifacts(entry).get(ref.source.output)
        if not isinstance(artifact, ref.artifact):
            raise StageError(f"{ref} is no {ref.artifact.type_name}", where=str(entry))
        if isinstance(artifact, Model):
            artifact = _with_options(artifact, ref)
        return artifact

    def seed_for(self, purpose: str, /) -> int:
        """A seed derived from the recipe's seed and the purpose; the same for every stage."""
        return derive_seed(self.seed, purpose)

    def load(self, component: Component[DatasetLoader], /) -> Rows:
        """Rows of a dataset component.

        Raises:
            DataError: No row is left.
        """
        loader = self.build(component)
        with ComponentBoundary(component.found, _founds(component.params)):
            rows = loader.load(self)
            count = len(rows.examples)
        details = ", ".join(f"{name} {number:,}" for name, number in rows.counts.items())
        self.log(f"{component.name}: {count:,} rows" + (f" ({details})" if details else ""))
        if not count:
            raise DataError("no row is left" + (f" ({details})" if details else ""), where=f"dataset {component.name}")
        return rows

    def progress(self, step: int, total: int, /, **values: float) -> None:
        """Tell observers where the stage is; calls that come too fast for a person are dropped."""
        now = monotonic()
        if step >= total or now - self._shown >= self.PROGRESS_SECONDS:
            self._shown = now
            self._emit(Event("progress", self.name, {"step": step, "total": total, **values}))

    def metrics(self, values: Mapping[str, float], /, *, step: int) -> None:
        """Scalars for ``metrics.jsonl`` of the store entry and for all trackers."""
        numbers = {name: float(value) for name, value in values.items()}
        self._metrics.append(numbers, step)
        self._trackers.log(numbers, step)

    def stopping(self) -> bool:
        """True once a signal asked for a checkpoint and an orderly end."""
        return self._stopping()


def _with_options(model: Model, ref: Ref[Any]) -> Any:
    """A stage's model with what this reference adds to it."""
    options = ref.options
    return replace(
        model,
        keep_layers=options.keep_layers if options.keep_layers is not None else model.keep_layers,
        trust_remote_code=options.trust_remote_code or model.trust_remote_code,
        name=str(ref),
    )
