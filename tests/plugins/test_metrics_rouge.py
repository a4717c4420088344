from __future__ import annotations

import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from metric_helpers import linked_mean, score
from rouge_score.rouge_scorer import RougeScorer, _lcs_table

from kdkit.plugins.metrics.lcs import lcs_length
from kdkit.plugins.metrics.words import code_tokens, unicode_words

# --- rouge-l ----------------------------------------------------------------------------------------------------------

words = st.lists(st.sampled_from(["the", "running", "runner", "cats", "cat", "año", "x==y", "42", "\n"]), max_size=15)
sentences = words.map(" ".join)


@given(
    st.lists(st.tuples(sentences, st.lists(sentences, min_size=1, max_size=3)), min_size=1, max_size=6), st.booleans()
)
def test_rouge_l_is_that_of_the_package(rows, stem):
    result = score("rouge-l", *((text, *references) for text, references in rows), use_stemmer=stem)
    scorer = RougeScorer(["rougeL"], use_stemmer=stem)
    expected = [100 * scorer.score_multi(references, text)["rougeL"].fmeasure for text, references in rows]
    assert result.per_example == pytest.approx(expected, rel=0, abs=1e-12)
    assert result.value == pytest.approx(sum(expected) / len(expected), rel=0, abs=1e-10)
    assert result.value == pytest.approx(linked_mean(result), abs=1e-10)


def test_rouge_l_by_hand():
    # The longest common subsequence of "the cat sat" and "the cat sat down here" is 3: P = 1, R = 3/5, F = 0.75.
    result = score("rouge-l", ("the cat sat", "the cat sat down here", "no"), ("", "x"), ("x", ""), ("", ""))
    assert result.per_example == pytest.approx((75.0, 0.0, 0.0, 0.0))
    assert (result.n, result.value) == (4, pytest.approx(18.75))
    assert result.ids == ("id0", "id1", "id2", "id3")
    assert (result.weights, result.link) == (None, "identity")


def test_stemming_is_on_by_default_for_the_paper_only():
    assert score("rouge-l", ("was", "wa")).value == 0.0
    assert score("rouge-l", ("connections", "connected")).value == 100.0
    assert score("rouge-l", ("connections", "connected"), use_stemmer=False).value == 0.0
    assert score("rouge-l", ("connections", "connected"), tokenizer="unicode").value == 0.0
    assert score("rouge-l", ("connections ran", "connected ran"), tokenizer="unicode", use_stemmer=True).value == 100.0
    assert score("rouge-l", ("connections", "connected"), tokenizer="code").value == 0.0


def random_pairs(count):
    draw = random.Random(0)
    stock = [
        "the",
        "a",
        "running",
        "Runs",
        "niño",
        "x==y",
        "42",
        "don't",
        "café",
        "你好",
        "\n",
        "yyyy",
        "national",
        "(",
        "é",
    ]
    return [tuple(" ".join(draw.choices(stock, k=draw.randrange(40))) for _ in range(2)) for _ in range(count)]


def assert_as_the_package(pairs):
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    expected = [100 * scorer.score(reference, text)["rougeL"].fmeasure for text, reference in pairs]
    result = score("rouge-l", *pairs)
    assert result.per_example == pytest.approx(expected, rel=0, abs=1e-12)
    assert 0 < result.value < 100


def test_paper_is_the_package_on_random_pairs():
    assert_as_the_package(random_pairs(1000))


