"""The version of the public API: ``kdkit.api``, ``kdkit.adapters``, ``kdkit.testing`` and the names of ``kdkit``."""

from __future__ import annotations

from typing import Final

__all__ = ["API_VERSION"]

API_VERSION: Final = "0.1"
"""``MAJOR.MINOR`` of the kdkit in which the public API last changed.

A plugin that was written for it works with every kdkit of the same major version that is as new; before 1.0, of the
same minor version. docs/how-to/api-stability.md says what counts as a change.
"""
