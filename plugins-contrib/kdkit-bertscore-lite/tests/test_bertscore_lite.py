"""Values are the formula's, computed by hand and by plain loops in float64, whatever gives the vectors."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import kdkit
from kdkit.api import DataError, EnvironmentUnmet, Metric, MetricResult, ModelError, Prediction, RecipeError
from kdkit.testing.conformance import MetricConformance
from kdkit.testing.tiny import save_tiny_model, tiny_tokenizer
from kdkit_bertscore_lite import metric as implementation
from kdkit_bertscore_lite import vectors
from kdkit_bertscore_lite.metric import BertscoreLite, matched
from kdkit_bertscore_lite.plugin import BertscoreLiteParams, _key
from kdkit_bertscore_lite.vectors import Embedded, static_vectors

RECIPE = Path(__file__).parents[1] / "recipe.yaml"
PAIRS = (
    ("the cat sat on the mat", "a kitten was sitting on the rug"),
    ("naïve café, 日本語", "Ein Käuzchen singt."),
    ("def f(x):\n    return x", "def f(x):\n    return x + 1"),
)


def build(**params: Any) -> Metric:
    built: Metric = kdkit.build("metric", "bertscore-lite", **params)
    return built


def one(metric: Metric, text: str, *references: str) -> float:
    return metric.score([Prediction("", text, references)]).value


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT with 64 positions, whose texts begin and end with marks."""
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel

    directory = tmp_path_factory.mktemp("models") / "Tiny_BERT"
    config = BertConfig(
        vocab_size=259,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(directory)
    tokenizer = tiny_tokenizer(chat_template=None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 257), ("<|im_end|>", 258)]
    )
    tokenizer.save_pretrained(directory)
    return directory


class TestStatic(MetricConformance):
    range = (0.0, 100.0)

    def build(self) -> Metric:
        return build()


class TestStaticRecall(MetricConformance):
    range = (0.0, 100.0)

    def build(self) -> Metric:
        return build(measure="recall")


class TestEncoder(MetricConformance):
    range = (0.0, 100.0)

    @pytest.fixture(autouse=True)
    def _with_an_encoder(self, encoder: Path) -> None:
        self.directory = encoder

    def build(self) -> Metric:
        return build(model=str(self.directory))


# --- by hand


class Table:
    """Words with vectors of two or three numbers."""

    longest = 3
    words: ClassVar = {"e": (1, 0, 0), "n": (0, 1, 0), "ne": (0.6, 0.8, 0), "w": (-1, 0, 0), "up": (0, 0, 1)}

    def __call__(self, text: str, /) -> Embedded:
        found = text.split()
        rows = [self.words[word] for word in found[:3]]
        return Embedded(np.array(rows, dtype=np.float64).reshape(-1, 3), cut=len(found) > 3)


def test_values_that_a_person_can_follow() -> None:
    # Answer "e n" and reference "ne": cosines 0.6 and 0.8, so that precision is 0.7, and recall 0.8.
    for measure, value in (("precision", 70.0), ("recall", 80.0), ("f1", 2 * 0.7 * 0.8 / 1.5 * 100)):
        assert one(BertscoreLite(Table(), measure), "e n", "ne") == pytest.approx(value, abs=1e-12)
    f1 = BertscoreLite(Table(), "f1")
    assert one(f1, "e n", "n e") == 100.0
    # Opposite counts as unlike: cosine -1 is 0, and not less.
    for measure in ("precision", "recall"):
        assert one(BertscoreLite(Table(), measure), "e", "w") == 0.0
    # "up" finds no partner: precision 1/2, recall 1.
    assert one(f1, "e up", "e") == pytest.approx(100 * 2 * 0.5 / 1.5)
    assert one(f1, "e", "w", "ne", "up") == pytest.approx(60.0)


def test_the_best_reference_is_that_of_the_measure() -> None:
    """Against "e" precision is 1/2 and recall 1, against "e up w" precision is 1 and recall 2/3."""
    assert one(BertscoreLite(Table(), "precision"), "e up", "e", "e up w") == pytest.approx(100.0)
    assert one(BertscoreLite(Table(), "recall"), "e up", "e", "e up w") == pytest.approx(100.0)
    f1 = one(BertscoreLite(Table(), "f1"), "e up", "e", "e up w")
    assert f1 == pytest.approx(100 * 2 * 1.0 * (2 / 3) / (1 + 2 / 3))


