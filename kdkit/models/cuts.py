"""Where a tokenizer cuts an answer's text, told in characters of the answer itself.

Two tokenizers cut the same answer in different places, and their chat templates put different text around it. What they
share is the answer: a cut is a number of its characters, so that the cuts of both can be compared. The end of an answer
(whatever marks it: an end token, or text of the template) counts as one more character, which no cut divides.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from kdkit.api.data import Example, Message
from kdkit.api.errors import DataError, ModelError
from kdkit.models.chat import ChatEncoder, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["NO_CUT", "OUTSIDE", "CutEncoder", "CutRow"]

NO_CUT: Final = -1
"""The text goes on within a character, or within what the template adds, after this token."""
OUTSIDE: Final = -2
"""The token stands before the answer's text (an empty thinking block, say): it covers none of it."""
_STAND_IN: Final = "\ue000answer\ue000"
"""Stands for an answer while a template is asked what it puts around one; private-use characters are never trimmed."""
_TRIMMED: Final = "Ġ "
"""How the vocabularies write a space whose tokenizers may leave it out of a token's offsets."""
_JAMO: Final = range(0x1160, 0x1200)
"""Vowels and final consonants of Hangul, which join the syllable before them."""


@dataclass(frozen=True, slots=True)
class CutRow:
    """Token ids of an example, and where its learned tokens cut the answers.

    Attributes:
        row: Prompt and answers.
        cuts: For every learned token the number of characters of all answers before the cut that follows it, each
            answer with one more for its end; ``NO_CUT`` or ``OUTSIDE`` otherwise. The numbers rise strictly.
    """

    row: Encoded
    cuts: tuple[int, ...]

    def cut(self, length: int) -> CutRow:
        """The first ``length`` tokens."""
        row = self.row.cut(length)
        return CutRow(row, self.cuts[: row.targets])


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer inside the text that is tokenised for it: ``text[start:stop]`` are its characters from ``lead`` on."""

    text: str
    start: int
    stop: int
    lead: int
    length: int


class CutEncoder(ChatEncoder):
    """A :class:`ChatEncoder` that also says where the tokens cut the answers.

    Args:
        tokenizer: A fast tokenizer; others cannot tell which characters a token stands for.

    Raises:
        ModelError: The tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        if not tokenizer.is_fast:
            raise ModelError("the tokenizer cannot say which characters its tokens cover", allowed="a fast tokenizer")

    def cut_row(self, example: Example) -> CutRow | None:
        """The row of :meth:`training` with its cuts; None when the chat template changes an answer's text.

        White space that a template trims from the ends of an answer is no change.

        Raises:
            DataError: The example has no completion.
            ModelError: The chat template does not say where an answer starts.
        """
        if example.completion is None:
            raise DataError("the example has no completion to learn", where=f"example {example.id}")
        if isinstance(example.prompt, str):
            return self._raw(example, example.completion)
        messages = (*example.prompt, Message("assistant", example.completion))
        turns = [i for i, m in enumerate(messages) if m.role == "assistant"] if example.every_turn else []
        return self._turns(example.id, messages, turns or [len(messages) - 1])

    def _raw(self, example: Example, answer: str) -> CutRow:
        size = len(answer)
        ids, cuts = self._cut(_Answer(answer, 0, size, 0, size), [self._end_id()])
        return CutRow(self._join(example.id, [(self.prompt(example), False), (ids, True)]), tuple(cuts))

    def _turns(self, example_id: str, messages: tuple[Message, ...], turns: list[int]) -> CutRow | None:
        shown = tuple(Message(m.role, _STAND_IN) if i in turns else m for i, m in enumerate(messages))
        pieces, frames = self._pieces(messages, turns), self._pieces(shown, turns)
        if pieces is None or frames is None:
            raise ModelError(
                "the chat template does not say where an answer starts: it rewrites earlier turns, or starts an answer "
                "without add_generation_prompt",
                where=self._name(),
                hint="train on the last turn only, or use a teacher with another template",
            )
        tokens: list[tuple[list[int], bool]] = []
        cuts: list[int] = []
        answers, done = iter(messages[turn].content for turn in turns), 0
        for index, ((text, learned), (frame, _)) in enumerate(zip(pieces, frames, strict=True)):
            if not learned:
                tokens.append((self._ids(text) if index == 0 else self._continued(text), False))
                continue
            content = next(answers)
            answer = _locate(text, frame, content)
            if answer is None:
                return None
            ids, own = self._cut(answer, [])
            tokens.append((ids, True))
            cuts += [cut + done if cut >= 0 else cut for cut in own]
            done += len(content) + 1
        return CutRow(self._join(example_id, tokens), tuple(cuts))

    def _cut(self, answer: _Answer, end: list[int]) -> tuple[list[int], list[int]]:
        """Ids of the answer's text, closed by ``end``, and its cuts."""
        ids, offsets = self._with_offsets(answer.text)
        size = len(answer.text)
        spans = _whole(offsets, self.tokenizer.convert_ids_to_tokens(ids), answer)
        return [*ids, *end], _cuts([*spans, *((size, size + 1) for _ in end)], answer)

    def _with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of :meth:`_continued` with the characters that each covers."""
        ids, offsets = self._tokens(text)
        if not self._adds_prefix:
            return ids, offsets
        before, (whole, places) = self._ids("\n"), self._tokens("\n" + text)
        # An unknown token may cover newline and text: see ``_swallows``.
        if whole[: len(before)] != before or (before and places[len(before) - 1][1] > 1):
            return ids, offsets
        return whole[len(before) :], [(start - 1, stop - 1) for start, stop in places[len(before) :]]

    def _tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [int(i) for i in out["input_ids"]], [(int(a), int(b)) for a, b in out["offset_mapping"]]


def _locate(text: str, frame: str, content: str) -> _Answer | None:
    """The answer in a rendered turn; ``frame`` is the same turn with the stand-in as its answer."""
    before, found, after = frame.partition(_STAND_IN)
    start, stop = len(before), len(text) - len(after)
    if not found or start > stop or not (text.startswith(before) and text.endswith(after)):
        return None
    kept = text[start:stop]
    if kept.strip() != content.strip() or kept not in content:
        return None
    return _Answer(text, start, stop, content.index(kept), len(content))


def _whole(offsets: Sequence[tuple[int, int]], pieces: Sequence[str], answer: _Answer) -> Iterator[tuple[int, int]]:
    """Offsets in which every character that no token covers belongs to the token before it.

    Some tokenizers leave the spaces at the ends of a token out of its offsets, and a character that a normaliser
    composes covers only the first of those it was made from.

    Args:
        offsets: First character of every token, and the one after its last.
        pieces: The tokens as the vocabulary writes them.
        answer: The text. A token on one side of an end of the answer stays there.
    """
    text = answer.text
    starts = [start - _left_out(start, stop, piece, text) for (start, stop), piece in zip(offsets, pieces, strict=True)]
    # One more than there are tokens where there are none.
    for (start, stop), following in zip(offsets, [*starts[1:], len(text)], strict=False):
        edge = next((edge for edge in (answer.start, answer.stop) if start < edge and stop <= edge), len(text))
        yield start, max(stop, min(following, edge))


def _left_out(start: int, stop: int, piece: str, text: str) -> int:
    """How many spaces at a token's start are not in its offsets: all of them or none."""
    spaces = len(piece) - len(piece.lstrip(_TRIMMED))
    return 0 if stop > start and text[start] == " " else spaces


