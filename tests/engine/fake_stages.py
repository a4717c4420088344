"""Stages that do little work, as a plugin file: ``plugins: [./fake_stages.py]``."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from kdkit.api import (
    Component,
    Dataset,
    DatasetSpec,
    EnvironmentUnmet,
    Example,
    Metric,
    MetricResult,
    MetricSpec,
    OneOrMore,
    Params,
    Precision,
    Ref,
    ReportFiles,
    Rows,
    Runtime,
    StageSpec,
    TrackerSpec,
    Weighted,
    hookimpl,
)
from kdkit.api.errors import Stopped
from kdkit.api.protocols import DatasetLoader


class Shade(Enum):
    DARK = "dark"
    LIGHT = "light"


class Nested(Params):
    depth: int = 1
    chatty: Annotated[bool, Runtime()] = False


class CountParams(Params):
    """Counts, with a checkpoint after every step."""

    steps: int = 3
    learning_rate: float = 1e-5
    shade: Shade = Shade.DARK
    nested: Nested = Nested()
    template: Path | None = None
    table: dict[str, float] = Field(default_factory=dict)
    precision: Precision = "auto"
    source: Ref[Dataset] | None = None
    data: OneOrMore[Weighted[DatasetLoader]] | None = None
    metric: Component[Metric] | None = None
    seconds: Annotated[float, Runtime()] = 0.0
    """Sleep per step."""
    fault: Annotated[str, Runtime()] = ""
    """What goes wrong, ``NAME:STEP``."""


def run_count(params: CountParams, ctx: Any) -> dict[str, Dataset]:
    saved = sorted(ctx.checkpoints.glob("step-*"))
    step = json.loads((saved[-1] / "state.json").read_text())["step"] if saved else 0
    ctx.log(f"from step {step}")
    print("printed by a library")
    for component in params.data or []:
        ctx.load(component)
    while step < params.steps:
        time.sleep(params.seconds)
        step += 1
        ctx.metrics({"train/loss": 1.0 / step}, step=step)
        ctx.progress(step, params.steps, loss=1.0 / step, tokens_per_s=100.0)
        _fault(params.fault, step)
        folder = ctx.checkpoints / f"step-{step:06d}"
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps({"step": step}))
        if ctx.stopping() and step < params.steps:
            raise Stopped(f"stopped after step {step}, checkpoint saved")
    upstream = ctx.resolve(params.source).path.read_text() if params.source else ""
    template = params.template.read_text() if params.template else ""
    (ctx.out / "data.jsonl").write_text(f"{upstream}{template}{ctx.name} {params.steps} {ctx.seed_for('x')}\n")
    return {"data": Dataset(path=ctx.out / "data.jsonl", info={"rows": params.steps})}


def _fault(fault: str, step: int) -> None:
    name, _, at = fault.partition(":")
    if not name or step != int(at):
        return
    if name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "interrupt":
        os.kill(os.getppid(), signal.SIGINT)
        return
    if name == "raise":
        raise ValueError(f"broken with {os.environ.get('HF_TOKEN')}")
    if name == "memory":
        raise MemoryError
    if name == "disk":
        raise OSError(28, "No space left on device", "/data/model.safetensors")
    if name == "unmet":
        raise EnvironmentUnmet("no such device", hint="use another")
    if name == "exit":
        sys.exit(3)
    raise AssertionError(name)


class LintParams(Params):
    value: float = 1.0


def run_wrong(params: LintParams, ctx: Any) -> dict[str, Any]:
    return {"other": Dataset(path=ctx.out / "x")}


def run_outside(params: LintParams, ctx: Any) -> dict[str, Any]:
    path = ctx.out.parent / "outside.jsonl"
    path.write_text("")
    return {"data": Dataset(path=path)}


def run_noisy(params: LintParams, ctx: Any) -> dict[str, Any]:
    """Different bytes every time."""
    (ctx.out / "data.jsonl").write_text(f"{time.time_ns()}\n")
    return {"data": Dataset(path=ctx.out / "data.jsonl")}


class ReportParams(Params):
    source: Ref[Dataset] | None = None


def run_report(params: ReportParams, ctx: Any) -> dict[str, ReportFiles]:
    print("a stage's print")
    out = ctx.out / "report"
    out.mkdir()
    (out / "report.json").write_text(json.dumps({"recipe": ctx.recipe, "seed": ctx.seed, "models": {}}))
    (out / "report.md").write_text("# Report\n")
    return {"report": ReportFiles(path=out)}


class RowsParams(Params):
    rows: int = 2
    source: Ref[Dataset] | None = None
    revision: str | None = None
    broken: bool = False


class Loader:
    def __init__(self, params: RowsParams) -> None:
        self.params = params

    def load(self, ctx: Any) -> Rows:
        if self.params.broken:
            raise KeyError("no such column")
        return Rows(examples=[Example(id=str(i), prompt="p") for i in range(self.params.rows)], counts={"dropped": 1})

    def sample(self) -> Rows:
        return Rows(examples=[])


class Score:
    def score(self, predictions: Any) -> MetricResult:
        return MetricResult(value=1.0, per_example=(1.0,), n=1)


class FragileParams(Params):
    fail: bool = True


class Fragile:
    def __init__(self, info: Any) -> None:
        self.file = info.run_dir / "fragile.txt"

    def log(self, metrics: Any, step: int) -> None:
        raise ConnectionError("the server is away")

    def artifact(self, path: Path) -> None: ...

    def finish(self, status: str) -> None:
        self.file.write_text(status)


@hookimpl
def kdkit_stages():
    yield StageSpec(
        name="count", summary="Count", params=CountParams, run=run_count, outputs={"data": Dataset}, version=1
    )
    yield StageSpec(name="wrong", summary="Wrong", params=LintParams, run=run_wrong, outputs={"data": Dataset})
    yield StageSpec(name="outside", summary="Outside", params=LintParams, run=run_outside, outputs={"data": Dataset})
    yield StageSpec(name="noisy", summary="Noisy", params=LintParams, run=run_noisy, outputs={"data": Dataset})
    yield StageSpec(
        name="sheet", summary="Report", params=ReportParams, run=run_report, outputs={"report": ReportFiles},
        launch="inline", names_recipe=True,
    )  # fmt: skip


@hookimpl
def kdkit_datasets():
    yield DatasetSpec(name="few", summary="A few rows", params=RowsParams, build=Loader)


@hookimpl
def kdkit_metrics():
    yield MetricSpec(name="one", summary="One", params=LintParams, build=lambda params: Score(), higher_is_better=True)


@hookimpl
def kdkit_trackers():
    yield TrackerSpec(name="fragile", summary="Fails", params=FragileParams, build=lambda params, info: Fragile(info))
