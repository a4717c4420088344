from __future__ import annotations

import json

import pytest
import torch
from gguf_models import Context, byte_tokenizer, model_of, piece_tokenizer, save
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from kdkit.api.errors import ModelError
from kdkit.plugins.quantizers.gguf_plugin import GGUF, GgufParams

ROWS = 340


def refuse(source, tmp_path, match, **params):
    with pytest.raises(ModelError, match=match) as caught:
        GGUF.build(GgufParams(**params)).quantize(source, (), tmp_path / "made" / "out", Context())
    assert "\n" not in str(caught.value)
    made = tmp_path / "made"
    assert not made.exists() or not list(made.iterdir())


def saved(tmp_path, kind="llama", tokenizer=None, rows=ROWS, **changes):
    return save(model_of(kind, rows, **changes), tokenizer or byte_tokenizer(), tmp_path / "source")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save(model_of("llama", ROWS), byte_tokenizer(), tmp_path_factory.mktemp("llama") / "model")


def edited(source, tmp_path, **changes):
    """A copy of the model whose config.json says something else about the same weights."""
    import shutil

    path = tmp_path / "edited"
    shutil.copytree(source, path)
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    return path


# --- architectures ----------------------------------------------------------------------------------------------------


def test_an_unsupported_architecture_by_name(tmp_path):
    config = AutoConfig.for_model(
        "mistral", vocab_size=ROWS, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    source = save(AutoModelForCausalLM.from_config(config), byte_tokenizer(), tmp_path / "source")
    refuse(source, tmp_path, "MistralForCausalLM cannot be exported to GGUF; allowed: .*llama")


def test_a_head_of_another_kind(llama, tmp_path):
    refuse(
        edited(llama, tmp_path, architectures=["LlamaForSequenceClassification"]), tmp_path, "SequenceClassification"
    )


def test_a_quantized_model(llama, tmp_path):
    source = edited(llama, tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    refuse(source, tmp_path, "is already quantised .gptq.")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_act": "gelu"}, "the activation 'gelu'; allowed: silu or swish"),
        ({"rms_norm_eps": 1e300}, "rms_norm_eps 1e.300; allowed: a positive number"),
        ({"head_dim": 31}, "head_dim 31; allowed: an even number|validate_rope"),  # transformers may be the first
        ({"max_position_embeddings": -5}, "max_position_embeddings -5"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "positions of type 'dynamic'",
        ),
    ],
)
def test_settings_that_llama_cpp_would_ignore(changes, match, llama, tmp_path):
    refuse(edited(llama, tmp_path, **changes), tmp_path, match)


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar 16; allowed: 256"),
        ("gemma2", {"attn_logit_softcapping": None}, "gemma2 without soft caps"),
        ("gemma2", {"tie_word_embeddings": False}, "an output projection apart"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50"),
        ("gemma", {"attention_bias": True}, "attention_bias for gemma"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            "sliding window for qwen2",
        ),
    ],
)
def test_settings_of_a_family(kind, changes, match, tmp_path):
    tokenizer = piece_tokenizer() if kind.startswith("gemma") else byte_tokenizer("qwen2")
    refuse(saved(tmp_path, kind, tokenizer, rows=420, **changes), tmp_path, match)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def wrapped(backend, bos="<|im_start|>", eos="<|im_end|>"):
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def with_splitter(pre_tokenizer):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def byte_level(**settings):
    return pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | settings))


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), byte_level()]),
        byte_level(add_prefix_space=True),
        byte_level(use_regex=False),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\p{N}{1,2}"), behavior="isolated"), byte_level(use_regex=False)]
        ),
        pre_tokenizers.Whitespace(),
    ],
    ids=["digit-runs", "prefix-space", "no-split", "other-expression", "whitespace"],
)
def test_a_splitting_rule_without_a_name(pre_tokenizer, tmp_path):
    refuse(
        saved(tmp_path, tokenizer=with_splitter(pre_tokenizer)), tmp_path, "no known name in GGUF.*allowed: .*smollm"
    )


def test_a_rule_that_skips_merges_under_a_name_that_does_not(tmp_path):
    tokenizer = byte_tokenizer("smollm")
    tokenizer.backend_tokenizer.model.ignore_merges = True
    refuse(saved(tmp_path, tokenizer=tokenizer), tmp_path, "no known name in GGUF")


