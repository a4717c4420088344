"""Does a reward keep its contract, whatever the completions say?

Subclass :class:`RewardConformance` in a test file and run pytest:

    class TestPoliteness(RewardConformance):
        def build(self):
            return Politeness()

        range = (0.0, 1.0)

        def rollouts(self):
            return [Rollout("Say it.", text, tuple(text.encode()), EXAMPLE) for text in ("Please.", "No.")]

The reward is called on the rollouts you give, on the bank of hostile completions (``kdkit rewards doctor`` has the
same), and on texts made at random with fixed seeds.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from typing import ClassVar, Final

from kdkit.api.data import Example, RewardScore, Rollout
from kdkit.api.protocols import Reward
from kdkit.testing.hostile import honest_wrong, hostile_completions

__all__ = ["RewardConformance", "random_texts"]

_PIECES: Final = (
    "<think>", "</think>", "<answer>", "</answer>", "<THINK>", "< think >", "<", ">", "Step 1:", "**Step 2**",
    "Step 0 ", "Step 999", "```python\n", "```cpp\n", "```", "\n```\n", "````", "print(1)", "import sys", "\n", " ",
    "²", "\r\n", "\t", "\u2028", "\x00", "\x1b[2J", "\ud800", "\udfff", "\u200b", "\u202e", "\u0301", "é", "ß", "中文",
    "ไทย", "עברית", "\U0001f600", "\uff11", "1e999", "nan", "-inf", "0x10", "1_000", "%s%n", "{0}", "{{", "}}", "\\",
    "$(", "`", "'", '"', "the", "and", "word", "a" * 300,
)  # fmt: skip
_FUZZED: Final = 150


def random_texts(count: int, seed: int) -> list[str]:
    """Texts of up to 60 pieces that parsers stumble over: tags, fences, numbers, controls, halves of characters."""
    source = random.Random(seed)  # noqa: S311 - texts for tests, no secrets
    return ["".join(source.choices(_PIECES, k=source.randrange(60))) for _ in range(count)]


class RewardConformance:
    """What every reward must fulfil.

    Attributes:
        range: What the spec declares; every value lies in it.
        deterministic_to: How far two calls on the same rollouts may differ; rewards that compute with a model may need
            a little more than nothing, since rounding depends on what is computed together.
    """

    range: ClassVar[tuple[float, float]]
    deterministic_to: ClassVar[float] = 1e-9

    def build(self) -> Reward:
        """The reward, ready to be called."""
        raise NotImplementedError

    def rollouts(self) -> Sequence[Rollout]:
        """Six or more rollouts as they come in training, with an example that the reward can score.

        At least two of them must have different scores.
        """
        raise NotImplementedError

    # -- helpers

    def _hostile(self) -> list[Rollout]:
        given = self.rollouts()[0]
        example = given.example or Example(id="", prompt=given.prompt)
        texts = [item.text for item in (honest_wrong(example), *hostile_completions(example, given.prompt))]
        return [_with_text(given, text) for text in (*texts, *random_texts(_FUZZED, seed=17))]

    def _score(self, rollouts: Sequence[Rollout]) -> list[RewardScore]:
        return list(self.build()(rollouts))

    def _same(self, got: Sequence[RewardScore], wanted: Sequence[RewardScore], what: str) -> None:
        assert len(got) == len(wanted), f"{what}: {len(got)} scores, not {len(wanted)}"
        for index, (now, before) in enumerate(zip(got, wanted, strict=True)):
            where = f"{what}: rollout {index} has {now}, not {before}"
            assert now.status == before.status, where
            if before.value is not None:
                assert now.value is not None, where
                assert abs(now.value - before.value) <= self.deterministic_to, where

    def _valid(self, score: RewardScore, what: str) -> None:
        low, high = self.range
        assert isinstance(score, RewardScore), f"{what}: {type(score).__name__} is no RewardScore"
        if score.status == "ok":
            assert isinstance(score.value, float), f"{what}: a score without a number: {score}"
            assert math.isfinite(score.value), f"{what}: {score.value} is no number to learn from"
            assert low <= score.value <= high, f"{what}: {score.value} is outside {low} to {high}"
        else:
            assert score.status in ("unscorable", "infra-error"), f"{what}: no such status: {score.status!r}"
            assert score.value is None, f"{what}: {score.status} with a value"
            assert score.reason, f"{what}: {score.status} without a reason"

    # -- the contract

    def test_your_rollouts_tell_something(self) -> None:
        rollouts = self.rollouts()
        assert len(rollouts) >= 6, "give six rollouts or more"
        values = {score.value for score in self._score(rollouts) if score.status == "ok"}
        assert len(values) >= 2, "at least two of your rollouts must have different scores"

    def test_one_valid_score_per_rollout(self) -> None:
        rollouts = self.rollouts()
        for count in (len(rollouts), 1, 0):
            scores = self.build()(rollouts[:count])
            assert len(scores) == count, f"{len(scores)} scores for {count} rollouts"
            for index, score in enumerate(scores):
                self._valid(score, f"rollout {index}")

    def test_the_same_twice_and_from_another_instance(self) -> None:
        rollouts, reward = self.rollouts(), self.build()
        first = list(reward(rollouts))
        self._same(list(reward(rollouts)), first, "a second call")
        self._same(self._score(rollouts), first, "another instance")

    def test_the_order_does_not_matter(self) -> None:
        rollouts = list(self.rollouts())
        wanted = self._score(rollouts)
        for seed in range(3):
            order = list(range(len(rollouts)))
            random.Random(seed).shuffle(order)  # noqa: S311 - an order for tests
            got = self._score([rollouts[i] for i in order])
            self._same(got, [wanted[i] for i in order], "in another order")

    def test_neighbours_do_not_matter(self) -> None:
        rollouts = list(self.rollouts())
        wanted = self._score(rollouts)
        for index, rollout in enumerate(rollouts):
            self._same(self._score([rollout]), [wanted[index]], "alone")
        half = len(rollouts) // 2
        self._same([*self._score(rollouts[:half]), *self._score(rollouts[half:])], wanted, "in two calls")
        self._same(self._score([*rollouts, *rollouts]), [*wanted, *wanted], "given twice")

    def test_earlier_calls_do_not_matter(self) -> None:
        rollouts, reward = list(self.rollouts()), self.build()
        wanted = self._score(rollouts)
        reward(rollouts[::-1])
        reward(self._hostile()[:20])
        self._same(list(reward(rollouts)), wanted, "after other calls")

    def test_the_rollouts_stay_as_they_are(self) -> None:
        rollouts = [_with_text(rollout, rollout.text, list(rollout.token_ids)) for rollout in self.rollouts()]
        kept = copy.deepcopy(rollouts)
        self._score(rollouts)
        assert rollouts == kept, "a rollout was changed"

    def test_no_text_makes_it_raise(self) -> None:
        hostile, reward = self._hostile(), self.build()
        for rollout in hostile:
            with _NamedText(rollout.text):
                scores = list(reward([rollout]))
                assert len(scores) == 1, f"{len(scores)} scores for one rollout"
                self._valid(scores[0], "a hostile completion")
        assert len(self._score(hostile)) == len(hostile), "not as many scores as hostile rollouts"

    def test_an_example_that_says_nothing_makes_no_error(self) -> None:
        for example in (None, Example(id="bare", prompt="")):
            for rollout in self.rollouts():
                bare = Rollout("", rollout.text, rollout.token_ids, example, rollout.truncated)
                (score,) = self._score([bare])
                self._valid(score, "without an example")

    def test_truncated_and_empty_completions_make_no_error(self) -> None:
        given = self.rollouts()[0]
        for text, ids, cut in (("", (), False), ("", (), True), (given.text, given.token_ids, True)):
            (score,) = self._score([Rollout(given.prompt, text, ids, given.example, cut)])
            self._valid(score, "a truncated or empty completion")


class _NamedText:
    """Adds the completion to whatever is raised inside."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        del kind, trace
        if error is not None:
            error.add_note(f"because of a completion of {len(self._text):,} characters: {self._text[:120]!r}")


def _with_text(rollout: Rollout, text: str, ids: Sequence[int] | None = None) -> Rollout:
    made = tuple(text.encode("utf-8", "surrogatepass")[:4096]) if ids is None else ids
    return Rollout(rollout.prompt, text, made, rollout.example, rollout.truncated)
