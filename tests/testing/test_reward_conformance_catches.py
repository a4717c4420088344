"""Deliberately wrong rewards: each must fail the suite for its own reason, and every check must catch one."""

from __future__ import annotations

import inspect
import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from suites import check, checks_of, variant

from kdkit.api import Example, RewardScore, Rollout
from kdkit.testing.conformance import RewardConformance

EXAMPLE = Example(id="sum", prompt="Add.", references=("the sum of both numbers",))
TEXTS = (
    "<think>Step 1: read the numbers\nStep 2: add them up</think><answer>the sum of both</answer>",
    "<think>no answer</think>",
    "the sum of both numbers",
    "Step 1: guess",
    "Только по-русски.",
    "four",
    "",
)


def right(rollouts):
    return [RewardScore.of(min(len(r.text), 1000) / 1000) for r in rollouts]


def pairs(rollouts):
    return zip(rollouts, right(rollouts), strict=True)


def one_too_few(rollouts):
    return right(rollouts)[:-1]


def one_score_for_all(rollouts):
    return right(rollouts)[:1]


def sorted_by_length(rollouts):
    return sorted(right(rollouts), key=lambda score: score.value)


def without_the_empty_ones(rollouts):
    return right([r for r in rollouts if r.text])


def whitened(rollouts):
    values = [score.value for score in right(rollouts)]
    return [RewardScore.of(max(0.0, value - sum(values) / len(values))) for value in values]


def nothing_for_repeats(rollouts):
    seen, scores = set(), []
    for rollout, score in pairs(rollouts):
        scores.append(RewardScore.of(0.0) if rollout.text in seen else score)
        seen.add(rollout.text)
    return scores


def at_random(rollouts, counter=itertools.count()):  # noqa: B008 - state between calls is the fault
    return [RewardScore.of(score.value * (1 - next(counter) % 2 / 10)) for score in right(rollouts)]


def above_its_range(rollouts):
    return [RewardScore.of(len(r.text) / 10) for r in rollouts]


def below_its_range(rollouts):
    return [RewardScore.of(score.value - 0.5) for score in right(rollouts)]


def not_a_number(rollouts):
    return [RewardScore.of(score.value if r.text else float("nan")) for r, score in pairs(rollouts)]


def divides_by_the_length(rollouts):
    return [RewardScore.of(min(1.0, r.text.count("e") / len(r.text))) for r in rollouts]


def encodes_strictly(rollouts):
    return [RewardScore.of(min(len(r.text.encode()), 1000) / 1000) for r in rollouts]


def numbers_of_any_size(rollouts):
    last = [(r.text.split() or ["0"])[-1] for r in rollouts]
    return [
        RewardScore.of(min(abs(int(x)), 1) if x.isdigit() else s.value)
        for x, s in zip(last, right(rollouts), strict=True)
    ]


def trusts_tags(rollouts):
    values = [len(r.text.split("<think>")[1]) if "think>" in r.text else len(r.text) for r in rollouts]
    return [RewardScore.of(min(value, 1000) / 1000) for value in values]


def plain_numbers(rollouts):
    return [score.value for score in right(rollouts)]


def none_for_unscorable(rollouts):
    return [RewardScore("ok", None) if not r.text else s for r, s in pairs(rollouts)]


def zero_with_a_reason_nobody_knows(rollouts):
    return [RewardScore("failed", None, "x") if not r.text else s for r, s in pairs(rollouts)]


def unscorable_without_a_reason(rollouts):
    return [RewardScore("unscorable") if not r.text else s for r, s in pairs(rollouts)]


def unscorable_with_a_value(rollouts):
    return [RewardScore("unscorable", 0.0, "empty") if not r.text else s for r, s in pairs(rollouts)]


def always_the_same(rollouts):
    return [RewardScore.of(0.5) for _ in rollouts]


def needs_an_example(rollouts):
    return [RewardScore.of(s.value * len(r.example.prompt) / 4) for r, s in pairs(rollouts)]


def needs_a_reference(rollouts):
    return [
        RewardScore.of(s.value if r.example is None or r.example.references[0] else 0.0) for r, s in pairs(rollouts)
    ]


def needs_tokens(rollouts):
    return [RewardScore.of(s.value * (r.token_ids[0] >= 0) if r.truncated else s.value) for r, s in pairs(rollouts)]


def eats_tokens(rollouts):
    scores = right(rollouts)
    for rollout in rollouts:
        if isinstance(rollout.token_ids, list):
            rollout.token_ids.clear()
    return scores


def no_batch(rollouts):
    return right(rollouts) if rollouts[0] else []


class Adapting:
    """Its scale is the longest completion it has ever seen."""

    def __init__(self):
        self.longest = 1

    def __call__(self, rollouts):
        self.longest = max([self.longest, *(len(r.text) for r in rollouts)])
        return [RewardScore.of(len(r.text) / self.longest) for r in rollouts]


