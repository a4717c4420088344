from __future__ import annotations

import json
from difflib import SequenceMatcher

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdkit.api import DataError, Message
from kdkit.plugins.datasets.bugnet import BugNetLoader
from kdkit.plugins.datasets.bugnet_columns import row_reading
from kdkit.plugins.datasets.code_params import BugNetParams
from kdkit.plugins.datasets.html_text import html_to_text

BUGGY = "n = int(input())\nprint(n +)\n"
FIXED = "n = int(input())\nprint(n + 1)\n"
LONGER = "n = int(input())\nif n:\n    n += 1\nprint(n)\n"


def params(**given) -> BugNetParams:
    return BugNetParams.model_validate_json(json.dumps(given, default=str))


def load(ctx, source, **given):
    return BugNetLoader(params(source=str(source), **{"split": "all", **given})).load(ctx)


def pair(buggy=BUGGY, accepted=LONGER, *, swapped=False, **change):
    """A row in the exact columns of the second revision; the ranges index the buggy program first, as upstream."""
    changes = [
        op for op in SequenceMatcher(None, buggy.splitlines(), accepted.splitlines()).get_opcodes() if op[0] != "equal"
    ]
    (_, i1, _, j1, _), (kind, _, i2, _, j2) = changes[0], changes[-1]
    fail, passing = (accepted, buggy) if swapped else (buggy, accepted)
    return {
        "problem_id": "p00001",
        "language": "Python",
        "original_status": "Runtime Error",
        "fail": fail,
        "pass": passing,
        "change": kind if len(changes) == 1 else "replace",
        "i1": i1,
        "i2": i2,
        "j1": j1,
        "j2": j2,
        "error": "SyntaxError: invalid syntax",
        "stderr": "Traceback",
        "stdout": "",
        "description": "<h1>Next</h1><p>Read <i>n</i> &lt; 9, print n + 1.</p>",
        "input": "1\n",
        "output": "2\n",
        **change,
    }


@pytest.fixture
def file(tmp_path):
    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(list(rows)), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def only(rows):
    (example,) = rows.examples
    return example


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_chat(load_context, file, name):
    example = only(load(load_context, file(pair(), name=name), description=True, system="Be exact."))
    assert example.prompt == (
        Message("system", "Be exact."),
        Message(
            "user",
            "This Python program has a bug. Write the corrected program, and nothing else.\n\n"
            "The problem it is meant to solve:\n\n# Next\n\nRead n < 9, print n + 1.\n\n"
            "```python\nn = int(input())\nprint(n +)\n```\n\n"
            "Status: Runtime Error\nError: SyntaxError: invalid syntax",
        ),
    )
    assert (example.completion, example.echo, example.category) == (LONGER, BUGGY, "Runtime Error")
    assert example.extra == {
        "problem_id": "p00001",
        "language": "python",
        "status": "Runtime Error",
        "error": "SyntaxError: invalid syntax",
        "official_tests": [{"input": "1\n", "output": "2\n"}],
        "official_tests_complete": False,
        "input_mode": "stdio",
    }


def test_paper_style_is_that_of_the_paper(load_context, file):
    example = only(load(load_context, file(pair(language="C++")), prompt_style="paper", language="cpp"))
    assert example.prompt == (
        "Below is an instruction that describes a task. Write a C++ Script that contains the correction of the code "
        "bug in order to fix the bug, fix the issue or fix the error\n\n### Code that has the bug issue or is "
        f"incorrect:\n{BUGGY}\n### The reported error in the code:\nSyntaxError: invalid syntax\n\n### Original "
        "Status:\nRuntime Error\n\n### Response:\n"
    )
    # What is trained is what is measured, unless the published answer is asked for.
    assert (example.completion, example.targets) == (LONGER, (LONGER,))
    framed = {"prompt_style": "paper", "answer": "paper"}
    example = only(load(load_context, file(pair()), **framed))
    assert example.completion == f"Solution type replace, solution code{LONGER}"
    assert example.references == (LONGER,)
    without = only(load(load_context, file(pair(change=None, error=None)), **framed))
    assert without.completion.startswith("Solution type undetermined, solution code")
    assert "reported error in the code:\nNone\n" in without.prompt


