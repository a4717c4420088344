"""Format rewards: a thought before the answer, in numbered steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from kdkit.api.data import RewardScore, Rollout
from kdkit.plugins.rewards.scores import scored
from kdkit.plugins.rewards.tags import find_tags, opened_by_prompt, thinking
from kdkit.plugins.rewards.words import has_content, words

__all__ = ["Steps", "Think"]

# Every run is bounded, so that a line is read once.
_HEADING: Final = re.compile(
    r"[ \t]{0,3}(?:#{1,6}[ \t]{1,3})?(?:\*\*|__)?[Ss]tep[ \t]{1,3}([0-9]{1,3})(?![0-9A-Za-z_])"
)
_AFTER_NUMBER: Final = " \t*_:.)-\u2013\u2014"


class Think:
    """One thought between tags, then an answer; see ``ThinkParams``."""

    def __init__(self, *, partial: float, answer_tags: bool) -> None:
        self._partial = partial
        self._answer_tags = answer_tags

    def __call__(self, rollouts: Sequence[Rollout], /) -> list[RewardScore]:
        """See :class:`kdkit.api.protocols.Reward`."""
        return [self._score(rollout) for rollout in rollouts]

    def _score(self, rollout: Rollout) -> RewardScore:
        value, note = self._judge(rollout)
        return scored(value, 0.0, 1.0, note)

    def _judge(self, rollout: Rollout) -> tuple[float, str | None]:
        parts = thinking(rollout.text, opened=opened_by_prompt(rollout))
        if isinstance(parts, str):
            return 0.0, parts
        if not has_content(parts.thought):
            return 0.0, "the thought is empty"
        flaws = []
        if parts.before.strip():
            flaws.append("text before <think>")
        if self._answer_tags:
            if flaw := _answer_flaw(rollout.text, parts.after):
                flaws.append(flaw)
        elif not has_content(parts.after):
            flaws.append("no answer after </think>")
        if not flaws:
            return 1.0, None
        return (self._partial if len(flaws) == 1 else 0.0), ", ".join(flaws)


def _answer_flaw(text: str, after: str) -> str | None:
    """What is wrong with ``<answer>...</answer>``, which must be all that follows the thought."""
    tags = find_tags(after, "answer")
    if len(find_tags(text, "answer")) != len(tags):
        return "an answer tag before </think>"
    if [(tag.closing, tag.exact) for tag in tags] != [(False, True), (True, True)]:
        return "not one <answer>...</answer>"
    first, last = tags
    if after[: first.start].strip() or after[last.stop :].strip():
        return "text around <answer>...</answer>"
    return None if has_content(after[first.stop : last.start]) else "the answer is empty"


class Steps:
    """Numbered steps inside the thought; see ``StepsParams``."""

    def __init__(self, *, steps: int, max_steps: int, min_words: int) -> None:
        self._steps = steps
        self._max_steps = max_steps
        self._min_words = min_words

    def __call__(self, rollouts: Sequence[Rollout], /) -> list[RewardScore]:
        """See :class:`kdkit.api.protocols.Reward`."""
        return [self._score(rollout) for rollout in rollouts]

    def _score(self, rollout: Rollout) -> RewardScore:
        parts = thinking(rollout.text, opened=opened_by_prompt(rollout))
        if isinstance(parts, str):
            return scored(0.0, 0.0, 1.0, parts)
        found = _headed(parts.thought)
        flaw = self._flaw(found)
        value = 0.0 if flaw else len(found) / self._steps
        return scored(value, 0.0, 1.0, flaw or f"{len(found)} steps")

    def _flaw(self, found: list[tuple[int, str]]) -> str | None:
        if not found:
            return "no steps"
        if [number for number, _ in found] != list(range(1, len(found) + 1)):
            return "steps are not numbered 1, 2, 3, ..."
        if len(found) > self._max_steps:
            return f"more than {self._max_steps} steps"
        seen: set[frozenset[str]] = set()
        for number, content in found:
            # Numbers do not make a step another one: "check case 1", "check case 2".
            said = frozenset(word for word in words(content) if not word.isdigit())
            if len(said) < self._min_words:
                return f"step {number} is empty"
            if said in seen:
                return f"step {number} repeats another"
            seen.add(said)
        return None


def _headed(thought: str) -> list[tuple[int, str]]:
    """Number and content of every line that begins with ``Step k``, up to the next such line."""
    found: list[tuple[int, list[str]]] = []
    for line in thought.split("\n"):
        match = _HEADING.match(line)
        if match is not None:
            found.append((int(match[1]), [line[match.end() :].lstrip(_AFTER_NUMBER)]))
        elif found:
            found[-1][1].append(line)
    return [(number, "\n".join(lines)) for number, lines in found]
