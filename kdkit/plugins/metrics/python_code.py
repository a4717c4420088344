"""Metrics on answers that are Python code. No answer is run or compiled: a syntax tree is all that is made of it."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal

from kdkit.api.data import MetricResult, Prediction
from kdkit.api.errors import DataError
from kdkit.plugins.metrics.answers import PYTHON, code_of
from kdkit.plugins.metrics.results import best_of_references, named, plain_mean
from kdkit.plugins.metrics.words import code_tokens

__all__ = ["CodeExact", "ParseRate"]

DEEPEST: Final = 100
"""Brackets open at once beyond which text is not given to the parser."""
LONGEST: Final = 200_000
"""Characters beyond which it is not: some short rules of Python's grammar take quadratic time."""

# What the parser raises on text that is no program: syntax, NUL bytes and surrogates, and nesting beyond its stacks.
_REFUSALS: Final = (SyntaxError, ValueError, RecursionError, MemoryError)
_WITH_DOCSTRING: Final = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class CodeExact:
    """100 for an answer whose code is that of one of its references, up to what Python ignores, else 0.

    ``python`` compares syntax trees: comments, white space, line breaks, brackets without effect and the style of
    quotes do not matter. When the answer or the reference does not parse, their lines are compared, without blank lines
    and white space at the ends. ``any`` compares the tokens of :func:`kdkit.plugins.metrics.words.code_tokens`.
    """

    def __init__(self, *, language: Literal["python", "any"], docstrings: bool) -> None:
        self._python = language == "python"
        self._docstrings = docstrings

    def score(self, predictions: Sequence[Prediction]) -> MetricResult:
        """See :class:`kdkit.api.Metric`. Raises ``DataError`` when no prediction has references."""
        return best_of_references(predictions, self._equal, "code-exact")

    def _equal(self, reference: str, text: str) -> float:
        languages = PYTHON if self._python else None
        wanted, given = code_of(reference, languages), code_of(text, languages)
        if not self._python:
            return float(code_tokens(wanted) == code_tokens(given))
        trees = self._form(wanted), self._form(given)
        if None in trees:
            return float(_lines(wanted) == _lines(given))
        return float(trees[0] == trees[1])

    def _form(self, code: str) -> str | None:
        """The syntax tree in writing; None for what does not parse or has no statement."""
        try:
            with _quietly():
                tree = _parsed(code)
                _simplify(tree, docstrings=self._docstrings)
                return ast.dump(tree)
        except _REFUSALS:
            return None


class ParseRate:
    """100 for an answer whose code parses in the Python that runs this, else 0; averaged over predictions.

    Code without a statement does not count as parsing; what only a compiler notices (``return`` outside a function)
    does.
    """

    def score(self, predictions: Sequence[Prediction]) -> MetricResult:
        """See :class:`kdkit.api.Metric`. Raises ``DataError`` when there are no predictions."""
        if not predictions:
            raise DataError("parse-rate: there are no predictions to score")
        return plain_mean([(key, 100.0 * _parses(code_of(item.text))) for key, item in named(predictions)], {})


def _parses(code: str) -> bool:
    try:
        with _quietly():
            _parsed(code)
    except _REFUSALS:
        return False
    return True


def _parsed(code: str) -> ast.Module:
    """The syntax tree of ``code``. Raises one of ``_REFUSALS``; text without a statement is refused as well."""
    if len(code) > LONGEST or _depth(code) > DEEPEST:
        raise ValueError("too long or too deep")
    tree = ast.parse(code)
    if not tree.body:
        raise ValueError("no statement")
    return tree


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


def _simplify(tree: ast.Module, *, docstrings: bool) -> None:
    """Drop the ``u`` of ``u"..."``, and docstrings unless they count."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            node.kind = None
        elif not docstrings and isinstance(node, _WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]


def _lines(code: str) -> list[str]:
    return [line.rstrip() for line in code.split("\n") if line.strip()]


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence what Python says about odd code, such as an invalid escape."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