class WarmsUp:
    """Has nothing to say the first time."""

    cold = True

    def __call__(self, rollouts):
        if self.cold and len(rollouts) > 1:
            self.cold = False
            return [RewardScore.unscorable("not ready") for _ in rollouts]
        return right(rollouts)


class SecondTime:
    """Changes what it gives when it is asked for the same again."""

    called = False

    def __call__(self, rollouts):
        scores, again = right(rollouts), self.called
        self.called = True
        return self.again(scores) if again else scores


class OneLess(SecondTime):
    def again(self, scores):
        return scores[1:]


class NoNumbers(SecondTime):
    def again(self, scores):
        return [RewardScore("ok", None) for _ in scores]


def nothing_for_control_characters(rollouts):
    return [score for rollout, score in pairs(rollouts) if "\x00" not in rollout.text]


def a_hundred_at_most(rollouts):
    return right(rollouts[:100])


TELLS, ONE = "test_your_rollouts_tell_something", "test_one_valid_score_per_rollout"
TWICE, ORDER = "test_the_same_twice_and_from_another_instance", "test_the_order_does_not_matter"
BESIDE, EARLIER = "test_neighbours_do_not_matter", "test_earlier_calls_do_not_matter"
STAY, TEXT = "test_the_rollouts_stay_as_they_are", "test_no_text_makes_it_raise"
BARE = "test_an_example_that_says_nothing_makes_no_error"
CUT = "test_truncated_and_empty_completions_make_no_error"
WRONG = [
    (always_the_same, TELLS, "must have different scores"),
    (one_too_few, ONE, "6 scores for 7 rollouts"),
    (one_score_for_all, ONE, "1 scores for 7 rollouts"),
    (without_the_empty_ones, ONE, "6 scores for 7 rollouts"),
    (no_batch, ONE, "index out of range"),
    (above_its_range, ONE, r"is outside 0\.0 to 1\.0"),
    (below_its_range, ONE, r"is outside 0\.0 to 1\.0"),
    (not_a_number, ONE, "nan is no number to learn from"),
    (plain_numbers, ONE, "float is no RewardScore"),
    (none_for_unscorable, ONE, "a score without a number"),
    (zero_with_a_reason_nobody_knows, ONE, "no such status: 'failed'"),
    (unscorable_without_a_reason, ONE, "unscorable without a reason"),
    (unscorable_with_a_value, ONE, "unscorable with a value"),
    (at_random, TWICE, "a second call: rollout"),
    (WarmsUp, TWICE, "a second call: rollout 0"),
    (OneLess, TWICE, "a second call: 6 scores, not 7"),
    (NoNumbers, TWICE, "a second call: rollout 0"),
    (sorted_by_length, ORDER, "in another order: rollout"),
    (whitened, BESIDE, "alone: rollout 0"),
    (nothing_for_repeats, BESIDE, "given twice: rollout"),
    (Adapting, EARLIER, "after other calls: rollout"),
    (eats_tokens, STAY, "a rollout was changed"),
    (nothing_for_control_characters, TEXT, "0 scores for one rollout"),
    (a_hundred_at_most, TEXT, "not as many scores as hostile rollouts"),
    (divides_by_the_length, TEXT, "division by zero"),
    (encodes_strictly, TEXT, "surrogates not allowed"),
    (numbers_of_any_size, TEXT, "invalid literal for int|Exceeds the limit"),
    (trusts_tags, TEXT, "list index out of range"),
    (needs_an_example, BARE, "has no attribute 'prompt'"),
    (needs_a_reference, BARE, "index out of range"),
    (needs_tokens, CUT, "index out of range"),
]


def suite(reward):
    return variant(
        RewardConformance,
        range=(0.0, 1.0),
        build=reward if inspect.isclass(reward) else lambda: reward,
        rollouts=lambda: [Rollout("Add.", text, tuple(text.encode()), EXAMPLE) for text in TEXTS],
    )


@pytest.mark.parametrize(("reward", "test", "reason"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_reward_fails(reward, test, reason, tmp_path):
    with pytest.raises((AssertionError, ArithmeticError, ValueError, LookupError, AttributeError), match=reason):
        check(suite(reward), test, tmp_path)


@pytest.mark.parametrize("test", checks_of(RewardConformance))
def test_a_right_reward_passes_and_no_test_is_idle(test, tmp_path):
    assert test in {caught for _, caught, _ in WRONG}
    check(suite(right), test, tmp_path)


def test_five_rollouts_are_too_few(tmp_path):
    few = variant(suite(right), rollouts=lambda: suite(right)().rollouts()[:5])
    with pytest.raises(AssertionError, match="give six rollouts or more"):
        check(few, TELLS, tmp_path)


def test_a_text_that_raises_is_named(tmp_path):
    with pytest.raises(ZeroDivisionError) as raised:
        check(suite(divides_by_the_length), TEXT, tmp_path)
    assert raised.value.__notes__ == ["because of a completion of 0 characters: ''"]
