"""think, steps, repetition, language: hand-computed values, and every way to earn them without the form."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from reward_helpers import Workshop, rollout

from kdkit.plugins.rewards.programs import blocks, last_program, without_blocks
from kdkit.plugins.rewards.tags import answer_part, thinking
from kdkit.plugins.rewards.words import words

STEPS = "Step 1: read the numbers.\n**Step 2:** add them up.\n**Step 3**: print the sum."


@pytest.fixture
def shop():
    return Workshop()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a thought</think>the answer", 1.0),
        (" \n<think>\n1\n</think>\n\n42", 1.0),
        ("<think>思考</think>答え", 1.0),
        # One flaw.
        ("Sure! <think>a thought</think>the answer", 0.5),
        ("<think>a thought</think>", 0.5),
        ("<think>a thought</think>\n...\n", 0.5),
        # Two flaws.
        ("Sure! <think>a thought</think>", 0.0),
        # No form.
        ("", 0.0),
        ("the answer", 0.0),
        ("<think>", 0.0),
        ("<think>a thought", 0.0),
        ("a thought</think>the answer", 0.0),
        ("</think>a thought<think>the answer", 0.0),
        ("<think></think>the answer", 0.0),
        ("<think> \n\t</think>the answer", 0.0),
        ("<think>...!?\u200b\u2060</think>the answer", 0.0),
        # Spam and nesting.
        ("<think>a</think>b<think>c</think>d", 0.0),
        ("<think><think>a</think></think>b", 0.0),
        ("<think>a</think>b</think>", 0.0),
        ("<think>a<think>b</think>c", 0.0),
        ("<think>a</think>" * 100, 0.0),
        # Other spellings are tags, too.
        ("<THINK>a</THINK>b", 0.0),
        ("<think >a</think>b", 0.0),
        ("<think>a</think>b<Think>", 0.0),
        ("<think>a</think>b< / think >", 0.0),
        ("<think>a<think/></think>b", 0.0),
        # These are none.
        ("<think>a <thinking> b</think>c", 1.0),
        ("<think>a < b and think></think>c", 1.0),
    ],
)
def test_think(shop, text, value):
    assert shop.value("think", text) == value


def test_think_does_not_pay_for_a_line_that_ends_well(shop):
    """An expression with MULTILINE would accept the first line and whatever follows."""
    assert shop.value("think", "<think>a</think>b\n<think>c</think>d\n") == 0.0
    assert shop.value("think", "x\n<think>a</think>b", partial=0.25) == 0.25
    assert shop.value("think", "x\n<think>a</think>b", partial=0) == 0.0


def test_think_with_answer_tags(shop):
    def value(text):
        return shop.value("think", text, answer_tags=True)

    assert value("<think>a</think> <answer>b</answer>\n") == 1.0
    for text in (
        "<think>a</think>b",
        "<think>a</think><answer></answer>",
        "<think>a</think><answer>b</answer>c",
        "<think>a</think><answer>b</answer><answer>b</answer>",
        "<think>a</think><answer>b<answer>",
        "<think>a<answer></think><answer>b</answer>",
        "<think>a</think><ANSWER>b</ANSWER>",
    ):
        assert value(text) == 0.5, text
    assert value("<answer>b</answer><think>a</think>") == 0.0


def test_a_thought_that_the_prompt_opens(shop):
    think, steps = shop.build("think"), shop.build("steps")
    prompt = "<|im_start|>assistant\n<think>\n"
    texts = [f"{STEPS}</think>answer", f"<think>{STEPS}</think>answer", STEPS]
    rollouts = [rollout(text, prompt=prompt) for text in texts]
    assert [score.value for score in think(rollouts)] == [1.0, 0.0, 0.0]
    assert [score.value for score in steps(rollouts)] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("thought", "value"),
    [
        (STEPS, 1.0),
        (STEPS + "\nStep 4: check the result again.", 1.0),
        ("Step 1: read the numbers.\nStep 2: add them up.", 2 / 3),
        ("Some words first.\n### Step 1\nRead the numbers\n", 1 / 3),
        ("Step 1: 读取两个数字", 1 / 3),
        # Nothing of the form.
        ("", 0.0),
        ("1. read\n2. add\n3. print", 0.0),
        ("We take Step 1: read the numbers", 0.0),
        ("Stepping 1: read the numbers", 0.0),
        ("Step 1a: read the numbers", 0.0),
        # Spam.
        ("Step 1\nStep 2\nStep 3", 0.0),
        ("Step 1:\nStep 2:\nStep 3: print the sum of them", 0.0),
        ("Step 1: ...\nStep 2: ...\nStep 3: ...", 0.0),
        ("Step 1: do it now\nStep 2: do it now\nStep 3: do it now", 0.0),
        ("Step 1: check case 1 now\nStep 2: check case 2 now", 0.0),
        ("Step 1: do it now\nStep 2: now it, do it!", 0.0),
        ("Step 1: go go go go", 0.0),
        ("Step 1: read them\nStep 1: add them\nStep 1: print them", 0.0),
        ("Step 3: print them\nStep 2: add them\nStep 1: read them", 0.0),
        ("Step 2: read them all\nStep 3: add them up", 0.0),
        ("\n".join(f"Step {k}: word{chr(97 + k)} another" for k in range(1, 22)), 0.0),
    ],
)
def test_steps(shop, thought, value):
    assert shop.value("steps", f"<think>{thought}</think>answer") == pytest.approx(value)


def test_steps_earn_nothing_outside_one_well_formed_thought(shop):
    for text in (
        STEPS,
        f"<think>a</think>{STEPS}",
        f"{STEPS}<think>a</think>b",
        f"<think>{STEPS}",
        f"<think>{STEPS}</think><think>{STEPS}</think>",
    ):
        assert shop.value("steps", text) == 0.0, text


def test_steps_parameters(shop):
    text = f"<think>{STEPS}</think>answer"
    assert shop.value("steps", text, steps=6) == 0.5
    assert shop.value("steps", text, min_words=4) == 0.0
    with pytest.raises(ValidationError, match="is at least steps"):
        shop.build("steps", steps=4, max_steps=3)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a b c d e", 0.0),
        # abc bca cab abc bca cab: 3 of 6 distinct... of 8 words there are 6 trigrams.
        ("a b c a b c a b", -0.5),
        ("A, b; c! a b c", -0.25),
        ("the same", 0.0),
        ("", -1.0),
        ("?!", -1.0),
        ("no " * 1000, -997 / 998),
        ("字" * 10, -7 / 8),
    ],
)
def test_repetition(shop, text, value):
    assert shop.value("repetition", text) == pytest.approx(value)


def test_repetition_without_spaces_is_repetition(shop):
    for piece in ("a", "ab", "abcdefg"):
        assert shop.value("repetition", piece * 3000) < -0.9
    assert shop.value("repetition", "a b a b", n=1) == -0.5


ENGLISH = "First we read the numbers, and then we print the sum of them with one line for each."
SPANISH = "Primero se leen los números y después se muestra la suma, pero con una línea para las dos cuando hay más."


def test_language_by_script(shop):
    assert shop.value("language", "Сначала прочитаем числа и сложим их", language="ru") == 1.0
    assert shop.value("language", ENGLISH, language="ru") == 0.0
    half = "abcdefghijklmnopqrst" + "абвгдежзийклмнопрсту"
    assert shop.value("language", half, language="ru") == 0.5
    assert shop.value("language", "まず数を読み、それから合計を出力します。結果を確認します。", language="ja") == 1.0
    assert shop.value("language", "ＡＢＣＤＥＦＧＨＩＪＫＬＭＮＯＰＱＲＳＴ", language="ru") == 0.0


def test_language_by_common_words(shop):
    assert shop.value("language", ENGLISH, language="en") == 1.0
    assert shop.value("language", ENGLISH, language="es") < 0.2
    assert shop.value("language", SPANISH, language="es") > 0.8
    assert shop.value("language", SPANISH, language="en") < 0.2


def test_language_needs_prose(shop):
    assert shop.value("language", "", language="en") == 0.0
    assert shop.value("language", "12 34 !?", language="en") == 0.0
    assert shop.value("language", "abcdefghij", language="en") == 0.5
    code = "```python\nprint('абв')\n```"
    assert shop.value("language", f"{ENGLISH}\n{code}", language="en") == 1.0
    assert shop.value("language", code, language="ru") == 0.0
    assert shop.value("language", "<think></think>" * 50, language="en") == 0.0


def test_words():
    assert words("Don't stop_me, ÉTÉ 12") == ["don", "t", "stop", "me", "été", "12"]
    assert words("x" * 24) == ["x" * 24]
    assert words("x" * 25) == ["x" * 8] * 3 + ["x"]


def test_answer_part():
    assert answer_part("plain", opened=False) == "plain"
    assert answer_part("plain", opened=True) == ""
    assert answer_part("<think>a</think>b", opened=False) == "b"
    assert answer_part("a</think>b", opened=True) == "b"
    assert answer_part("<think>a</think>b<think>c", opened=False) == ""
    assert answer_part("<think>a</think>b</THINK>c", opened=False) == "c"
    assert thinking("x<think>a</think>b", opened=False).before == "x"


def test_blocks():
    text = "a\n```python x=1\none\n```\nb\n````\n```\ntwo\n````\n   ```C++\r\nthree\r\n```\n    ```py\nfour\n```\nopen"
    assert [(block.tag, block.code) for block in blocks(text)] == [
        ("python", "one\n"),
        ("", "```\ntwo\n"),
        ("c++", "three\n"),
    ]
    assert without_blocks("a\n```\nb\n```\nc\n```\nd") == "a\nc\n```\nd"


def test_last_program():
    text = "```python\nfirst\n```\n```py\nsecond\n```\n```text\nno\n```\n```\nbare\n```\n```cpp\nthird\n```"
    assert last_program(text, "python") == "second\n"
    assert last_program(text, "cpp") == "third\n"
    assert last_program("```\nbare\n```\n```json\n{}\n```", "python") == "bare\n"
    assert last_program("```json\n{}\n```", "python") is None
    assert last_program("```python\n  \n```", "python") is None
    assert last_program("```python\nnever closed", "python") is None


@pytest.mark.parametrize(
    "piece",
    [
        "<",
        "< ",
        "<think>",
        "<think",
        "</think>",
        "`",
        "```",
        "```python\n",
        "Step 1:",
        "Step 1\n",
        "*",
        "# ",
        " ",
        "a ",
        "\n",
    ],
)
def test_parsers_are_linear(shop, piece):
    """A quadratic scan of this megabyte would take hours; no time is asserted but that of the whole suite."""
    text = piece * (1_000_000 // len(piece))
    rewards = [shop.build(name) for name in ("think", "steps", "repetition")]
    rewards.append(shop.build("language", language="en"))
    for reward in rewards:
        (score,) = reward([rollout("<think>" + text)])
        assert score.status == "ok"
    last_program(text, "python")
