from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdkit.api import DataError, Message
from kdkit.plugins.datasets.code_params import CodeforcesParams
from kdkit.plugins.datasets.code_prompts import last_block
from kdkit.plugins.datasets.codeforces import CodeforcesLoader, codeforces_converter
from kdkit.plugins.datasets.codeforces_text import PAPER_SYSTEM, THINK_SYSTEM
from kdkit.plugins.datasets.decontaminate import raw_text
from kdkit.plugins.datasets.values import SourceRow

ASKED = "Solve it in Python 3."
TRACE = "<think>\nAdd them.\n```python\nwrong\n```\n</think>\n\nThe sum:\n\n```python\nprint(1)\n```\n"


def params(**given) -> CodeforcesParams:
    return CodeforcesParams.model_validate_json(json.dumps(given, default=str))


def load(ctx, source, **given):
    return CodeforcesLoader(params(source=str(source), **{"split": "all", **given})).load(ctx)


def rl(ctx, source, **given):
    return load(ctx, source, task="rl", **given)


def problem(**change):
    """A row with the columns of open-r1/codeforces."""
    return {
        "id": "852/A",
        "aliases": None,
        "contest_id": "852",
        "contest_name": "Round",
        "contest_type": "CF",
        "contest_start": 1504432800,
        "contest_start_year": 2017,
        "index": "A",
        "time_limit": 2.0,
        "memory_limit": 256.0,
        "title": "Sum",
        "description": "Add $$$a$$$ and $$$b$$$.",
        "input_format": "Two numbers.",
        "output_format": "Their sum.",
        "interaction_format": None,
        "note": "Easy.",
        "examples": [{"input": "1 2\n", "output": "3\n"}],
        "editorial": None,
        "rating": 800,
        "tags": ["math"],
        "testset_size": 2,
        "official_tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5\n", "output": "10\n"}],
        "official_tests_complete": True,
        "input_mode": "stdio",
        "generated_checker": None,
        "executable": True,
        "generated_tests": 0,
        **change,
    }


def trace(text=TRACE, **change):
    """A row with the columns of codeforces-cots, solutions_py_decontaminated."""
    row = {name: value for name, value in problem().items() if not name.startswith(("official", "generated"))}
    return {
        **row,
        "prompt": ASKED,
        "generation": text,
        "finish_reason": "stop",
        "api_metadata": {"completion_tokens": 9, "prompt_tokens": 9, "prompt_tokens_details": None, "total_tokens": 18},
        "messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": text}],
        "accepted_solutions": [{"code": "x", "verdict": "OK"}],
        "failed_solutions": [{"code": "y", "verdict": "WRONG_ANSWER"}],
        "generated_tests": {"input": ["7 1\n"], "output": ["8\n"]},
        "private_tests": {"input": ["0 0\n"], "output": ["0\n"]},
        "problem_type": "diff",
        "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
        "public_tests_ms": [{"input": "1 2\n", "output": "3\n"}],
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


# -- answers to learn from


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_sft(load_context, file, name):
    example = only(load(load_context, file(trace(), name=name)))
    assert example.prompt == (Message("user", ASKED),)
    assert (example.completion, example.category) == (TRACE, "diff")
    assert example.echo == "Add $$$a$$$ and $$$b$$$."
    assert example.extra == {
        "problem_id": "852/A",
        "contest_id": "852",
        "index": "A",
        "title": "Sum",
        "time_limit": 2.0,
        "memory_limit": 256.0,
        "language": "python",
    }


def test_answers_without_their_trace(load_context, file):
    assert only(load(load_context, file(trace()), traces=False)).completion == "The sum:\n\n```python\nprint(1)\n```\n"


def test_rows_without_messages(load_context, file):
    example = only(load(load_context, file(trace(messages=None))))
    assert (example.prompt, example.completion) == ((Message("user", ASKED),), TRACE)
    made = only(load(load_context, file(trace(messages=None, prompt=None)))).prompt[0].content
    assert made.startswith("Solve this programming problem with a Python program that reads from standard input")


def test_think_style_adds_the_system_message(load_context, file):
    example = only(load(load_context, file(trace()), prompt_style="think"))
    assert example.prompt == (Message("system", THINK_SYSTEM), Message("user", ASKED))


