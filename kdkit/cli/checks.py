"""What ``kdkit doctor`` finds, one finding at a time."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Check"]


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; ``status`` is ``ok``, ``note`` (worth knowing) or ``missing`` (kdkit cannot work)."""

    name: str
    status: str
    found: str
    hint: str = ""
