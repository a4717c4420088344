from __future__ import annotations

import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from other_tokenizers import byte_level, fusing, normalising

from kdkit.api import DataError, Example, Message, ModelError
from kdkit.models import cuts
from kdkit.models.catalogue import models_dir
from kdkit.models.chat import ChatEncoder
from kdkit.models.cuts import NO_CUT, OUTSIDE, CutEncoder, CutRow
from kdkit.testing.tiny import CHAT_TEMPLATE, tiny_piece_tokenizer, tiny_tokenizer
from kdkit.train import alignment
from kdkit.train.alignment import NO_GROUP, AlignedRow, align, encode_aligned, group_count

# Before any fixture moves the caches away.
REAL_MODELS = models_dir()
UNTRIMMED = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\\n' }}"
    "{{ m['content'] + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\\n' }}{% endif %}"
)
THINKS = CHAT_TEMPLATE.replace("{{ message['content'] + '<|im_end|>' }}{% endg", "{{ '<think>\\n\\n</think>\\n\\n' + "
                               "message['content'] + '<|im_end|>' }}{% endg")  # fmt: skip
SPACE_FIRST = CHAT_TEMPLATE.replace("{% generation %}{{ message", "{% generation %}{{ ' ' + message")
PROMPT = (Message("user", "What is it?"),)
LOSSLESS = {
    "bytes": tiny_tokenizer(),
    "pairs": byte_level(),
    "trimmed-offsets": byte_level(trim_offsets=True),
    "pieces": tiny_piece_tokenizer(chat_template=UNTRIMMED),
}
ENCODERS = {name: CutEncoder(tokenizer) for name, tokenizer in LOSSLESS.items()}
OTHERS = {
    "normalising": CutEncoder(normalising()),
    "trims": CutEncoder(tiny_piece_tokenizer()),
    "thinks": CutEncoder(tiny_tokenizer(chat_template=THINKS)),
    "space": CutEncoder(tiny_tokenizer(chat_template=SPACE_FIRST)),
}
TEXTS = [
    "It is the 10.", "x", " ", "", "  leading", "trailing  ", "\n", "\n\n  the end\n", "é e\u0301 ﬁ ä\u0304", "😀",
    "a😀a", " 😀😀 the", "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1ea\U0001f1f8", "foo  foo - - in",
    "def f(x):\n    return x == {}\n", "\u65e5\u672c\u8a9e \u30c6", "\t\u00a0\u2028x",
    "\u0646\u0635 \u200f\u0639", "ÿĀ\x00\x7f", "</s><|im_end|><end_of_turn> the",
    "\ue000answer\ue000", "<0x41>", "▁the Ġ",
]  # fmt: skip


def example(text: str, prompt=PROMPT, **values) -> Example:
    return Example(id="1", prompt=prompt, completion=text, **values)


def learned(row) -> list[int]:
    return [i for i, flag in zip(row.ids, row.learned, strict=True) if flag]


def texts(encoder: CutEncoder, ids: list[int], groups, count: int) -> list[str]:
    """The text of every group, each decoded alone but after a newline, so that no dummy prefix is dropped from it."""
    newline, found = encoder._ids("\n"), []
    for group in range(count):
        members = [i for i, g in zip(ids, groups, strict=True) if g == group]
        decoded = encoder.tokenizer.decode([*newline, *members], clean_up_tokenization_spaces=False)
        found.append(decoded[len(encoder.tokenizer.decode(newline)) :])
    return [text.removesuffix(encoder.tokenizer.eos_token) for text in found]


def check_partition(a: CutEncoder, b: CutEncoder, text: str, prompt) -> AlignedRow:
    row = align(*(e.cut_row(example(text, prompt)) for e in (a, b)))
    mine, its = learned(row), learned(row.teacher)
    for groups in (row.student_groups, row.teacher_groups):
        assert list(groups) == sorted(groups)
        assert set(groups) == set(range(row.groups)), "every token is in a group, and every group has tokens"
    ours, theirs = texts(a, mine, row.student_groups, row.groups), texts(b, its, row.teacher_groups, row.groups)
    if text.startswith("\n"):
        # The tokenizer of pieces begins such a text with its dummy prefix, which belongs to the first group.
        ours[0], theirs[0] = ours[0].removeprefix(" "), theirs[0].removeprefix(" ")
    assert ours == theirs
    assert "".join(ours) == text
    # Each side's end token alone is the last group: nothing of the text is in it.
    assert [i for i, g in zip(mine, row.student_groups, strict=True) if g == row.groups - 1] == [mine[-1]]
    assert [i for i, g in zip(its, row.teacher_groups, strict=True) if g == row.groups - 1] == [its[-1]]
    return row


