"""correctness on assertions about functions: nothing but the right value passes, whatever the program does."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from reward_helpers import Workshop, answer, rollout
from sandbox_helpers import PROVIDERS, need

from kdkit.api import Example, SandboxLimits
from kdkit.models.asserts import split_assert
from kdkit.plugins.rewards import caller
from kdkit.plugins.rewards.calls import FunctionTest, same_value
from kdkit.plugins.rewards.judge import Judge, Submission
from kdkit.plugins.rewards.problems import Limiting, problem_of
from kdkit.plugins.rewards.verdicts import Verdict
from kdkit.plugins.sandboxes.unsafe import UnsafeLocal

SECRET = 7130417
LIMITING = Limiting(time_limit=1.0, time_factor=1.0, max_time=1.0, memory_mb=192, max_memory_mb=192)


def problem(*tests, **extra):
    return Example(id="p", prompt="Q", extra={"test_list": list(tests), **extra})


def found(*tests, **extra):
    return problem_of(problem(*tests, **extra), choice="auto", language=None, limiting=LIMITING, max_tests=None)


@pytest.fixture(params=["unsafe-local", *PROVIDERS])
def judge(request):
    if request.param == "unsafe-local":
        sandbox = UnsafeLocal(2)
    else:
        need(request.param)
        sandbox = PROVIDERS[request.param](2)
    made = Judge(sandbox, mode="tokens", tolerance=1e-6)
    yield made
    made.close()


# -- programs, in every sandbox that works here


HONEST = {
    "def f(x): return x * x": "AC",
    "print('hello', end='')\ndef f(x):\n    print('there', end='')\n    return x * x": "AC",
    "import sys\nsys.stdout = None\nf = lambda x: float(x * x)": "AC",
    "if __name__ == '__main__':\n    1 / 0\ndef f(x): return x * x": "AC",
    "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef f(x): return P(x).x ** 2": "AC",
    "def f(x): return x + 1": "WA",
    "def f(x): return str(x * x)": "WA",
    "def f(x): return [x * x]": "WA",
    "def f(x): return": "WA",
    "def f(x) return x": "CE",
    "def f(x): return 1 / 0": "RE",
    "def g(x): return x * x": "RE",
    "raise ValueError": "RE",
    "def f(x):\n    return f(x)": "RE",
    "def f(x): return int(input())": "RE",
    "def f(x):\n    while True: pass": "TLE",
    "def f(x): return len(bytes(10 ** 9))": "MLE",
    "def f(x):\n    print('a' * 10 ** 7)\n    return x * x": "OLE",
}
_TEXT = (Path(__file__).parent / "hostile_functions.txt").read_text(encoding="utf-8")
HACKS = dict(part.split("\n", 1) for part in _TEXT.removeprefix("=== ").split("\n=== "))
"""Programs that want to pass ``f(3) == 7130417`` without knowing it. Those that say it themselves say it where it does
not count: in an object that is equal to everything, or in what is printed."""


def verdicts(judge, programs, *tests, **extra):
    tested = found(*tests, **extra)
    judged = judge.judge([Submission(program, tested, stop_early=False) for program in programs])
    return [one.verdict.name for one in judged]


def test_verdicts_of_honest_programs(judge):
    assert dict(zip(HONEST, verdicts(judge, HONEST, "assert f(3) == 9"), strict=True)) == HONEST


def test_nothing_but_the_value_passes(judge):
    given = verdicts(judge, HACKS.values(), f"assert f(3) == {SECRET}")
    assert {name: verdict for name, verdict in zip(HACKS, given, strict=True) if verdict not in ("WA", "RE")} == {}
    assert verdicts(judge, [f"def f(x): return {SECRET}"], f"assert f(3) == {SECRET}") == ["AC"]


def test_every_kind_of_assertion(judge):
    program = (
        "from collections import *\nfrom decimal import Decimal\nfrom fractions import Fraction\nimport enum\n"
        "Pair = namedtuple('Pair', 'a b')\nColour = enum.IntEnum('Colour', 'RED')\n"
        "class Node:\n    def __init__(self, v): self.v = v\n"
        "def same(x): return x\ndef value(node): return node.v\n"
        "def make(name): return {'counter': Counter('aab'), 'default': defaultdict(list, {1: [2]}),\n"
        "    'pair': Pair(1, 2), 'keys': {1: 2}.keys(), 'frozen': frozenset([1]), 'enum': Colour.RED,\n"
        "    'decimal': Decimal('0.5'),\n"
        "    'ratio': Fraction(1, 3), 'big': 7 ** 5000, 'bytes': bytearray(b'\\xff'), 'complex': 1 + 2j,\n"
        "    'text': 'ñ\\ud800\\n\"', 'inf': float('inf'), 'items': {1: 2}.items()}[name]\n"
    )
    tests = [
        "assert make('counter') == {'a': 2, 'b': 1}",
        "assert make('default') == {1: [2]}",
        "assert make('pair') == (1, 2)",
        "assert make('keys') == {1}",
        "assert make('items') == {(1, 2)}",
        "assert make('frozen') == {1}",
        "assert make('enum') == 1",
        "assert make('decimal') == 0.5",
        "assert make('ratio') == 0.333333333",
        f"assert make('big') == {hex(7**5000)}",
        "assert make('bytes') == b'\\xff'",
        "assert make('complex') == 1 + 2j",
        "assert make('text') == 'ñ\\ud800\\n\"'",
        "assert make('inf') == 1e999",
        "assert value(node) == 5",
        "assert same(True) is True",
        "assert same([1])",
        "assert not same([])",
        "assert same({'a': (1, [2.0000000001], {3})}) == {'a': (1, [2], {3})}",
        "assert math.isclose(same(2.5001), 2.5, rel_tol=1e-3)",
        "assert abs(same(2.5) - 2.4) < 0.2",
        "assert sorted(same({3, 1})) == [1, 3]",
    ]
    wrong = [
        "assert make('pair') == [1, 2]",
        "assert make('ratio') == 0.3333",
        "assert same(1) is True",
        "assert same([])",
        "assert not same([1])",
        "assert math.isclose(same(2.6), 2.5, rel_tol=1e-3)",
        "assert math.isclose(same('2.5'), 2.5, rel_tol=1e-3)",
        "assert math.isclose(same(2.5 + 0j), 2.5)",
        "assert same([1, 2]) == [1]",
        "assert same({1: 2}) == {1: 3}",
        "assert same({1: 2}) == {1: 2, 3: 4}",
        "assert same('ab') == b'ab'",
    ]
    extra = {"test_imports": ["import math"], "test_setup_code": "node = Node(5)"}
    given = [verdicts(judge, [program], test, **extra) for test in (*tests, *wrong)]
    wanted = [["AC"]] * len(tests) + [["WA"]] * len(wrong)
    assert dict(zip((*tests, *wrong), given, strict=True)) == dict(zip((*tests, *wrong), wanted, strict=True))


def test_the_order_is_gone_before_the_program_runs(judge):
    program = (
        "import os, sys\ntry:\n    os.lseek(0, 0, 0)\nexcept OSError:\n    pass\nsaid = os.read(0, 9999)\n"
        "def f(): return [len(said), sys.stdin.read(), __name__, 'main' in vars(sys.modules['__main__'])]"
    )
    assert verdicts(judge, [program], "assert f() == [0, '', 'solution', False]") == ["AC"]


def test_partial_scores_and_state_between_tests(judge):
    program = "calls = []\ndef f(x):\n    calls.append(x)\n    return len(calls) + 1 if x < 3 else 1 / 0"
    tested = found("assert f(1) == 2", "assert f(2) == 2", "assert f(3) == 2")
    (one,) = judge.judge([Submission(program, tested, stop_early=False)])
    assert (one.verdict, one.passed, one.total) == (Verdict.RE, 2, 3)


# -- the judge's side


def made(source, setup=""):
    return FunctionTest(split_assert(source), setup)


def said(test, record):
    job = test.job("def f(): pass")
    word = job.stdin.partition("\n")[0]
    return test.verdict(job, record.replace("WORD", word), tolerance=1e-6).name


@pytest.mark.parametrize(
    ("output", "verdict"),
    [
        ("\nWORD value 9\n", "AC"),
        ("noise WORD\n\nWORD value 9\n", "AC"),
        ("WORD value 9", "AC"),
        ("WORD value 9.0000000001\n", "AC"),
        ("WORD value 8\n", "WA"),
        ("WORD value 9\nWORD value 8\n", "WA"),
        ("WORD other\n", "WA"),
        ("WORD no-compile\n", "CE"),
        # Not the record, or no longer the last line.
        ("value 9\n", "RE"),
        ("WORDvalue 9\n", "RE"),
        ("0123456789abcdef value 9\n", "RE"),
        (" value 9\n", "RE"),
        ("x WORD value 9\n", "RE"),
        ("WORD\n", "RE"),
        ("WORD 9\n", "RE"),
        ("WORD value 9\nx\n", "RE"),
        ("WORD value 9\n\n", "RE"),
        ("", "RE"),
        # Not what the caller writes.
        ("WORD value \n", "WA"),
        ("WORD value 9 9\n", "WA"),
        ("WORD value __import__('os')\n", "WA"),
        ('WORD value {"eval": "9"}\n', "WA"),
        ("WORD value {}\n", "WA"),
        ('WORD value {"int": "9", "float": "9"}\n', "WA"),
        ('WORD value {"int": 9}\n', "WA"),
        ('WORD value {"int": "z"}\n', "WA"),
        ('WORD value {"ratio": [1, 0]}\n', "WA"),
        ('WORD value {"ratio": [9]}\n', "WA"),
        ('WORD value {"set": [[]]}\n', "WA"),
        ('WORD value {"dict": [1]}\n', "WA"),
        ('WORD value {"bytes": "\\u1234"}\n', "WA"),
        ('WORD value {"bytes": [1]}\n', "WA"),
        ("WORD value " + "[" * 90_000 + "\n", "WA"),
        ("WORD value " + "9" * 5000 + "\n", "WA"),
        ("WORD value [" + "9," * 90_000 + "9]\n", "WA"),
    ],
)
def test_records(output, verdict):
    assert said(made("assert f() == 9"), output) == verdict


def test_the_word_changes_and_the_expected_value_stays_here():
    test = made(f"assert f('{{') == [{SECRET}, 'told']", setup="a = 1")
    jobs = [test.job("def f(x): ...") for _ in range(3)]
    assert len({job.stdin.partition("\n")[0] for job in jobs}) == 3
    for job in jobs:
        assert not job.files
        assert job.language == "python"
        assert str(SECRET) not in job.program + job.stdin
        assert "told" not in job.stdin
        word, _, order = job.stdin.partition("\n")
        assert len(word) == 32
        assert json.loads(order) == {
            "program": "def f(x): ...", "setup": "a = 1", "expression": "_kdkit_result = (f('{'))", "truth": False,
        }  # fmt: skip


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("expected", "given", "same"),
    [
        (1, 1, True), (1, True, True), (True, 1, True), (True, 1.0, True), (1, 1.0, True), (1, 2, False),
        (1, 1 + 1e-9, True), (True, 1 + 1e-9, False), (10**6, 10**6 + 0.4, False), (2**60, 2.0**60 + 4096, False),
        (2**53 + 1, float(2**53), False), (0.1, 0.1 + 1e-9, True), (0.1, 0.2, False), (1e9, 1e9 + 1, True),
        (0.5, Fraction(1, 2), True), (0, NAN, False), (0.0, INF, False), (INF, INF, True), (INF, -INF, False),
        (1j, 1j + 1e-9, True), (1.0, 10**400, False), (10**400, 1.0, False), (1, "1", False), ("1", 1, False),
        ("a", "a", True), ("a", b"a", False), (None, None, True), (None, False, False), (0, None, False),
        ([1], [1.0], True), ([1], (1,), False), ((1,), (1,), True), ([1], [1, 2], False), ([], [], True),
        ([0.1], [0.1 + 1e-9], True), ({1: 0.1}, {1: 0.1 + 1e-9}, True), ({1: 2}, {True: 2}, True), ({}, [], False),
        ({1: 2}, {1: 2, 3: 4}, False), ({1}, {1.0}, True), ({1}, [1], False), (set(), {}, False),
        ({0.1}, {0.1 + 1e-9}, False), ([{1: [None, "a"]}], [{1: [None, "a"]}], True),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_same_values(expected, given, same):
    assert same_value(expected, given, 1e-6) is same
    if expected == given:
        assert same_value(expected, given, 0.0) is True
    elif not math.isnan(given if isinstance(given, float) else 0):
        assert same_value(expected, given, 0.0) is False


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, -1, 10**400, -(10**5000), 1.5, -0.0, 1e300, INF, 1 + 2j, "", "a\"\\\n\ud800é", b"\0\xff",
        [], [[]], (), (1,), set(), {1, 2}, {}, {1: 2, (3,): {"a": [4]}}, Fraction(1, 3), Decimal("1.25"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_the_caller_writes_is_what_the_judge_reads(value):
    test = made("assert f() == 9")
    object.__setattr__(test.test, "expected", value)
    assert said(test, f"WORD value {caller._encode(value)}") == "AC"


def test_values_that_the_caller_does_not_write():
    deep: list = []
    for _ in range(80):
        deep = [deep]
    for value in (object(), range(3), iter(()), int, deep, "a" * 300_000, [None] * 100_000, 1 << 10**7):
        with pytest.raises(caller._Unwritable):
            caller._encode(value)


# -- examples


def test_examples_with_assertions():
    shop = Workshop()
    text = answer("def f(x): ...")
    score = shop.score("correctness", text, example=problem("assert f(1) == 2"))
    assert (score.value, score.reason) == (0.0, "RE runtime error")
    (job,) = shop.sandbox.jobs
    assert "def f(x): ..." in json.loads(job.stdin.partition("\n")[2])["program"]
    assert shop.sandbox.opened == [SandboxLimits(wall_s=13, cpu_s=6, memory_bytes=2**29, output_bytes=2**19)]
    cases = {
        "test 2 cannot be judged: neither side is a literal": problem("assert f(1) == 2", "assert f(1) == f(2)"),
        "its test_setup_code or test_imports is no Python": problem("assert f(1) == 2", test_setup_code="a ="),
        "its tests call functions of Python, and the language is cpp": problem("assert f(1) == 2", language="cpp"),
        "its tests are no list of texts 'input' and 'output', nor of assertions": problem("assert f(1) == 2", 3),
    }
    for reason, example in cases.items():
        score = shop.score("correctness", text, example=example)
        assert (score.status, score.value, score.reason) == ("unscorable", None, reason)
    first = problem("assert f(1) == 2", "assert f(1) == 3")
    assert shop.score("correctness", text, example=first, tests="official").status == "ok"
    assert shop.score("correctness", text, example=first, tests="examples").reason == "no tests"
    tests = Example(id="t", prompt="Q", extra={"tests": ["assert f(1) == 2"], "checker": "1"})
    assert shop.score("correctness", text, example=tests).reason == "RE runtime error"


def test_a_program_is_judged_once_and_setups_are_part_of_the_problem():
    shop = Workshop()
    reward = shop.build("correctness")
    text = answer("def f(x): ...")
    for jobs, setup in ((1, "a = 1"), (1, "a = 1"), (2, "a = 2")):
        reward([rollout(text, example=problem("assert f(1) == 2", test_setup_code=setup))] * 2)
        assert len(shop.sandbox.jobs) == jobs


def test_exact_comparison_has_no_tolerance():
    for mode, verdict in (("tokens", "AC"), ("exact", "WA")):
        judge = Judge(UnsafeLocal(1), mode=mode, tolerance=1e-6)
        assert verdicts(judge, ["def f(x): return x / 3"], "assert f(1) == 0.33333333") == [verdict]
        judge.close()
