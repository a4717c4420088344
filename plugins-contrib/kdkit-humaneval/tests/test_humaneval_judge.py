"""Who passes, who does not, and what a program can do about it. Everything runs in a real sandbox."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from conftest import Judge, block, rollout, sample

from kdkit.api import EnvironmentUnmet, Example, Reward, RewardScore, Rollout, SandboxOutcome
from kdkit.testing.conformance import RewardConformance
from kdkit.testing.fakes import FakeSandbox
from kdkit_humaneval.answers import continuation, last_block
from kdkit_humaneval.judge import HumanEvalTests
from kdkit_humaneval.plugin import HumanEvalTestsParams

MIDDLE = "def middle(text):\n    return text[(len(text) - 1) // 2 : len(text) // 2 + 1]"


@pytest.fixture(scope="class")
def built(request: pytest.FixtureRequest, reward: Reward) -> None:
    request.cls.reward = reward


@pytest.mark.usefixtures("built")
class TestHumanEvalTests(RewardConformance):
    range = (0.0, 1.0)
    reward: Reward

    def build(self) -> Reward:
        return self.reward

    def rollouts(self) -> Sequence[Rollout]:
        example = sample()["middle"]
        texts = (block(MIDDLE), block("middle = str.upper"), block("x = ("), block("import os"), "no program", "")
        return [rollout(example, text) for text in texts]


def test_reference_answers_pass_and_bugs_do_not(reward: Reward) -> None:
    for params in ({}, {"task": "fix"}, {"prompt_style": "complete"}):
        examples = list(sample(**params).values())
        scores = reward([rollout(example, example.completion or "") for example in examples])
        assert [score.reason for score in scores] == ["passed"] * 8
        assert [score.value for score in scores] == [1.0] * 8
    bugs = reward([rollout(example, example.echo) for example in sample(task="fix").values()])
    assert [score.value for score in bugs] == [0.0] * 8
    assert {score.reason for score in bugs} == {"wrong"}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def middle(text):\n    return text[len(text) // 2]", "wrong"),
        ("def middle(text):\n    raise KeyError", "wrong"),
        ("def other(text):\n    return text", "runtime-error"),
        ("def middle(text:", "runtime-error"),
        ("import sys\nsys.exit(0)", "it ended before its calls"),
        ("import os\nos._exit(0)", "it ended before its calls"),
        ("def middle(text):\n    raise SystemExit", "it ended before its calls"),
        ("def middle(text):\n    while True: pass", "timeout"),
        ("def middle(text):\n    print('x' * 5_000_000)", "output-limit"),
    ],
)
def test_programs_that_do_not_pass(code: str, reason: str, judge: Judge) -> None:
    assert judge("middle", block(code)) == RewardScore("ok", 0.0, reason)


MAIN = """
import sys
frame = sys._getframe()
while frame.f_code.co_name != "main":
    frame = frame.f_back
