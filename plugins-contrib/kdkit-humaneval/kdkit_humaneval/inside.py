"""Runs in the sandbox, one step of a judgement at a time. Its text is the job's program: it imports nothing of kdkit.

``record`` writes down the calls that a problem's tests make of its own solution, ``answer`` makes these calls of a
program that nobody trusts, and ``check`` runs the tests with what it returned, which by then is plain data.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import random
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_NOT_A_VALUE = (ValueError, TypeError, SyntaxError, RecursionError, MemoryError)


class _Unwritable(BaseException):
    """The tests pass something that has no literal."""


def main() -> None:
    """Read the order, do the step, write its result in one line after the word, and end at once."""
    # A program may put something else in their places.
    write, leave, dumps = os.write, os._exit, json.dumps
    word, _, text = sys.stdin.read().partition("\n")
    order = json.loads(text)
    steps: dict[str, Callable[[dict[str, Any]], object]] = {"record": _record, "answer": _answer, "check": _check}
    result = steps[order["step"]](order)
    write(1, f"\n{word} {dumps(result)}\n".encode())
    leave(0)


def _record(order: dict[str, Any]) -> object:
    """The calls, each the text of ``(arguments, keywords)``, and what the solution returns; or why there are none."""
    calls: list[str] = []
    results: list[str | None] = []
    solution = getattr(_module(order["solved"]), order["entry_point"])

    def candidate(*args: Any, **named: Any) -> Any:
        calls.append(_literal((args, named)))
        results.append(None)
        # The next call must not see what this one does to its arguments.
        result = solution(*copy.deepcopy(args), **copy.deepcopy(named))
        results[-1] = repr(result)
        return result

    try:
        _run_tests(order, candidate)
    except _Unwritable:
        return "its tests pass a value that cannot be written down"
    except Exception as error:  # noqa: BLE001 - whatever the tests raise, they do not accept the solution
        return f"its own solution does not pass its tests ({type(error).__name__})"
    return {"calls": calls, "results": results}


def _answer(order: dict[str, Any]) -> object:
    """What the program's function returns, as text; None where it raises."""
    module = _module(order["before"], order["program"])
    function = getattr(module, order["entry_point"])
    results: list[str | None] = []
    for call in order["calls"]:
        args, named = ast.literal_eval(call)
        try:
            results.append(repr(function(*args, **named)))
        except Exception:  # noqa: BLE001 - a program may raise what it likes
            results.append(None)
    return results


def _check(order: dict[str, Any]) -> object:
    """Whether the tests accept the results."""
    said = iter(zip(order["calls"], order["results"], strict=True))

    def candidate(*args: Any, **named: Any) -> Any:
        call, result = next(said, (None, None))
        # Other calls follow on wrong values only: an assertion that fails may call again for its message.
        if call is None or result is None or ast.literal_eval(call) != (args, named):
            raise RuntimeError("the program raised, or the tests go another way")
        return _value(result)

    try:
        _run_tests(order, candidate)
    except Exception:  # noqa: BLE001 - a failed assertion, or what a wrong value leads to
        return False
    return True


def _module(*sources: str) -> ModuleType:
    module = ModuleType("solution")
    sys.modules["solution"] = module
    for source in sources:
        exec(compile(source, "<solution>", "exec"), vars(module))  # noqa: S102 - this is what the sandbox is for
    return module


def _run_tests(order: dict[str, Any], candidate: Callable[..., Any]) -> None:
    # Tests may call helper functions of the prompt, and the function by its name.
    module = _module(order["solved"])
    setattr(module, order["entry_point"], candidate)
    exec(compile(order["test"], "<test>", "exec"), vars(module))  # noqa: S102 - as above
    random.seed(0)
    module.check(candidate)


def _literal(value: object) -> str:
    text = repr(value)
    try:
        if ast.literal_eval(text) == value:
            return text
    except _NOT_A_VALUE:
        pass
    raise _Unwritable


def _value(text: str) -> object:
    """The value; one that equals nothing for what is no literal."""
    try:
        return ast.literal_eval(text)
    except _NOT_A_VALUE:
        return object()


if __name__ == "__main__":
    main()
