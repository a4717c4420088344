"""Programs that try to do harm, with the verdict that each has to get. Never run them outside a sandbox.

They stand in hostile_python.txt and hostile_cpp.txt, each below a line ``=== NAME: VERDICT``. Each prints PWNED when it
got what it wanted; what it may want is handed to it on standard input as JSON: a world-readable ``secret``, a
``private`` file of the judge's own user, the pids of the ``judge`` and of a ``victim``, a TCP ``port``, a ``unix``
socket and an ``abstract`` one, a directory ``outside`` and the ``token`` that must not be found.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HEAD = """
import json, os, sys
given = json.loads(sys.stdin.read())
"""


@dataclass(frozen=True)
class Hostile:
    name: str
    source: str
    status: str
    language: Literal["python", "cpp"] = "python"


def _read(name: str) -> list[tuple[str, str, str]]:
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return re.findall(r"^=== ([^\n]+): (\S+)\n(.*?)(?=^=== |\Z)", text, re.MULTILINE | re.DOTALL)


_RAW = {
    "unclosed bracket": "print((((1\n",
    "nested brackets": "(" * 5000 + ")" * 5000,
    "null byte": "print(1)\0",
    "lone surrogate": "print('\ud800')",
    "return outside": "return 1\n",
}
PYTHON = [Hostile(name, HEAD + source, status) for name, status, source in _read("hostile_python.txt")]
if platform.machine() != "x86_64":
    # They make system calls by number, or i386's.
    PYTHON = [p for p in PYTHON if "syscall(" not in p.source and "fromhex" not in p.source]
PYTHON += [Hostile(name, source, "compile-error") for name, source in _RAW.items()]
CPP = [Hostile(name, source, status, "cpp") for name, status, source in _read("hostile_cpp.txt")]
EXACT = {
    "kills itself after the answer": (None, 9),
    "exit 137": (137, None),
    "exit with a text": (1, None),
    "claims an infrastructure error": (125, None),
    "crash": (None, 11),
    "C++ crash": (None, 11),
}
"""Exit code and signal of some of them."""
