"""correctness: what is run, how verdicts become values, and what must never be paid for."""

from __future__ import annotations

import gc
import subprocess
import sys
from itertools import pairwise

import pytest
from pydantic import ValidationError
from reward_helpers import Workshop, answer, failed, problem, rollout

from kdkit.api import ConformanceError, EnvironmentUnmet, Example, SandboxLimits, StageError
from kdkit.plugins.rewards.compare import compare
from kdkit.plugins.rewards.judge import CHECKER_LIMITS, RUN_CHECKER, Judge, Submission
from kdkit.plugins.rewards.problems import Limiting, problem_of
from kdkit.plugins.rewards.verdicts import Verdict, of_outcome, worst

TESTS = (("1 2", "3"), ("5 5", "10"), ("2 2", "4"), ("0 0", "0"))
SUM = problem(*TESTS)


MALFORMED = "its tests are no list of texts 'input' and 'output', nor of assertions"


def add(job):
    a, b = job.stdin.split()
    return f"{int(a) + int(b)}\n"


PROGRAMS = {
    "add": add,
    "four": lambda job: "4",
    "prefix": lambda job: add(job).strip()[:0],
    "crash late": lambda job: failed("runtime-error", exit_code=1) if job.stdin == "0 0" else add(job),
    "exit code": lambda job: failed("ok", stdout=add(job), exit_code=3),
    "slow": lambda job: failed("timeout", stdout=add(job)),
    "slow then fat": lambda job: failed("timeout" if job.stdin == "1 2" else "memory"),
    "loud": lambda job: failed("output-limit", stdout=add(job)),
    "broken": lambda job: failed("compile-error"),
    "evil": lambda job: add(job) if job.stdin == "1 2" else failed("security-violation"),
    "strange": lambda job: failed("on fire", stdout=add(job)),
    "down": lambda job: failed("infra-error", stderr="no space\nleft"),
}


@pytest.fixture
def shop():
    return Workshop(PROGRAMS)


@pytest.mark.parametrize(
    ("code", "passed", "share", "note"),
    [
        ("add", 1.0, 1.0, "AC accepted"),
        ("four", 0.0, 0.25, "WA wrong answer"),
        ("prefix", 0.0, 0.0, "WA wrong answer"),
        ("crash late", 0.0, 0.75, "RE runtime error"),
        ("exit code", 0.0, 0.0, "RE runtime error"),
        ("slow", 0.0, 0.0, "TLE time limit"),
        ("loud", 0.0, 0.0, "OLE output limit"),
        ("broken", 0.0, 0.0, "CE compile error"),
        ("evil", 0.0, 0.0, "SV security violation"),
        ("unknown: prints nothing", 0.0, 0.0, "WA wrong answer"),
    ],
)
def test_scoring(shop, code, passed, share, note):
    score = shop.score("correctness", answer(code), example=SUM)
    assert (score.value, score.reason) == (passed, note)
    score = shop.score("correctness", answer(code), example=SUM, scoring="partial")
    assert score.value == share
    assert score.reason.startswith(note)
    weighted = shop.value("correctness", answer(code), example=SUM, scoring="weighted_sum")
    assert weighted == pytest.approx((passed + 0.1 * share) / 1.1)
    half = shop.value("correctness", answer(code), example=SUM, scoring="weighted_sum", partial_weight=0.5)
    assert half == pytest.approx((passed + 0.5 * share) / 1.5)


def test_the_gravest_verdict_counts(shop):
    score = shop.score("correctness", answer("slow then fat"), example=SUM, scoring="partial")
    assert score.reason == "TLE time limit, 0 of 4 tests passed"
    order = ["IE", "SV", "CE", "TLE", "MLE", "OLE", "RE", "WA", "PE", "AC"]
    assert [verdict.name for verdict in Verdict] == order
    for graver, milder in pairwise(Verdict):
        assert worst([milder, graver, milder]) is graver


@pytest.mark.parametrize("code", ["down", "strange"])
def test_a_failure_of_the_sandbox_is_never_zero(shop, code):
    for scoring in ("pass_fail", "partial", "weighted_sum"):
        score = shop.score("correctness", answer(code), example=SUM, scoring=scoring)
        assert (score.status, score.value) == ("infra-error", None)
    assert shop.score("correctness", answer("down"), example=SUM).reason == "no space left"


def test_a_failure_is_tried_again_in_a_new_sandbox():
    calls = []

    def flaky(job):
        calls.append(job)
        return failed("infra-error") if len(calls) < 3 else add(job)

    shop = Workshop({"flaky": flaky})
    assert shop.value("correctness", answer("flaky"), example=problem(("1 2", "3"))) == 1.0
    assert len(calls) == 3
    assert (len(shop.sandbox.opened), shop.sandbox.closed) == (3, 2)