@pytest.mark.parametrize(
    ("text", "change", "reason"),
    [
        (TRACE, {"finish_reason": "length"}, "unfinished"),
        ("<think>\nStill thinking\n```python\nx\n```\n", {}, "unfinished"),
        ("<think>\n```python\nx\n```\n</think>\nNo code.", {}, "no-code"),
        ("```python\nprint(1)\n", {}, "no-code"),
        ("```cpp\nint main() {}\n```\n", {}, "other-language"),
        ("```\nprint(1)\n```\n", {}, "other-language"),
        (" \n", {}, "empty-completion"),
    ],
)
def test_answers_that_are_left_out(load_context, file, text, change, reason):
    rows = load(load_context, file(trace(text, **change), trace()))
    assert (rows.counts[reason], rows.counts["kept"], rows.counts["read"]) == (1, 1, 2)


def test_unfinished_answers_can_be_kept(load_context, file):
    path = file(trace(finish_reason="length"), trace("<think>\n```python\nx\n```\n"))
    assert load(load_context, path, unfinished=True).counts["kept"] == 2


@pytest.mark.parametrize(("language", "tag"), [("cpp", "cpp"), ("cpp", "c++"), ("python", "Python3"), ("all", "rust")])
def test_the_last_block_tells_the_language(load_context, file, language, tag):
    text = f"<think></think>\n```text\n1\n```\nthen\n```{tag}\nx\n```"
    rows = load(load_context, file(trace(text)), language=language)
    assert rows.counts["kept"] == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```python\na\n```", ("python", "a\n")),
        ("````md\n```\nx\n```\n````\n", ("md", "```\nx\n```\n")),
        ("```a\n1\n```\n```B \n2\n\n```   ", ("b", "2\n\n")),
        ("```a\n1\n```\n```b\n2", ("a", "1\n")),
        ("x ```python\na\n```", None),
        ("```a\n" * 200_000, None),
        ("", None),
    ],
)
def test_last_block(text, found):
    assert last_block(text) == found


def test_all_answers_to_a_problem_are_in_one_part(load_context, file):
    rows = [
        trace(TRACE + str(n), id=f"{n % 40}/A", aliases=[f"{n % 40 + 1000}/C"] if n % 2 else None) for n in range(120)
    ]
    # The same problems under the other name, which names the first one.
    rows += [trace(f"{TRACE}x{n}", id=f"{n + 1000}/C", aliases=[f"{n}/A"]) for n in range(1, 40, 2)]
    path = file(*rows)
    parts = [
        load(load_context, path, split=name, test_fraction=0.3, validation_fraction=0.3).examples
        for name in ("train", "validation", "test")
    ]
    names = [{str(int(e.extra["problem_id"].split("/")[0]) % 1000) for e in examples} for examples in parts]
    assert sum(map(len, parts)) == 140
    assert all(names)
    assert sum(map(len, names)) == len(set.union(*names)) == 40


@pytest.mark.parametrize("strip", ["", " "])
def test_one_problem_under_many_ids_is_in_one_part(load_context, file, strip):
    # Chains in which each names the next one only, and stars whose middle alone names the others.
    rows = []
    for n in range(30):
        names = [f"{n + 100 * part}/A" for part in (1, 2, 3, 4)]
        others = [[names[1]], [names[2]], [names[3]], None] if n % 2 else [None, None, names[:2] + names[3:], None]
        rows += [
            trace(f"{TRACE}{name}", id=f"{name}{strip}", aliases=other and [f"{strip}{other_}" for other_ in other])
            for name, other in zip(names, others, strict=True)
        ]
    shares = {"test_fraction": 0.3, "validation_fraction": 0.3}
    for order in (rows, rows[::-1]):
        path = file(*order)
        parts = [load(load_context, path, split=name, **shares).examples for name in ("train", "validation", "test")]
        names = [{int(e.extra["problem_id"].split("/")[0]) % 100 for e in examples} for examples in parts]
        assert sum(map(len, parts)) == 120
        assert all(names)
        assert sum(map(len, names)) == 30


def test_rows_that_differ_in_what_a_template_shows_are_two(load_context, file, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ title }}: {{ prompt }}")
    given = {"prompt_style": "template", "template": template}
    for order in ([trace(), trace(title="Add")], [trace(title="Add"), trace()]):
        prompts = {example.prompt for example in load(load_context, file(*order), **given).examples}
        assert prompts == {f"Sum: {ASKED}", f"Add: {ASKED}"}


OPEN_R1 = "A problem, in words that are the same in all rows of the set, and many.\n\n# Problem\n\n{}\n\n## Input\n\nN."


