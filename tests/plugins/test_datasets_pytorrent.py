from __future__ import annotations

import ast
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdkit.api import DataError, Message
from kdkit.plugins.datasets.code_params import PyTorrentParams
from kdkit.plugins.datasets.docstrings import NotAFunctionError, read_function
from kdkit.plugins.datasets.pytorrent import PyTorrentLoader

SOURCE = 'def double(x):\n    """Twice a number.\n\n    More text.\n    """\n    return 2 * x  # twice\n'
CODE = "def double(x):\n    return 2 * x  # twice\n"


def params(**given) -> PyTorrentParams:
    return PyTorrentParams.model_validate_json(json.dumps(given, default=str))


def load(ctx, source, **given):
    return PyTorrentLoader(params(source=str(source), **{"split": "all", **given})).load(ctx)


def function(**change):
    """A row with the twelve columns of CodeSearchNet and PyTorrent's three."""
    return {
        "repo": "mathlib",
        "path": "mathlib/x.py",
        "func_name": "double",
        "original_string": SOURCE,
        "language": "python",
        "code": CODE,
        "code_tokens": ["def", "double"],
        "docstring": "Twice a number.\n\nMore text.",
        "docstring_tokens": ["Twice", "a", "number", "."],
        "sha": "",
        "url": "mathlib/x.py#L1-L6",
        "partition": "train",
        "code_tokens_ast": ["def", "double"],
        "code_with_docstrings": SOURCE,
        "summary": "Twice a number.",
        **change,
    }


@pytest.fixture
def file(tmp_path):
    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(list(rows)), path)
        elif name.endswith(".gz"):
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text, encoding="utf-8")
        return path

    return write


def only(rows):
    (example,) = rows.examples
    return example


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "train_scenario_both_chk_0.jsonl.gz"])
def test_chat(load_context, file, name):
    example = only(load(load_context, file(function(), name=name)))
    request = "Write a Python function for this description. Answer with its code, and nothing else.\n\n"
    assert example.prompt == (Message("user", f"{request}Twice a number."),)
    assert (example.completion, example.echo, example.references) == (CODE, "Twice a number.", ())
    assert example.extra == {
        "language": "python",
        "repo": "mathlib",
        "path": "mathlib/x.py",
        "func_name": "double",
    }


@pytest.mark.parametrize(
    ("prompt_with", "ending"),
    [
        ("summary", "Twice a number."),
        ("docstring", "Twice a number.\n\nMore text."),
        ("summary+signature", "number.\n\nIt starts like this:\n\n```python\ndef double(x):\n```"),
        ("docstring+signature", "text.\n\nIt starts like this:\n\n```python\ndef double(x):\n```"),
    ],
)
def test_what_the_prompt_tells(load_context, file, prompt_with, ending):
    (message,) = only(load(load_context, file(function()), prompt_with=prompt_with)).prompt
    assert message.content.endswith(ending)


@pytest.mark.parametrize("summary", [None, "", " \n"])
def test_without_summary_the_docstring(load_context, file, summary):
    assert only(load(load_context, file(function(summary=summary)))).echo == "Twice a number.\n\nMore text."


def test_paper_style_is_that_of_the_paper(load_context, file):
    example = only(load(load_context, file(function()), prompt_style="paper", keep_docstring=True))
    assert example.prompt == (
        "Below is an instruction that describes a task. Write a programming script that appropriately completes the "
        "request.\n\n### Request:\nTwice a number.\n### Response:\n"
    )
    assert (example.completion, example.targets) == (SOURCE, (SOURCE,))
    given = {"prompt_style": "paper", "answer": "paper", "keep_docstring": True}
    example = only(load(load_context, file(function()), **given))
    assert example.completion == f"### solution code \n\n{SOURCE}\n\n### End of code\n"
    assert example.references == (SOURCE,)