def test_a_failure_is_not_remembered():
    state = ["infra-error"]
    shop = Workshop({"later": lambda job: failed(state[0]) if state[0] else add(job)})
    reward = shop.build("correctness")
    assert reward([rollout(answer("later"), example=SUM)])[0].status == "infra-error"
    state[0] = ""
    assert reward([rollout(answer("later"), example=SUM)])[0].value == 1.0


def test_an_error_of_the_session_is_infrastructure(shop, monkeypatch):
    def broken(self, jobs):
        raise StageError("the broker is gone")

    monkeypatch.setattr("kdkit.testing.fakes.FakeSession.run", broken)
    score = shop.score("correctness", answer("add"), example=SUM)
    assert (score.status, score.reason) == ("infra-error", "the broker is gone")


def test_a_session_that_loses_outcomes_is_named(shop, monkeypatch):
    monkeypatch.setattr("kdkit.testing.fakes.FakeSession.run", lambda self, jobs: [])
    with pytest.raises(ConformanceError, match="0 outcomes for 1 jobs"):
        shop.score("correctness", answer("add"), example=SUM)


def test_a_sandbox_that_does_not_work_ends_the_run(shop, monkeypatch):
    def closed(self, limits):
        raise EnvironmentUnmet("no sandbox here")

    monkeypatch.setattr("kdkit.testing.fakes.FakeSandbox.open", closed)
    with pytest.raises(EnvironmentUnmet, match="no sandbox here"):
        shop.score("correctness", answer("add"), example=SUM)
    assert shop.value("correctness", "no program, nothing to run", example=SUM) == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("```python\nadd\n```", 1.0),
        ("```\nadd\n```", 1.0),
        ("```python\nfour\n```\nBetter:\n```python\nadd\n```", 1.0),
        ("```python\nadd\n```\nOutput:\n```\nfour\n```\n```text\nfour\n```", 1.0),
        ("```python\nadd\n```\nNo:\n```python\nfour\n```", 0.0),
        ("<think>```python\nfour\n```</think>```python\nadd\n```", 1.0),
        ("<think>\n```python\nfour\n```\n</think>\n```python\nadd\n```", 1.0),
        # Inside the thought, or in a thought that never ends.
        ("<think>\n```python\nadd\n```\n</think>", 0.0),
        ("<think>\n```python\nadd\n```\n", 0.0),
        ("<think>a</think>\n<think>\n```python\nadd\n```\n", 0.0),
        ("<think>a</think>\n```python\nadd\n```\n</think>", 0.0),
        # No complete block of the language.
        ("add", 0.0),
        ("```python\nadd", 0.0),
        ("```cpp\nadd\n```", 0.0),
        ("```python\n\n```", 0.0),
        ("", 0.0),
    ],
)
def test_which_program_counts(shop, text, value):
    assert shop.value("correctness", text, example=SUM) == value


def test_languages(shop):
    cpp = problem(*TESTS, language="C++17")
    assert shop.value("correctness", answer("add", "c++"), example=cpp) == 1.0
    assert shop.sandbox.jobs[-1].language == "cpp"
    assert shop.value("correctness", answer("add", "python"), example=cpp) == 0.0
    assert shop.value("correctness", answer("add", "python"), example=cpp, language="python") == 1.0
    score = shop.score("correctness", answer("add"), example=problem(*TESTS, language="rust"))
    assert (score.status, score.reason) == ("unscorable", "no programs in 'rust' can be run")


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (None, "no example"),
        (Example(id="e", prompt="Q"), "no tests"),
        (problem(), "no tests"),
        (Example(id="e", prompt="Q", extra={"tests": {"input": ["1"], "output": ["2"]}}), MALFORMED),
        (Example(id="e", prompt="Q", extra={"tests": [{"input": "0 0", "output": "0"}, "x"]}), MALFORMED),
        (Example(id="e", prompt="Q", extra={"tests": [{"input": "0 0", "output": "0"}, {"input": "1"}]}), MALFORMED),
        (Example(id="e", prompt="Q", extra={"tests": [{"input": "0 0", "output": 0}]}), MALFORMED),
        (problem(*TESTS, input_mode="file"), "its programs read and write files"),
    ],
)
def test_examples_that_cannot_judge_are_unscorable(shop, example, reason):
    score = shop.score("correctness", answer("add"), example=example)
    assert (score.status, score.value, score.reason) == ("unscorable", None, reason)


