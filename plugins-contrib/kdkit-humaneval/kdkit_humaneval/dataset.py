"""From rows of HumanEval to prompts."""

from __future__ import annotations

import ast
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kdkit.api import DataError, Example, Message, Rows

if TYPE_CHECKING:
    from kdkit.api import LoadContext
    from kdkit_humaneval.plugin import HumanEvalParams

__all__ = ["COLUMN", "HumanEvalLoader"]

COLUMN: Final = "humaneval"
"""The extra column with what the judge needs."""
_SAMPLE: Final = Path(__file__).parent / "sample.jsonl"
_WRITE: Final = "Complete this Python function."
_FIX: Final = "This Python function does not do what its docstring says. Find the bug and repair it."
_FORM: Final = "Answer with the whole function, with what it imports, in one code block that begins with ```python."


class HumanEvalLoader:
    """See :class:`kdkit_humaneval.plugin.HumanEvalParams`."""

    def __init__(self, params: HumanEvalParams) -> None:
        self._params = params

    def load(self, ctx: LoadContext) -> Rows:
        """The problems of the source. Raises ``DataError`` for a file or a row that it cannot read."""
        return self._read(ctx.resolve(self._params.source).path)

    def sample(self) -> Rows:
        """Eight problems that were written for this package."""
        return self._read(_SAMPLE)

    def _read(self, path: Path) -> Rows:
        examples: dict[str, Example] = {}
        for where, row in islice(_rows(path), self._params.max_rows):
            example = _Row(where, row).example(self._params)
            if example.id in examples:
                raise DataError(f"task_id {example.id!r} is there twice", where=where)
            examples[example.id] = example
        if not examples:
            raise DataError("has no rows", where=str(path))
        return Rows(examples=list(examples.values()), counts={"read": len(examples), "kept": len(examples)})


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """``(FILE:LINE, columns)`` of every row."""
    if path.is_dir():
        raise DataError("is a directory", where=str(path), allowed="a file of JSON Lines (.jsonl, .jsonl.gz)")
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, _object(line, where)
    except FileNotFoundError as error:
        raise DataError("no such file", where=str(path)) from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"cannot be read: {error}", where=str(path)) from error


def _object(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON: {error}", where=where) from error
    if not isinstance(row, dict):
        raise DataError("is no JSON object", where=where)
    return row


class _Row:
    """A row, and where it stands."""

    def __init__(self, where: str, columns: Mapping[str, Any]) -> None:
        self._where = where
        self._columns = columns

    def example(self, params: HumanEvalParams) -> Example:
        name, prompt, solution = self._text("entry_point"), self._text("prompt"), self._text("canonical_solution")
        start = re.search(rf"^def {re.escape(name)}\b", prompt, re.MULTILINE)
        if start is None:
            raise DataError(f"'prompt' defines no function {name!r}", where=self._where)
        buggy = prompt + self._text("buggy_solution") if params.task == "fix" else ""
        complete = params.prompt_style == "complete"
        return Example(
            id=self._text("task_id"),
            prompt=prompt if complete else _chat(_FIX if buggy else _WRITE, buggy or prompt),
            completion=solution if complete else _fenced(prompt + solution),
            category=str(self._columns.get("bug_type") or "") if buggy else "",
            echo=_fenced(buggy) if buggy else prompt,
            extra={
                COLUMN: {
                    "entry_point": name,
                    # Helper functions and imports before the function: an answer need not repeat them.
                    "before": prompt if complete else prompt[: start.start()],
                    "solved": prompt + solution,
                    "test": self._test(),
                    "continues": complete,
                }
            },
        )

    def _test(self) -> str:
        """The tests without a call of ``check`` at their end, which HumanEvalPack has and HumanEval has not."""
        try:
            tree = ast.parse(self._text("test"))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise DataError(f"'test' is no Python: {error}", where=self._where) from error
        if not any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body):
            raise DataError("'test' defines no function 'check'", where=self._where)
        tree.body = [node for node in tree.body if not _calls_check(node)]
        return ast.unparse(tree)

    def _text(self, name: str) -> str:
        value = self._columns.get(name)
        if not isinstance(value, str) or not value.strip():
            columns = ", ".join(key if key.isprintable() else ascii(key) for key in self._columns)
            raise DataError(f"has no text in {name!r}", where=self._where, hint=f"its columns: {columns or 'none'}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{name!r} has half of a character: {error.reason}", where=self._where) from error
        return value


def _calls_check(node: ast.stmt) -> bool:
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "check"


def _chat(task: str, code: str) -> tuple[Message, ...]:
    return (Message("user", f"{task} {_FORM}\n\n{_fenced(code)}"),)


def _fenced(code: str) -> str:
    longest = max((len(run) for run in re.findall("`{3,}", code)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}python\n{code.strip(chr(10))}\n{fence}"
