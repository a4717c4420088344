from __future__ import annotations

import ast
import threading
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from metric_helpers import score

from kdkit.plugins.metrics import python_tree
from kdkit.plugins.metrics.answers import code_of, reference_code

# --- the code in an answer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("x = 1", "x = 1"),
        ("\n  x = 1\n  y = 2\n", "x = 1\ny = 2"),
        (" x = 1\ny = 2", "x = 1\ny = 2"),
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("~~~\nx\n~~~", "~~~\nx\n~~~"),
        # An answer corrects its drafts; what is printed is no code.
        ("```python\ndraft\n```\nBetter:\n```python\nx = 1\n```", "x = 1"),
        ("```python\nx = 1\n```\nIt prints:\n```\n42\n```", "x = 1"),
        ("```py\nx = 1\n```\n```bash\nls\n```", "x = 1"),
        ("```\nx = 1\n```\n```bash\nls\n```", "x = 1"),
        ("```cpp\nint x;\n```", "int x;"),
        # As models write fences: upper case, on a line of text, indented, in CRLF, more words, never closed, too long.
        ("```Python\nx = 1\n```\n```\n42\n```", "x = 1"),
        ("Solution: ```python\nx = 1\n```", "x = 1"),
        ("1. this\n   ```python\n   x = 1\n   ```\n", "x = 1"),
        ("```python\r\nx = 1\r\ny = 2\r\n```\r\n", "x = 1\ny = 2"),
        ("```python title=a.py\nx = 1\n```", "x = 1"),
        ("```python\nif x:\n    y", "if x:\n    y"),
        ("````\n```\nx\n```\n````", "```\nx\n```"),
        ("```python\nx = 1```", "x = 1"),
        ("```python\nx = 1\n```\n```python\n\n```", "x = 1"),
        ("```\n```", "```\n```"),
        # One line between marks is code; in a sentence, marks are marks, and the last ones open nothing.
        ("```x = 1```", "x = 1"),
        ("The fix is ```x = 1```\nand that is all", "The fix is ```x = 1```\nand that is all"),
        # Lists indent what belongs to them; other indented fences belong to code.
        ("10. this\n    ```python\n    x = 1\n    ```\n", "x = 1"),
        ("- a\n  - b\n\n    text\n      ```python\n      x = 1\n      ```\nend", "x = 1"),
        ("- a\n\nend\n    ```\n    x\n    ```", "- a\n\nend\n    ```\n    x\n    ```"),
        ("    ```python\n    x = 1\n    ```", "x = 1"),
        ("- ```python\n  x = 1\n  ```", "x = 1"),
        # Fences in the comments and in the docstring of code.
        ("/**\n * ```\n * f(1)\n * ```\n */\nint f;", "/**\n * ```\n * f(1)\n * ```\n */\nint f;"),
        ("marks like ``` are fences\nx", "marks like ``` are fences\nx"),
        (
            "```python\ndef f():\n    '''\n    ```\n    f()\n    ```\n    '''\n```\nend",
            "def f():\n    '''\n    ```\n    f()\n    ```\n    '''",
        ),
        ("```python\nx = '``'\n```", "x = '``'"),
    ],
)
def test_the_code_of_an_answer(answer, expected):
    assert code_of(answer) == expected


EXAMPLE = '''def f(x):
    """Add one.

    ```python
    f(1)
    ```
    """
    return x + 1'''


def test_a_program_is_its_own_code_whatever_its_docstring_shows():
    shell = EXAMPLE.replace("```python", "```sh").replace("f(1)", "$ pip install x y")
    flat = EXAMPLE.replace("    ```", "```").replace("    f(1)", "f(1)")
    for code in (EXAMPLE, shell, flat):
        assert code_of(code) == code
        assert code_of(f"Here:\n```python\n{code}\n```\nDone.") == code or code is flat
        assert score("code-exact", (code, code)).value == 100.0
        assert score("code-exact", (code.replace("x + 1", "x - 1"), code)).value == 0.0
        assert score("code-exact", (code.replace("x + 1", "x - 1"), code), language="any").value == 0.0
    assert parses(shell)
    assert not parses(EXAMPLE.replace("return x", "retrun x +*"))
    assert not parses(EXAMPLE.removesuffix("x + 1") + "(")