def _cuts(spans: Sequence[tuple[int, int]], answer: _Answer) -> list[int]:
    """The cut after every token.

    Text is cut after a token when no later token covers a character that it or an earlier one covers: the pieces of one
    character (byte-level vocabularies) and the letters of one ligature (normalisers) stay together. So does a letter
    with its marks, which a normaliser may compose or put into another order.
    """
    shift, end = answer.lead - answer.start, answer.length + 1
    reached = accumulate((end if stop > answer.stop else stop + shift for _, stop in spans), max)
    starts = [min(start, answer.stop) + shift for start, _ in spans]
    # The first character that a later token covers.
    ahead = list(accumulate(reversed([*starts[1:], end]), min))[::-1]
    cuts = [cut if cut <= first else NO_CUT for cut, first in zip(reached, ahead, strict=True)]
    cuts = [NO_CUT if _divides(answer, cut - shift) else cut for cut in cuts]
    # A token that covers nothing belongs to the one before it: only the last of equal cuts is one.
    cuts = [NO_CUT if cut == after else cut for cut, after in zip(cuts, [*cuts[1:], NO_CUT], strict=True)]
    # Where the template puts no text before the answer, a token before it is the tokenizer's own dummy prefix.
    before = OUTSIDE if answer.start else NO_CUT
    return [before if stop <= answer.start else cut for cut, (_, stop) in zip(cuts, spans, strict=True)]


def _divides(answer: _Answer, place: int) -> bool:
    """Whether a cut at this place of the text parts a character from what normalisers may join to it (Unicode's NFC).

    Where only one side composes the two, its token covers both, so that no cut is common there anyway; but marks of one
    letter can change places without being composed.
    """
    if not answer.start < place < answer.stop:
        return False
    following = answer.text[place]
    return unicodedata.combining(following) != 0 or ord(following) in _JAMO