def plain(text: str) -> bool:
    """Without what a tokenizer would read as its own marks."""
    return not any(mark in text for mark in ("<|", "<end", "<start", "<bos", "▁", "<0x"))


@pytest.mark.parametrize("prompt", [PROMPT, "### Answer:\n"], ids=["chat", "raw"])
@pytest.mark.parametrize("text", [text for text in TEXTS if plain(text)])
@pytest.mark.parametrize("student", list(ENCODERS))
@pytest.mark.parametrize("teacher", list(ENCODERS))
def test_groups_cover_the_same_text(student, teacher, text, prompt):
    if not text and prompt == PROMPT and "pieces" not in {student, teacher}:
        pytest.skip("an empty turn of this template is closed twice")
    check_partition(ENCODERS[student], ENCODERS[teacher], text, prompt)


ALPHABETS = st.one_of(
    st.text(max_size=24),
    st.text(alphabet=" \n\tthefoin=()-é\u0301\u0308ä😀日👩\u200d", max_size=24),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=ALPHABETS.filter(plain), pair=st.sampled_from([(a, b) for a in ENCODERS for b in ENCODERS]))
def test_groups_partition_any_text(text, pair):
    check_partition(ENCODERS[pair[0]], ENCODERS[pair[1]], text, "Q: ")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(max_size=30), pair=st.sampled_from([(a, b) for a in ENCODERS for b in ENCODERS]))
def test_groups_are_the_smallest(text, pair):
    """No common cut lies inside a group."""
    sides = [ENCODERS[name].cut_row(example(text, "Q: ")) for name in pair]
    row = align(*sides)
    common = {c for c in sides[0].cuts if c >= 0} & {c for c in sides[1].cuts if c >= 0}
    assert row.groups == len(common)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", [*ENCODERS, "normalising", "trims", "thinks", "space"])
@pytest.mark.parametrize("prompt", [PROMPT, "raw"])
def test_the_row_is_the_one_that_training_sees(name, text, prompt):
    encoder = ENCODERS.get(name) or OTHERS[name]
    found = encoder.cut_row(example(text, prompt))
    if found is None:
        assert prompt == PROMPT
        assert not text.strip() or not plain(text), "what is left of white space may be closed twice"
        return
    assert found.row == ChatEncoder(encoder.tokenizer).training(example(text, prompt))
    assert len(found.cuts) == found.row.targets
    made = [cut for cut in found.cuts if cut >= 0]
    assert made == sorted(set(made))
    assert made[-1] == len(text) + 1


COMPOSING = {trims: CutEncoder(byte_level(trim_offsets=trims, composes=True)) for trims in (False, True)}
DECOMPOSED = ["ae\u0301b", "e\u0301", "\u0301a", "a\u0300\u0323b", "q\u0307\u0323 the", "x\u1112\u1161\u11ab y",
              "\ud558\u11ab", "a\u0323\u0300  the e\u0301e\u0301  ", " e\u0301  foo foo e\u0301", "\u0958a",
              "\u09c7\u09be \u0b47\u0b3e", "e \u0301"]  # fmt: skip


def check_prefixes(a: CutEncoder, b: CutEncoder, text: str) -> AlignedRow:
    """After every group both sides have read the same text, but for Unicode's normal form."""
    row = align(*(e.cut_row(example(text, "Q: ")) for e in (a, b)))
    for count in range(1, row.groups + 1):
        read = []
        for encoder, side, groups in ((a, row, row.student_groups), (b, row.teacher, row.teacher_groups)):
            ids = [i for i, group in zip(learned(side), groups, strict=True) if group < count]
            decoded = encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            read.append(unicodedata.normalize("NFC", decoded))
        assert "\ufffd" not in read[0]
        assert read[0] == read[1]
    assert row.groups >= 2
    return row


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("text", DECOMPOSED)
def test_a_character_that_one_side_composes_stays_whole(text, trims):
    check_prefixes(ENCODERS["bytes"], COMPOSING[trims], text)
    check_prefixes(COMPOSING[trims], ENCODERS["pairs"], text)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    text=st.text(alphabet="ae \u0301\u0323\u0300foth\u1112\u1161\u11ab\u09c7\u09be-é", min_size=1, max_size=16),
    trims=st.booleans(),
)
def test_any_characters_that_one_side_composes_stay_whole(text, trims):
    check_prefixes(ENCODERS["bytes"], COMPOSING[trims], text)


