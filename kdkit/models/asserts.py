"""Tests that call functions, taken apart: what is evaluated beside the program, and what it should give.

``assert f(1) == [2]`` becomes the expression ``f(1)`` and the value ``[2]``. Only the expression is ever shown to a
program; the value stays with the judge. So the side of a comparison that is expected has to be a value that can be
read off the text, and nothing of the other side may compare: who evaluates ``f(1) - 2 == 0`` next to a program lets
it say what a difference is.
"""

from __future__ import annotations

import ast
import builtins
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

__all__ = ["MAX_DEPTH", "CallTest", "setup_code", "split_assert"]

MAX_DEPTH: Final = 40
"""Deepest nesting of an expected value."""
_LONGEST: Final = 16_000
_READ: Final[Mapping[str, Callable[[Any], Any]]] = {
    "set": set,
    "frozenset": frozenset,
    "list": list,
    "tuple": tuple,
    "sorted": sorted,
    "dict": dict,
}
"""What may stand around a literal that is expected."""
_ISCLOSE: Final = ("rel_tol", "abs_tol")
_REL_TOL: Final = 1e-9


@dataclass(frozen=True, slots=True)
class CallTest:
    """One assertion.

    Attributes:
        expression: What is evaluated beside the program.
        expected: What it should give.
        rule: ``equal`` is ``==``, ``same`` is ``is`` (of None, True and False), ``truth`` compares truth values, and
            ``close`` is ``math.isclose`` with ``rel_tol`` and ``abs_tol``.
        rel_tol: Relative tolerance, for ``close``.
        abs_tol: Absolute tolerance, for ``close``.
        length: Characters of the assertion.
    """

    expression: str
    expected: Any
    rule: Literal["equal", "same", "truth", "close"]
    rel_tol: float = 0.0
    abs_tol: float = 0.0
    length: int = 0

    def call(self) -> tuple[str, int] | None:
        """Name of the function that is tested and with how many arguments; None where it cannot be told."""
        node: ast.AST | None = _parsed(self.expression)
        found: tuple[str, int] | None = None
        while node is not None:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                named = (node.func.id, len(node.args) + len(node.keywords))
                if node.func.id not in vars(builtins):
                    return named
                # Of sorted(f(1)) it is f; of sum(1, 2), where nothing else is called, sum.
                found, node = found or named, node.args[0] if node.args else None
            else:
                node = _inner(node)
        return found


class _Unsplit(Exception):
    """Why an assertion cannot be taken apart."""


def split_assert(source: str) -> CallTest | str:
    """An assertion as a test, or in a few words why it cannot be one.

    ``f(x) == literal`` (also turned round), ``f(x) is True``, ``f(x)``, ``not f(x)``, ``math.isclose(f(x), number)``
    and ``abs(f(x) - number) < number``; a literal may be wrapped as in ``set([1, 2])``, and the call as in
    ``sorted(f(x))``, ``f(x)[0]`` or ``f(x).strip()``. A message after a comma does not count.
    """
    if len(source) > _LONGEST:
        return f"it is longer than {_LONGEST:,} characters"
    try:
        statement = _parsed(source.strip())
        if not isinstance(statement, ast.Assert):
            return "it is no assertion"
        return replace(_split(statement.test), length=len(source))
    except _Unsplit as problem:
        return str(problem)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "it is no assertion"


