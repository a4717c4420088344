"""Metrics on answers that are Python code. No answer is run or compiled: a syntax tree is all that is made of it."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Final, Literal

from kdkit.api.data import MetricResult, Prediction
from kdkit.api.errors import DataError
from kdkit.plugins.metrics.answers import PYTHON, code_of, reference_code
from kdkit.plugins.metrics.python_tree import REFUSALS, parsed, parses
from kdkit.plugins.metrics.results import best_of_references, named, plain_mean
from kdkit.plugins.metrics.words import code_tokens

__all__ = ["CodeExact", "ParseRate"]

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
        wanted, given = reference_code(reference, languages), code_of(text, languages)
        if not self._python:
            return float(code_tokens(wanted) == code_tokens(given))
        trees = self._form(wanted), self._form(given)
        if None in trees:
            return float(_lines(wanted) == _lines(given))
        return float(trees[0] == trees[1])

    def _form(self, code: str) -> str | None:
        """The syntax tree in writing; None for what does not parse or has no statement."""
        try:
            tree = parsed(code)
            _simplify(tree, docstrings=self._docstrings)
            return ast.dump(tree)
        except REFUSALS:
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
        return plain_mean([(key, 100.0 * parses(code_of(item.text))) for key, item in named(predictions)], {})


def _simplify(tree: ast.Module, *, docstrings: bool) -> None:
    """Drop the ``u`` of ``u"..."``, and docstrings unless they count."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            node.kind = None
        elif not docstrings and isinstance(node, _WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]


def _lines(code: str) -> list[str]:
    return [line.rstrip() for line in code.split("\n") if line.strip()]
