"""Examples in a temporary file, for datasets that are larger than memory should hold."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, overload

from kdkit.api.data import Example
from kdkit.models.examples import example_from_json, example_to_json

__all__ = ["ExampleFile", "StoredExamples", "memory_of"]

_LENGTH: Final = 8
_OBJECTS: Final = 400
"""Bytes of an example's objects without their texts."""


def memory_of(example: Example) -> int:
    """About how many bytes ``example`` takes in memory."""
    prompt = example.prompt
    texts = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
    return _OBJECTS + _bytes((*texts, example.completion, *example.references, example.category, example.extra))


def _bytes(value: Any) -> int:
    size = sys.getsizeof(value)
    if isinstance(value, Mapping):
        return size + sum(_bytes(item) for item in value.values()) + 60 * len(value)
    if isinstance(value, list | tuple):
        return size + sum(map(_bytes, value))
    return size


class ExampleFile:
    """A nameless file in the temporary directory (``TMPDIR``) that is gone when nothing refers to it any more."""

    def __init__(self) -> None:
        self._stream = tempfile.TemporaryFile(prefix="kdkit-")  # noqa: SIM115
        self._end = 0
        weakref.finalize(self, self._stream.close)

    def write(self, example: Example) -> int:
        """Append ``example``; returns where :meth:`read` finds it."""
        data = json.dumps(example_to_json(example), ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        place, self._end = self._end, self._end + _LENGTH + len(data)
        self._stream.write(len(data).to_bytes(_LENGTH, "big"))
        self._stream.write(data)
        return place

    def flush(self) -> None:
        """Make everything written so far readable."""
        self._stream.flush()

    def read(self, place: int) -> Example:
        """The example at ``place``; moves no shared file position, so threads and forks may read at once."""
        descriptor = self._stream.fileno()
        length = int.from_bytes(os.pread(descriptor, _LENGTH, place), "big")
        return example_from_json(json.loads(os.pread(descriptor, length, place + _LENGTH)))


class StoredExamples(Sequence[Example]):
    """Examples that are read from an :class:`ExampleFile` each time they are asked for: eight bytes each in memory."""

    def __init__(self, file: ExampleFile, places: Iterable[int]) -> None:
        file.flush()
        self._file = file
        self._places = array("Q", places)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int, /) -> Example: ...

    @overload
    def __getitem__(self, index: slice, /) -> StoredExamples: ...

    def __getitem__(self, index: int | slice, /) -> Example | StoredExamples:
        if isinstance(index, slice):
            return StoredExamples(self._file, self._places[index])
        return self._file.read(self._places[index])