def test_a_normalizer(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    refuse(saved(tmp_path, tokenizer=tokenizer), tmp_path, "normalizes text .Lowercase.")


def test_another_model_of_tokens(tmp_path):
    backend = Tokenizer(Unigram([("<unk>", 0.0), ("a", -1.0), ("<|im_end|>", -2.0), ("<|im_start|>", -2.0)], unk_id=0))
    refuse(saved(tmp_path, tokenizer=wrapped(backend)), tmp_path, r"its tokenizer \(Unigram\) cannot be exported")


def test_byte_level_without_merges(tmp_path):
    from kdkit.testing.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = byte_level()
    refuse(saved(tmp_path, tokenizer=tokenizer), tmp_path, "has no merges")


def test_pieces_without_bytes(tmp_path):
    state = json.loads(piece_tokenizer().backend_tokenizer.to_str())
    state["model"]["vocab"]["<0x7f>"] = state["model"]["vocab"].pop("<0x7F>")
    tokenizer = wrapped(Tokenizer.from_str(json.dumps(state)), "<s>", "</s>")
    refuse(saved(tmp_path, tokenizer=tokenizer, rows=420), tmp_path, "lacks a token for every byte")


def test_merges_that_leave_one_out(tmp_path):
    tokenizer = piece_tokenizer(drop=("th", "at"))
    refuse(saved(tmp_path, tokenizer=tokenizer, rows=420), tmp_path, "never makes 'that' from 'th' and 'at'")


def test_merges_in_an_order_that_scores_cannot_say(tmp_path):
    state = json.loads(piece_tokenizer().backend_tokenizer.to_str())
    merges = state["model"]["merges"]
    (last,) = [pair for pair in merges if pair == ["th", "at"]]
    merges.remove(last)
    merges.append(last)
    tokenizer = wrapped(Tokenizer.from_str(json.dumps(state)), "<s>", "</s>")
    refuse(saved(tmp_path, tokenizer=tokenizer, rows=420), tmp_path, "prefers one way of making 'that'")


def test_pieces_after_another_preparation(tmp_path):
    tokenizer = piece_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    refuse(saved(tmp_path, tokenizer=tokenizer, rows=420), tmp_path, "GGUF has no name for .NFKC, Replace")


def test_other_tokens_around_text(tmp_path):
    tokenizer = byte_tokenizer()
    special = [("<|im_start|>", 1), ("<|im_end|>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_end|> $A <|im_start|>", special_tokens=special
    )
    refuse(saved(tmp_path, tokenizer=tokenizer), tmp_path, "other tokens than one start and one end")


def test_no_end_token(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    refuse(saved(tmp_path, tokenizer=tokenizer, eos_token_id=None), tmp_path, "has no end token")


def test_a_token_beyond_the_table(tmp_path):
    tokenizer = byte_tokenizer()
    refuse(
        saved(tmp_path, tokenizer=tokenizer, rows=len(tokenizer) - 1), tmp_path, "token 319, its token table 319 rows"
    )


def test_a_null_character(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["a\0b"])
    refuse(saved(tmp_path, tokenizer=tokenizer), tmp_path, "null character")


def test_an_end_token_beyond_the_table(tmp_path):
    model = model_of("llama", ROWS)
    model.generation_config.eos_token_id = [2, 99999]
    refuse(save(model, byte_tokenizer(), tmp_path / "source"), tmp_path, "eot token 99999")


# --- weights and files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "match"),
    [(float("nan"), "not finite"), (1e6, "too large for float16"), (-65520.0, "too large for float16")],
)
def test_weights_that_cannot_be_stored(value, match, tmp_path):
    model = model_of("llama", ROWS)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = value
    refuse(
        save(model, byte_tokenizer(), tmp_path / "source"), tmp_path, rf"layers\.2\.mlp\.down_proj\.weight: .*{match}"
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\x00\xff" * 40], ids=["empty", "object", "noise"])
def test_broken_files(name, content, llama, tmp_path):
    source = edited(llama, tmp_path)
    (source / name).write_bytes(content)
    refuse(source, tmp_path, "edited")


def test_no_directory(tmp_path):
    refuse(tmp_path / "nowhere", tmp_path, "nowhere")
