"""Python's syntax tree of text from anywhere: bounded and silent. Nothing is run or compiled."""

from __future__ import annotations

import ast
import warnings
from typing import Final

__all__ = ["DEEPEST", "LONGEST", "REFUSALS", "parsed", "parses"]

DEEPEST: Final = 100
"""Brackets open at once beyond which text is not given to the parser."""
LONGEST: Final = 200_000
"""Characters beyond which it is not: some short rules of Python's grammar take quadratic time."""

REFUSALS: Final = (SyntaxError, ValueError, RecursionError, MemoryError)
"""What the parser raises on text that is no program: syntax, NUL bytes and surrogates, nesting beyond its stacks."""


def parsed(code: str) -> ast.Module:
    """The syntax tree of ``code``. Raises one of ``REFUSALS``; text without a statement is refused as well."""
    if len(code) > LONGEST or _depth(code) > DEEPEST:
        raise ValueError("too long or too deep")
    with warnings.catch_warnings():
        # What Python says about odd code, such as an invalid escape.
        warnings.simplefilter("ignore")
        tree = ast.parse(code)
    if not tree.body:
        raise ValueError("no statement")
    return tree


def parses(code: str) -> bool:
    """Whether ``code`` has a syntax tree with a statement in it."""
    try:
        parsed(code)
    except REFUSALS:
        return False
    return True


def _depth(code: str) -> int:
    """The most brackets open at one place, in one pass; those in strings and comments count too."""
    depth = deepest = 0
    for char in code:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}":
            depth = max(depth - 1, 0)
    return deepest
