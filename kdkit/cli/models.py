"""Bodies of ``kdkit models pull`` and ``prune``."""

from __future__ import annotations

from pathlib import Path

from kdkit.api.artifacts import KeepLayers
from kdkit.api.errors import ExitCode
from kdkit.cli.output import emit, log
from kdkit.models.locate import locate

__all__ = ["prune_model", "pull_model"]


def pull_model(name: str, dest: Path | None) -> int:
    """Fetch a known model and print its directory.

    Returns:
        0.

    Raises:
        ModelError: No such name.
        EnvironmentUnmet: No network, no room, or the download is not what it should be.
    """
    from kdkit.models.pull import pull

    emit(str(pull(name, dest=dest, log=log)))
    return int(ExitCode.OK)


def prune_model(source: str, dest: Path, layers: str) -> int:
    """Write a copy with fewer layers and print its directory.

    Args:
        source: What a recipe would write for the model.
        dest: The directory to make.
        layers: A count, ``every-2nd``, or indices joined by commas.

    Returns:
        0.

    Raises:
        ModelError: No such model, or the layers do not fit it.
        EnvironmentUnmet: The disk is full or ``dest`` cannot be written.
    """
    directory = locate(source, base_dir=Path.cwd(), offline=False)
    from kdkit.models.prune import prune

    kept = prune(directory, dest, _layers(layers))
    log(f"kept layers {', '.join(map(str, kept))}")
    emit(str(dest.absolute()))
    return int(ExitCode.OK)


def _layers(text: str) -> KeepLayers:
    """The value as a recipe would give it: a number, a tuple of numbers, or the text itself."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        return text
    return int(text) if len(parts) == 1 else tuple(int(part) for part in parts)