@pytest.mark.shared
def test_paper_is_the_package_on_real_pairs(shared_data):
    pairs = []
    for file in ("dolly_en/databricks-dolly-15k.partial", "dolly_es/xquad_es_in_dolly_multilingual_schema"):
        lines = (shared_data / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()[:401]
        answers = [max((v for v in json.loads(line).values() if isinstance(v, str)), key=len)[:1500] for line in lines]
        pairs += itertools.pairwise(answers)
    for file in ("bugnet_python", "bugnet_python_v2_as_published_swapped"):
        lines = (shared_data / f"bugnet/{file}.jsonl").read_text(encoding="utf-8").splitlines()
        pairs += [(row["fail"][:1500], row["pass"][:1500]) for row in map(json.loads, lines)]
    assert len(pairs) >= 1000
    assert_as_the_package(pairs)


def test_what_the_paper_cannot_see_and_unicode_can():
    assert score("rouge-l", ("mañana", "ma ana")).value == 100.0
    assert score("rouge-l", ("你好", "你好")).value == 0.0
    pairs = [("año", "ano"), ("mañana", "mañana"), ("mañana", "ma ana"), ("你好", "你好"), ("你好吗", "你好")]
    result = score("rouge-l", *pairs, tokenizer="unicode")
    assert result.per_example == pytest.approx((0.0, 100.0, 0.0, 100.0, 80.0))
    assert score("rouge-l", ("¿Qué MAÑANA?", "que\u0301 man\u0303ana"), tokenizer="unicode").value == 100.0
    for same in ("привет мир", "مرحبا بالعالم", "สวัสดี", "नमस्ते", "안녕"):
        assert score("rouge-l", (same, same), tokenizer="unicode").value == 100.0


def test_unicode_words():
    assert unicode_words("L'État, c'est moi: 3.5 €_x") == ["l", "état", "c", "est", "moi", "3", "5", "x"]
    assert unicode_words("हिन्दी में") == ["हिन्दी", "में"]
    assert unicode_words("東京とParis") == ["東", "京", "と", "paris"]
    assert unicode_words("ไทยxy") == ["ไ", "ท", "ย", "xy"]
    assert unicode_words("\U00020000\U00020001") == ["\U00020000", "\U00020001"]
    assert unicode_words("\u200b \ufeff\n") == []


# --- the longest common subsequence -----------------------------------------------------------------------------------

tokens = st.lists(st.sampled_from("abcd"), max_size=40)


@given(tokens, tokens, st.integers(1, 50))
def test_the_subsequence_is_that_of_the_table(first, second, block):
    expected = _lcs_table(first, second)[-1][-1]
    assert lcs_length(first, second, block=block) == lcs_length(second, first) == expected


def test_the_subsequence_of_long_texts():
    draw = random.Random(1)
    first, second = ([str(draw.randrange(60)) for _ in range(n)] for n in (700, 1300))
    expected = _lcs_table(first, second)[-1][-1]
    assert lcs_length(first, second) == lcs_length(first, second, block=64) == expected
    # Every second token of 20,000, with as many others between.
    long = [str(n) for n in range(20_000)]
    assert lcs_length(long, [word for n in long for word in (n if int(n) % 2 else "x", "y")]) == 10_000


# --- tokens of code ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x==a", ["x", "==", "a"]),
        ("x!=a", ["x", "!=", "a"]),
        ("i+=1;j++", ["i", "+=", "1", ";", "j", "++"]),
        ("std::vector<int>&v->at(0)", ["std", "::", "vector", "<", "int", ">", "&", "v", "->", "at", "(", "0", ")"]),
        ("a<<=b>>1<=>c**2//3", ["a", "<<=", "b", ">>", "1", "<=>", "c", "**", "2", "//", "3"]),
        ("#include <x.h>\n/* y */", ["#", "include", "<", "x", ".", "h", ">", "/*", "y", "*/"]),
        ("1e-5 0x1F 3.14f .5 1_000j 1'000u", ["1e-5", "0x1F", "3.14f", ".5", "1_000j", "1'000u"]),
        ("""s = f"it's" + rb'\\'' + L"w" + "" """, ["s", "=", """f"it's\"""", "+", r"rb'\''", "+", 'L"w"', "+", '""']),
        ("""c = '"'; d = '\\''""", ["c", "=", """'"'""", ";", "d", "=", r"'\''"]),
        ('f"""two "w"\n"""', ["f", '"""', "two", '"w"', '"""']),
        ('print("oops', ["print", "(", '"', "oops"]),
        ("# don't: it's", ["#", "don", "'", "t", ":", "it", "'", "s"]),
        (r"\" \n", ['\\"', "\\", "n"]),
        ("año = ñ", ["año", "=", "ñ"]),
        ("man\u0303ana", ["mañana"]),
        ("你好 \0\ud800", ["你好", "\0", "\ud800"]),
    ],
)
def test_code_tokens(code, expected):
    assert code_tokens(code) == expected


def test_rouge_for_code():
    assert score("rouge-l", ("x == a", "x != a")).value == 100.0
    assert score("rouge-l", ("x == a", "x != a"), tokenizer="code").value == pytest.approx(200 / 3)
    same = [("if x:\n    y = 1", "if x :\n\ty=1"), ("for(;;){f();}", "for ( ; ; )\n{\n  f();\n}"), ("X", "x")]
    assert score("rouge-l", *same, tokenizer="code").per_example == (100.0, 100.0, 0.0)


@given(st.text(st.sampled_from("ab \"'\\\n#1.e+=<_é"), max_size=60))
def test_code_tokens_lose_nothing_but_white_space(code):
    assert "".join("".join(code_tokens(code)).split()) == "".join(code.split())


# --- chrf -------------------------------------------------------------------------------------------------------------


def chrf_by_hand(reference, text):
    """Popović 2015: mean precision and recall over n-grams of 1 to 6 characters, F with beta 2."""
    reference, text = ("".join(side.split()) for side in (reference, text))
    precisions, recalls = [], []
    for n in range(1, 7):
        wanted, given = ([side[at : at + n] for at in range(len(side) - n + 1)] for side in (reference, text))
        if wanted and given:
            common = sum(min(wanted.count(gram), given.count(gram)) for gram in set(given))
            precisions.append(common / len(given))
            recalls.append(common / len(wanted))
    p, r = (sum(side) / len(side) if side else 0.0 for side in (precisions, recalls))
    return 100 * 5 * p * r / (4 * p + r) if p + r else 0.0


def test_chrf():
    pytest.importorskip("sacrebleu")
    pairs = [
        ("the cat sat", "the cat is here"),
        ("año", "ano"),
        ("你好吗", "你好"),
        ("", "x"),
        ("x", ""),
        ("abc", "abc"),
    ]
    result = score("chrf", *pairs)
    assert result.per_example == pytest.approx([chrf_by_hand(reference, text) for text, reference in pairs])
    assert 0 < result.per_example[1] < 100 == pytest.approx(result.per_example[5])
    best = score("chrf", ("the cat sat", "no", "the cat is here")).value
    assert best == pytest.approx(result.per_example[0])