def test_nothing_is_like_nothing() -> None:
    for answer, reference in (("", "e"), ("e", ""), ("", "")):
        assert one(BertscoreLite(Table(), "f1"), answer, reference) == 0.0


def test_texts_that_were_cut_and_rows_without_references_are_counted() -> None:
    rows = [
        Prediction("", "e", ("e",), id="a"),
        Prediction("", "e n e n", ("e",), id="b"),
        Prediction("", "e", ("e", "n e n e"), id="c"),
        Prediction("", "e", (), id="d"),
    ]
    result = BertscoreLite(Table(), "f1").score(rows)
    assert result.ids == ("a", "b", "c")
    assert result.counts == {"predictions without references": 1, "predictions with a text cut at 3 tokens": 2}
    assert result.value == pytest.approx(sum(result.per_example) / 3)
    assert BertscoreLite(Table(), "f1").score(rows[:1]).counts == {}
    with pytest.raises(DataError, match="none of 1 predictions has a reference"):
        BertscoreLite(Table(), "f1").score(rows[3:])


# --- by plain loops in float64


def loops(answer: list[list[float]], reference: list[list[float]]) -> dict[str, float]:
    """The equations of the paper, one number at a time."""

    def cosine(x: list[float], y: list[float]) -> float:
        lengths = math.sqrt(math.fsum(a * a for a in x)) * math.sqrt(math.fsum(b * b for b in y))
        return max(0.0, math.fsum(a * b for a, b in zip(x, y, strict=True)) / lengths)

    precision = sum(max(cosine(x, y) for y in reference) for x in answer) / len(answer)
    recall = sum(max(cosine(x, y) for x in answer) for y in reference) / len(reference)
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}


def rows_of_wordllama(text: str) -> list[list[float]]:
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    spec = importlib.util.find_spec("wordllama")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    (table,) = load_file(root / vectors._WEIGHTS).values()
    ids = Tokenizer.from_file(str(root / vectors._TOKENIZER)).encode(text, add_special_tokens=False).ids
    return [[float(number) for number in table[token]] for token in ids]


@pytest.mark.parametrize("pair", PAIRS)
def test_static_vectors_give_the_formula(pair: tuple[str, str]) -> None:
    expected = loops(*map(rows_of_wordllama, pair))
    for measure, value in expected.items():
        assert one(build(measure=measure), *pair) == pytest.approx(100 * value, rel=1e-12)


def hidden_states(encoder: Path, text: str, layer: int) -> list[list[float]]:
    from transformers import BertModel

    model = BertModel.from_pretrained(encoder).double().eval()
    ids = [257, *tiny_tokenizer().encode(text), 258]
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
    # What marks start and end takes part in the model and not in the matching.
    found: list[list[float]] = states[1:-1].tolist()
    return found


@pytest.mark.parametrize("layer", [None, 0, 2])
def test_hidden_states_give_the_formula(layer: int | None, encoder: Path) -> None:
    for pair in (("a cat sat", "the dog ran off"), ("été", "winter")):
        states = [hidden_states(encoder, text, 3 if layer is None else layer) for text in pair]
        for measure, value in loops(*states).items():
            given = build(model=str(encoder), layer=layer, measure=measure)
            assert one(given, *pair) == pytest.approx(100 * value, rel=1e-5)


def test_long_texts_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    answer, reference = (vectors._unit(generator.normal(size=(n, 8))) for n in (23, 11))
    whole = matched(answer, reference)
    monkeypatch.setattr(implementation, "_ROWS", 5)
    pieces = matched(answer, reference)
    assert (pieces.precision, pieces.recall) == pytest.approx((whole.precision, whole.recall), rel=1e-12)
    expected = loops(answer.tolist(), reference.tolist())
    assert (whole.precision, whole.recall, whole.f1) == pytest.approx(tuple(expected.values()), rel=1e-12)


# --- vectors


def test_meaning_counts_where_words_differ() -> None:
    metric = build()
    like, unlike = "a kitten was sitting on the rug", "stock prices fell sharply in Tokyo"
    text = "the cat sat on the mat"
    assert one(metric, text, unlike) < 20 < 40 < one(metric, text, like) < 100
    assert one(metric, text, text) == pytest.approx(100.0)
    assert one(metric, "mat the on sat cat the", text) == pytest.approx(100.0), "without a model order does not count"


def test_an_encoder_sees_the_order(encoder: Path) -> None:
    metric = build(model=str(encoder))
    assert one(metric, "cat sat", "cat sat") == pytest.approx(100.0)
    assert one(metric, "tas tac", "cat sat") < 99.9


