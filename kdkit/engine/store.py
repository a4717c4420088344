"""The store: one directory per finished stage, named by kind and content key.

Work happens in ``<kind>-<key>.partial``. The manifest is written last and the directory renamed, so an entry is either
whole or not there. Entries are verified against their manifest before they are used again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from kdkit.api.errors import ConformanceError, StageError
from kdkit.engine.files import check_writable, environment_error, fsync_directory, fsync_file, read_json, write_json
from kdkit.engine.hashing import HashMemo, files_below
from kdkit.engine.lock import Lock
from kdkit.engine.manifest import MANIFEST, Manifest, output_digest

__all__ = ["CHECKPOINTS", "STAGE_LOG", "Condition", "Store", "store_root"]

CHECKPOINTS: Final = "checkpoints"
STAGE_LOG: Final = "stage.log"
_ORIGIN: Final = ".inputs.json"
_HINT: Final = "set KDKIT_STORE to a directory you may write"


def store_root() -> Path:
    """``$KDKIT_STORE``, or ``.kdkit/store`` below the current directory; absolute, not created."""
    return Path(os.environ.get("KDKIT_STORE") or ".kdkit/store").expanduser().absolute()


@dataclass(frozen=True, slots=True)
class Condition:
    """What the store holds for a key.

    Attributes:
        state: ``whole`` (verified), ``damaged``, ``finished`` (only the renaming is missing) or ``absent``.
        damage: What is wrong with a damaged entry.
        manifest: Of a whole or finished entry.
        checkpoint: Name of the newest checkpoint of unfinished work, or empty.
    """

    state: Literal["whole", "damaged", "finished", "absent"]
    damage: str = ""
    manifest: Manifest | None = None
    checkpoint: str = ""


class Store:
    """All finished and unfinished stages below one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.memo = HashMemo(root / ".hashes.json")

    def entry(self, kind: str, key: str) -> Path:
        """Where the result of a key is, or will be."""
        return self.root / f"{kind}-{key}"

    @staticmethod
    def partial(entry: Path) -> Path:
        """Where the work on an entry happens."""
        return entry.with_name(f"{entry.name}.partial")

    def lock(self, entry: Path) -> Lock:
        """The exclusive right to work on an entry.

        Raises:
            EnvironmentUnmet: Another process has it.
        """
        return Lock(self.root / ".locks" / f"{entry.name}.lock", what=str(entry))

    def prepare(self) -> None:
        """Make sure that the store can be written, and clear what an interrupted replacement left behind.

        Raises:
            EnvironmentUnmet: It cannot.
        """
        check_writable(self.root, hint=_HINT)
        for leftover in _children(self._trash):
            shutil.rmtree(leftover, ignore_errors=True)

    def condition(self, entry: Path) -> Condition:
        """What there is for an entry, every file verified."""
        partial = self.partial(entry)
        saved = sorted(path.name for path in _children(partial / CHECKPOINTS) if not path.name.startswith("."))
        checkpoint = saved[-1] if saved else ""
        if entry.exists():
            try:
                manifest = Manifest.read(entry)
                self.verify(entry, manifest)
            except StageError as error:
                return Condition("damaged", error.what, checkpoint=checkpoint)
            return Condition("whole", manifest=manifest, checkpoint=checkpoint)
        if (sealed := self._sealed(partial)) is not None:
            return Condition("finished", manifest=sealed, checkpoint=checkpoint)
        return Condition("absent", checkpoint=checkpoint)

    def verify(self, entry: Path, manifest: Manifest) -> None:
        """Compare every file with the manifest; a file that was verified before and not touched is not read.

        Raises:
            StageError: A file is missing or changed.
        """
        for name, (size, sha256) in manifest.files.items():
            path = entry / name
            try:
                found = path.stat().st_size
                if found != size:
                    raise StageError(f"{name} has {found} bytes instead of {size}", where=str(entry))
                if self.memo.sha256(path) != sha256:
                    raise StageError(f"{name} changed", where=str(entry))
            except OSError as error:
                raise StageError(f"{name} cannot be read ({error.strerror})", where=str(entry)) from error
        self.memo.save()

    def open_partial(self, entry: Path, inputs: Mapping[str, str], *, fresh: bool) -> tuple[Path, bool]:
        """The directory to work in, and whether it holds checkpoints to resume from. Hold the lock.

        Args:
            entry: The entry to be made.
            inputs: Digest of every artifact the stage reads; checkpoints made from others are thrown away.
            fresh: Throw earlier checkpoints away in any case.
        """
        partial = self.partial(entry)
        origin = partial / CHECKPOINTS / _ORIGIN
        saved = any(not path.name.startswith(".") for path in _children(partial / CHECKPOINTS))
        resume = saved and not fresh and _read_or_none(origin) == dict(inputs)
        try:
            if not resume:
                self.discard(partial)
            (partial / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            # Files are about to change, so an earlier attempt to publish must not count any more.
            (partial / MANIFEST).unlink(missing_ok=True)
            write_json(origin, dict(inputs))
        except OSError as error:
            raise environment_error(error, where=partial, hint=_HINT) from error
        return partial, resume

    def publish(self, entry: Path, draft: Manifest) -> Manifest:
        """Turn the partial directory of ``entry`` into the entry. Hold the lock.

        Args:
            entry: The entry that is finished.
            draft: Its manifest without ``files`` and digests.

        Raises:
            EnvironmentUnmet: The disk is full or not writable; checkpoints are kept.
            ConformanceError: The stage left something that cannot be published.
        """
        partial = self.partial(entry)
        try:
            files = self._seal(partial)
            outputs = {n: {**output, "digest": output_digest(output, files)} for n, output in draft.outputs.items()}
            manifest = replace(draft, files=files, outputs=outputs)
            write_json(partial / MANIFEST, manifest.to_json())
            self.finish(entry)
        except OSError as error:
            raise environment_error(error, where=partial, hint="make room, then resume") from error
        for name, (_, sha256) in files.items():
            self.memo.remember(entry / name, sha256)
        self.memo.save()
        return manifest

    def finish(self, entry: Path) -> None:
        """The last steps of publishing; safe to repeat after a crash between any two of them."""
        partial = self.partial(entry)
        shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
        for folder in {path.parent for path in files_below(partial)} | {partial}:
            fsync_directory(folder)
        self.discard(entry)
        partial.rename(entry)
        fsync_directory(self.root)

    def discard(self, path: Path) -> None:
        """Remove a directory so that no half of it is ever seen under its name."""
        if not path.exists():
            return
        self._trash.mkdir(parents=True, exist_ok=True)
        gone = self._trash / f"{path.name}-{os.getpid()}"
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def manifests(self, kind: str) -> Iterator[Manifest]:
        """Manifests of all readable entries of a kind, newest first."""
        found = []
        for path in self.root.glob(f"{kind}-*/{MANIFEST}"):
            if path.parent.suffix != ".partial":
                try:
                    found.append(Manifest.read(path.parent))
                except StageError:
                    # A damaged entry is named when its own key is asked for; as history it is only useless.
                    continue
        yield from sorted(found, key=lambda manifest: manifest.created, reverse=True)

    def _sealed(self, partial: Path) -> Manifest | None:
        """The manifest of a partial directory to which only the renaming is missing."""
        try:
            manifest = Manifest.read(partial)
            self.verify(partial, manifest)
        except StageError:
            return None
        return manifest

    @property
    def _trash(self) -> Path:
        return self.root / ".trash"

    def _seal(self, partial: Path) -> dict[str, tuple[int, str]]:
        """Flush, open up and hash every file of a finished stage; its log and checkpoints are no results."""
        umask = os.umask(0)
        os.umask(umask)
        for link in (path for path in partial.rglob("*") if path.is_symlink()):
            raise ConformanceError("is a link, and links break when the entry moves", where=str(link))
        files = {}
        for path in files_below(partial):
            name = path.relative_to(partial).as_posix()
            if name in {STAGE_LOG, MANIFEST} or name.startswith(f"{CHECKPOINTS}/"):
                continue
            # safetensors writes files that only their owner can read.
            path.chmod(path.stat().st_mode | (0o666 & ~umask))
            fsync_file(path)
            files[name] = (path.stat().st_size, self.memo.sha256(path))
        return files


def _children(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []


def _read_or_none(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None