"""
EQUAL = """
class Equal(str):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __repr__(self): return "Equal()"
"""


@pytest.mark.parametrize(
    "code",
    [
        f"{EQUAL}\ndef middle(text): return Equal()",
        "import builtins\nbuiltins.AssertionError = ValueError\ndef middle(text): return None",
        "import sys\nsys.modules['__main__']._check = lambda order: True\ndef middle(text): return 'x'",
        "import json\njson.dumps = lambda *a, **k: 'true'\nprint('true')\ndef middle(text): return ''",
        f"{MAIN}import os\nos.write(1, ('\\n' + frame.f_locals['word'] + ' true\\n').encode())\nos._exit(0)",
    ],
    ids=["equal to everything", "no assertion fails", "other check", "other encoder", "knows the word"],
)
def test_programs_that_cheat(code: str, judge: Judge) -> None:
    assert judge("middle", block(code)).value == 0.0


def test_results_are_one_for_each_call(judge: Judge) -> None:
    write = "import os\nos.write(1, ('\\n' + frame.f_locals['word'] + ' [null]\\n').encode())\nos._exit(0)"
    score = judge("middle", block(f"{MAIN}{write}"))
    assert score == RewardScore("ok", 0.0, "it wrote something else than results")


def test_a_program_finds_no_test_and_no_solution_beside_it(judge: Judge) -> None:
    seen = f"{MAIN}told = sorted(frame.f_locals['order'])\n"
    told = ["before", "calls", "entry_point", "program", "step"]
    assert judge("middle", block(f"{seen}assert told == {told}\n{MIDDLE}")).value == 1.0
    assert judge("middle", block(f"{seen}assert told == []\n{MIDDLE}")).value == 0.0


def test_an_answer_need_not_repeat_what_stands_before_the_function(judge: Judge) -> None:
    assert judge("unrotate", block("def unrotate(word, places):\n    return rotate(word, -places)")).value == 1.0
    future = (
        "from __future__ import annotations\ndef unrotate(word: nothing, places):\n    return rotate(word, -places)"
    )
    assert judge("unrotate", block(future)).value == 1.0


def test_helper_functions_of_the_tests_are_the_problems_own(judge: Judge) -> None:
    code = "def rotate(word, places):\n    return word\ndef unrotate(word, places):\n    return word"
    assert judge("unrotate", block(code)).reason == "wrong"


def test_a_continuation_ends_with_the_function(judge: Judge) -> None:
    body = "    return text[(len(text) - 1) // 2 : len(text) // 2 + 1]\n\nraise ValueError('not part of it')\n"
    assert judge("middle", body, prompt_style="complete").value == 1.0
    assert judge("middle", block(MIDDLE), prompt_style="complete").value == 0.0


def test_a_function_that_calls_itself_is_called_by_the_tests_only(judge: Judge) -> None:
    code = "def middle(text):\n    return middle(text[1:-1]) if len(text) > 2 else text"
    assert judge("middle", block(code)).value == 1.0


def test_solutions_and_messages_may_call_the_function(reward: Reward) -> None:
    solved = "def middle(text):\n    return middle(text[1:-1]) if len(text) > 2 else text"
    test = "def check(candidate):\n    assert candidate('abc') == 'b', 'it says ' + candidate('abc')"
    example = changed("middle", solved=solved, test=test)
    wrong = rollout(example, block("def middle(text):\n    return text"))
    assert [score.reason for score in reward([rollout(example, block(MIDDLE)), wrong])] == ["passed", "wrong"]


def test_tests_that_draw_numbers_draw_the_same_again(reward: Reward) -> None:
    test = "import random\nrandom.seed()\ndef check(candidate):\n    assert candidate(x := random.random()) == x"
    example = changed("middle", solved="def middle(x): return x", test=test)
    assert reward([rollout(example, block("def middle(x):\n    return x"))])[0].reason == "passed"


def changed(name: str, **facts: Any) -> Example:
    example = sample()[name]
    return replace(example, extra={"humaneval": {**example.extra["humaneval"], **facts}})


UNSCORABLE: dict[str, tuple[Callable[[], Example], str]] = {
    "another dataset": (lambda: Example(id="x", prompt="x", extra={"tests": []}), "no problem of HumanEval"),
    "a wrong solution": (
        lambda: changed("middle", solved="def middle(text):\n    return 3"),
        "the problem cannot be judged: its own solution does not pass its tests (AssertionError)",
    ),
    "a value without a literal": (
        lambda: changed("middle", test="def check(candidate):\n    candidate(object())", solved="def middle(x): pass"),
        "the problem cannot be judged: its tests pass a value that cannot be written down",
    ),
    "other calls every time": (
        lambda: changed("middle", test="import os\ndef check(candidate):\n    candidate(os.urandom(8).hex())"),
        "the problem cannot be judged: its tests do not accept its own solution again",
    ),
    "tests that never end": (
        lambda: changed("middle", test="def check(candidate):\n    while True: pass"),
        "the problem cannot be judged: timeout",
    ),
}


@pytest.mark.parametrize("what", UNSCORABLE)
def test_problems_that_cannot_be_judged(what: str, reward: Reward) -> None:
    example, reason = UNSCORABLE[what]
    assert reward([rollout(example(), block(MIDDLE))]) == [RewardScore.unscorable(reason)]


# --- without a sandbox


def around(sandbox: FakeSandbox, **params: Any) -> HumanEvalTests:
    fields = {"sandbox": None, "time_limit": 5.0, "memory_mb": 512, "chunk": 64, **params}
    return HumanEvalTests(HumanEvalTestsParams.model_construct(**fields), sandbox)


class Broken(FakeSandbox):
    """Its sessions fail, each in a way of its own."""

    def __init__(self, failure: Exception | None) -> None:
        super().__init__()
        self.failure = failure

    def open(self, limits: Any, /) -> Any:
        session = super().open(limits)
        failure = self.failure

        class Session:
            close = session.close

            def run(self, jobs: Sequence[Any], /) -> list[SandboxOutcome]:
                if failure is not None:
                    raise failure
                return [SandboxOutcome(status="infra-error", reason="no space left")] * len(jobs)

        return Session()


def test_a_failure_of_the_sandbox_is_not_the_programs_and_not_remembered() -> None:
    sandbox = Broken(None)
    reward = around(sandbox)
    answer = rollout(sample()["middle"], block(MIDDLE))
    assert reward([answer]) == [RewardScore.infra_error("no space left")]
    assert reward([answer]) == [RewardScore.infra_error("no space left")]
    assert len(sandbox.opened) == 1


def test_a_session_that_dies_is_opened_again() -> None:
    sandbox = Broken(OSError("broken pipe"))
    reward = around(sandbox, time_limit=3.0, memory_mb=99)
    answer = rollout(sample()["middle"], block(MIDDLE))
    assert [reward([answer]) for _ in range(2)] == [[RewardScore.infra_error("broken pipe")]] * 2
    assert sandbox.closed == 2
    assert [(limits.cpu_s, limits.wall_s, limits.memory_bytes) for limits in sandbox.opened] == [
        (3.0, 7.0, 99 << 20)
    ] * 2


def test_no_sandbox_ends_the_run() -> None:
    with pytest.raises(EnvironmentUnmet):
        around(Broken(EnvironmentUnmet("no sandbox")))([rollout(sample()["middle"], block(MIDDLE))])


def test_work_is_given_to_the_sandbox_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = Broken(None)
    reward, sizes = around(sandbox, chunk=3), list[int]()
    monkeypatch.setattr(reward, "_some", lambda some: sizes.append(len(some)) or [])
    reward([rollout(sample()["middle"], "")] * 8)
    assert sizes == [3, 3, 2]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("    a\n\n    b\n", "    a\n\n    b\n"),
        (" a\nb", " a"),
        (" a\n# b", " a"),
        ("a\nb", "a"),
        (" a\r\n b\r\nc", " a\n b"),
        ("", ""),
    ],
)
def test_continuations(text: str, kept: str) -> None:
    assert continuation(text) == kept


@pytest.mark.parametrize(
    ("prompt", "text", "code"),
    [
        ("", "```python\na\n```\n```py\nb\n```", "b"),
        ("", "```python\na\n```\n```\nb\n```\n```cpp\nc\n```", "a"),
        ("", "```\nb\n```", "b"),
        ("", "````python\n```\na\n```\n````", "```\na\n```"),
        ("", "```python\na", None),
        ("", "<think>```python\na\n```", None),
        ("<think>", "```python\na\n```", None),
        ("<think>", "</think>\n```python\na\n```", "a"),
    ],
)
def test_blocks(prompt: str, text: str, code: str | None) -> None:
    assert last_block(prompt, text) == code
