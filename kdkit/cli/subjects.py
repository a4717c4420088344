"""What ``--model`` says, as models on this machine: a directory, a stage's result, a known name, or a Hub id."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from kdkit.api.artifacts import Model
from kdkit.api.errors import KdkitError, ModelError, RecipeError
from kdkit.api.slots import Ref
from kdkit.engine.inputs import artifact_at, is_hub_id, is_local
from kdkit.engine.manifest import MANIFEST, Manifest
from kdkit.models.locate import check_directory, locate

__all__ = ["Subject", "find_subjects"]

_LABELLED: Final = re.compile(r"(?P<label>[\w.+-]+)=(?P<model>.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with the name it is shown under.

    Attributes:
        label: ``NAME`` of ``NAME=MODEL``, else what the person wrote.
        written: What the person wrote for the model.
        model: The model itself.
    """

    label: str
    written: str
    model: Model


def find_subjects(values: Sequence[str]) -> list[Subject]:
    """The models behind the values of ``--model``, in their order.

    Raises:
        RecipeError: Two models have one name.
        ModelError: No such model, or it is not complete.
        EnvironmentUnmet: It has to be fetched first and cannot be.
    """
    try:
        return _find(values)
    except OSError as error:  # such as a name that is too long, or a directory that may not be entered
        written = str(error.filename or ", ".join(values))
        raise ModelError(f"cannot be read: {error.strerror}", where=textwrap.shorten(written, 200)) from error


def _find(values: Sequence[str]) -> list[Subject]:
    named = [_split(value) for value in values]
    repeated = [label for label, count in Counter(label for label, _ in named).items() if count > 1]
    if repeated:
        raise RecipeError(
            f"two models are called {repeated[0]!r}",
            where="--model",
            hint=f"give each a name of its own, as in --model a={named[0][1]}",
        )
    return [Subject(label, written, replace(_model(written), name=label)) for label, written in named]


def _split(value: str) -> tuple[str, str]:
    """Label and model. A path that exists is taken as it is, even with ``=`` in it."""
    match = _LABELLED.fullmatch(value)
    if match is None or Path(value).exists():
        return value, value
    return match["label"], match["model"]


def _model(written: str) -> Model:
    if not written:
        raise ModelError("the model has no name", where="--model", allowed="a directory, a known name, or org/name")
    path = _path(written)
    if path is not None and not (path / "config.json").exists() and (path / MANIFEST).is_file():
        model = _of_stage(path)
    else:
        _refuse_run(path)
        literal = str(path) if path is not None else written
        found = artifact_at(Ref(Model, literal), locate(literal, base_dir=Path.cwd(), offline=False))
        assert isinstance(found, Model)
        model = found
    if model.format == "adapter":
        raise ModelError(
            f"a model of format {model.format!r} cannot be loaded here",
            where=written,
            allowed="a full save_pretrained directory, a GPTQ checkpoint or a GGUF file",
        )
    return model


def _path(written: str) -> Path | None:
    """The directory that is meant, or None for a known name or a Hub id.

    A shell completes ``runs/x`` without ``./``, so a directory that exists wins over the Hub id of that spelling.
    """
    is_path = is_local(written) or ("/" in written and (Path(written).is_dir() or not is_hub_id(written)))
    if not is_path:
        return None
    try:
        return Path(written).expanduser().absolute()
    except RuntimeError as error:
        raise ModelError("no such user", where=written) from error


def _of_stage(entry: Path) -> Model:
    """The one model that a stage wrote."""
    root = entry.resolve()
    try:
        found = Manifest.read(root).artifacts(root)
    except KdkitError as error:
        raise ModelError(f"is no result of a stage: {error.what}", where=str(entry)) from error
    models = [artifact for artifact in found.values() if isinstance(artifact, Model)]
    if len(models) != 1:
        made = ", ".join(f"{name} ({artifact.type_name})" for name, artifact in found.items())
        raise ModelError(
            f"the stage has {'no model' if not models else 'several models'} among its outputs: {made or 'none'}",
            where=str(entry),
            hint="name the directory of a model",
        )
    check_directory(models[0].path)
    return models[0]


def _refuse_run(path: Path | None) -> None:
    """Say which stages there are when a whole run was named."""
    stages = None if path is None else path / "stages"
    if stages is None or not stages.is_dir() or (stages.parent / "config.json").exists():
        return
    names = ", ".join(sorted(stage.name for stage in stages.iterdir()))
    raise ModelError("is a run, not a model", where=str(path), allowed=f"stages/NAME below it, with NAME of {names}")
