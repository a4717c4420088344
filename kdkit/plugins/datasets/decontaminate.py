"""Rows that share text with an evaluation set: the same n words in a row."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Final, TypeVar

from kdkit.api.artifacts import Artifact
from kdkit.api.data import Message
from kdkit.api.errors import DataError
from kdkit.api.protocols import DatasetLoader, LoadContext
from kdkit.api.slots import Component, Ref
from kdkit.plugins.datasets.options import Decontaminate
from kdkit.plugins.datasets.splits import Candidate

__all__ = ["Contamination", "NGrams", "RawPrompts", "contamination", "prompt_text", "raw_text", "words"]

A = TypeVar("A", bound=Artifact)
T = TypeVar("T")
_UNSPACED: Final = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Thai, Lao, Burmese, Khmer, Japanese syllables and Chinese characters."""
_SHOWN: Final = 5


def words(text: str) -> list[str]:
    """The words of ``text`` without case: runs of letters, digits and marks; single characters where no blanks are
    written.
    """
    return _word().findall(_plain(text))


@cache
def _word() -> re.Pattern[str]:
    # Marks are no letters for the regular expression, but vowels of Hindi and Arabic are.
    marks = "".join(char for char in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(char)[0] == "M")
    return re.compile(rf"[{_UNSPACED}]|(?:[^\W{_UNSPACED}]|(?![{_UNSPACED}])[{marks}])+")


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


class NGrams:
    """The word n-grams of texts, as hashes: about 70 bytes each.

    Args:
        size: Words in an n-gram.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._grams: set[int] = set()
        self._short: set[int] = set()

    def add(self, prompt: str, answers: Sequence[str]) -> None:
        """Take in one row of an evaluation set."""
        found = words(prompt)
        if len(found) < self._size:
            self._short.add(_whole(prompt, found))
        self._grams.update(self._hashes(found))
        for answer in answers:
            self._grams.update(self._hashes(words(answer)))

    def shares(self, prompt: str, answers: Sequence[str]) -> bool:
        """Whether any n-gram was there before; a prompt of fewer words counts when it was there as a whole."""
        found = words(prompt)
        if len(found) < self._size:
            if _whole(prompt, found) in self._short:
                return True
        elif not self._grams.isdisjoint(self._hashes(found)):
            return True
        return any(not self._grams.isdisjoint(self._hashes(words(answer))) for answer in answers)

    def _hashes(self, found: list[str]) -> Iterator[int]:
        return (hash(tuple(found[start : start + self._size])) for start in range(len(found) - self._size + 1))


def _whole(prompt: str, found: list[str]) -> int:
    """A short prompt as a hash: its words, or all of it when it has none, as a row of signs or emoji."""
    return hash(tuple(found) or " ".join(_plain(prompt).split()))


class Contamination:
    """Tells which rows share text with the evaluation sets, and remembers how many.

    Args:
        ngrams: Those of the evaluation sets.
        against: The evaluation sets in words.
        size: Words in an n-gram.
    """

    def __init__(self, ngrams: NGrams, against: str, size: int) -> None:
        self._ngrams = ngrams
        self._against = against
        self._size = size
        self._checked = 0
        self._found = 0
        self._ids: list[str] = []

    def __call__(self, candidate: Candidate) -> bool:
        """Whether the row shares text; it is then counted."""
        self._checked += 1
        example = candidate.example
        answers = dict.fromkeys(filter(None, (example.completion, *example.references)))
        shared = self._ngrams.shares(raw_text(candidate), list(answers))
        if shared:
            self._found += 1
            self._ids = sorted((*self._ids, example.id))[:_SHOWN]
        return shared

    def summary(self) -> str:
        """One line for the log."""
        how = f"share {self._size} words in a row, or a whole shorter prompt, with {self._against}"
        more = ", ..." if self._found > len(self._ids) else ""
        removed = f"; removed: {', '.join(self._ids)}{more}" if self._ids else ""
        return f"decontaminate: {self._found:,} of {self._checked:,} rows {how}{removed}"


def contamination(options: Decontaminate, ctx: LoadContext) -> Contamination:
    """Load the evaluation sets of ``options``.

    Raises:
        KdkitError: One of them cannot be loaded.
        DataError: One of them has no rows.
    """
    ngrams, names = NGrams(options.ngram), []
    for component in options.against:
        loader: DatasetLoader = ctx.build(component)
        rows = loader.load(RawPrompts(ctx))
        if not rows.examples:
            raise DataError("no row is left to compare with", where=f"decontaminate against dataset {component.name}")
        for example in rows.examples:
            ngrams.add(prompt_text(example.prompt), example.targets)
        names.append(f"{component.name} ({len(rows.examples):,} rows)")
    return Contamination(ngrams, ", ".join(names), options.ngram)


class RawPrompts:
    """A ``LoadContext`` that asks kdkit's loaders for prompts in their own words, whatever the prompt style.

    With the fixed sentences of a prompt style in both sets, every row would share n-grams with every other.
    """

    def __init__(self, ctx: LoadContext) -> None:
        self._ctx = ctx
        self.seed = ctx.seed
        self.offline = ctx.offline

    def resolve(self, ref: Ref[A], /) -> A:
        """See :class:`kdkit.api.LoadContext`."""
        return self._ctx.resolve(ref)

    def build(self, component: Component[T], /, *args: Any) -> T:
        """See :class:`kdkit.api.LoadContext`."""
        return self._ctx.build(component, *args)

    def log(self, message: str, /) -> None:
        """See :class:`kdkit.api.LoadContext`."""
        self._ctx.log(message)


def raw_text(candidate: Candidate) -> str:
    """The words of a row's prompt without what a prompt style adds, as far as its loader says."""
    return candidate.text or candidate.example.echo or prompt_text(candidate.example.prompt)


def prompt_text(prompt: str | tuple[Message, ...]) -> str:
    """The text of a prompt without system messages."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message.content for message in prompt if message.role != "system")