def test_letters_and_their_marks_are_groups_of_their_own():
    row = check_prefixes(ENCODERS["bytes"], COMPOSING[False], "ae\u0301b")
    assert row.student_groups == (0, 1, 1, 1, 2, 3)
    assert row.teacher_groups == (0, 1, 2, 3)


def test_what_no_token_covers_stays_on_its_side_of_the_answers_ends():
    answer = cuts._Answer("<_ab_>", 2, 4, 0, 2)
    spans = list(cuts._whole([(0, 1), (3, 4), (5, 6)], ["<", "b", ">"], answer))
    assert spans == [(0, 2), (3, 4), (5, 6)]
    assert cuts._cuts(spans, answer) == [OUTSIDE, 2, 3]


def test_the_pieces_of_one_character_stay_together():
    made = ENCODERS["bytes"].cut_row(example("a😀b", "Q: ")).cuts
    assert made == (1, NO_CUT, NO_CUT, NO_CUT, 2, 3, 4)


def test_a_space_at_the_end_of_a_token_counts_even_where_offsets_leave_it_out():
    for name in ("pairs", "trimmed-offsets"):
        encoder = ENCODERS[name]
        row = encoder.cut_row(example("foo foo ", "Q: "))
        assert encoder.tokenizer.convert_ids_to_tokens(learned(row.row))[:2] == ["fooĠ", "fooĠ"]
        assert row.cuts == (4, 8, 9)


def test_a_token_that_covers_nothing_belongs_to_the_one_before():
    answer = cuts._Answer("ab", 0, 2, 0, 2)
    assert cuts._cuts([(0, 1), (1, 1), (1, 2), (2, 3)], answer) == [NO_CUT, 1, 2, 3]


def test_letters_of_one_ligature_stay_together():
    encoder = CutEncoder(normalising())
    row = encoder.cut_row(example("ﬁn", "Q: "))
    assert encoder.tokenizer.convert_ids_to_tokens(learned(row.row))[:2] == ["f", "in"]
    assert row.cuts == (NO_CUT, 2, 3)


@pytest.mark.parametrize("text", ["日本 ok", "日", "ok 日", "\n日a"])
def test_an_unknown_token_swallows_no_text(text):
    """Where a newline and the text's first characters are unknown, both are one token."""
    encoder = CutEncoder(fusing())
    assert encoder._adds_prefix
    found = encoder.cut_row(example(text, "Q: "))
    assert found.row == ChatEncoder(fusing()).training(example(text, "Q: "))
    pieces = encoder.tokenizer.convert_ids_to_tokens(learned(found.row))
    unknown = any(ord(c) > 127 or c == "\n" for c in text)
    assert pieces.count("<unk>") == unknown
    assert "".join(pieces).count("o") == text.count("o")
    assert [cut for cut in found.cuts if cut >= 0][-2:] == [len(text), len(text) + 1]


def test_a_template_that_trims_joins_the_white_space_to_what_follows():
    student, teacher = ENCODERS["bytes"], CutEncoder(tiny_piece_tokenizer())
    row = align(*(e.cut_row(example(" it\n")) for e in (student, teacher)))
    assert texts(student, learned(row), row.student_groups, row.groups) == [" it", "\n"]
    assert texts(teacher, learned(row.teacher), row.teacher_groups, row.groups) == ["it", ""]


@pytest.mark.parametrize(("template", "extra"), [(THINKS, "<think>\n\n</think>\n\n"), (SPACE_FIRST, " ")])
def test_what_a_template_puts_before_an_answer_is_in_no_group(template, extra):
    teacher = CutEncoder(tiny_tokenizer(chat_template=template))
    found = teacher.cut_row(example("an <answer>"))
    assert found.cuts[: len(extra)] == (OUTSIDE,) * len(extra)
    row = align(ENCODERS["bytes"].cut_row(example("an <answer>")), found)
    assert row.teacher_groups[: len(extra)] == (NO_GROUP,) * len(extra)
    assert row.teacher_groups[len(extra) :] == row.student_groups == tuple(range(12))


def test_a_teacher_whose_template_rewrites_the_answer_gives_no_row():
    upper = CHAT_TEMPLATE.replace("{{ message['content'] + '<|im_end|>' }}{% endg",
                                  "{{ message['content'] | upper + '<|im_end|>' }}{% endg")  # fmt: skip
    assert CutEncoder(tiny_tokenizer(chat_template=upper)).cut_row(example("yes")) is None


