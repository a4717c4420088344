"""``manifest.json``: what a finished stage made, with the hash of every file. Written last, so it means "done"."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from kdkit.api.artifacts import Artifact, artifact_from_manifest
from kdkit.api.errors import StageError
from kdkit.engine.files import canonical_json, read_json
from kdkit.engine.hashing import digest_of

__all__ = ["MANIFEST", "Manifest", "describe_artifact"]

MANIFEST: Final = "manifest.json"
FORMAT: Final = 1
_CARDS: Final = frozenset({"README.md", "kdkit.json"})
"""Files of a model directory that say where it came from and not what it computes."""


def describe_artifact(artifact: Artifact, root: Path) -> dict[str, Any]:
    """``artifact`` as JSON data with its path relative to ``root``, special fields of its type included."""
    special = {f.name: getattr(artifact, f.name) for f in fields(artifact) if f.name not in {"path", "info"}}
    return {**artifact.relative_to(root), "fields": special}


def _artifact(entry: Mapping[str, Any], root: Path) -> Artifact:
    artifact = artifact_from_manifest(entry, root)
    known = {f.name for f in fields(artifact)}
    # JSON has no tuples; layer indices are one.
    special: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in entry.get("fields", {}).items()
        if name in known
    }
    return replace(artifact, **special)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The record of a finished stage.

    Attributes:
        outputs: Artifacts by name as :func:`describe_artifact` writes them, each with the ``digest`` of its content.
        files: Size in bytes and sha256 of every file, by relative path.
        inputs: Digest of every artifact of another stage that was read, by ``KEY/OUTPUT``.
        explained: What the key was made of.
        versions: Of kdkit, Python and the libraries that computed the result.
    """

    kind: str
    key: str
    recipe: str
    stage: str
    seed: int
    created: str
    seconds: float
    outputs: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, tuple[int, str]]
    inputs: Mapping[str, str] = field(default_factory=dict)
    explained: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The file's content; ``sha256`` covers all the rest, so that damage to the manifest itself is seen."""
        data = {"format": FORMAT, **asdict(self)}
        return {**data, "sha256": _self_hash(data)}

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest in ``directory``.

        Raises:
            StageError: It is missing, unreadable, of another format, or damaged.
        """
        path = directory / MANIFEST
        try:
            data = read_json(path)
            claimed = data.pop("sha256")
            if data.pop("format") != FORMAT:
                raise StageError("was written by another version of kdkit", where=str(path))
            manifest = cls(**data)
        except FileNotFoundError as error:
            raise StageError("has no manifest.json", where=str(directory)) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StageError("manifest.json cannot be read", where=str(path)) from error
        if claimed != _self_hash({"format": FORMAT, **data}):
            raise StageError("manifest.json changed", where=str(path))
        return manifest

    def artifacts(self, root: Path) -> dict[str, Artifact]:
        """The outputs as artifacts below ``root``."""
        return {name: _artifact(entry, root) for name, entry in self.outputs.items()}

    def digest(self, output: str) -> str:
        """Identity of an output's content; empty when there is no such output."""
        return str(self.outputs.get(output, {}).get("digest", ""))


def _self_hash(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


def output_digest(output: Mapping[str, Any], files: Mapping[str, tuple[int, str]]) -> str:
    """Identity of an output's content, from the hashes of its files."""
    path = str(output["path"])
    below = "" if path == "." else f"{path}/"
    cards = _CARDS if output["type"] == "model" else frozenset()
    return digest_of(
        {
            name.removeprefix(below): sha256
            for name, (_, sha256) in files.items()
            if (name == path or name.startswith(below)) and name.removeprefix(below) not in cards
        }
    )