@pytest.mark.parametrize("name", ["error", "original_status", "description", "change"])
def test_rows_that_differ_in_what_a_prompt_shows_are_two(load_context, file, tmp_path, name):
    template = tmp_path / "t.jinja"
    template.write_text("{{ error }}{{ status }}{{ description }}{{ code }}")
    rows = [pair(), pair(**{name: "Other"})]
    styles = [
        {"description": True},
        {"prompt_style": "paper", "answer": "paper"},
        {"prompt_style": "template", "template": template},
    ]
    ids = [
        {e.id for e in load(load_context, file(*order), dedup="none", **style).examples}
        for style in styles
        for order in (rows, rows[::-1])
    ]
    assert len(ids[0]) == 2
    assert all(other == ids[0] for other in ids)


def test_an_accepted_program_of_the_test_part_is_not_trained(load_context, file):
    rows = [pair(f"a = {n}\n", f"b = {n % 20}\n", problem_id=f"p{n}") for n in range(100)]
    shares = {"test_fraction": 0.3, "validation_fraction": 0.2}
    parts = [load(load_context, file(*rows), split=part, **shares) for part in ("train", "validation", "test")]
    programs = [{example.completion for example in part.examples} for part in parts]
    assert all(programs)
    assert sum(map(len, programs)) == len(set.union(*programs))
    assert parts[0].counts["shared-with-other-split"] > 0


def test_template(load_context, file, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ language }}|{{ status }}|{{ error }}|{{ code }}")
    example = only(load(load_context, file(pair(error="-11")), prompt_style="template", template=template))
    assert example.prompt == f"Python|Runtime Error|exit code -11|{BUGGY}"


@pytest.mark.parametrize(
    ("error", "line"),
    [("WA", "Error: wrong answer"), ("TLE", "Error: time limit exceeded"), ("0", None), (None, None), ("", None)],
)
def test_errors_in_words(load_context, file, error, line):
    text = only(load(load_context, file(pair(error=error)))).prompt[0].content
    assert text.endswith(line or "Status: Runtime Error")


def test_languages(load_context, file):
    path = file(pair(), pair(language="C++"), pair(language="Rust"))
    for language, kept, left in (("python", 1, 2), ("cpp", 1, 2)):
        rows = load(load_context, path, language=language)
        assert (rows.counts["kept"], rows.counts["other-language"]) == (kept, left)
        assert only(rows).extra["language"] == language
    (prompt,) = only(load(load_context, path, language="cpp")).prompt
    assert "This C++ program" in prompt.content
    assert "```cpp\n" in prompt.content


# -- swapped columns


def test_reading_of_a_row():
    assert row_reading(pair()) == "as-named"
    assert row_reading(pair(swapped=True)) == "swapped"
    # A change of one line into one line fits both readings.
    assert row_reading(pair(accepted=FIXED)) is None
    assert row_reading(pair(accepted=FIXED, swapped=True)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"i1": None},
        {"i1": "1"},
        {"i1": True, "i2": 2},
        {"i2": 10**400},
        {"i1": -1},
        {"i1": 5, "i2": 1},
        {"j2": 1.5},
        {"fail": None},
        {"pass": 3},
        {"i1": 0, "i2": 0, "j1": 0, "j2": 0},
    ],
)
def test_no_reading_from_broken_ranges(change):
    assert row_reading(pair(**change)) is None


def test_lines_before_and_after_the_ranges_have_to_be_equal():
    ranges = {"i1": 1, "i2": 2, "j1": 1, "j2": 1}
    assert row_reading(pair("a\nb\nz\n", "a\nz\n", **ranges)) == "as-named"
    assert row_reading(pair("a\nb\nz\n", "x\nz\n", **ranges)) is None
    assert row_reading(pair("a\nb\nz\n", "a\nx\n", **ranges)) is None


def test_inserts_and_deletes_decide():
    assert row_reading(pair("a\nb\n", "a\nx\nb\n")) == "as-named"
    assert row_reading(pair("a\nx\nb\n", "a\nb\n", swapped=True)) == "swapped"


def test_a_swapped_file_is_swapped_back(load_context, file):
    silent = pair(accepted=FIXED, swapped=True, problem_id="p2")
    rows = load(load_context, file(silent, pair(swapped=True)))
    assert {example.completion for example in rows.examples} == {LONGER, FIXED}
    assert {example.echo for example in rows.examples} == {BUGGY}
    assert any("'fail' and 'pass' are swapped" in line for line in load_context.lines)


def test_named_files_are_not_announced(load_context, file):
    assert only(load(load_context, file(pair()))).completion == LONGER
    assert load_context.lines == []


def test_files_of_a_directory_are_judged_on_their_own(load_context, file, tmp_path):
    file(pair(), name="a.jsonl")
    file(pair(swapped=True), pair(f"{BUGGY}# 2\n", swapped=True), name="b.jsonl")
    rows = load(load_context, tmp_path)
    # The same pair in both revisions is one pair.
    assert (rows.counts["kept"], rows.counts["duplicate"]) == (2, 1)
    assert {example.completion for example in rows.examples} == {LONGER}


