"""What tests of sandboxes share: which of them work here, and a session of each."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import pytest

from kdkit.api import SandboxLimits, SandboxReport
from kdkit.plugins.sandboxes.providers import bubblewrap, landlock

HERE = Path(__file__).parent
PROVIDERS = {"bubblewrap": bubblewrap, "landlock": landlock}
LIMITS = SandboxLimits(wall_s=8.0, cpu_s=2.0, memory_bytes=192 * 2**20, output_bytes=2**18, processes=8)


@functools.cache
def report(name: str) -> SandboxReport:
    if sys.platform != "linux":
        return SandboxReport(usable=False, reason="not Linux")
    return PROVIDERS[name](2).probe()


def need(name: str) -> None:
    """Skip where the sandbox does not work; in CI, which says that it must, that is a failure."""
    found = report(name)
    if not found.usable:
        reason = f"sandbox {name}: {found.reason}"
        if os.environ.get("KDKIT_REQUIRE_SANDBOX"):
            pytest.fail(reason)
        pytest.skip(reason)
