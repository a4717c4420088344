from __future__ import annotations

import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl

import pytest
from rich.console import Console

from kdkit.cli.answers import Row, facts, plain, rich_rows
from kdkit.cli.live import LiveView
from kdkit.cli.output import emit_json, visible
from kdkit.cli.progress import PlainView, make_view
from kdkit.train.answers import Answer

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m[red]x[/red] :smile: \rover\x08\x7f\u202egnp.exe\U000e0041"


def said(text, *, tokens=12, truncated=False):
    return Answer(text, tokens, 7, 0.5, truncated=truncated)


def drawn(row, width, *, colour=False):
    stream = io.StringIO()
    system = "standard" if colour else None
    console = Console(file=stream, width=width, force_terminal=True, color_system=system, markup=False)
    rich_rows([row], console)
    return stream.getvalue()


def test_columns_when_they_are_wide_enough():
    row = Row("prompt", "Why?", {"base": said("word " * 20), "kd": said("Because.", truncated=True)})
    lines = ESCAPE.sub("", drawn(row, 80)).splitlines()
    assert max(map(len, lines)) <= 80
    head = next(i for i, line in enumerate(lines) if "base" in line)
    assert re.fullmatch(r"base {35}│ kd *", lines[head])
    assert re.fullmatch(r"(word ){7} *│ Because\. *", lines[head + 2])
    assert "truncated" in lines[-2]
    stacked = ESCAPE.sub("", drawn(row, 78)).splitlines()
    assert "-- base (12 tokens in 0.50 s, 24 tokens/s)" in stacked
    assert ("word " * 20).strip() in [line.strip() for line in stacked]


@pytest.mark.parametrize(("models", "width", "columns"), [(1, 200, False), (3, 120, True), (3, 119, False)])
def test_the_width_decides_for_any_number_of_models(models, width, columns):
    row = Row("prompt", "Why?", {f"m{i}": said("Because.") for i in range(models)})
    assert ("│" in drawn(row, width)) == columns


@pytest.mark.parametrize(
    ("answer", "columns"),
    [
        ("prose " * 30, True),
        ("```python\nprint('a')\n```", True),
        (f"```python\n{'x' * 39}\n```", False),
        (f"Do this:\n\n    {'x' * 35}", False),
        (f"\tif {'x' * 34}:", False),
        (f"```\nok\n```\n{'x' * 50}", True),
    ],
)
def test_code_is_never_torn_into_columns(answer, columns):
    row = Row("prompt", "Why?", {"a": said("Short."), "b": said(answer)})
    assert ("│" in drawn(row, 80)) == columns


def test_wide_characters_keep_the_columns_straight():
    row = Row("prompt", "?", {"a": said("知识蒸馏" * 12), "b": said("ñ" * 50)})
    lines = [line for line in drawn(row, 80).splitlines() if "│" in line]
    assert {line.index("│") + sum(ord(c) > 0x2E80 for c in line.split("│")[0]) for line in lines[1:-1]} == {39}
    assert "".join(line.split("│")[0].strip() for line in lines[1:-1]) == "知识蒸馏" * 12


def test_plain_text_is_never_wrapped_and_says_what_it_is():
    row = Row("prompt 1 of 1 (f:1)", "Why?", {"a": said("word " * 200), "b": said("  ", tokens=0), "c": None})
    assert list(plain([row])) == [
        "== prompt 1 of 1 (f:1)",
        "Why?",
        "",
        "-- a (12 tokens in 0.50 s, 24 tokens/s)",
        "word " * 200,
        "",
        "-- b (0 tokens in 0.50 s, 0 tokens/s)",
        "(empty answer)",
        "",
        "-- c (stopped before this answer)",
        "",
    ]


def test_facts_mark_a_truncated_answer():
    assert facts(said("x", tokens=1)) == "1 token in 0.50 s, 2 tokens/s"
    assert facts(said("x", tokens=1, truncated=True)).endswith(", truncated")
    assert "\x1b[" in drawn(Row("p", "?", {"a": said("x", truncated=True)}), 80, colour=True)


def test_a_long_prompt_is_cut_on_a_terminal_only():
    row = Row("prompt", "p" * 3000, {"a": said("x")})
    assert "ppp... (2,000 more characters)" in drawn(row, 80).replace("\n", "")
    assert "p" * 3000 in "\n".join(plain([row]))


def obeyed(text: str) -> set[str]:
    """Characters that a terminal would not simply show."""
    return {c for c in text if (not c.isprintable() and c not in "\n ") or c in "\u202e\x9b\x7f"}


def test_nothing_that_a_model_says_reaches_the_terminal_as_a_command():
    for answers in ({"\x1b[1mlabel": said(HOSTILE)}, {"a": said(HOSTILE), "b\x07": said(HOSTILE)}):
        row = Row("prompt\x1b[0m", HOSTILE, answers)
        for text in ("\n".join(plain([row])), ESCAPE.sub("", drawn(row, 120)).replace("\n", "")):
            assert not obeyed(text)
            assert r"\x1b[2J\x1b]0;owned\x07\x9b31m[red]x[/red] :smile: \rover\x08\x7f\u202egnp" in text
        # The only codes are those of kdkit's own styles.
        assert set(ESCAPE.findall(drawn(row, 120, colour=True))) <= {
            f"\x1b[{code}m" for code in ("0", "1", "2", "36", "1;33")
        }


def test_visible_leaves_text_alone():
    text = "¿Año? 知识\u200d👩\u200d💻\n\tيمين"
    assert visible(text) == text
    assert visible("a\r\nb\rc") == "a\nb\\rc"


def test_json_keeps_the_text_and_shows_no_control_code(capsys):
    emit_json({"text": HOSTILE})
    out = capsys.readouterr().out
    assert not obeyed(out)
    assert json.loads(out) == {"text": HOSTILE}


def on_a_terminal(arguments, columns, **environ):
    """What ``python -m kdkit ARGUMENTS`` writes to a terminal."""
    main, side = pty.openpty()
    ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES", "NO_COLOR"}}
    with subprocess.Popen(
        [sys.executable, "-m", "kdkit", *map(str, arguments)],
        stdout=side,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        env={**env, **environ},
    ) as process:
        os.close(side)
        text = b""
        while True:
            try:
                text += os.read(main, 65536)
            except OSError:  # Linux says so when the other side is closed
                break
    os.close(main)
    assert process.returncode == 0
    return text.decode()


@pytest.mark.parametrize("environ", [{"TERM": "xterm"}, {"TERM": "dumb"}])
def test_a_real_terminal(tiny, environ):
    """A random model emits control characters by itself."""
    models = ("--model", f"a={tiny[0]}", "--model", f"b={tiny[1]}")
    text = on_a_terminal(
        ("generate", *models, "--prompt", "x", "--max-new-tokens", "200", "--precision", "fp32"), 80, **environ
    )
    codes = set(ESCAPE.findall(text))
    assert codes == set() if environ["TERM"] == "dumb" else "\x1b[1m" in codes
    shown = ESCAPE.sub("", text).replace("\r\n", "\n")
    assert not obeyed(shown)
    assert re.search(r"^a {36,38} │ b *$", shown, re.MULTILINE)
    assert re.search(r"\\x[01][0-9a-f]", shown)


def test_a_terminal_without_a_cursor_gets_plain_progress(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_view(["kd"], Terminal()), PlainView)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_view(["kd"], Terminal()), LiveView)
    assert isinstance(make_view(["kd"], io.StringIO()), PlainView)
