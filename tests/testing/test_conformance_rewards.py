"""The built-in rewards keep the contract, and what the suite calls them with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import kdkit
from kdkit.api import Example, Rollout
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


class TestTeacherLogprob(BuiltIn):
    name, range = "teacher-logprob", (-1.0, 0.0)
    deterministic_to = 1e-5

    @pytest.fixture(autouse=True)
    def _teacher(self, tiny_model):
        self.tiny = str(tiny_model)

    def build(self):
        teacher = {"use": "local", "model": self.tiny, "precision": "fp32"}
        return kdkit.build("reward", self.name, teacher=teacher, tokenizer=self.tiny, floor=10.0, batch_size=2)


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