def test_template(load_context, file, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ name }}|{{ signature }}|{{ text }}")
    example = only(load(load_context, file(function()), prompt_style="template", template=template))
    assert example.prompt == "double|def double(x):|Twice a number."


# -- docstrings


@pytest.mark.parametrize(
    ("source", "code", "signature"),
    [
        ('def f():\n    """d"""\n    return 1', "def f():\n    return 1", "def f():"),
        ("def f():\n    'a' \"b\"\n\n    return 1\n", "def f():\n\n    return 1\n", "def f():"),
        ("def f():\n    # why\n    r'''d\n  e'''  # noqa\n    x\n", "def f():\n    # why\n    x\n", "def f():"),
        ('def f(): "d"; return 1\n', "def f(): return 1\n", "def f():"),
        ('def f():\n    "d"; x = 1\n', "def f():\n    x = 1\n", "def f():"),
        ('def f():\r\n    """d"""\r\n    return 1\r\n', "def f():\r\n    return 1\r\n", "def f():"),
        ('def f(self):\n\t\t"""d"""\n\t\tprint self\n', "def f(self):\n\t\tprint self\n", "def f(self):"),
        ('    def f(a):\n        """d"""\n        a\n', "    def f(a):\n        a\n", "def f(a):"),
        (
            '@a(x=":")\n@b\nasync def f(a={1: 2}, *, b=lambda: 3) -> d["x": 1]:\n  """d"""\n  yield\n',
            '@a(x=":")\n@b\nasync def f(a={1: 2}, *, b=lambda: 3) -> d["x": 1]:\n  yield\n',
            'async def f(a={1: 2}, *, b=lambda: 3) -> d["x": 1]:',
        ),
        (
            'def f(\n    a,  # :\n):\n    "é\u2028"\n    "é"\n',
            'def f(\n    a,  # :\n):\n    "é"\n',
            "def f(\n    a,  # :\n):",
        ),
        ('def f():\n    ("""d""")\n    x\n', "def f():\n    x\n", "def f():"),
        ('def f():\n    (  # a\n        ("d"\n        "e")\n    )  # b\n    x\n', "def f():\n    x\n", "def f():"),
        ('def f(): ("d"); x\n', "def f(): x\n", "def f():"),
        ('def f():\r    """d"""\r    return 1\r', "def f():\r    return 1\r", "def f():"),
        ('def f():\n    """d\r e"""\n    return 1\r\n', "def f():\n    return 1\r\n", "def f():"),
        ('def f():\n    """d""";\n    return 1\n', "def f():\n    return 1\n", "def f():"),
        ('def f():\n    """d""" ; # c\n    return 1\n', "def f():\n    return 1\n", "def f():"),
        ('class A(B):\n    """d"""\n\n    x = 1\n', "class A(B):\n\n    x = 1\n", "class A(B):"),
        ('def f():\n    """d"""\n    def g():\n        """e"""\n    return g\n', None, "def f():"),
    ],
)
def test_docstrings_are_cut_out_and_all_else_stays(source, code, signature):
    found = read_function(source)
    if code is None:
        code = source.replace('    """d"""\n', "")
    assert (found.code, found.signature) == (code, signature)
    assert found.has_docstring
    assert not found.only_docstring


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    return 1\n",
        'def f():\n    """d""" % 3\n    return 1\n',
        'def f():\n    """d""".join(x)\n',
        'def f():\n    f"""d"""\n    return 1\n',
        'def f():\n    b"d"\n    return 1\n',
        'def f():\n    "a", "b"\n',
        'def f():\n    x = """d"""\n',
        'def f():\n    ("d",)\n    x\n',
        'def f():\n    ("d").x\n    x\n',
        'def f():\n    ("d") + ("e")\n    x\n',
        "def f():\n    ()\n    x\n",
        'def f():\n    ("d")("e")\n    x\n',
        'def f():\n    return """\n    d"""\n',
    ],
)
def test_code_without_docstring_is_left_alone(source):
    found = read_function(source)
    assert (found.code, found.has_docstring) == (source, False)