def test_which_tests(shop):
    extra = {"examples": [{"input": "1 2", "output": "3"}], "official_tests": [{"input": "1 2", "output": "4"}]}
    example = Example(id="e", prompt="Q", extra=extra)
    text = answer("add")
    assert shop.value("correctness", text, example=example) == 0.0
    assert shop.value("correctness", text, example=example, tests="examples") == 1.0
    only = Example(id="e", prompt="Q", extra={"examples": extra["examples"], "official_tests": []})
    assert shop.value("correctness", text, example=only) == 1.0
    assert shop.score("correctness", text, example=only, tests="official").status == "unscorable"
    plain = Example(id="e", prompt="Q", extra={"tests": extra["official_tests"]})
    assert shop.value("correctness", text, example=plain, tests="official") == 0.0
    first = problem(("1 2", "3"), ("1 2", "4"))
    assert shop.value("correctness", text, example=first) == 0.0
    assert shop.value("correctness", text, example=first, max_tests=1) == 1.0


def test_the_first_failure_ends_pass_fail_only():
    tests = [(f"{k} 0", "x") for k in range(20)]
    for scoring, jobs in (("pass_fail", 1), ("partial", 20)):
        shop = Workshop(PROGRAMS)
        shop.score("correctness", answer("add"), example=problem(*tests), scoring=scoring)
        assert len(shop.sandbox.jobs) == jobs


def test_endless_programs_are_not_run_on_every_test():
    shop = Workshop(PROGRAMS)
    tests = [(f"{k} 0", str(k)) for k in range(64)]
    assert shop.value("correctness", answer("slow"), example=problem(*tests), scoring="partial") == 0.0
    assert len(shop.sandbox.jobs) == 2


def test_no_program_runs_twice():
    shop = Workshop(PROGRAMS)
    reward = shop.build("correctness")
    batch = [rollout(answer("add", thought=f"thought {k}"), example=SUM) for k in range(5)]
    assert [score.value for score in reward(batch)] == [1.0] * 5
    assert len(shop.sandbox.jobs) == 4
    reward(batch)
    other = shop.build("correctness", scoring="partial")
    assert [score.value for score in other(batch)] == [1.0] * 5
    assert len(shop.sandbox.jobs) == 4, "judged by another reward of the same recipe"
    reward([rollout(answer("add"), example=problem(("1 1", "2"), id="other"))])
    assert len(shop.sandbox.jobs) == 5, "another problem is another judgement"


def test_a_judgement_cut_short_does_not_stand_for_a_whole_one():
    shop = Workshop(PROGRAMS)
    batch = [rollout(answer("crash late"), example=problem(("0 0", "0"), *TESTS))]
    assert shop.build("correctness")(batch)[0].value == 0.0
    assert shop.build("correctness", scoring="partial")(batch)[0].value == 0.6
    assert shop.build("correctness")(batch)[0].value == 0.0


def test_of_two_equal_programs_the_one_that_wants_all_tests_answers_both(shop):
    found = problem_of(
        problem(("0 0", "0"), *TESTS),
        choice="auto",
        language=None,
        limiting=Limiting(time_limit=1, time_factor=1, max_time=1, memory_mb=64, max_memory_mb=64),
        max_tests=None,
    )
    for order in ((True, False), (False, True)):
        judge = Judge(shop.sandbox, mode="tokens", tolerance=0)
        judged = judge.judge([Submission("crash late", found, early) for early in order])
        assert [(one.passed, one.total, one.whole) for one in judged] == [(3, 5, True)] * 2


def test_tests_of_a_submission_go_with_its_input_only(shop):
    shop.value("correctness", answer("add"), example=SUM)
    for job in shop.sandbox.jobs:
        assert not job.files
        assert job.stdin in dict(TESTS)
        assert "3" not in job.program


def test_limits_come_from_the_example(shop):
    def limits(example, **given):
        shop.value("correctness", answer("add"), example=example, **given)
        return shop.sandbox.opened[-1]

    mib = 2**20
    assert limits(SUM) == SandboxLimits(wall_s=13, cpu_s=6, memory_bytes=512 * mib, output_bytes=2**17)
    hard = problem(*TESTS, id="hard", time_limit=1.0, memory_limit=256.0)
    assert limits(hard) == SandboxLimits(wall_s=7, cpu_s=3, memory_bytes=256 * mib, output_bytes=2**17)
    assert limits(hard, time_factor=2.0).cpu_s == 2
    assert limits(hard, max_time=1.0).cpu_s == 1
    odd = problem(*TESTS, id="odd", time_limit=1000, memory_limit=1.0)
    assert (limits(odd).cpu_s, limits(odd).memory_bytes) == (15, 64 * mib)
    big = problem(("1 2", "3" * 10**6), id="big", memory_limit=9000, time_limit="soon")
    assert (limits(big).cpu_s, limits(big).memory_bytes, limits(big).output_bytes) == (6, 1024 * mib, 4 * mib)


