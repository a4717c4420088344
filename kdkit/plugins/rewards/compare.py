"""Is an output the expected one? Token by token, every token counts, numbers within a tolerance."""

from __future__ import annotations

import math
import re
from typing import Final, Literal

from kdkit.plugins.rewards.verdicts import Verdict

__all__ = ["compare", "same_token"]

# ASCII digits only: neither nan nor inf, underscores, hexadecimal numbers or digits of other scripts.
_NUMBER: Final = re.compile(rb"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]{1,4})?")
_INTEGER: Final = re.compile(rb"[+-]?[0-9]++")
_EXACT_FLOATS: Final = 2.0**53


def compare(expected: str, given: str, *, mode: Literal["tokens", "exact"], tolerance: float) -> Verdict:
    """AC, WA, or with ``exact`` PE where only white space differs.

    Args:
        expected: What the test expects.
        given: What the program wrote.
        mode: ``tokens`` compares what stands between white space; ``exact`` all characters but line ends at the end.
        tolerance: See :func:`same_token`; for ``tokens``.
    """
    wanted, got = _tokens(expected), _tokens(given)
    if mode == "exact":
        if _plain(expected) == _plain(given):
            return Verdict.AC
        return Verdict.PE if wanted == got else Verdict.WA
    # The number of tokens first: a correct beginning is no answer.
    if len(wanted) != len(got):
        return Verdict.WA
    return Verdict.AC if all(map(same_token, wanted, got, [tolerance] * len(got))) else Verdict.WA


def same_token(wanted: bytes, got: bytes, tolerance: float) -> bool:
    """Equal as bytes, or numbers that are close.

    Two whole numbers are never close. To a number that is expected with a point or an exponent the other may have an
    absolute or relative distance of ``tolerance``; to a whole number only an absolute one, so that 1000000.4 is not
    1000000, and 2.0 is 2.
    """
    if wanted == got:
        return True
    if not tolerance or _NUMBER.fullmatch(wanted) is None or _NUMBER.fullmatch(got) is None:
        return False
    whole = _INTEGER.fullmatch(wanted) is not None
    if whole and _INTEGER.fullmatch(got) is not None:
        return False
    a, b = float(got), float(wanted)
    if not (math.isfinite(a) and math.isfinite(b)) or (whole and abs(b) >= _EXACT_FLOATS):
        return False
    return abs(a - b) <= (tolerance if whole else max(tolerance, tolerance * abs(b)))


def _tokens(text: str) -> list[bytes]:
    # Bytes are split at ASCII white space only: a no-break space does not separate.
    return text.encode("utf-8", "surrogatepass").split()


def _plain(text: str) -> str:
    return text.replace("\r\n", "\n").rstrip("\n")
