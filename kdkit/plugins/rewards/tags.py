"""The parts of a completion: the thought between ``<think>`` tags, and the answer after it. Linear in the text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from kdkit.api.data import Rollout

__all__ = ["Tag", "Thinking", "answer_part", "find_tags", "opened_by_prompt", "thinking", "without_tags"]

# Written out in another way ("< Think >", "<think/>") it is no tag that anybody asked for, but it is one for the count.
# Possessive runs of white space hold no "<", so that no character is read more than twice whatever the text.
_TAG: Final = re.compile(r"<\s*+(/?)\s*+(think|answer)\s*+/?\s*+>", re.IGNORECASE)
_OPEN: Final = "<think>"


@dataclass(frozen=True, slots=True)
class Tag:
    """A tag in a text; ``exact`` when it is written as ``<name>`` or ``</name>``."""

    name: str
    closing: bool
    exact: bool
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Thinking:
    """A completion with one well-formed thought: what stands before, in and after it."""

    before: str
    thought: str
    after: str


def find_tags(text: str, name: str) -> list[Tag]:
    """All tags called ``name`` (``think`` or ``answer``), in order."""
    found = []
    for match in _TAG.finditer(text):
        if match[2].casefold() == name:
            closing = bool(match[1])
            exact = match[0] == (f"</{name}>" if closing else f"<{name}>")
            found.append(Tag(name, closing, exact, match.start(), match.end()))
    return found


def opened_by_prompt(rollout: Rollout) -> bool:
    """Whether the chat template has opened the thought already, so that the completion starts inside it."""
    return rollout.prompt.rstrip().endswith(_OPEN)


def thinking(text: str, *, opened: bool) -> Thinking | str:
    """The parts around the one thought of a completion, or in a few words why there is not exactly one.

    Args:
        text: The completion.
        opened: The prompt ends with the opening tag.
    """
    tags = find_tags(text, "think")
    if not tags:
        return "the thought is never closed" if opened else "no <think>"
    if not all(tag.exact for tag in tags):
        return "a tag is not written as <think> or </think>"
    shape = "".join("/" if tag.closing else "<" for tag in tags)
    wanted = "/" if opened else "</"
    if shape == wanted:
        start = 0 if opened else tags[0].start
        inside = 0 if opened else tags[0].stop
        return Thinking(text[:start], text[inside : tags[-1].start], text[tags[-1].stop :])
    if shape == "<":
        return "the thought is never closed"
    return "tags are repeated, nested or out of order"


def answer_part(text: str, *, opened: bool) -> str:
    """What follows the last thought; all of a text without tags, nothing when a thought is not closed."""
    tags = find_tags(text, "think")
    if not tags:
        return "" if opened else text
    return text[tags[-1].stop :] if tags[-1].closing else ""


def without_tags(text: str) -> str:
    """The text with a space in the place of every tag."""
    return _TAG.sub(" ", text)