def test_rows_that_disagree_stop_the_load(load_context, file):
    path = file(pair(), pair(swapped=True, problem_id="p2"))
    with pytest.raises(DataError) as error:
        load(load_context, path)
    assert str(error.value).startswith(f"{path}: rows disagree on which column holds the buggy program")
    assert "1 are as named and 1 swapped" in str(error.value)
    assert load(load_context, path, columns="as-named").counts["kept"] == 2


def test_single_rows_that_contradict_their_file_are_dropped(load_context, file):
    good = [pair(f"{BUGGY}# {n}\n") for n in range(40)]
    rows = load(load_context, file(*good, pair(swapped=True, problem_id="p40")))
    assert (rows.counts["kept"], rows.counts["contradicts-file"]) == (40, 1)
    assert {example.completion for example in rows.examples} == {LONGER}


def test_without_evidence_the_names_count_and_it_says_so(load_context, file):
    row = {name: pair()[name] for name in ("problem_id", "language", "fail", "pass")}
    assert only(load(load_context, file(row))).completion == LONGER
    assert "taken as named" in load_context.lines[0]
    assert only(load(load_context, file(row), columns="swapped")).completion == BUGGY


# -- splits


def test_no_problem_is_in_two_parts(load_context, file):
    rows = [pair(accepted=f"{LONGER}# {n}\n", problem_id=f"p{n % 60:05d}", error=None) for n in range(240)]
    path = file(*rows)
    parts = {
        name: load(load_context, path, split=name, test_fraction=0.3, validation_fraction=0.3).examples
        for name in ("train", "validation", "test")
    }
    problems = [{example.extra["problem_id"] for example in examples} for examples in parts.values()]
    assert sum(map(len, parts.values())) == 240
    assert all(problems)
    assert sum(map(len, problems)) == len(set.union(*problems)) == 60


def test_max_rows_takes_many_problems(load_context, file):
    rows = [pair(buggy=f"{BUGGY}# {n}\n", accepted=f"{LONGER}# {n}\n", problem_id=f"p{n % 5}") for n in range(100)]
    assert len({e.extra["problem_id"] for e in load(load_context, file(*rows), max_rows=20).examples}) == 5


@pytest.mark.parametrize("problem", [None, "", "  "])
def test_rows_without_a_problem_are_in_no_part(load_context, file, problem):
    path = file(pair(problem_id=problem), pair(f"{BUGGY}# 2\n"))
    assert load(load_context, path, split="train", test_fraction=0, validation_fraction=0).counts["no-problem-id"] == 1
    assert load(load_context, path).counts["kept"] == 2


# -- hostile rows


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"fail": 3}, "'fail' is a number, not text"),
        ({"pass": None}, "has no 'pass' (columns: "),
        ({"language": None}, "has no 'language' (columns: "),
        ({"language": ["Python"]}, "'language' is a list, not text"),
        ({"problem_id": 7}, "'problem_id' is a number, not text"),
        ({"error": {}}, "'error' is an object, not text"),
        ({"description": 1}, "'description' is a number, not text"),
        ({"output": [1]}, "'output' is a list, not text"),
        ({"fail": "a\0b"}, "'fail' holds a NUL character"),
    ],
)
def test_broken_rows_name_file_and_line(load_context, file, change, what):
    path = file(pair(), pair(**change))
    with pytest.raises(DataError) as error:
        load(load_context, path)
    assert str(error.value).startswith(f"{path}:2: {what}")
    rows = load(load_context, path, on_error="skip")
    assert (rows.counts["kept"], rows.counts["broken"]) == (1, 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fail": " \n"}, "empty-prompt"),
        ({"pass": "\n"}, "empty-completion"),
        ({"pass": f"\n{BUGGY}\n"}, "no-change"),
    ],
)
def test_rows_that_teach_nothing_are_counted(load_context, file, change, reason):
    rows = load(load_context, file(pair(**change), pair()), columns="as-named")
    assert (rows.counts[reason], rows.counts["kept"], rows.counts["read"]) == (1, 1, 2)


def test_all_null_and_huge_rows(load_context, file):
    huge = pair("x = 1\n" * 200_000, "x = 2\n" + "x = 1\n" * 199_999, i1=0, i2=1, j1=0, j2=1)
    path = file(dict.fromkeys(pair()), huge, {})
    rows = load(load_context, path, on_error="skip")
    assert (rows.counts["kept"], rows.counts["broken"]) == (1, 2)