def test_a_reference_is_taken_whole_unless_it_is_a_chat_answer():
    # No Python, so that nothing but its place in the reference tells the block from code.
    java = "/** Adds one:\n```\nf(1)\n```\n*/\nint f(int x) { return x + 1; }"
    assert reference_code(java) == java
    assert score("code-exact", (f"````java\n{java}\n````", java), language="any").value == 100.0
    assert score("code-exact", ("```\nf(1)\n```", java), language="any").value == 0.0
    assert reference_code("```python\nx = 1\n```\nThat is it.") == "x = 1"
    assert score("code-exact", ("Fixed:\n```python\nx = 1\n```", "x = 1")).value == 100.0


def test_code_in_any_language_is_the_last_block_with_a_language():
    answer = "```python\nx\n```\n```cpp\nint y;\n```\nIt prints\n```\n1\n```"
    assert code_of(answer, None) == "int y;"
    assert code_of(answer) == "x"
    assert code_of("```\na\n```\n```\nb\n```", None) == "b"
    assert code_of("int y;", None) == "int y;"


@given(st.text(st.sampled_from("`x \n\r\tpy"), max_size=60))
def test_text_with_fences_of_any_kind_gives_part_of_it(answer):
    code = code_of(answer)
    assert set(code.replace(" ", "")) <= set(answer)
    assert len(code) <= len(answer)
    assert bool(code) == bool(answer.strip())


# --- parse-rate -------------------------------------------------------------------------------------------------------


def parses(text):
    return score("parse-rate", (text,)).value == 100.0


@pytest.mark.parametrize(
    "text",
    [
        "x = 1",
        "```python\ndef f(x):\n    return x\n```",
        "    x = 1\n    y = 2",
        "async def f():\n    await g()",
        "match x:\n    case 1: pass",
        "año = '你好'",
        "x = (\n1)  # comment",
        "from __future__ import annotations\nx: y = 1",
        "(" * 100 + "1" + ")" * 100,
        # What only a compiler notices.
        "return 1",
    ],
)
def test_what_parses(text):
    assert parses(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n\t",
        "# only a comment",
        "```python\n# TODO\n```",
        "def f(:",
        "print 'python 2'",
        "if x:\ny",
        "int main() { return 0; }",
        "The answer is 42.",
        "x = 'a\0b'",
        "x = '\ud800'",
        "x = " + "9" * 5000,
    ],
)
def test_what_does_not_parse(text):
    assert not parses(text)


def nested(n):
    yield from ("(" * n + ")" * n, "[" * n, "{1:" * n, "f(" * n, "-" * n + "1", "not " * n + "x", "lambda:" * n + "1")
    yield from (
        "x" + ".x" * n,
        "x" + "[0]" * n,
        "x" + "()" * n,
        "1+" * n + "1",
        "1**" * n + "1",
        "1 if 1 else " * n + "1",
    )
    yield from ("if x:\n pass\n" + "elif x:\n pass\n" * n, "f'{" * n, "\\\n" * n, "(" * 101 + "1" + ")" * 101)
    yield "".join(" " * depth + "if x:\n" for depth in range(300)) + " " * 300 + "x"


@pytest.mark.parametrize("text", [*nested(3000), *nested(60_000)], ids=lambda text: text[:8].strip())
def test_nesting_is_refused_and_does_no_harm(text):
    results = []
    # A thread has a smaller stack than the main one on most systems.
    thread = threading.Thread(target=lambda: results.append(score("parse-rate", (text,)).value))
    thread.start()
    thread.join()
    assert results == [0.0]
    assert score("code-exact", (text, text), (text, "x")).per_example == (100.0, 0.0)


def test_long_and_deep_text_never_reaches_the_parser(monkeypatch):
    monkeypatch.setattr(python_tree.ast, "parse", lambda code: pytest.fail(f"parsed {len(code)} characters"))
    assert not parses("x = 1\n" * 40_000)
    assert not parses("(" * 101 + "1" + ")" * 101)
    assert not parses(")" * 50 + "[" * 101)


def test_nothing_is_run(tmp_path):
    target = tmp_path / "written"
    assert parses(f"open({str(target)!r}, 'w').close()\nimport sys\nsys.exit(1)")
    assert not target.exists()