@pytest.mark.parametrize("task", ["sft", "rl"])
def test_decontaminate_compares_statements_and_not_the_instructions_around_them(task):
    asked = [{"role": "user", "content": OPEN_R1.format("Count the owls.")}, {"role": "assistant", "content": TRACE}]
    change = {"messages": asked, "prompt": asked[0]["content"]}
    convert = codeforces_converter(params(task=task, split="all"), {}, {})
    for description, words in ((None, "Count the owls."), ("Count the crows.", "Count the crows.")):
        row = trace(**change, description=description)
        assert raw_text(convert(SourceRow("f:1", row))) == words


def test_max_rows_takes_many_problems(load_context, file):
    path = file(*(trace(TRACE + str(n), id=f"{n % 5}/A") for n in range(100)))
    assert len({e.extra["problem_id"] for e in load(load_context, path, max_rows=20).examples}) == 5


# -- problems with tests


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_rl(load_context, file, name):
    example = only(rl(load_context, file(problem(generated_checker="print(1)"), name=name)))
    assert (example.id, example.completion, example.echo) == ("852/A", None, "Add $$$a$$$ and $$$b$$$.")
    assert example.prompt == (
        Message(
            "user",
            "Solve this programming problem with a Python program that reads from standard input and writes to "
            "standard output. The program has to stay within the limits on the largest inputs that the statement "
            "allows, and prints nothing but the answer.\n\n# Sum\n\nAdd $$$a$$$ and $$$b$$$.\n\n# Limits\n\nTime limit "
            "per test: 2 s\nMemory limit: 256 MB\n\n# Input\n\nTwo numbers.\n\n# Output\n\nTheir sum.\n\n# Examples\n\n"
            "Input:\n```\n1 2\n```\nOutput:\n```\n3\n```\n\n# Note\n\nEasy.\n\nPut the complete program into one code "
            "block that begins with ```python.",
        ),
    )
    assert example.extra == {
        "problem_id": "852/A",
        "contest_id": "852",
        "index": "A",
        "title": "Sum",
        "time_limit": 2.0,
        "memory_limit": 256.0,
        "language": "python",
        "examples": [{"input": "1 2\n", "output": "3\n"}],
        "official_tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5\n", "output": "10\n"}],
        "official_tests_complete": True,
        "tests_left_out": 0,
        "checker": "print(1)",
        "input_mode": "stdio",
    }


def test_rl_prompts(load_context, file, tmp_path):
    path = file(problem())
    assert only(rl(load_context, path, prompt_style="think")).prompt[0] == Message("system", THINK_SYSTEM)
    assert only(rl(load_context, path, prompt_style="paper")).prompt[0] == Message("system", PAPER_SYSTEM)
    assert "```cpp." in only(rl(load_context, path, language="cpp")).prompt[0].content
    by_file = only(rl(load_context, file(problem(input_mode="file"))))
    assert "reads from input.txt and writes to output.txt" in by_file.prompt[0].content
    assert by_file.extra["input_mode"] == "file"
    bare = problem(title=None, time_limit=None, memory_limit=None, note="", examples=[], input_format=None)
    text = only(rl(load_context, file(bare))).prompt[0].content
    assert "# Problem\n\nAdd" in text
    assert "# Limits" not in text
    assert "# Examples" not in text
    template = tmp_path / "t.jinja"
    template.write_text("{{ title }}|{{ limits }}|{{ language }}|{{ note }}")
    styled = only(rl(load_context, file(problem()), prompt_style="template", template=template))
    assert styled.prompt == "Sum|Time limit per test: 2 s\nMemory limit: 256 MB|Python|Easy."


def test_rows_of_verifiable_prompts(load_context, file):
    path = file(problem(language="python", prompt=ASKED), problem(language="cpp", prompt="In C++."))
    for language, text in (("python", ASKED), ("cpp", "In C++.")):
        rows = rl(load_context, path, language=language)
        assert only(rows).prompt == (Message("user", text),)
        assert rows.counts["other-language"] == 1


