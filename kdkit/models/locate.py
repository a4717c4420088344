"""From what a recipe says (a path, a known name, a Hub id) to a directory that holds a model. Imports stay light."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

from kdkit.api.errors import EnvironmentUnmet, ModelError
from kdkit.models.catalogue import KNOWN, MODEL_NAMES, TINY, KnownModel, cache_dir, models_dir
from kdkit.models.hub import MODEL_FILES, NotOnHubError, is_offline, snapshot

__all__ = ["check_directory", "fingerprint", "locate", "model_format", "pulled"]

_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json")
_FORMS: Final = "./path, ../path, /path, ~/path, a known name, or org/name"


def locate(literal: str, *, base_dir: Path, revision: str | None = None, offline: bool) -> Path:
    """The local directory of the model that ``literal`` names.

    Args:
        literal: A path (starts with ``./ ../ / ~``), a name of the catalogue, or a Hub id ``org/name``.
        base_dir: What a relative path starts from: the directory of the recipe.
        revision: Branch, tag or commit; only for a Hub id.
        offline: Use only what is on this machine.

    Returns:
        Absolute directory with a configuration, a tokenizer and safetensors weights.

    Raises:
        ModelError: No such directory or name, or the directory is not a complete model.
        EnvironmentUnmet: The model has to be fetched first and cannot be.
    """
    is_hub_id = literal.count("/") == 1 and all(literal.split("/")) and not literal.startswith((".", "~"))
    if revision is not None and not is_hub_id:
        raise ModelError(f"a revision ({revision!r}) belongs to a Hub id (org/name) only", where=literal)
    if literal in {".", ".."} or literal.startswith(("./", "../", "/", "~")):
        found = _local(literal, base_dir)
    elif is_hub_id:
        found = _hub(literal, revision, offline=offline or is_offline())
    elif literal in KNOWN:
        found = _known(KNOWN[literal])
    elif literal == TINY:
        from kdkit.models.tiny import made_tiny

        found = made_tiny()
    else:
        raise _unknown(literal, base_dir)
    check_directory(found, where=literal)
    return found


def check_directory(path: Path, *, where: str | None = None) -> None:
    """Refuse a directory that is not a complete model.

    Raises:
        ModelError: One line that names what is missing.
    """
    where = f"{where} ({path})" if where not in {None, str(path)} else str(path)
    if not path.exists():
        raise ModelError("no such directory", where=where, hint="write a model directory that save_pretrained made")
    if not path.is_dir():
        raise ModelError("is a file", where=where, allowed="a directory that save_pretrained made")
    problem = _missing(path)
    if problem:
        raise ModelError(
            f"is not a complete model: {problem}",
            where=where,
            allowed="config.json, tokenizer files and *.safetensors weights",
        )


def pulled(model: KnownModel) -> Path | None:
    """The directory into which ``kdkit models pull`` put ``model``; None when it was not pulled."""
    directory = models_dir() / model.name
    return directory if directory.is_dir() and _missing(directory) is None else None


def _local(literal: str, base_dir: Path) -> Path:
    try:
        expanded = Path(literal).expanduser()
    except RuntimeError as error:
        raise ModelError("no such user", where=literal) from error
    return (base_dir / expanded).absolute().resolve()


def _known(model: KnownModel) -> Path:
    directory = models_dir() / model.name
    if not directory.exists():
        raise EnvironmentUnmet(
            f"the model is not on this machine ({directory})", where=model.name, hint=_pull_hint(model)
        )
    return directory


def _hub(repo: str, revision: str | None, *, offline: bool) -> Path:
    known = next((model for model in KNOWN.values() if model.hub_id.lower() == repo.lower()), None)
    # A pulled copy is no particular revision, so it only stands in for "the model", whatever the Hub has today.
    own = pulled(known) if known is not None and revision is None else None
    if own is not None:
        try:
            return snapshot(repo, revision=None, cache_only=True)
        except NotOnHubError:
            return own
    try:
        return snapshot(repo, revision=revision, cache_only=offline)
    except NotOnHubError as error:
        hint = error.hint if known is None or revision is not None else _pull_hint(known)
        # The public class, which crosses from a worker process to its parent by name.
        raise EnvironmentUnmet(error.what, where=repo, hint=hint) from error


def _pull_hint(model: KnownModel) -> str:
    return f"run: kdkit models pull {model.name}"


def _unknown(literal: str, base_dir: Path) -> ModelError:
    """The error for a bare word, with the nearest name or the path it was probably meant to be."""
    if literal and (base_dir / literal).exists():
        return ModelError(f"no known model is called {literal!r}", hint=f"write ./{literal} for the local directory")
    bare = literal.rsplit("/", 1)[-1].lower()
    close = difflib.get_close_matches(bare, MODEL_NAMES, n=1, cutoff=0.5)
    meant = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(MODEL_NAMES))}"
    return ModelError(f"no known model is called {literal!r}", allowed=_FORMS, hint=meant)


def _missing(path: Path) -> str | None:
    """What a model directory lacks, or None when it is complete."""
    if not (path / "config.json").is_file():
        adapter = (path / "adapter_config.json").is_file()
        return "no config.json" + (" (an adapter alone: merge it into its base model first)" if adapter else "")
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return f"no tokenizer ({', '.join(_TOKENIZER_FILES)})"
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.gguf")):
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth"))
        return "no *.safetensors" + (" (pickled weights can run code and are never loaded)" if pickled else "")
    return _missing_shard(path)


def _missing_shard(path: Path) -> str | None:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return None
    try:
        shards = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{index.name} cannot be read"
    absent = sorted(name for name in shards if not (path / name).is_file())
    return f"no {absent[0]} ({len(absent)} of {len(shards)} weight files are absent)" if absent else None


def model_format(path: Path) -> Literal["full", "gptq", "gguf"]:
    """How the weights in ``path`` are stored: ``gptq`` when the model says so, ``gguf`` alone, else ``full``."""
    if any(path.glob("*.gguf")) and not any(path.glob("*.safetensors")):
        return "gguf"
    try:
        quantization = json.loads((path / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError, RecursionError):
        return "full"
    if quantization is None:
        # Checkpoints of auto-gptq may say it in a file of their own only.
        return "gptq" if (path / "quantize_config.json").is_file() else "full"
    return "gptq" if isinstance(quantization, dict) and quantization.get("quant_method") == "gptq" else "full"


def fingerprint(path: Path) -> str:
    """Identity of a model by content: two directories with the same model files have the same fingerprint.

    The hash of each file is remembered in ``hashes.json`` of the cache directory with its size and modification time,
    so that only the first call reads the weights. A cache that cannot be written only costs time.

    Returns:
        sha256 (hex) over the sorted names and contents of configuration, tokenizer, template, generation
        configuration, code, safetensors and GGUF files. Cards and provenance do not count.

    Raises:
        ModelError: There is no model file, or one cannot be read.
    """
    patterns = (*MODEL_FILES, "*.gguf")
    files = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
    if not files:
        raise ModelError("no model files to fingerprint", where=str(path))
    memo = _Memo(cache_dir() / "hashes.json")
    try:
        lines = [f"{file.name}\0{memo.sha256(file)}\n" for file in files]
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(error.filename or path)) from error
    memo.save()
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class _Memo:
    """File hashes by absolute path, valid while size and modification time stay the same."""

    # A file that changes twice within one tick of the file system's clock keeps its time, so a hash of a file that
    # was just written is used but not remembered.
    SETTLED_SECONDS: Final = 2.0

    def __init__(self, file: Path) -> None:
        self._file = file
        self._entries = self._read()
        self._new: dict[str, list[Any]] = {}

    def sha256(self, file: Path) -> str:
        real = file.resolve()
        stat = real.stat()
        known = self._entries.get(str(real))
        if isinstance(known, list) and known[:2] == [stat.st_size, stat.st_mtime_ns] and len(known) == 3:
            return str(known[2])
        with real.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if time.time() - stat.st_mtime > self.SETTLED_SECONDS:
            self._new[str(real)] = [stat.st_size, stat.st_mtime_ns, digest]
        return digest

    def save(self) -> None:
        """Add what was learned, atomically; the file is only a memory, so any failure to write it is tolerated."""
        if not self._new:
            return
        alive = dict(self._alive())
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._file.parent, prefix=".hashes-")
        except OSError:
            return
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(alive | self._new, stream)
            Path(name).replace(self._file)
        except OSError:
            Path(name).unlink(missing_ok=True)

    def _alive(self) -> Iterator[tuple[str, Any]]:
        # Read again: another process may have added entries since.
        for name, entry in self._read().items():
            if Path(name).exists():
                yield name, entry

    def _read(self) -> dict[str, Any]:
        try:
            data = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}