def test_warnings_about_an_answer_are_silent():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert parses("x = '\\d'\nassert (x, 'always')\nx is 1\n1()")
        assert score("code-exact", ("x = '\\d'", "x = '\\\\d'")).value == 100.0
    assert caught == []


def test_parse_rate_is_a_mean_over_answers():
    result = score("parse-rate", ("x = 1",), ("x =",), ("y", "reference is not looked at ("))
    assert (result.per_example, result.n, result.counts) == ((100.0, 0.0, 100.0), 3, {})
    assert result.value == pytest.approx(200 / 3)
    assert result.ids == ("id0", "id1", "id2")


# --- code-exact -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("x = 'a'", 'x="a"  # note'),
        ("def f(a,\n      b):\n  return (a)", "def f(a, b):\n\treturn a"),
        ("x = 1_000; y = 0x10", "x = 1000\n\ny = 16\n"),
        ("x = 'a' 'b'", "x = 'ab'"),
        ("x = u'a'", "x = 'a'"),
        ("x = 1", "```\nx = 1\n```"),
        # Neither parses: lines without white space at their ends and without blank ones.
        ("print 'a'  \n\nprint 'b'", "print 'a'\nprint 'b'\n"),
        ("The end", "  The end "),
        ("", ""),
        ("# a", "# a "),
    ],
)
def test_the_same_code(text, reference):
    assert score("code-exact", (text, reference), (reference, text)).per_example == (100.0, 100.0)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("x = 1", "x = 2"),
        ("x == a", "x != a"),
        ("x = 1", "y = 1"),
        ("x = 1", "x = 1.0"),
        ("x = 'a'", "x = b'a'"),
        ("X", "x"),
        ("if x:\n    y\n    z", "if x:\n    y\nz"),
        # The answer is the reference but for its indentation, and so does not parse.
        ("if x:\ny", "if x:\n    y"),
        ("print 'a'", "print 'A'"),
        ("# a", "# b"),
        ("", "x"),
        ("", "# a"),
        ("def f():\n    'doc'\n    return 1", "def f():\n    return 1"),
    ],
)
def test_other_code(text, reference):
    assert score("code-exact", (text, reference), (reference, text)).per_example == (0.0, 0.0)


def test_docstrings_are_left_out_on_request():
    pairs = [
        ("def f():\n    'doc'\n    return 1", "def f():\n    return 1"),
        ("'doc'\nclass A:\n    'doc'\n    async def f(): 'doc'", "class A:\n    async def f(): pass"),
        ("x = 'doc'", "x = 'other'"),
        ("def f():\n    return 1\n    'late'", "def f():\n    return 1"),
    ]
    assert score("code-exact", *pairs, docstrings=False).per_example == (100.0, 100.0, 0.0, 0.0)
    assert score("code-exact", *pairs).value == 0.0


def test_code_of_any_language_by_its_tokens():
    pairs = [
        ("int main(){return 0;}", "int main()\n{\n  return 0;\n}"),
        ("```cpp\nint x;\n```\nIt prints\n```\n1\n```", "int x;"),
        ("int x = 1;", "int x = 2;"),
        ("a == b", "a != b"),
        ("int x; // a", "int x;"),
    ]
    assert score("code-exact", *pairs, language="any").per_example == (100.0, 100.0, 0.0, 0.0, 0.0)
    assert score("code-exact", pairs[0]).value == 0.0


names = st.sampled_from(["a", "b", "cd"])
expressions = st.recursive(
    names | st.sampled_from(["1", "'s'", "2.5"]),
    lambda inner: (
        st.tuples(inner, st.sampled_from(["+", "==", "and", "[0] ,"]), inner).map(" ".join)
        | inner.map("({})".format)
        | inner.map("f( {} )".format)
    ),
    max_leaves=8,
)


@given(expressions)
def test_python_that_is_written_anew_is_the_same(expression):
    code = f"def g(a, b):\n    # {expression}\n    return {expression}\n"
    again = ast.unparse(ast.parse(code))
    assert score("code-exact", (again, code)).value == 100.0
    assert score("code-exact", (again.replace("return", "yield"), code)).value == 0.0