def test_all_answers_of_a_conversation_are_aligned():
    turns = (Message("user", "a?"), Message("assistant", "It is"), Message("user", "c?"))
    student, teacher = ENCODERS["bytes"], CutEncoder(tiny_piece_tokenizer())
    row = align(*(e.cut_row(example("the end", turns, every_turn=True)) for e in (student, teacher)))
    assert texts(student, learned(row), row.student_groups, row.groups)[:3] == ["It", " is", ""]
    ours, theirs = ("".join(texts(e, learned(r), g, row.groups)) for e, r, g in
                    ((student, row, row.student_groups), (teacher, row.teacher, row.teacher_groups)))  # fmt: skip
    assert ours == theirs == "It isthe end"
    made = [cut for cut in student.cut_row(example("the end", turns, every_turn=True)).cuts if cut >= 0]
    assert made == list(range(1, 15))
    assert NO_GROUP not in row.student_groups


@pytest.mark.parametrize("side", [0, 1])
def test_truncation_keeps_the_groups_that_are_whole_on_both_sides(side):
    whole = [ENCODERS[n].cut_row(example("It is what the 10😀")) for n in ("bytes", "pieces")]
    full = align(*whole)
    for length in range(1, len(whole[side].row.ids) + 1):
        sides = list(whole)
        sides[side] = whole[side].cut(length)
        row = align(*sides)
        kept = (row.student_groups, row.teacher_groups)[side]
        before = (full.student_groups, full.teacher_groups)[side]
        for group in range(row.groups):
            assert kept.count(group) == before.count(group)
        grouped = [g for g in kept if g != NO_GROUP]
        assert grouped == list(before[: len(grouped)])
        other = (row.teacher_groups, row.student_groups)[side]
        assert set(other) - {NO_GROUP} == set(range(row.groups))
    assert row == full


def test_a_group_that_is_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(alignment, "LONGEST_GROUP", 3)
    sides = [ENCODERS[n].cut_row(example("It what 1", "Q: ")) for n in ("bytes", "pieces")]
    row = align(*sides)
    assert row.student_groups == (0, 0, *[NO_GROUP] * 5, 1, 2, 3)
    assert row.teacher_groups == (0, NO_GROUP, 1, 2, 3)
    assert group_count([row, row, row.teacher]) == 8


def test_rows_are_counted_and_named():
    student, teacher = ENCODERS["bytes"], CutEncoder(tiny_piece_tokenizer())
    logs: list[str] = []
    rows = [Example(id=str(i), prompt=PROMPT, completion=t) for i, t in enumerate(["It is", "", "x" * 90, "the end"])]
    options = {"max_length": 80, "log": logs.append, "name": "dataset d"}
    kept = encode_aligned(rows, student, teacher, overlong="drop", **options)
    assert [row.id for row in kept] == ["0", "3"]
    longer = "longer than max_length=80 in the student's tokens and max_length=80 in the teacher's tokens"
    dropped = f"1 without an answer, 1 {longer}"
    assert logs == [f"dataset d: 2 of 4 rows kept; dropped {dropped}"]
    cut = encode_aligned(rows, student, teacher, overlong="truncate", **options)
    assert [len(row.ids) <= 80 and len(row.teacher.ids) <= 80 for row in cut] == [True] * 3
    with pytest.raises(DataError, match="dataset d: no row is left of 1: 1 longer than max_length=5 in the student's"):
        encode_aligned(rows[:1], student, teacher, overlong="drop", **{**options, "max_length": 5})
    with pytest.raises(DataError, match="no common text within max_length=5"):
        encode_aligned(rows[:1], student, teacher, overlong="truncate", **{**options, "max_length": 5})


ROW = [Example(id="a", prompt=PROMPT, completion="It is the end")]


def encoded(rows=ROW, *, overlong="drop", max_length=80, positions=(None, None), sides=None):
    logs: list[str] = []
    student, teacher = sides or (ENCODERS["bytes"], CutEncoder(tiny_piece_tokenizer()))
    options = {"max_length": max_length, "overlong": overlong, "positions": positions}
    return encode_aligned(rows, student, teacher, log=logs.append, name="d", **options), logs


