"""From lines of JSON to the examples that kdkit trains on."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from kdkit.api import DataError, Example, Message, Rows

if TYPE_CHECKING:
    from kdkit.api import LoadContext

    from kdkit_acme import plugin

SAMPLE = files(__package__) / "rows.jsonl"


def example(row: dict[str, Any], where: str) -> Example:
    """The example in a row; ``where`` is its file and line.

    Raises:
        DataError: The row is not as it should be.
    """
    texts = {key: row.get(key) for key in ("question", "answer")}
    for key, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"has no text under {key!r}", where=where)
    return Example(
        # The same row has the same id in every file: splits and statistics go by it.
        id=str(row.get("id") or texts["question"]),
        prompt=(Message("user", str(texts["question"])),),
        completion=texts["answer"],
        category=str(row.get("topic", "")),
    )


class AcmeRows:
    """Reads the rows of a file.

    Args:
        params: As a recipe gives them.
    """

    def __init__(self, params: plugin.AcmeParams) -> None:
        self._params = params

    def load(self, ctx: LoadContext, /) -> Rows:
        """The rows that the parameters ask for.

        Raises:
            DataError: The file cannot be read, or one of its lines; names it.
        """
        if self._params.source is None:
            rows = self.sample()
        else:
            file = ctx.resolve(self._params.source).path
            try:
                rows = _parsed(file.read_bytes(), str(file))
            except OSError as error:
                raise DataError(f"cannot be read: {error.strerror}", where=str(file)) from error
        return Rows(examples=rows.examples[: self._params.max_rows], counts=rows.counts)

    def sample(self) -> Rows:
        """The rows that come with the package."""
        return _parsed(SAMPLE.read_bytes(), SAMPLE.name)


def _parsed(content: bytes, name: str) -> Rows:
    """The examples of all lines; of several rows with the same id the first."""
    found: dict[str, Example] = {}
    counts = {"read": 0, "duplicate": 0}
    # Not str.splitlines: it also cuts at characters that JSON texts may contain.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        counts["read"] += 1
        made = example(_object(line, f"{name}:{number}"), f"{name}:{number}")
        counts["duplicate"] += made.id in found
        found.setdefault(made.id, made)
    return Rows(examples=tuple(found.values()), counts=counts)


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
        # JSON can spell halves of characters, which no file and no tokenizer takes.
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise DataError("is not JSON in UTF-8", where=where) from error
    if not isinstance(row, dict):
        raise DataError("is not a JSON object", where=where)
    return row