@pytest.mark.parametrize(
    "source",
    [
        'def f(): "d"\nx = 1\n',
        'def f(): "d";\nx = 1\n',
        'def f():\n    "d";\nx = 1\n',
        'def f(): "d"',
        'def f():\n    """d"""\n',
        'def f():\n    "d"  # x\n    # more\n\n',
        'class A: "d"\n',
    ],
)
def test_only_a_docstring(source):
    assert read_function(source).only_docstring


@pytest.mark.parametrize(
    "source",
    [
        "x = 1",
        "",
        "   ",
        "def",
        "def f",
        "def f\n:",
        "def f(",
        'def f():\n    """d',
        "@",
        "@x\n",
        "lambda: 0",
        "<html>",
        'def f():\n    """d"""\n  x\n',
        "(" * 50_000,
        "-" * 50_000 + "x",
        "def f(" + "(" * 50_000,
        "\ufeff\ufeff",
        "async",
        "`" * 9,
    ],
)
def test_what_is_no_function_is_refused(source):
    with pytest.raises(NotAFunctionError):
        read_function(source)


@pytest.mark.parametrize(
    "body", ["-" * 60_000 + "1", "x" + ".x" * 40_000, "not " * 20_000 + "1", "(" * 150 + ")" * 150, "1" + "+1" * 40_000]
)
def test_no_depth_of_nesting_harms(load_context, file, body):
    source = f'def f():\n    """d"""\n    return {body}\n'
    rows = load(load_context, file(function(original_string=source)))
    assert only(rows).completion == f"def f():\n    return {body}\n"


# -- rows that are not used


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"original_string": 'def f():\n    """d"""\n'}, "only-docstring"),
        ({"original_string": "def f(:\n"}, "unreadable-code"),
        ({"original_string": "import os\n"}, "unreadable-code"),
        ({"original_string": " \n"}, "empty-completion"),
        ({"original_string": f"def f():\n    x = '{'y' * 1_000_000}'\n"}, "too-long"),
        ({"language": "java"}, "other-language"),
        ({"docstring": "", "summary": ""}, "empty-prompt"),
    ],
)
def test_unusable_rows_are_counted(load_context, file, change, reason):
    rows = load(load_context, file(function(), function(**change)))
    assert (rows.counts[reason], rows.counts["kept"], rows.counts["read"]) == (1, 1, 2)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"original_string": None}, "has no 'original_string' (columns: "),
        ({"original_string": ["def"]}, "'original_string' is a list, not text"),
        ({"docstring": 3}, "'docstring' is a number, not text"),
        ({"summary": {}}, "'summary' is an object, not text"),
        ({"repo": 1}, "'repo' is a number, not text"),
        ({"original_string": "def f():\0"}, "'original_string' holds a NUL character"),
    ],
)
def test_broken_rows_name_file_and_line(load_context, file, change, what):
    path = file(function(), function(**change))
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


@pytest.mark.parametrize("split_by", ["repo", "partition"])
def test_any_value_in_any_column(load_context, file, split_by):
    rows = [function(**{name: value}) for name in function() for value in HOSTILE]
    found = load(load_context, file(*rows), split_by=split_by, on_error="skip")
    assert found.counts["read"] == len(rows) == sum(found.counts.values()) - len(rows)
    assert found.counts["broken"] > 20


@given(st.randoms(use_true_random=False), st.integers(1, 4))
def test_damaged_functions_are_cut_once_or_refused(random, damages):
    source = SOURCE.replace("(x)", "(x, y={'a': [1]}, *z)")
    for _ in range(damages):
        start = random.randrange(len(source))
        source = source[:start] + random.choice(["", "\n", '"', "(", ":", "\\", "\t", "#"]) + source[start + 1 :]
    try:
        found = read_function(source)
    except NotAFunctionError:
        return
    # The code is the source without one piece.
    same = next((n for n, (a, b) in enumerate(zip(found.code, source, strict=False)) if a != b), len(found.code))
    cut = len(source) - len(found.code)
    assert any(source[:n] + source[n + cut :] == found.code for n in range(same + 1))