def test_halves_of_characters_are_texts_like_others(encoder: Path) -> None:
    for metric in (build(), build(model=str(encoder))):
        assert one(metric, "a\ud800b", "a?b") == pytest.approx(100.0)


def test_texts_are_cut_at_the_positions_of_a_model(encoder: Path) -> None:
    metric = build(model=str(encoder))
    # 62 bytes and two marks fill the 64 positions.
    result = metric.score([Prediction("", text, ("x" * 62,), id=text) for text in ("x" * 62, "x" * 63, "y")])
    assert result.counts == {"predictions with a text cut at 64 tokens": 1}
    assert result.per_example[0] == result.per_example[1] == pytest.approx(100.0)


def test_positions_of_roberta_start_behind_the_padding() -> None:
    from types import SimpleNamespace as Config

    tokenizer = Config(model_max_length=10**30)
    assert (
        vectors._longest(Config(max_position_embeddings=514, model_type="xlm-roberta", pad_token_id=1), tokenizer)
        == 512
    )
    assert vectors._longest(Config(max_position_embeddings=512, model_type="bert", pad_token_id=0), tokenizer) == 512
    assert vectors._longest(Config(model_type="t5"), tokenizer) is None
    assert vectors._longest(Config(max_position_embeddings=512, model_type="bert"), Config(model_max_length=128)) == 128


def test_a_decoder_has_hidden_states_too(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "tiny")
    assert one(build(model=str(tmp_path / "tiny")), "a cat", "a cat") == pytest.approx(100.0)


def test_wordllama_is_read_and_not_imported() -> None:
    assert one(build(), "a", "a") == pytest.approx(100.0)
    assert "wordllama" not in sys.modules


# --- what is refused


def test_no_wordllama_is_an_error_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    for found, said in ((None, "the package wordllama is missing"), (spec, f"wordllama has no {vectors._WEIGHTS}")):
        monkeypatch.setattr(vectors, "find_spec", lambda _name, found=found: found)
        with pytest.raises(EnvironmentUnmet) as refused:
            static_vectors()
        assert str(refused.value) == f"metric bertscore-lite: {said}; run: pip install 'wordllama==0.4.*'"


def test_models_that_cannot_be_used(tmp_path: Path, encoder: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        build(model=str(tmp_path))
    with pytest.raises(RecipeError, match="layer 4 of a model with 3; allowed: 0 to 3"):
        build(model=str(encoder), layer=4)
    with pytest.raises(RecipeError, match="layer needs model"):
        build(layer=1)
    broken = tmp_path / "broken"
    broken.mkdir()
    config = json.loads((encoder / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (broken / name).write_bytes((encoder / name).read_bytes())
    with pytest.raises(ModelError, match=r"the weights lack encoder\.layer\.3\."):
        build(model=str(broken))


# --- in reports


@pytest.mark.parametrize(
    ("params", "key"),
    [
        ({}, "bertscore-lite"),
        ({"measure": "recall"}, "bertscore-lite-recall"),
        ({"model": "./models/all-MiniLM_L6"}, "bertscore-lite-all-minilm-l6"),
        ({"model": "a", "layer": 0, "measure": "precision"}, "bertscore-lite-a-layer-0-precision"),
    ],
)
def test_numbers_of_different_vectors_have_different_names(params: dict[str, Any], key: str) -> None:
    assert _key(BertscoreLiteParams.model_validate_json(json.dumps(params))) == key


def test_the_recipe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDKIT_STORE", str(tmp_path / "store"))
    questions = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"Say {word}.", "completion": f"{word} it is"} for word in ("yes", "no", "maybe", "never")]
    questions.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tiny = str(save_tiny_model(tmp_path / "tiny"))
    short = {"stages.eval.sampling.max_new_tokens": 8}
    result = kdkit.run(RECIPE, var={"model": tiny, "questions": str(questions)}, set=short, out=tmp_path)
    assert result.ok, result.error
    found = result.report["models"]["model"]["metrics"]
    for key in ("bertscore-lite", "bertscore-lite-recall"):
        assert 0 <= found[key]["value"] <= 100
        assert found[key]["n"] == 4


def test_a_result_can_be_resampled() -> None:
    rows = [Prediction("", text, (reference,), id=text) for text, reference in PAIRS]
    result = build().score(rows)
    assert isinstance(result, MetricResult)
    assert result.value == pytest.approx(math.fsum(result.per_example) / 3)
    assert len(set(result.per_example)) == 3
