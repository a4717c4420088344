"""Is the text in the language that was asked for? By script, and for six languages by their commonest words."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

from kdkit.api.data import RewardScore, Rollout
from kdkit.plugins.rewards.programs import without_blocks
from kdkit.plugins.rewards.scores import scored
from kdkit.plugins.rewards.tags import without_tags
from kdkit.plugins.rewards.words import words

__all__ = ["SCRIPTS", "LanguageReward"]

SCRIPTS: Final[Mapping[str, tuple[str, ...]]] = {
    "en": ("LATIN",),
    "es": ("LATIN",),
    "de": ("LATIN",),
    "fr": ("LATIN",),
    "it": ("LATIN",),
    "pt": ("LATIN",),
    "ru": ("CYRILLIC",),
    "el": ("GREEK",),
    "ar": ("ARABIC",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "th": ("THAI",),
    "ko": ("HANGUL",),
    "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "zh": ("CJK",),
}
"""Language to the first words of its letters' Unicode names."""

_COMMON: Final[Mapping[str, str]] = {
    "en": "the and of is that this with for are which from have not then it we be by if to",
    "es": "el los las y es para por pero como más está entonces si también del cuando hay",
    "de": "der das und ist nicht mit ein eine auf für von wir auch dann sich wenn zu aber",
    "fr": "le les et est dans pas qui nous une avec donc alors il cette mais sont ces",
    "it": "il gli di che è non sono della questo anche allora si nel più quindi",
    "pt": "os é com não uma para por mas mais então também da em isso quando",
}
"""Words that are common in one language and no words of English in another."""
_LETTERS: Final = 20
"""A text with fewer letters earns its share only: one word in the right language is no answer."""
_TELLING: Final = 5
"""Fewer common words tell nothing about the language."""


class LanguageReward:
    """The share of the prose that is in one language; see ``LanguageParams``."""

    def __init__(self, *, language: str) -> None:
        self._scripts = SCRIPTS[language]
        self._telling = _telling(language)

    def __call__(self, rollouts: Sequence[Rollout], /) -> list[RewardScore]:
        """See :class:`kdkit.api.protocols.Reward`."""
        return [self._score(rollout.text) for rollout in rollouts]

    def _score(self, text: str) -> RewardScore:
        prose = without_tags(without_blocks(text))
        names = [name for char in prose if (name := _script(char))]
        if not names:
            return scored(0.0, 0.0, 1.0, "no letters")
        right = sum(name in self._scripts for name in names)
        value = right / len(names) * min(1.0, len(names) / _LETTERS)
        note = f"{right} of {len(names)} letters are of its script"
        own, other = self._common(prose)
        if own + other >= _TELLING:
            value *= own / (own + other)
            note += f", {own} of {own + other} common words are its own"
        return scored(value, 0.0, 1.0, note)

    def _common(self, prose: str) -> tuple[int, int]:
        """How many words only this language has among the commonest, and how many only others have."""
        own, other = self._telling
        said = words(prose) if own else []
        return sum(word in own for word in said), sum(word in other for word in said)


def _telling(language: str) -> tuple[frozenset[str], frozenset[str]]:
    if language not in _COMMON:
        return frozenset(), frozenset()
    own = frozenset(_COMMON[language].split())
    others = frozenset(word for name, text in _COMMON.items() if name != language for word in text.split())
    return own - others, others - own


@lru_cache(maxsize=1 << 14)
def _script(char: str) -> str:
    """The first word of a letter's name, empty for what is no letter; letters of half and full width are as others."""
    if not char.isalpha():
        return ""
    plain = unicodedata.normalize("NFKC", char)[:1]
    return unicodedata.name(plain, "").partition(" ")[0]
