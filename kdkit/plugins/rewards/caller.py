"""Runs beside a program in the sandbox: calls it, and writes down what came of the call.

The text of this file is the job's program, so it imports nothing of kdkit. What it is told is one expression, and never
what that should give: a program that takes everything here over can still only say a value, as its function could. Its
answer is the last line of the output, after a word that is read and gone from the input before the program runs, so
that nothing that the program prints by accident, or leaves printed when it ends early, is taken for an answer.
"""

from __future__ import annotations

import json
import operator
import os
import sys
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from importlib.abc import InspectLoader
from json.encoder import encode_basestring_ascii
from types import CodeType, ModuleType
from typing import Any

_DEPTH = 60
_LENGTH = 200_000  # characters, those for which JSON has longer names counted once
_LEAST = 4  # characters that any value counts for
_INT_BITS = 10_000
_RESULT = "_kdkit_result"
_NOTHING: dict[str, str] = {}
_VIEWS = (type(_NOTHING.keys()), type(_NOTHING.items()))
_NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError)


class _Unwritable(Exception):
    """The result has no text here."""


class _Text(InspectLoader):
    """Code made from text, for a module."""

    def __init__(self, name: str, text: str) -> None:
        self._code = InspectLoader.source_to_code(text, f"<{name}>")

    def get_source(self, fullname: str) -> str | None:  # noqa: ARG002 - the interface has it
        return None

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002 - the interface has it
        return self._code


def main() -> None:
    """Read the order, run the program, evaluate the expression, write the record, end at once.

    What the program raises, or how it ends on its own, is left to the interpreter: there is no record then.
    """
    # The program may put something else in their places.
    write, leave, truth, encode = os.write, os._exit, operator.truth, _encode
    word, order = _order()
    module = ModuleType("solution")
    sys.modules["solution"] = sys.modules["__main__"] = module
    try:
        program = _Text("solution", order["program"])
    except _NOT_PYTHON as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="backslashreplace"))
        write(1, f"\n{word} no-compile\n".encode())
        leave(0)
    program.exec_module(module)
    for name in ("setup", "expression"):
        _Text(name, order[name]).exec_module(module)
    result = vars(module)[_RESULT]
    try:
        record = f"value {encode(truth(result) if order['truth'] else result)}"
    except (_Unwritable, RecursionError, MemoryError):
        record = "other"
    write(1, f"\n{word} {record}\n".encode())
    leave(0)


def _order() -> tuple[str, dict[str, Any]]:
    """The word and the order; the input is empty afterwards, and what it was is closed."""
    parts: list[bytes] = []
    while part := os.read(0, 1 << 16):
        parts.append(part)
    readable, writable = os.pipe()
    os.dup2(readable, 0)
    os.close(readable)
    os.close(writable)
    word, _, order = b"".join(parts).partition(b"\n")
    return word.decode(), json.loads(order)


def _encode(value: object) -> str:
    """JSON of a value of the types that literals have, and of those that are equal to such values.

    Lists are arrays, and what JSON lacks is an object with one key: ``tuple``, ``set``, ``dict`` (pairs), ``bytes``,
    ``float`` (nan and infinities), ``int`` (hexadecimal, where it is long), ``complex``, ``ratio``.

    Raises:
        _Unwritable: Another type, too long or too deep.
    """
    parts: list[str] = []
    _write(value, parts, [_LENGTH], _DEPTH)
    return "".join(parts)


def _write(value: object, parts: list[str], room: list[int], depth: int) -> None:
    _take(_LEAST, room)
    if not depth:
        raise _Unwritable
    if value is None or value is True or value is False:
        parts.append({None: "null", True: "true", False: "false"}[value])
    elif isinstance(value, str):
        _take(len(value), room)
        parts.append(encode_basestring_ascii(str.__str__(value)))
    elif isinstance(value, bytes | bytearray):
        _take(len(value), room)
        parts.append(f'{{"bytes": {encode_basestring_ascii(value.decode("latin-1"))}}}')
    elif isinstance(value, int | float | complex | Decimal | Fraction):
        parts.append(_number(value, room))
    else:
        name, items = _group(value)
        parts.append(f'{{"{name}": [' if name else "[")
        for number, item in enumerate(items):
            parts.append(", " if number else "")
            _write(item, parts, room, depth - 1)
        parts.append("]}" if name else "]")


def _take(length: int, room: list[int]) -> None:
    room[0] -= length
    if room[0] < 0:
        raise _Unwritable


def _group(value: Any) -> tuple[str, Iterable[object]]:
    """The name of a type that holds others, and what it holds, whatever its own class makes of that."""
    if isinstance(value, list):
        return "", list.__iter__(value)
    if isinstance(value, tuple):
        return "tuple", tuple.__iter__(value)
    if isinstance(value, dict):
        return "dict", map(list, dict.items(value))
    if isinstance(value, set):
        return "set", set.__iter__(value)
    if isinstance(value, frozenset):
        return "set", frozenset.__iter__(value)
    if type(value) in _VIEWS:
        return "set", iter(value)
    raise _Unwritable


def _number(value: complex | Decimal | Fraction, room: list[int]) -> str:
    if isinstance(value, int):
        value = int.__int__(value)
        _take(value.bit_length() // 3, room)
        return str(value) if value.bit_length() <= _INT_BITS else f'{{"int": "{value:x}"}}'
    if isinstance(value, float):
        value = float.__float__(value)
        finite = value == value and abs(value) != float("inf")
        return float.__repr__(value) if finite else f'{{"float": "{value}"}}'
    if isinstance(value, complex):
        return f'{{"complex": [{_number(float(value.real), room)}, {_number(float(value.imag), room)}]}}'
    try:
        above, below = value.as_integer_ratio()
    except (ValueError, OverflowError):
        return _number(float(value), room)
    return f'{{"ratio": [{_number(above, room)}, {_number(below, room)}]}}'


if __name__ == "__main__":
    main()