HOSTILE = (
    None,
    0,
    -1,
    10**400,
    1e308,
    True,
    "",
    " ",
    "x" * 10,
    "\u2028",
    [],
    [None],
    [[]],
    {},
    {"input": 3},
    {"x": [{}]},
)


@pytest.mark.parametrize("columns", ["auto", "swapped"])
def test_any_value_in_any_column(load_context, file, columns):
    rows = [pair(**{name: value}) for name in pair() for value in HOSTILE]
    found = load(load_context, file(*rows), columns=columns, on_error="skip", description=True)
    assert found.counts["read"] == len(rows) == sum(found.counts.values()) - len(rows)
    assert found.counts["broken"] > len(pair())


def test_a_fence_in_the_program_does_not_end_the_block(load_context, file):
    text = only(load(load_context, file(pair(buggy='s = """\n```\n"""\n')))).prompt[0].content
    assert '\n````python\ns = """\n```\n"""\n````\n' in text


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>a  b\nc</p>", "a b c"),
        ("<pre>\n1 2\n 3\n</pre>", "1 2\n3"),
        ("<ul><li>x<li>y</ul>", "- x\n- y"),
        ("x < y <b>and</b> y > z", "x < y and y > z"),
        ("&lt;b&gt; &amp;lt; &le;", "<b> &lt; ≤"),
        ("<![foo[bar <p a='", "<![foo[bar <p a='"),
        ("<" * 100_000, "<" * 100_000),
        # Minutes, if the time were quadratic in the length.
        ("<" + "a" * 1_000_000, "<" + "a" * 1_000_000),
        ("<a" * 500_000, "<a" * 500_000),
        ("", ""),
    ],
)
def test_html_to_text(html, text):
    assert html_to_text(html) == text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt_style": "alpaca"}, "'chat', 'paper' or 'template'"),
        ({"prompt_style": "paper", "description": True}, "with prompt_style: chat only"),
        ({"answer": "paper"}, "with prompt_style: paper only"),
        ({"columns": "auto-detect"}, "'as-named'"),
        ({"language": "rust"}, "'cpp'"),
        ({"prompt_style": "template"}, "needs a Jinja file"),
        ({"prompt_style": "paper", "system": "x"}, "with prompt_style: chat only"),
    ],
)
def test_parameters_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match="BugNetParams") as error:
        params(**given)
    assert message in error.value.errors()[0]["msg"]


def test_sample():
    rows = BugNetLoader(params(language="cpp", max_rows=1)).sample()
    assert [example.extra["language"] for example in rows.examples].count("python") == 8
    assert len(rows.examples) == 10
    assert all(example.echo != example.completion for example in rows.examples)


# -- real rows


@pytest.mark.shared
def test_real_rows_of_both_revisions(shared_data, load_context):
    named = load(load_context, shared_data / "bugnet/bugnet_python.jsonl")
    # One pair is the same as another but for white space.
    assert named.counts["kept"] + named.counts.get("duplicate", 0) == named.counts["read"] == 141
    assert named.counts["kept"] >= 140
    assert load_context.lines == []
    swapped = load(load_context, shared_data / "bugnet/bugnet_python_v2_as_published_swapped.jsonl")
    assert len(load_context.lines) == 1
    assert swapped.counts["read"] == 100
    # Every pair of the swapped file is in the other one, the right way round.
    answers = {(example.echo, example.completion) for example in named.examples}
    assert {(example.echo, example.completion) for example in swapped.examples} <= answers


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "right", "decided"),
    [("bugnet_python", "as-named", 81), ("bugnet_python_v2_as_published_swapped", "swapped", 49)],
)
def test_the_detector_is_never_wrong_on_real_rows(shared_data, name, right, decided):
    lines = (shared_data / f"bugnet/{name}.jsonl").read_text(encoding="utf-8").split("\n")
    readings = [row_reading(json.loads(line)) for line in lines if line]
    assert readings.count(right) == decided
    assert readings.count(None) == len(readings) - decided


@pytest.mark.shared
def test_real_problems_are_in_one_part_each(shared_data, load_context):
    path = shared_data / "bugnet/bugnet_python.jsonl"
    parts = [load(load_context, path, split=name).examples for name in ("train", "validation", "test")]
    problems = [{example.extra["problem_id"] for example in part} for part in parts]
    assert all(problems)
    assert sum(map(len, problems)) == len(set.union(*problems))
    assert sum(map(len, parts)) >= 121
