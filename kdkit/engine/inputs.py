"""What a recipe names directly (models, data) turned into files on this machine and the hash of their content."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kdkit.api.artifacts import Artifact, Dataset, Model
from kdkit.api.errors import DataError
from kdkit.api.slots import Ref
from kdkit.engine.hashing import HashMemo, hash_tree
from kdkit.engine.hub_data import dataset_commit, dataset_snapshot
from kdkit.models.hub import is_offline
from kdkit.models.locate import fingerprint, locate, model_format

__all__ = ["Inputs", "Located", "artifact_at", "is_hub_id"]

_LOCAL: Final = ("./", "../", "/", "~")
_COMMIT: Final = "commit:"


@dataclass(frozen=True, slots=True)
class Located:
    """A literal input found.

    Attributes:
        pin: Absolute file or directory; ``commit:`` and the commit for a dataset on the Hub.
        digest: Identity of the content: a hash, or the pin of a Hub dataset.
    """

    pin: str
    digest: str


def is_local(literal: str) -> bool:
    """Whether ``literal`` is a path: it starts with ``./ ../ / ~``."""
    return literal in {".", ".."} or literal.startswith(_LOCAL)


def is_hub_id(literal: str) -> bool:
    """Whether ``literal`` is ``org/name``; a local path starts with ``./ ../ / ~``."""
    return not is_local(literal) and literal.count("/") == 1 and all(literal.split("/"))


class Inputs:
    """Finds each literal input once, so that a whole run works with the same files.

    Args:
        base_dir: What relative paths start from.
        memo: Remembers the hashes of data files; needed by :meth:`locate` only.
        pins: Paths found by an earlier process, by :meth:`pin_name`; they are used as they are.
    """

    def __init__(self, base_dir: Path, memo: HashMemo | None = None, *, pins: Mapping[str, str] | None = None) -> None:
        self._base_dir = base_dir
        self._memo = memo or HashMemo(Path(os.devnull))
        self._pins = pins or {}
        self._found: dict[str, Located] = {}
        self.offline = is_offline()

    @staticmethod
    def pin_name(ref: Ref[Any], revision: str | None) -> str:
        """The name under which a reference's path is handed to the worker."""
        return f"{ref.artifact.type_name} {ref.source}" + (f" @{revision}" if revision else "")

    def pins(self) -> dict[str, str]:
        """What was found so far, for the worker."""
        return {name: found.pin for name, found in self._found.items()}

    def locate(self, ref: Ref[Any], revision: str | None = None) -> Located:
        """The files behind a literal reference, and the identity of their content.

        Raises:
            KdkitError: They are missing, incomplete, or have to be fetched and cannot be.
        """
        revision = ref.options.revision or revision
        name = self.pin_name(ref, revision)
        if name not in self._found:
            self._found[name] = self._locate(ref, revision)
        return self._found[name]

    def path(self, ref: Ref[Any]) -> Path:
        """Only the path: the pinned one when there is one, without reading any content."""
        name = self.pin_name(ref, ref.options.revision)
        pin = self._pins.get(name)
        if _is_hub_data(ref):
            # The revision may be a parameter of the component that holds the reference.
            commits = {pin for known, pin in self._pins.items() if known == name or known.startswith(f"{name} @")}
            commit = commits.pop().removeprefix(_COMMIT) if len(commits) == 1 else ref.options.revision
            return dataset_snapshot(str(ref.source), commit, offline=self.offline)
        return Path(pin) if pin is not None else self._path(ref, ref.options.revision)

    def _locate(self, ref: Ref[Any], revision: str | None) -> Located:
        if _is_hub_data(ref):
            pin = _COMMIT + dataset_commit(str(ref.source), revision, offline=self.offline)
            return Located(pin, pin)
        path = self._path(ref, revision)
        if issubclass(ref.artifact, Model):
            return Located(str(path), fingerprint(path))
        try:
            digest = hash_tree(path, self._memo)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=str(error.filename or path)) from error
        # Readers choose the format by the name's ending.
        return Located(str(path), digest + ("" if path.is_dir() else path.suffix))

    def _path(self, ref: Ref[Any], revision: str | None) -> Path:
        literal = str(ref.source)
        if issubclass(ref.artifact, Model):
            return locate(literal, base_dir=self._base_dir, revision=revision, offline=self.offline)
        if not is_local(literal):
            raise DataError(
                f"{literal!r} is neither a path nor a Hub id",
                allowed="./path, ../path, /path, ~/path, or org/name",
                hint=f"write ./{literal} for the local file" if (self._base_dir / literal).exists() else None,
            )
        path = (self._base_dir / Path(literal).expanduser()).absolute()
        if not path.exists():
            raise DataError("no such file or directory", where=str(path))
        return path


def _is_hub_data(ref: Ref[Any]) -> bool:
    return issubclass(ref.artifact, Dataset) and is_hub_id(str(ref.source))


def artifact_at(ref: Ref[Any], path: Path) -> Artifact:
    """The artifact behind a literal reference whose path is known."""
    if issubclass(ref.artifact, Model):
        return Model(
            path=path,
            format=model_format(path),
            keep_layers=ref.options.keep_layers,
            trust_remote_code=ref.options.trust_remote_code,
            name=str(ref.source),
        )
    artifact: Artifact = ref.artifact(path=path)
    return artifact
