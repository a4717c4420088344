"""What stages hand to each other: directories and files with a type.

A stage declares ``outputs={"model": Model}``; a recipe names one with ``${stages.NAME.model}``; the type is checked
before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, TypeAlias

from kdkit.api.errors import StageError

__all__ = ["ARTIFACT_TYPES", "Artifact", "Dataset", "KeepLayers", "Model", "ReportFiles", "Scores", "SignalCache"]

KeepLayers: TypeAlias = int | str | tuple[int, ...]
"""Which decoder layers a depth-pruned copy keeps: a count, ``"every-2nd"``, or explicit indices from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A typed output of a stage, or an input that a recipe names directly.

    Attributes:
        path: Absolute file or directory.
        info: Small JSON facts about it (row counts, token counts), copied into the manifest.
    """

    type_name: ClassVar[str] = "artifact"
    path: Path
    info: Mapping[str, Any] = field(default_factory=dict)

    def relative_to(self, root: Path) -> dict[str, Any]:
        """The manifest entry of this artifact, with ``path`` relative to the store entry ``root``."""
        return {"type": self.type_name, "path": self.path.relative_to(root).as_posix(), "info": dict(self.info)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model(Artifact):
    """A ``save_pretrained`` directory with its tokenizer.

    Attributes:
        format: ``full`` loads with plain transformers; ``gptq`` and ``gguf`` are quantised, and
            kdkit dequantises them when it loads them.
        keep_layers: Drop all other decoder layers when the model is loaded; None keeps every layer.
        trust_remote_code: Run the model's own Python code; only ever true when the recipe says so for this model.
        name: How the recipe wrote it (a Hub id, a path, a stage); for reports.
    """

    type_name: ClassVar[str] = "model"
    format: Literal["full", "adapter", "gptq", "gguf"] = "full"
    keep_layers: KeepLayers | None = None
    trust_remote_code: bool = False
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset(Artifact):
    """Rows: a JSONL file of examples that a stage wrote, or a dataset file or directory of the user."""

    type_name: ClassVar[str] = "dataset"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores(Artifact):
    """``scores.json`` with every model's metric values, and per-example values beside it."""

    type_name: ClassVar[str] = "scores"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFiles(Artifact):
    """A directory with ``report.json``, ``report.md`` and ``report.html``."""

    type_name: ClassVar[str] = "report"


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalCache(Artifact):
    """A directory with a teacher's most probable tokens for every learned token of some rows."""

    type_name: ClassVar[str] = "cache"


ARTIFACT_TYPES: Final[Mapping[str, type[Artifact]]] = {
    cls.type_name: cls for cls in (Model, Dataset, Scores, ReportFiles, SignalCache)
}


def artifact_from_manifest(entry: Mapping[str, Any], root: Path) -> Artifact:
    """Rebuild what :meth:`Artifact.relative_to` wrote.

    Raises:
        StageError: The manifest names a type this version of kdkit does not know.
    """
    cls = ARTIFACT_TYPES.get(entry["type"])
    if cls is None:
        raise StageError(f"unknown artifact type {entry['type']!r}", where=str(root / "manifest.json"))
    return cls(path=root / entry["path"], info=entry.get("info", {}))