def test_corrupt_lines_are_counted(load_context, tmp_path):
    path = tmp_path / "chk.jsonl"
    good = json.dumps(function())
    path.write_bytes(
        f'{good}\n{good[:90]}\n\n{{"a": \nnull\n{json.dumps(dict.fromkeys(function()))}\n'.encode() + b"\xff\n"
    )
    rows = load(load_context, path, on_error="skip")
    assert (rows.counts["kept"], rows.counts["broken"]) == (1, 5)
    assert "skipped 5 broken rows; the first: " in load_context.lines[0]
    with pytest.raises(DataError, match=r"chk\.jsonl:2: is not JSON"):
        load(load_context, path)


# -- splits


def many(n=200, repos=40):
    return [
        function(
            repo=f"repo-{i % repos}",
            original_string=SOURCE.replace("2 * x", f"{i} * x"),
            partition=("train", "valid", "test")[i % 3],
        )
        for i in range(n)
    ]


def parts_of(ctx, path, **given):
    fractions = {"test_fraction": 0.3, "validation_fraction": 0.3}
    return [load(ctx, path, split=name, **fractions, **given).examples for name in ("train", "validation", "test")]


def test_no_package_is_in_two_parts(load_context, file):
    parts = parts_of(load_context, file(*many()))
    repos = [{example.extra["repo"] for example in part} for part in parts]
    assert all(repos)
    assert sum(map(len, repos)) == 40
    assert sum(map(len, parts)) == 200


def test_parts_of_the_partition_column(load_context, file):
    parts = parts_of(load_context, file(*many()), split_by="partition")
    assert [len(part) for part in parts] == [67, 67, 66]
    path = file(function(partition="holdout"))
    assert load(load_context, path).counts["kept"] == 1
    with pytest.raises(DataError, match=r"'partition' is 'holdout', none of train, valid"):
        load(load_context, path, split_by="partition", split="train")


def test_parts_of_functions(load_context, file):
    parts = parts_of(load_context, file(*many(repos=1)), split_by="function")
    assert sum(map(len, parts)) == 200
    assert min(map(len, parts)) > 30


def test_max_rows_takes_many_packages(load_context, file):
    rows = load(load_context, file(*many()), max_rows=40)
    assert len({example.extra["repo"] for example in rows.examples}) > 15


def test_an_empty_part_says_why(load_context, file):
    rows = load(load_context, file(function()), split="test", test_fraction=0.001, validation_fraction=0.001)
    assert not rows.examples
    assert "no repo is in split: test; with few packages set split_by: function" in load_context.lines[0]


# -- related schemas


def test_columns_of_the_hubs_codesearchnet(load_context, file):
    row = {
        "repository_name": "ageitgey/face_recognition",
        "func_path_in_repository": "a.py",
        "func_name": "double",
        "whole_func_string": SOURCE,
        "language": "python",
        "func_code_string": SOURCE,
        "func_code_tokens": [],
        "func_documentation_string": "Twice a number.",
        "func_documentation_tokens": [],
        "split_name": "test",
        "func_code_url": "u",
    }
    example = only(load(load_context, file(row), split="test", split_by="partition"))
    assert (example.completion, example.echo) == (CODE, "Twice a number.")
    assert example.extra["repo"] == "ageitgey/face_recognition"


def test_cosqa(load_context, file):
    row = {"idx": "0", "doc": "python double it", "code": SOURCE, "code_tokens": "def", "docstring_tokens": "T"}
    rows = load(load_context, file({**row, "label": 1}, {**row, "label": 0}))
    assert (only(rows).echo, only(rows).completion) == ("python double it", CODE)
    assert rows.counts["no-match"] == 1
    with pytest.raises(DataError, match="'label' is 7, neither 0 nor 1"):
        load(load_context, file({**row, "label": 7}))