def test_sessions_are_warm_and_few():
    shop = Workshop(PROGRAMS)
    reward = shop.build("correctness")
    for _ in range(2):
        reward([rollout(answer("add"), example=problem(*TESTS, time_limit=t)) for t in (1.0, 2.0, 1.0, 3.0)])
    assert (len(shop.sandbox.opened), shop.sandbox.closed) == (3, 0)
    reward([rollout(answer("add"), example=problem(*TESTS, time_limit=t)) for t in (4.0, 5.0)])
    assert (len(shop.sandbox.opened), shop.sandbox.closed) == (5, 1)
    reward.close()
    assert shop.sandbox.closed == 5
    assert reward([rollout(answer("four"), example=SUM)])[0].value == 0.0


def test_sessions_end_with_the_context():
    shop = Workshop(PROGRAMS)
    sandbox, reward = shop.sandbox, shop.build("correctness")
    reward([rollout(answer("add"), example=SUM)])
    del shop, reward
    gc.collect()
    assert sandbox.closed == 1


def test_many_rollouts_of_many_examples_in_order(shop):
    wanted, batch = [], []
    for k in range(50):
        batch.append(
            rollout(answer("add" if k % 3 else "four"), example=problem(*TESTS, id=str(k), time_limit=1 + k % 2))
        )
        wanted.append(float(bool(k % 3)))
    assert [score.value for score in shop.build("correctness")(batch)] == wanted


# -- comparison


@pytest.mark.parametrize(
    ("expected", "given", "verdict"),
    [
        ("1 2\n3\n", "1  2 3", "AC"),
        ("", "", "AC"),
        ("", " \n", "AC"),
        ("yes", "YES", "WA"),
        # A correct beginning, or too much.
        ("1 2 3", "1 2", "WA"),
        ("1 2 3", "", "WA"),
        ("1 2 3", "1 2 3 4", "WA"),
        ("1\n2\n3", "1\n", "WA"),
        ("", "1", "WA"),
        # Whole numbers exactly.
        ("7", "07", "WA"),
        ("7", "+7", "WA"),
        ("1000000000000", "1000000000001", "WA"),
        ("9007199254740993", "9007199254740992.0", "WA"),
        ("1000000", "1000000.4", "WA"),
        ("2", "2.0", "AC"),
        ("2", "2.0000001", "AC"),
        ("0", "-0.0", "AC"),
        # Numbers with a point.
        ("0.5", ".5", "AC"),
        ("0.5", "0.5000009", "AC"),
        ("0.5", "0.500002", "WA"),
        ("1e6", "1000000.9", "AC"),
        ("1000000.0", "1000001.1", "WA"),
        ("-1.5", "1.5", "WA"),
        # What only some parsers take for numbers.
        ("1.0", "nan", "WA"),
        ("nan", "1.0", "WA"),
        ("nan", "nan", "AC"),
        ("1.0", "inf", "WA"),
        ("1e9999", "1e9998", "WA"),
        ("1e9999", "1.5", "WA"),
        ("1.0", "1_0", "WA"),
        ("10.0", "0xa", "WA"),
        ("1.0", "１.0", "WA"),
        ("1.5", "1.5f", "WA"),
        ("1.5", "1..5", "WA"),
        ("1 2", "1\u00a02", "WA"),
        ("a\ud800", "a?", "WA"),
        ("1.0", "9" * 500_000 + ".", "WA"),
    ],
)
def test_tokens(expected, given, verdict):
    assert compare(expected, given, mode="tokens", tolerance=1e-6).name == verdict


def test_tolerance_and_exactness():
    assert compare("0.5", "0.6", mode="tokens", tolerance=0.2) is Verdict.AC
    assert compare("0.5", ".5", mode="tokens", tolerance=0) is Verdict.WA
    for given, verdict in (
        ("a b\n", "AC"),
        ("a b", "AC"),
        ("a b\r\n\n", "AC"),
        ("a  b", "PE"),
        ("a b ", "PE"),
        ("ab", "WA"),
    ):
        assert compare("a b\n", given, mode="exact", tolerance=0).name == verdict, given


