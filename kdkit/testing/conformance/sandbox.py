"""Checks of a sandbox; see the class."""

from __future__ import annotations

__all__ = ["SandboxConformance"]


class SandboxConformance:
    """What every sandbox must fulfil."""
