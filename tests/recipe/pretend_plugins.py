"""A catalogue of made-up components, so that tests of the recipe layer do not depend on the built-in ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, field_validator, model_validator

from kdkit.api import (
    Component,
    Dataset,
    DatasetLoader,
    DatasetSpec,
    Loss,
    LossSpec,
    Model,
    OneOrMore,
    Params,
    PluginError,
    RecipeError,
    Ref,
    Sampling,
    Sandbox,
    SandboxSpec,
    Scores,
    Spec,
    StageSpec,
    TrackerSpec,
    Weighted,
)
from kdkit.api.protocols import Reward
from kdkit.api.slots import Found
from kdkit.api.specs import RewardSpec


class Empty(Params):
    """Nothing to set."""


class Divergence(Params):
    """A divergence."""

    temperature: float = Field(1.0, gt=0)
    """Softmax temperature."""
    top_k: int | Literal["auto"] = "auto"
    """Entries kept."""


class Correctness(Params):
    """Runs programs."""

    sandbox: Component[Sandbox]
    """Where they run."""
    timeout_s: float = Field(5.0, gt=0)
    """Seconds."""


class Rows(Params):
    """Rows of a file."""

    split: Literal["train", "test"] = "train"
    """Part."""
    source: Ref[Dataset] | None = None
    """File."""


class Train(Params):
    """Training."""

    model: Ref[Model]
    """What is trained."""
    data: OneOrMore[Weighted[DatasetLoader]]
    """Rows."""
    losses: OneOrMore[Weighted[Loss]] = Field(default=[{"use": "soft-kl"}], validate_default=True)
    """Objectives."""
    rewards: list[Weighted[Reward]] = Field([])
    """Rewards."""
    sampling: Sampling = Sampling()
    """Decoding."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak."""
    max_steps: int | None = Field(None, ge=1)
    """Steps."""
    bits: int | Literal["auto", "none"] = "auto"
    """Width."""
    tags: list[str] = Field([], max_length=2)
    """Free text."""
    note: str = ""
    """Free text."""

    @model_validator(mode="after")
    def _fits(self) -> Train:
        if self.max_steps == 13:
            raise ValueError("13 steps bring bad luck")
        return self

    @field_validator("note")
    @classmethod
    def _crashes(cls, value: str) -> str:
        return str(1 / 0) if value == "crash" else value


def _named(value: Any) -> Any:
    return {value["use"]: value} if isinstance(value, dict) and isinstance(value.get("use"), str) else value


class Evaluate(Params):
    """Scoring."""

    models: dict[str, Ref[Model]] = Field(min_length=1)
    """Models by name."""
    data: Annotated[dict[str, Component[DatasetLoader]], BeforeValidator(_named)]
    """Datasets by name, or one."""


class Odd:
    """A type without a JSON schema."""


class Wide(Params):
    """More keys than a message can list."""

    model: Ref[Model] | None = None
    """A model."""
    size: Annotated[Odd, PlainValidator(lambda value: Odd())] = Odd()
    """Something odd."""
    aa: int = 1
    bb: int = 1
    cc: int = 1
    dd: int = 1
    ee: int = 1
    ff: int = 1
    gg: int = 1
    hh: int = 1
    ii: int = 1
    jj: int = 1
    kk: int = 1
    ll: int = 1
    mm: int = 1


class Report(Params):
    """A table."""

    scores: list[Ref[Scores]] = Field(min_length=1)
    """Scores."""
    extra: Ref[Dataset] | OneOrMore[Component[DatasetLoader]] | None = None
    """A file or loaders."""


def _check_train(params: Train) -> list[tuple[tuple[str | int, ...], str]]:
    if params.note == "bad check":
        raise RuntimeError("the check is broken")
    return [(("losses", 0, "temperature"), "is too hot")] if params.note == "hot" else []


def _no(*args: Any) -> Any:
    raise AssertionError(f"validation never builds or runs a component: {args}")


SPECS: tuple[Spec[Any], ...] = (
    LossSpec(name="soft-kl", summary="KL", params=Divergence, build=_no),
    LossSpec(name="hard", summary="Likelihood", params=Empty, build=_no),
    RewardSpec(name="correctness", summary="Tests", params=Correctness, build=_no, range=(0, 1)),
    SandboxSpec(name="auto", summary="Any", params=Empty, build=_no),
    DatasetSpec(name="rows", summary="Rows", params=Rows, build=_no),
    TrackerSpec(name="jsonl", summary="A file", params=Empty, build=_no),
    TrackerSpec(name="board", summary="A board", params=Divergence, build=_no),
    StageSpec(name="train", summary="Train", params=Train, run=_no, outputs={"model": Model}, check=_check_train),
    StageSpec(name="make", summary="Make", params=Empty, run=_no, outputs={"model": Model, "data": Dataset}),
    StageSpec(name="wide", summary="Wide", params=Wide, run=_no),
    StageSpec(name="score", summary="Score", params=Evaluate, run=_no, outputs={"scores": Scores}),
    StageSpec(name="table", summary="Table", params=Report, run=_no),
)


@dataclass(frozen=True)
class PretendEntry:
    kind: str
    name: str
    spec: Spec[Any]
    dist: str = "kdkit"


@dataclass(frozen=True)
class PretendCatalog:
    """What the recipe layer uses of ``kdkit.host.Catalog``."""

    specs: tuple[Spec[Any], ...] = SPECS
    files: tuple[Path, ...] = field(default=())

    def entries(self, kind: str | None = None) -> tuple[PretendEntry, ...]:
        return tuple(PretendEntry(s.kind, s.name, s) for s in self.specs if kind in {None, s.kind})

    def find(self, kind: str, name: str, /) -> Found:
        if name == "broken":
            raise PluginError(f"no {kind} 'broken'", hint="acme 1.0 is broken")
        for spec in self.specs:
            if spec.kind == kind and spec.name == name.removeprefix("kdkit/"):
                return Found(spec, f"kdkit/{spec.name}", "v1", __file__)
        raise RecipeError(f"no {kind} {name!r}")

    def with_files(self, paths: Sequence[Path]) -> PretendCatalog:
        for path in paths:
            if not path.is_file():
                raise PluginError("cannot read the plugin file", where=path.name)
        extra = tuple(LossSpec(name=path.stem, summary="File", params=Empty, build=_no) for path in paths)
        return replace(self, specs=(*self.specs, *extra), files=(*self.files, *paths))

    def check_requires(self, requirements: Sequence[str]) -> list[str]:
        return [f"{text} is not installed" for text in requirements if not text.startswith("kdkit")]