def test_tests_of_codeforces_cots(load_context, file):
    example = only(rl(load_context, file(trace())))
    # Both shapes, private before public before generated, each test once.
    assert [test["input"] for test in example.extra["official_tests"]] == ["0 0\n", "1 2\n", "7 1\n"]
    assert example.extra["official_tests_complete"] is True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"official_tests": []}, "no-tests"),
        ({"official_tests": None}, "no-tests"),
        ({"official_tests_complete": False}, "incomplete-tests"),
        ({"official_tests_complete": False, "generated_tests": 12}, "tests-elsewhere"),
        ({"official_tests_complete": False, "generated_tests": 12.0, "official_tests": []}, "tests-elsewhere"),
        ({"executable": False}, "not-executable"),
        ({"interaction_format": "Ask ? x."}, "interactive"),
        ({"problem_type": "interactive"}, "interactive"),
        ({"problem_type": "checker"}, "no-checker"),
        ({"description": " ", "prompt": None}, "empty-prompt"),
        ({"official_tests": [{"input": "1" * 5_000_000, "output": ""}]}, "tests-too-large"),
    ],
)
def test_problems_that_cannot_be_judged_are_counted(load_context, file, change, reason):
    rows = rl(load_context, file(problem(), problem(id="1/B", **change)))
    assert (rows.counts[reason], rows.counts["kept"], rows.counts["read"]) == (1, 1, 2)


def test_public_tests_alone_are_incomplete(load_context, file):
    row = trace(private_tests=None, generated_tests=None)
    assert rl(load_context, file(row)).counts["incomplete-tests"] == 1
    example = only(rl(load_context, file(row), incomplete_tests=True))
    assert example.extra["official_tests_complete"] is False
    assert len(example.extra["official_tests"]) == 1


def test_what_the_row_says_of_its_tests_counts_more_than_their_columns(load_context, file):
    row = trace(official_tests_complete=False)
    assert rl(load_context, file(row)).counts["incomplete-tests"] == 1
    assert only(rl(load_context, file(row), incomplete_tests=True)).extra["official_tests_complete"] is False


def test_official_tests_without_a_flag_are_taken_for_complete(load_context, file):
    assert only(rl(load_context, file(problem(official_tests_complete=None)))).extra["official_tests_complete"] is True


def test_a_checker_makes_a_checker_problem_judgeable(load_context, file):
    assert only(rl(load_context, file(problem(problem_type="checker", generated_checker="x")))).extra["checker"] == "x"


def test_tests_that_do_not_fit_are_left_out_and_counted(load_context, file):
    tests = [{"input": "x" * size, "output": "y"} for size in (10, 500, 20)]
    example = only(rl(load_context, file(problem(official_tests=tests)), max_tests_bytes=40))
    assert [len(test["input"]) for test in example.extra["official_tests"]] == [10, 20]
    assert example.extra["tests_left_out"] == 1
    # Who passes these has not passed all.
    assert example.extra["official_tests_complete"] is False
    assert load_context.lines[0].endswith("left out 1 tests of 1 problems, which have more than 40 bytes of tests")
    # Room is for all tests together, and a test that is there twice takes it once.
    for room, sizes in ((32, [10, 20]), (31, [10])):
        twice = problem(official_tests=[tests[0], tests[0], tests[2]])
        example = only(rl(load_context, file(twice), max_tests_bytes=room))
        assert [len(test["input"]) for test in example.extra["official_tests"]] == sizes


def test_generated_tests_of_other_files(load_context, file, tmp_path):
    path = file(problem(official_tests_complete=False, generated_tests=2))
    assert rl(load_context, path).counts["tests-elsewhere"] == 1
    assert "set generated_tests" in load_context.lines[0]
    folder = tmp_path / "tests"
    folder.mkdir()
    table = [
        {"problem_id": key, "input": given, "output": "1", "test_case_i": 0}
        for key, given in (("852/A", "a"), ("852/B", "b"), ("852/A", "c"))
    ]
    pq.write_table(pa.Table.from_pylist(table), folder / "test_cases_0852.parquet")
    example = only(rl(load_context, path, generated_tests=folder))
    assert [test["input"] for test in example.extra["official_tests"]] == ["1 2\n", "5 5\n", "a", "c"]
    assert example.extra["official_tests_complete"] is True
    some = only(rl(load_context, path, generated_tests=folder, max_tests_bytes=11))
    assert [test["input"] for test in some.extra["official_tests"]] == ["1 2\n", "a", "c"]
    assert (some.extra["tests_left_out"], some.extra["official_tests_complete"]) == (1, False)
    # None of the generated tests fits, so that they complete nothing.
    none = rl(load_context, path, generated_tests=folder, max_tests_bytes=1)
    assert none.counts["tests-too-large"] == 1
    full = problem(official_tests=[{"input": "x" * 10, "output": ""}], official_tests_complete=False)
    assert rl(load_context, file(full), generated_tests=folder, max_tests_bytes=11).counts["incomplete-tests"] == 1
    # No file for this contest, and an id that is no path.
    for other in ("853/A", "../../852/A"):
        rows = rl(load_context, file(problem(id=other, official_tests_complete=False)), generated_tests=folder)
        assert rows.counts["incomplete-tests"] == 1