def setup_code(columns: Mapping[str, Any]) -> str | None:
    """What runs between a program and its assertions: ``test_imports`` and ``test_setup_code``; None if no Python."""
    imports, code = columns.get("test_imports") or [], columns.get("test_setup_code") or ""
    if not isinstance(imports, list | tuple) or not all(isinstance(part, str) for part in (*imports, code)):
        return None
    text = "\n".join([*imports, code]).replace("\r\n", "\n").strip("\n")
    try:
        _body(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return text


def _parsed(source: str) -> ast.AST:
    """The only statement, or the expression that it is."""
    (statement,) = _body(source)
    return statement.value if isinstance(statement, ast.Expr) else statement


def _body(source: str) -> list[ast.stmt]:
    with warnings.catch_warnings():
        # About backslashes in texts, which are none of the reader's making.
        warnings.simplefilter("ignore")
        return ast.parse(source).body


def _split(test: ast.expr) -> CallTest:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return CallTest(_expression(test.operand), expected=False, rule="truth")
    if isinstance(test, ast.Compare):
        return _compared(test)
    if isinstance(test, ast.Call) and _is_isclose(test.func):
        return _close(test)
    return CallTest(_expression(test), expected=True, rule="truth")


def _compared(test: ast.Compare) -> CallTest:
    if len(test.ops) != 1:
        raise _Unsplit("it compares more than twice")
    operator, (left, right) = test.ops[0], (test.left, test.comparators[0])
    if isinstance(operator, ast.Lt | ast.LtE):
        return _near(left, right)
    if isinstance(operator, ast.Gt | ast.GtE):
        return _near(right, left)
    if not isinstance(operator, ast.Eq | ast.Is):
        raise _Unsplit("it compares with neither ==, is nor a tolerance")
    call, expected = (right, _value(left)) if _has_value(left) else (left, _value(right))
    if isinstance(operator, ast.Eq):
        return CallTest(_expression(call), expected, rule="equal")
    if expected is not None and not isinstance(expected, bool):
        raise _Unsplit("'is' compares with something else than None, True or False")
    return CallTest(_expression(call), expected, rule="same")


def _near(left: ast.expr, right: ast.expr) -> CallTest:
    """``abs(f(x) - number) < number``."""
    inner = left.args[0] if isinstance(left, ast.Call) and len(left.args) == 1 and not left.keywords else None
    named = isinstance(left, ast.Call) and isinstance(left.func, ast.Name) and left.func.id == "abs"
    if not named or not isinstance(inner, ast.BinOp) or not isinstance(inner.op, ast.Sub):
        raise _Unsplit("it compares with neither ==, is nor a tolerance")
    a, b = (inner.right, inner.left) if _has_value(inner.left) else (inner.left, inner.right)
    return CallTest(_expression(a), _number(b), rule="close", abs_tol=_number(right))


def _close(test: ast.Call) -> CallTest:
    given = {keyword.arg: _number(keyword.value) for keyword in test.keywords}
    if len(test.args) != 2 or not given.keys() <= set(_ISCLOSE) or min(given.values(), default=0.0) < 0:
        raise _Unsplit("math.isclose has other arguments than two numbers and tolerances")
    a, b = (test.args[1], test.args[0]) if _has_value(test.args[0]) else (test.args[0], test.args[1])
    rel_tol, abs_tol = given.get("rel_tol", _REL_TOL), given.get("abs_tol", 0.0)
    return CallTest(_expression(a), _number(b), rule="close", rel_tol=rel_tol, abs_tol=abs_tol)


def _is_isclose(node: ast.expr) -> bool:
    of_math = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "math"
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return name == "isclose" and (of_math or isinstance(node, ast.Name))


# --- the side that is evaluated ---------------------------------------------------------------------------------------


def _expression(node: ast.expr) -> str:
    """The text of what is evaluated: a call, and what takes its result as it is.

    Raises:
        _Unsplit: It contains a comparison, or does more than call.
    """
    if any(isinstance(part, ast.Compare | ast.BoolOp | ast.NamedExpr) for part in _outside_lambdas(node)):
        raise _Unsplit("it compares with something else than a literal")
    part: ast.expr | None = node
    while part is not None and not isinstance(part, ast.Call):
        part = _inner(part)
    if part is None:
        raise _Unsplit("nothing of it is the result of a call")
    return ast.unparse(node)


def _inner(node: ast.AST) -> ast.expr | None:
    """What a subscript, attribute, sign, or a method is taken of; None for anything else."""
    if isinstance(node, ast.Call):
        return _inner(node.func)
    if isinstance(node, ast.Subscript | ast.Attribute):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return node.operand
    return None


def _outside_lambdas(node: ast.AST) -> list[ast.AST]:
    """The node and all below it but the bodies of functions that are passed on."""
    found: list[ast.AST] = []
    waiting = [node]
    while waiting:
        found.append(waiting.pop())
        if not isinstance(found[-1], ast.Lambda):
            waiting += ast.iter_child_nodes(found[-1])
    return found


# --- the side that is expected ----------------------------------------------------------------------------------------


def _has_value(node: ast.expr) -> bool:
    try:
        _value(node)
    except _Unsplit:
        return False
    return True


def _number(node: ast.expr) -> float:
    value = _value(node)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Unsplit("a tolerance is compared with something else than a number")
    return value


def _value(node: ast.expr) -> Any:
    """The value that the text shows.

    Raises:
        _Unsplit: It has to be computed.
    """
    found: Any
    try:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and _wraps(node):
            found = _READ[node.func.id](ast.literal_eval(node.args[0]))
        else:
            found = ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise _Unsplit("neither side is a literal") from error
    if _depth(found) > MAX_DEPTH:
        raise _Unsplit("the expected value is nested too deeply")
    return found


def _wraps(node: ast.Call) -> bool:
    return getattr(node.func, "id", "") in _READ and len(node.args) == 1 and not node.keywords


def _depth(value: Any) -> int:
    deepest, level = 1, [value]
    while level := [part for whole in level if isinstance(whole, list | tuple | set | frozenset | dict)
                    for part in (whole if not isinstance(whole, dict) else (*whole, *whole.values()))]:  # fmt: skip
        deepest += 1
    return deepest
