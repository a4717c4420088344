"""Assertions are taken apart so that what is expected stays behind."""

from __future__ import annotations

import pytest

from kdkit.models.asserts import MAX_DEPTH, setup_code, split_assert


@pytest.mark.parametrize(
    ("source", "expression", "expected", "rule"),
    [
        ("assert f(1) == 2", "f(1)", 2, "equal"),
        ("  assert 2 == f(1)\n", "f(1)", 2, "equal"),
        ("assert f(1) == -2.5, 'it is -2.5'", "f(1)", -2.5, "equal"),
        ("assert f(1) == {'a': [(1, 2), {3}, None]}", "f(1)", {"a": [(1, 2), {3}, None]}, "equal"),
        ("assert f() == set()", "f()", set(), "equal"),
        ("assert set(f('a b')) == set(['a', 'b'])", "set(f('a b'))", {"a", "b"}, "equal"),
        ("assert sorted(f(3)) == sorted([2, 1])", "sorted(f(3))", [1, 2], "equal"),
        ("assert f(1)[0].strip() == 'x'", "f(1)[0].strip()", "x", "equal"),
        ("assert -f(1) == 1", "-f(1)", 1, "equal"),
        ("assert f(lambda a: a == 1) == [1]", "f(lambda a: a == 1)", [1], "equal"),
        ("assert f(1) is None", "f(1)", None, "same"),
        ("assert True is f(1)", "f(1)", True, "same"),
        ("assert f(1)", "f(1)", True, "truth"),
        ("assert not f(1)", "f(1)", False, "truth"),
        ("assert f('\\d') == 1", "f('\\\\d')", 1, "equal"),
    ],
)
def test_what_is_evaluated_and_what_is_expected(source, expression, expected, rule):
    test = split_assert(source)
    assert (test.expression, test.expected, test.rule) == (expression, expected, rule)
    assert type(test.expected) is type(expected)


@pytest.mark.parametrize(
    ("source", "expected", "tolerances"),
    [
        ("assert math.isclose(f(1), 2.5)", 2.5, (1e-9, 0.0)),
        ("assert isclose(2, f(1), rel_tol=0.001)", 2, (0.001, 0.0)),
        ("assert math.isclose(f(1), 0, rel_tol=0, abs_tol=1e-3)", 0, (0, 1e-3)),
        ("assert abs(f(1) - 2.5) < 1e-6", 2.5, (0.0, 1e-6)),
        ("assert 0.5 >= abs(2 - f(1))", 2, (0.0, 0.5)),
    ],
)
def test_tolerances(source, expected, tolerances):
    test = split_assert(source)
    assert (test.expression, test.rule, test.expected) == ("f(1)", "close", expected)
    assert (test.rel_tol, test.abs_tol) == tolerances


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert f(1) == g(2)", "neither side is a literal"),
        ("assert f(1) == sys.getsizeof((1, 2))", "neither side is a literal"),
        ("assert f(1) == set([[1]])", "neither side is a literal"),
        ("assert f(1) != 2", "it compares with neither ==, is nor a tolerance"),
        ("assert f(1) in (1, 2)", "it compares with neither ==, is nor a tolerance"),
        ("assert f(1) > 2", "it compares with neither ==, is nor a tolerance"),
        ("assert 1 < f(1) < 3", "it compares more than twice"),
        ("assert f(1) is 2", "'is' compares with something else than None, True or False"),
        ("assert f(1) == 2 and f(2) == 3", "it compares with something else than a literal"),
        ("assert all([f(1) == 2])", "it compares with something else than a literal"),
        # The program would say what a difference is.
        ("assert f(1) - 2 == 0", "nothing of it is the result of a call"),
        ("assert 1 == 1", "nothing of it is the result of a call"),
        ("assert done", "nothing of it is the result of a call"),
        ("assert math.isclose(f(1), 'a')", "a tolerance is compared with something else than a number"),
        ("assert math.isclose(f(1), 2, 3)", "math.isclose has other arguments than two numbers and tolerances"),
        (
            "assert math.isclose(f(1), 2, rel_tol=-1)",
            "math.isclose has other arguments than two numbers and tolerances",
        ),
        ("f(1) == 2", "it is no assertion"),
        ("assert f(1) == 2\nassert f(2) == 3", "it is no assertion"),
        ("assert f(1) ==", "it is no assertion"),
        ("", "it is no assertion"),
        ("\0", "it is no assertion"),
        ("assert " + "-" * 9000 + "1 == f()", "it is no assertion"),
        ("assert " + "(" * 900 + "1" + ")" * 900 + " == f()", "it is no assertion"),
        ("assert f() == " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "the expected value is nested too deeply"),
        ("assert f() == '" + "a" * 20_000 + "'", "it is longer than 16,000 characters"),
    ],
)
def test_what_cannot_be_taken_apart_says_why(source, reason):
    assert split_assert(source) == reason


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("assert f(1, b=2) == 2", ("f", 2)),
        ("assert sorted(set(f(1))) == [2]", ("f", 1)),
        ("assert sum(10, 15) == 6", ("sum", 2)),
        ("assert f()[0].strip() == 'x'", ("f", 0)),
        ("assert -f(1) == 2", ("f", 1)),
        ("assert (lambda: 1)() == 1", None),
    ],
)
def test_the_function_that_is_tested(source, call):
    assert split_assert(source).call() == call


def test_setup():
    columns = {"test_imports": ["import math", "import re"], "test_setup_code": "a = 1\r\nb = 2\r\n"}
    assert setup_code(columns) == "import math\nimport re\na = 1\nb = 2"
    assert setup_code({}) == setup_code({"test_imports": None, "test_setup_code": None}) == ""
    for broken in ({"test_setup_code": "a ="}, {"test_imports": "import math"}, {"test_imports": [1]}):
        assert setup_code(broken) is None