@pytest.mark.parametrize("content", [b"PAR1 is damaged", b""])
def test_damaged_generated_tests(load_context, file, tmp_path, content):
    path = file(problem())
    with pytest.raises(DataError, match="no such directory of generated tests"):
        rl(load_context, path, generated_tests=tmp_path / "absent")
    (tmp_path / "test_cases_0852.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"test_cases_0852\.parquet: is damaged"):
        rl(load_context, path, generated_tests=tmp_path)


def test_generated_tests_that_are_a_bomb_are_not_unpacked(load_context, file, tmp_path, monkeypatch):
    monkeypatch.setattr("kdkit.plugins.datasets.readers.EXPANSION_FROM", 10_000)
    rows = [{"problem_id": "852/A", "input": "x" * 9000, "output": "1"}] * 400
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test_cases_0852.parquet", compression="zstd")
    with pytest.raises(DataError, match=r"test_cases_0852\.parquet: grows to more than"):
        rl(load_context, file(problem()), generated_tests=tmp_path)


def test_generated_tests_with_other_columns(load_context, file, tmp_path):
    pq.write_table(pa.Table.from_pylist([{"a": 1}]), tmp_path / "test_cases_0852.parquet")
    with pytest.raises(DataError, match=r"test_cases_0852\.parquet: has no columns problem_id, input, output"):
        rl(load_context, file(problem()), generated_tests=tmp_path)


# -- hostile rows


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"id": ["x"]}, "'id' is a list, neither text nor a whole number"),
        ({"id": True}, "'id' is true, neither"),
        ({"aliases": "1/A"}, "'aliases' is not a list of texts"),
        ({"aliases": [1]}, "'aliases' is not a list of texts"),
        ({"time_limit": "2"}, "'time_limit' is a text, not a number"),
        ({"time_limit": 0}, "'time_limit' is 0, and limits lie between 0 and 1,000,000;"),
        ({"memory_limit": 10**400}, "'memory_limit' is 10000000000000000000, and limits lie between"),
        ({"memory_limit": -1}, "'memory_limit' is -1, and limits lie between 0 and 1,000,000;"),
        ({"description": 3}, "'description' is a number, not text"),
        ({"examples": [{"input": 1, "output": ""}]}, "'examples' holds a test without the texts"),
        ({"official_tests": "x"}, "'official_tests' is a text, neither a list of tests nor an object"),
        ({"official_tests": [None]}, "'official_tests' holds a test without the texts"),
        ({"official_tests": {"input": ["1"], "output": []}}, "'official_tests' has not as many inputs as outputs"),
        ({"executable": "yes"}, "'executable' is a text, neither true nor false"),
        ({"official_tests_complete": 1}, "'official_tests_complete' is a number, neither true nor false"),
        ({"input_mode": "tape"}, "'input_mode' is 'tape', neither stdio nor file"),
        ({"generated_checker": 1}, "'generated_checker' is a number, not text"),
        ({"description": "\0"}, "'description' holds a NUL character"),
    ],
)
def test_broken_problems_name_file_and_line(load_context, file, change, what):
    path = file(problem(), problem(**change))
    with pytest.raises(DataError) as error:
        rl(load_context, path)
    assert str(error.value).startswith(f"{path}:2: {what}")
    assert rl(load_context, path, on_error="skip").counts["broken"] == 1


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, "'messages' is not one question"),
        ({"messages": [{"role": "assistant", "content": TRACE}] * 2}, "'messages' is not one question"),
        ({"messages": "x"}, "'messages' is a text"),
        ({"messages": [{"role": "user"}]}, "the content of messages[0] is null"),
        ({"messages": None, "generation": None}, "has no 'generation'"),
        ({"messages": None, "prompt": 1}, "'prompt' is a number, not text"),
        ({"finish_reason": 1}, "'finish_reason' is a number, not text"),
    ],
)
def test_broken_answers_name_file_and_line(load_context, file, change, what):
    path = file(trace(), trace(**change))
    with pytest.raises(DataError) as error:
        load(load_context, path)
    assert str(error.value).startswith(f"{path}:2: {what}")


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


