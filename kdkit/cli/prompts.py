"""What ``--prompt`` and ``--prompts`` say. Nothing in a file of prompts is trusted."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final

from kdkit.api.data import Example, Message
from kdkit.api.errors import DataError, EnvironmentUnmet, RecipeError
from kdkit.models.examples import json_kind, messages_from_json, prompt_from_json

__all__ = ["MAX_LINE", "MAX_PROMPTS", "read_prompts"]

MAX_LINE: Final = 10_000_000
"""Longest line of a file of prompts, in bytes."""
MAX_PROMPTS: Final = 10_000
"""More are no longer read by a person; an evaluate stage scores them."""
_BOM: Final = b"\xef\xbb\xbf"
_HINT: Final = 'give --prompt "...", or --prompts FILE'


def read_prompts(texts: Sequence[str], file: str | None) -> list[Example]:
    """Those of the command line, then those of the file; the id of each says where it stands.

    Args:
        texts: Values of ``--prompt``.
        file: JSON Lines when its first line starts with ``{``, otherwise one prompt a line; ``-`` is standard input.

    Raises:
        RecipeError: There is none.
        DataError: The file is missing, empty, too large, or has a line that is no prompt.
        EnvironmentUnmet: The file cannot be read.
    """
    if not texts and file is None:
        raise RecipeError("there is nothing to ask", hint=_HINT)
    numbered = len(texts) > 1
    prompts = [_checked(f"--prompt {i}" if numbered else "--prompt", text) for i, text in enumerate(texts, start=1)]
    if file is not None:
        prompts += _from_file(file)
    return prompts


def _from_file(file: str) -> list[Example]:
    name = "standard input" if file == "-" else file
    try:
        if file == "-":
            if sys.stdin.isatty():
                print("reading prompts, one a line; Ctrl-D ends", file=sys.stderr)
            prompts = list(_prompts(sys.stdin.buffer, name))
        else:
            with Path(file).expanduser().open("rb") as stream:
                prompts = list(_prompts(stream, name))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        what = "is a directory" if isinstance(error, IsADirectoryError) else "no such file"
        raise DataError(what, where=f"--prompts {file}", allowed="a file, or - for standard input") from error
    except OSError as error:
        raise EnvironmentUnmet(f"cannot be read: {error.strerror}", where=name) from error
    if not prompts:
        raise DataError("has no prompt in it", where=name, hint="write one prompt a line")
    return prompts


def _prompts(stream: IO[bytes], name: str) -> Iterator[Example]:
    structured: bool | None = None
    count = 0
    for where, line in _lines(stream, name):
        if not line.strip():
            continue
        if structured is None:
            structured = name.endswith((".jsonl", ".ndjson")) or line.startswith("{")
        count += 1
        if count > MAX_PROMPTS:
            raise DataError(
                f"has more than {MAX_PROMPTS:,} prompts", where=name, hint="score large sets with an evaluate stage"
            )
        yield _checked(where, _content(line, where) if structured else line)


def _lines(stream: IO[bytes], name: str) -> Iterator[tuple[str, str]]:
    """Place and text of every line. Only a line feed ends one: JSON may hold U+2028 and U+0085."""
    number = 0
    while data := stream.readline(MAX_LINE + 1):
        number += 1
        where = f"{name}:{number}"
        if len(data) > MAX_LINE:
            raise DataError(f"the line is longer than {MAX_LINE:,} bytes", where=where)
        try:
            text = (data.removeprefix(_BOM) if number == 1 else data).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"is not UTF-8 at byte {error.start + 1}", where=where) from error
        yield where, text.rstrip("\r\n")


def _content(line: str, where: str) -> str | tuple[Message, ...]:
    row = _object(line, where)
    present = {name for name in ("prompt", "messages") if row.get(name) is not None}
    if len(present) != 1:
        columns = ", ".join(map(repr, sorted(row))) or "none"
        what = "has 'prompt' and also 'messages'" if present else "has neither 'prompt' nor 'messages'"
        raise DataError(f"{what} (keys: {columns})", where=where)
    try:
        if "prompt" in present:
            return prompt_from_json(row["prompt"])
        messages = messages_from_json(row["messages"])
    except DataError as error:
        raise DataError(error.what, where=where, allowed=error.allowed) from error
    # Rows for training end with the answer that a model should learn; here the models answer.
    return messages[:-1] if messages[-1].role == "assistant" else messages


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"is not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}", where=where
        ) from error
    except RecursionError as error:
        raise DataError("is nested too deeply", where=where) from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"is not JSON: {error}", where=where) from error
    if not isinstance(row, dict):
        raise DataError(f"is {json_kind(row)}", where=where, allowed='an object, such as {"prompt": "..."}')
    return row


def _checked(where: str, content: str | tuple[Message, ...]) -> Example:
    """The example, unless no model could answer it."""
    messages = (Message("user", content),) if isinstance(content, str) else content
    if not any(message.content.strip() for message in messages if message.role != "system"):
        raise DataError("the prompt is empty", where=where)
    if messages[-1].role not in {"user", "tool"}:
        raise DataError(f"the last message is of the role {messages[-1].role!r}", where=where, allowed="user")
    try:
        "".join(message.content for message in messages).encode()
    except UnicodeEncodeError as error:
        raise DataError("the prompt is not valid Unicode text", where=where) from error
    return Example(id=where, prompt=content)