def test_hub_configuration(load_context, monkeypatch):
    called = []

    def rows(source, split, convert, ctx, *, hub_split):
        called.append((str(source.source), source.config, hub_split))
        return PyTorrentLoader(params()).sample()

    monkeypatch.setattr("kdkit.plugins.datasets.pytorrent.load_rows", rows)
    PyTorrentLoader(params()).load(load_context)
    PyTorrentLoader(params(source="org/name")).load(load_context)
    assert called == [("code-search-net/code_search_net", "python", "train"), ("org/name", None, "train")]


def test_the_published_answer_goes_with_the_published_prompt():
    with pytest.raises(ValueError, match="with prompt_style: paper only"):
        params(answer="paper")


def test_a_byte_order_mark_is_no_code(load_context, file):
    assert only(load(load_context, file(function(original_string="\ufeff" + SOURCE)))).completion == CODE


@pytest.mark.parametrize("dedup", ["exact", "prompt"])
def test_a_function_of_the_test_part_is_not_trained_under_another_docstring(load_context, file, dedup):
    rows = [
        function(
            repo=f"r{n}",
            original_string=f'def f{n % 50}():\n    """Doc {n}."""\n    return {n % 50}\n',
            summary=f"D {n}.",
        )
        for n in range(100)
    ]
    shares = {"test_fraction": 0.3, "validation_fraction": 0.2, "dedup": dedup}
    parts = [load(load_context, file(*rows), split=part, **shares) for part in ("train", "validation", "test")]
    code = [{example.completion for example in part.examples} for part in parts]
    assert all(code)
    assert sum(map(len, code)) == len(set.union(*code))
    assert parts[0].counts["shared-with-other-split"] > 0
    # Within one part such copies are different things to learn.
    assert len(load(load_context, file(*rows)).examples) == 100


def test_paper_style_has_no_place_for_a_signature():
    with pytest.raises(ValueError, match="has no place for a signature"):
        params(prompt_style="paper", prompt_with="summary+signature")


@pytest.mark.parametrize("keep", [True, False])
def test_sample(keep):
    rows = PyTorrentLoader(params(keep_docstring=keep, max_rows=1)).sample()
    assert len(rows.examples) == 9
    assert all(('"""' in example.completion.split("\n")[1]) == keep for example in rows.examples)
    assert all(ast.parse(example.completion) for example in rows.examples)


# -- real rows


@pytest.mark.shared
def test_real_functions_lose_exactly_their_docstring(shared_data):
    path = shared_data / "pytorrent/pypi_functions_in_pytorrent_schema.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert len(rows) == 985
    # `code` was made independently, with the lines that the syntax tree gives.
    assert [read_function(row["original_string"]).code for row in rows] == [row["code"] for row in rows]


@pytest.mark.shared
def test_real_rows(shared_data, load_context):
    path = shared_data / "pytorrent/pypi_functions_in_pytorrent_schema.jsonl"
    rows = load(load_context, path, prompt_with="docstring+signature")
    assert (rows.counts["read"], rows.counts["kept"]) == (985, 985)
    by_column = [load(load_context, path, split=name, split_by="partition") for name in ("train", "validation", "test")]
    assert [len(part.examples) for part in by_column] == [886, 50, 49]
    parts = [load(load_context, path, split=name).examples for name in ("train", "validation", "test")]
    assert sum(map(len, parts)) == 985
    assert sum(len({example.extra["repo"] for example in part}) for part in parts) == 6


@pytest.mark.shared
def test_real_cosqa(shared_data, load_context):
    rows = load(load_context, shared_data / "pytorrent/cosqa-dev.jsonl")
    assert rows.counts["read"] == 604
    assert rows.counts["kept"] + rows.counts["no-match"] + rows.counts.get("duplicate", 0) == 604
    assert rows.counts["kept"] > 300