@pytest.mark.parametrize("task", ["sft", "rl"])
def test_any_value_in_any_column(load_context, file, task):
    rows = [row(**{name: value}) for row in (trace, problem) for name in row() for value in HOSTILE]
    found = load(load_context, file(*rows), task=task, on_error="skip")
    assert found.counts["read"] == len(rows) == sum(found.counts.values()) - len(rows)
    assert found.counts["broken"] > 20


@pytest.mark.parametrize("task", ["sft", "rl"])
def test_nulls_everywhere(load_context, file, task):
    path = file(dict.fromkeys({**trace(), **problem()}), {}, trace() if task == "sft" else problem())
    rows = load(load_context, path, task=task, on_error="skip")
    assert (rows.counts["broken"], rows.counts["kept"]) == (2, 1)


def test_a_problem_without_id_goes_by_its_statement(load_context, file):
    example = only(rl(load_context, file(problem(id=None, contest_id=None))))
    assert len(example.id) == 16
    assert only(rl(load_context, file(problem(id=None, contest_id=852)))).id == "852/A"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "sft", "prompt_style": "paper"}, "asks for <answer>, which no row of task: sft has"),
        ({"task": "sft", "incomplete_tests": True}, "incomplete_tests: means nothing with task: sft"),
        ({"task": "rl", "traces": False, "unfinished": True}, "traces, unfinished: means nothing with task: rl"),
        ({"task": "rl", "language": "all"}, "language: task: rl needs one"),
        ({"max_tests_bytes": 0}, "greater than or equal to 1"),
        ({"prompt_style": "think", "system": "x"}, "with prompt_style: chat only"),
    ],
)
def test_parameters_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match="CodeforcesParams") as error:
        params(**given)
    assert message in error.value.errors()[0]["msg"]


@pytest.mark.parametrize(
    ("given", "called"),
    [
        ({}, ("open-r1/codeforces-cots", "solutions_py_decontaminated")),
        ({"language": "cpp"}, ("open-r1/codeforces-cots", "solutions_decontaminated")),
        ({"config": "solutions_py"}, ("open-r1/codeforces-cots", "solutions_py")),
        ({"task": "rl"}, ("open-r1/codeforces", "verifiable")),
        ({"source": "org/name"}, ("org/name", None)),
    ],
)
def test_hub_sources(load_context, monkeypatch, given, called):
    seen = []

    def rows(source, split, convert, ctx, *, hub_split):
        seen.append((str(source.source), source.config, hub_split))
        return CodeforcesLoader(params()).sample()

    monkeypatch.setattr("kdkit.plugins.datasets.codeforces.load_rows", rows)
    monkeypatch.setattr("kdkit.plugins.datasets.codeforces.source_rows", lambda *_, **__: iter(()))
    CodeforcesLoader(params(**given)).load(load_context)
    assert seen == [(*called, "train")]


def test_samples():
    answers = CodeforcesLoader(params(language="cpp", max_rows=1)).sample()
    assert len(answers.examples) == 8
    assert all("<think>\nStep 1: " in example.completion for example in answers.examples)
    problems = CodeforcesLoader(params(task="rl", max_tests_bytes=100)).sample()
    assert len(problems.examples) == 8
    assert all(example.completion is None and example.extra["official_tests"] for example in problems.examples)


@pytest.mark.shared
def test_real_taco_problems(shared_data, load_context):
    path = shared_data / "codeforces/taco_stdio_in_open_r1_schema.jsonl"
    # Their only tests are the examples of the statement.
    assert rl(load_context, path).counts["incomplete-tests"] == 272
    rows = rl(load_context, path, incomplete_tests=True)
    assert (rows.counts["read"], rows.counts["kept"]) == (272, 272)
    parts = [
        rl(load_context, path, incomplete_tests=True, split=name, test_fraction=0.2, validation_fraction=0.2).examples
        for name in ("train", "validation", "test")
    ]
    assert sum(map(len, parts)) == 272
    assert min(map(len, parts)) > 30


@pytest.mark.shared
def test_the_schema_of_the_rows_here_is_the_published_one(shared_data):
    published = json.loads((shared_data / "codeforces/open_r1_schemas.json").read_text(encoding="utf-8"))
    assert set(problem()) == set(published["open-r1/codeforces"]["default"]["columns"])
    cots = set(published["open-r1/codeforces-cots"]["solutions_py_decontaminated"]["columns"])
    # The row here has a few columns more, which are those of the problems.
    assert cots - {"interaction_format"} <= set(trace())
