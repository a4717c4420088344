"""Verdicts of a judge. They come from what the sandbox saw from outside, never from what a program says."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Final

from kdkit.api.sandboxes import SandboxOutcome

__all__ = ["Verdict", "of_outcome", "worst"]


class Verdict(StrEnum):
    """How a program did on a test, the gravest first: of several the first in this order counts."""

    IE = "infra-error"
    SV = "security violation"
    CE = "compile error"
    TLE = "time limit"
    MLE = "memory limit"
    OLE = "output limit"
    RE = "runtime error"
    WA = "wrong answer"
    PE = "wrong white space"
    AC = "accepted"


_OF_STATUS: Final[dict[str, Verdict]] = {
    "infra-error": Verdict.IE,
    "security-violation": Verdict.SV,
    "compile-error": Verdict.CE,
    "timeout": Verdict.TLE,
    "memory": Verdict.MLE,
    "output-limit": Verdict.OLE,
    "runtime-error": Verdict.RE,
}
_ORDER: Final = list(Verdict)


def of_outcome(outcome: SandboxOutcome) -> Verdict | None:
    """The verdict that the sandbox decides; None when the program ended well and its output has to be read.

    A status that nobody knows is the judge's fault and not the program's.
    """
    if outcome.status == "ok":
        return None if outcome.exit_code in (None, 0) else Verdict.RE
    return _OF_STATUS.get(outcome.status, Verdict.IE)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The gravest of one or more verdicts."""
    return min(verdicts, key=_ORDER.index)
