"""Keeps secrets of the environment out of everything kdkit writes."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from typing import Final

__all__ = ["RedactingStream", "redact", "secrets_of"]

_SECRET_NAME: Final = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)
_SHORTEST: Final = 8
"""Shorter values are no secrets, and replacing them would garble ordinary text."""
_MASK: Final = "***"


def secrets_of(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Values that must not be written, longest first: ``HF_TOKEN``, ``WANDB_API_KEY`` and the like."""
    values = {value for name, value in environ.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST}
    return tuple(sorted(values, key=len, reverse=True))


def redact(text: str) -> str:
    """``text`` with every secret of the environment as ``***``."""
    for secret in secrets_of(os.environ):
        text = text.replace(secret, _MASK)
    return text


class RedactingStream(io.TextIOWrapper):
    """A text stream that masks secrets before it passes text on."""

    def write(self, text: str, /) -> int:
        """Write ``text`` without secrets; returns the length of what was given."""
        super().write(redact(text))
        return len(text)