def test_comparison_is_a_parameter(shop):
    example = problem(("1 2", "3.0000001"))
    assert shop.value("correctness", answer("add"), example=example) == 1.0
    assert shop.value("correctness", answer("add"), example=example, float_tolerance=0) == 0.0
    score = shop.score("correctness", answer("add"), example=problem(("1 2", " 3")), comparison="exact")
    assert (score.value, score.reason) == (0.0, "PE wrong white space")


# -- checkers


@pytest.mark.parametrize(
    ("said", "status", "value"),
    [
        ("1\n", "ok", 1.0),
        ("", "ok", 1.0),
        ("fine 1.0", "ok", 1.0),
        ("0", "ok", 0.0),
        ("0.5", "ok", 0.0),
        ("nan", "ok", 0.0),
        ("what", "infra-error", None),
        (failed("runtime-error", exit_code=1), "ok", 0.0),
        (failed("runtime-error", exit_code=2), "ok", 0.0),
        (failed("ok", exit_code=1, stdout="1"), "ok", 0.0),
        (failed("runtime-error", exit_code=3), "infra-error", None),
        (failed("runtime-error", exit_code=-9), "infra-error", None),
        (failed("timeout"), "infra-error", None),
        (failed("infra-error"), "infra-error", None),
    ],
)
def test_a_checker_decides(said, status, value):
    def check(job):
        assert job.files["checker.py"] == "the checker"
        assert (job.files["input.txt"], job.files["expected_output.txt"]) == ("1 2", "something")
        assert job.files["output.txt"] == "3\n"
        return said

    shop = Workshop(PROGRAMS)
    plain = shop.sandbox.programs

    class Programs(dict):
        def get(self, program, default=None):
            return check if "checker.py" in program else plain.get(program, default)

    shop.sandbox.programs = Programs()
    example = problem(("1 2", "something"), checker="the checker")
    score = shop.score("correctness", answer("add"), example=example)
    assert (score.status, score.value) == (status, value)
    assert CHECKER_LIMITS in shop.sandbox.opened


@pytest.mark.parametrize(("output", "code", "said"), [("3 1 2", 0, "1"), ("3 1", 0, "0"), ("a b", 1, "")])
def test_the_program_that_calls_a_checker(tmp_path, output, code, said):
    """The jail runs this; here the checker is ours."""
    checker = (
        "import sys\n\nif __name__ == '__main__':\n"
        "    given, expected, got = (open(name).read().split() for name in sys.argv[1:])\n"
        "    assert given == ['3']\n"
        "    print(int(sorted(map(int, got)) == sorted(map(int, expected))))\n"
    )
    files = {"checker.py": checker, "input.txt": "3", "expected_output.txt": "1 2 3", "output.txt": output}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-W", "ignore", "-c", RUN_CHECKER]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (code, said), done.stderr


@pytest.mark.parametrize(
    ("given", "expected", "written", "verdict"),
    [
        (1000, 10, 8 * 2**20, "OLE"),
        (1000, 10, 100_000, "AC"),
        # Here a right answer would not fit either: the judge is to blame.
        (8 * 2**20, 10, 11, "AC"),
        (4 * 2**20, 4 * 2**20, 4 * 2**20, "AC"),
    ],
)
def test_an_output_that_no_checker_can_be_given_is_the_fault_of_the_program(given, expected, written, verdict):
    asked = []

    class Programs(dict):
        def get(self, program, default=None):
            return (lambda job: asked.append(job) or "1") if "checker.py" in program else lambda job: "x" * written

    shop = Workshop()
    shop.sandbox.programs = Programs()
    example = problem(("1" * given, "2" * expected), checker="the checker")
    score = shop.score("correctness", answer("any"), example=example)
    assert score.status == "ok"
    assert score.reason.split()[0] == verdict
    assert len(asked) == (verdict == "AC")


def test_a_checker_is_not_asked_about_a_crash(shop):
    score = shop.score("correctness", answer("broken"), example=problem(("1 2", "3"), checker="the checker"))
    assert score.reason == "CE compile error"
    assert len(shop.sandbox.jobs) == 1


def test_statuses_of_the_sandbox():
    assert of_outcome(failed("ok")) is None
    assert of_outcome(failed("ok", exit_code=0)) is None
    assert of_outcome(failed("ok", exit_code=1)) is Verdict.RE
    assert of_outcome(failed("something new")) is Verdict.IE


def test_parameters_that_mean_nothing_are_refused(shop):
    for given in ({"partial_weight": 0.2}, {"comparison": "exact", "float_tolerance": 0.1}, {"time_factor": 0.0}):
        with pytest.raises(ValidationError):
            shop.build("correctness", **given)
