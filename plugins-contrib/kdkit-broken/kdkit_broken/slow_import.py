"""No fault but the time that it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from kdkit.api import LossSpec, hookimpl
from kdkit_broken.working import spec_of

time.sleep(1.0)


@hookimpl
def kdkit_losses() -> Iterator[LossSpec[Any]]:
    """``broken-slow-import``, which works."""
    yield spec_of("broken-slow-import")
