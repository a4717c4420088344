"""Nothing of it is imported by a kdkit that is too old."""

from __future__ import annotations

raise RuntimeError("this kdkit should have looked at the requirements first")
