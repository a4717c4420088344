"""The built-in rewards keep the contract, and the suite catches rewards that do not."""

from __future__ import annotations

import inspect
import itertools
import sys
from functools import cache
from pathlib import Path

import pytest

from kdkit.api import Example, RewardScore, Rollout
from kdkit.testing.conformance.reward import RewardConformance, random_texts
from kdkit.testing.hostile import expected_outputs, honest_wrong, hostile_completions

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins"))

from reward_helpers import Workshop, answer, failed

TESTS = [{"input": "1 2", "output": "3"}, {"input": "2 2", "output": "4"}]
EXAMPLE = Example(
    id="sum",
    prompt="Add.",
    references=("the sum of both numbers",),
    extra={"language": "python", "official_tests": TESTS},
)
PROGRAMS = {
    "add": lambda job: str(sum(map(int, job.stdin.split()))),
    "four": lambda job: "4",
    "down": lambda job: failed("infra-error"),
}
TEXTS = (
    answer("add", thought="Step 1: read the numbers\nStep 2: add them up\nStep 3: print the sum of both"),
    answer("four", thought="Step 1: guess a number"),
    answer("down"),
    "<think>no answer</think>",
    "the sum of both numbers is the sum of both numbers",
    "Только по-русски, без программы и без мыслей.",
    "",
)


class BuiltIn(RewardConformance):
    name = ""
    given = {}  # noqa: RUF012

    def build(self):
        return Workshop(PROGRAMS).build(self.name, **self.given)

    def rollouts(self):
        return [Rollout("Add.", text, tuple(text.encode()), EXAMPLE) for text in TEXTS]


class TestThink(BuiltIn):
    name, range = "think", (0.0, 1.0)


class TestThinkWithAnswerTags(BuiltIn):
    name, range, given = "think", (0.0, 1.0), {"answer_tags": True}


class TestSteps(BuiltIn):
    name, range = "steps", (0.0, 1.0)


class TestCorrectness(BuiltIn):
    name, range = "correctness", (0.0, 1.0)


class TestPartialCorrectness(BuiltIn):
    name, range, given = "correctness", (0.0, 1.0), {"scoring": "partial"}


class TestWeightedCorrectness(BuiltIn):
    name, range, given = "correctness", (0.0, 1.0), {"scoring": "weighted_sum"}


class TestLength(BuiltIn):
    name, range = "length", (-1.0, 1.0)


class TestTargetLength(BuiltIn):
    name, range = "length", (-1.0, 1.0)
    given = {"shape": "target", "min_tokens": 40, "max_tokens": 60, "margin": 50}  # noqa: RUF012


class TestOverlong(BuiltIn):
    name, range = "length", (-1.0, 1.0)
    given = {"shape": "overlong", "max_tokens": 60, "margin": 30}  # noqa: RUF012


class TestRepetition(BuiltIn):
    name, range = "repetition", (-1.0, 0.0)


class TestLanguage(BuiltIn):
    name, range, given = "language", (0.0, 1.0), {"language": "ru"}


class TestRouge(BuiltIn):
    name, range = "rouge", (0.0, 1.0)


# -- the suite is worth what it catches


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


FAULTS = (
    one_too_few,
    one_score_for_all,
    sorted_by_length,
    without_the_empty_ones,
    whitened,
    nothing_for_repeats,
    at_random,
    above_its_range,
    below_its_range,
    not_a_number,
    divides_by_the_length,
    encodes_strictly,
    numbers_of_any_size,
    trusts_tags,
    plain_numbers,
    none_for_unscorable,
    zero_with_a_reason_nobody_knows,
    unscorable_without_a_reason,
    unscorable_with_a_value,
    always_the_same,
    needs_an_example,
    needs_a_reference,
    needs_tokens,
    eats_tokens,
    no_batch,
    Adapting,
)


@cache
def failures(fault):
    class Suite(BuiltIn):
        range = (0.0, 1.0)

        def build(self):
            return fault() if inspect.isclass(fault) else fault

    suite, names = Suite(), []
    for name, test in inspect.getmembers(suite, inspect.ismethod):
        if name.startswith("test_"):
            try:
                test()
            except (AssertionError, ArithmeticError, ValueError, LookupError, AttributeError):
                names.append(name)
    return names


def test_the_right_reward_passes_everything():
    assert failures(right) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_the_suite_catches(fault):
    assert failures(fault)


def test_no_test_of_the_suite_is_idle():
    caught = {name for fault in FAULTS for name in failures(fault)}
    own = {name for name, _ in inspect.getmembers(RewardConformance, inspect.isfunction) if name.startswith("test_")}
    assert own <= caught, own - caught


def test_a_text_that_raises_is_named():
    class Suite(BuiltIn):
        range = (0.0, 1.0)

        def build(self):
            return divides_by_the_length

    with pytest.raises(ZeroDivisionError) as raised:
        Suite().test_no_text_makes_it_raise()
    assert raised.value.__notes__ == ["because of a completion of 0 characters: ''"]


# -- the bank


def test_the_bank_is_large_for_every_kind_of_example():
    cpp = Example(id="c", prompt="Add.", extra={"language": "C++17", "tests": TESTS})
    for example in (EXAMPLE, cpp, Example(id="plain", prompt="Say it.")):
        found = hostile_completions(example, "Add.")
        assert len(found) >= 40
        assert len({item.name for item in found}) == len(found)
        assert not any("{{" in item.text.replace("}}", "") and "{{out" in item.text for item in found)
        assert honest_wrong(example).name == "honest-wrong"
    assert len(hostile_completions(EXAMPLE, "")) >= 60
    assert len(hostile_completions(cpp, "")) >= 45


def test_the_bank_knows_the_example():
    found = {item.name: item.text for item in hostile_completions(EXAMPLE, "What is {{output}}?")}
    assert found["prompt-echo"] == "What is {{output}}?"
    assert 'print("""3""", "or not")' in found["first-output"]
    assert '"""3\n4"""' in found["all-outputs"]
    assert len(found["huge"]) == 10**6
    assert expected_outputs(EXAMPLE) == ["3", "4"]
    assert expected_outputs(Example(id="x", prompt="")) == []
    calls = {"test_list": ["assert f(1) == 'a b'", "assert f(2) == [3]", "assert f(2) == f(3)"]}
    assert expected_outputs(Example(id="x", prompt="", extra=calls)) == ["a b", "[3]"]
    bank = {row.name: row.text for row in hostile_completions(Example(id="x", prompt="", extra=calls), "Q")}
    assert "a b" in bank["all-outputs"]


def test_programs_of_the_bank_are_programs():
    import ast

    from kdkit.plugins.rewards.programs import last_program
    from kdkit.plugins.rewards.tags import answer_part

    broken = {"syntax-error", "program-in-thought", "open-fence", "no-fence", "fence-spam"}
    rows = [honest_wrong(EXAMPLE), *hostile_completions(EXAMPLE, "Add.")]
    programs = {r.name: last_program(answer_part(r.text, opened=False), "python") for r in rows}
    parsed = [name for name, program in programs.items() if program and name != "syntax-error" and ast.parse(program)]
    assert len(parsed) >= 20
    assert not [name for name in broken - {"syntax-error"} if programs[name]]


def test_random_texts_are_the_same_everywhere():
    assert random_texts(5, seed=1) == random_texts(5, seed=1)
    assert random_texts(5, seed=1) != random_texts(5, seed=2)