@pytest.mark.parametrize("side", [0, 1])
def test_each_side_is_bounded_by_its_own_positions(side):
    (whole,), logs = encoded()
    assert logs == []
    whose, lengths = ("student", "teacher")[side], (len(whole.ids), len(whole.teacher.ids))
    few = [None, None]
    few[side] = lengths[side]
    assert encoded(positions=tuple(few)) == ([whole], [])
    few[side] -= 3
    with pytest.raises(DataError, match=f"1 longer than the {whose}'s {few[side]} positions"):
        encoded(positions=tuple(few))
    (cut,), logs = encoded([*ROW], overlong="truncate", positions=tuple(few))
    assert (len(cut.ids), len(cut.teacher.ids))[side] == few[side]
    assert (len(cut.ids), len(cut.teacher.ids))[1 - side] == lengths[1 - side]
    assert logs[0] == f"d: cut short: 1 at the {whose}'s {few[side]} positions"
    both = (lengths[0] - 1, lengths[1] - 1)
    with pytest.raises(DataError, match=r"longer than the student's \d+ positions and the teacher's \d+ positions$"):
        encoded(positions=both)


def test_text_in_no_group_is_told(monkeypatch):
    monkeypatch.setattr(alignment, "LONGEST_GROUP", 3)
    (row,), logs = encoded([Example(id="1", prompt="Q: ", completion="It what 1")])
    assert row.student_groups.count(NO_GROUP) == 5
    assert logs == ["d: 5 of 10 answer tokens are in no group: no aligned loss sees them"]
    # What a template puts before an answer is none of its text.
    thinks = CutEncoder(tiny_tokenizer(chat_template=THINKS))
    assert encoded([Example(id="1", prompt=PROMPT, completion="It")], sides=(thinks, ENCODERS["bytes"]))[1] == []
    (_,), logs = encoded([Example(id="1", prompt="Q: ", completion="It is")], max_length=7, overlong="truncate")
    assert logs[0] == "d: cut short: 1 at max_length=7 in the student's tokens"


def test_a_row_with_nothing_but_the_end_of_its_answers_in_common_is_dropped(monkeypatch):
    monkeypatch.setattr(alignment, "LONGEST_GROUP", 4)
    turns = (Message("user", "a?"), Message("assistant", "What"), Message("user", "c?"))
    rows = [
        Example(id="words", prompt="Q: ", completion=" what"),
        Example(id="turns", prompt=turns, completion=" what", every_turn=True),
        Example(id="fine", prompt="Q: ", completion=" what it"),
    ]
    sides = ENCODERS["bytes"], CutEncoder(tiny_piece_tokenizer(chat_template=UNTRIMMED))
    assert align(*(side.cut_row(rows[0]) for side in sides)).groups == 1
    kept, logs = encoded(rows, sides=sides)
    assert "words" not in [row.id for row in kept]
    assert "fine" in [row.id for row in kept]
    assert logs[0].endswith("with no common text in groups of at most 4 tokens")
    assert align(*(side.cut_row(Example(id="1", prompt="Q: ", completion="x")) for side in sides)).groups == 2
    assert len(encoded([Example(id="1", prompt="Q: ", completion="x")], sides=sides)[0]) == 1


def test_what_cannot_be_aligned_is_refused():
    class Slow:
        is_fast = False
        eos_token_id = 1

        def __call__(self, text, **_):
            return {"input_ids": list(text.encode())}

    with pytest.raises(ModelError, match="allowed: a fast tokenizer"):
        CutEncoder(Slow())
    forgets = (
        "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}{{ 'A:' }}"
        "{% else %}{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    turns = (Message("user", "a?"), Message("assistant", "It is"), Message("user", "c?"))
    with pytest.raises(ModelError, match="does not say where an answer starts"):
        CutEncoder(tiny_tokenizer(chat_template=forgets)).cut_row(example("x", turns, every_turn=True))
    with pytest.raises(DataError, match="example 1: the example has no completion"):
        ENCODERS["bytes"].cut_row(Example(id="1", prompt=PROMPT))


def test_a_cut_row_is_cut_with_its_cuts():
    row = ENCODERS["bytes"].cut_row(example("abc", "Q"))
    assert row.cut(3) == CutRow(row.row.cut(3), (1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("text", [text for text in TEXTS if plain(text)])
@pytest.mark.parametrize("other", list(ENCODERS))
def test_a_real_tokenizer_is_aligned_with_others(other, text):
    from transformers import AutoTokenizer

    path = REAL_MODELS / "smollm2-135m-instruct"
    if not path.is_dir():
        pytest.skip("run: kdkit models pull smollm2-135m-instruct")
    encoder = CutEncoder(AutoTokenizer.from_pretrained(path))
    check_partition(encoder, ENCODERS[other], text, "### Answer:\n")
    check_partition(ENCODERS[other], encoder, text, "### Answer:\n")
