"""The same files in llama.cpp itself: run with ``llama-cpp-python`` installed (it builds from source)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf_models import CHAT, HARD, byte_tokenizer, export, model_of, piece_tokenizer, save, tokenizer_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdkit.api import Model
from kdkit.models.catalogue import models_dir
from kdkit.models.load import load_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
REAL = models_dir()


def load(file):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs the package llama-cpp-python")
    return llama_cpp.Llama(
        str(file), n_ctx=128, n_batch=128, n_threads=1, logits_all=True, verbose=False, n_gpu_layers=0
    )


def close(llama, model, ids, tolerance):
    """Logits of both for one row; llama.cpp multiplies in float16, so the largest one sets the scale."""
    llama.reset()
    llama.eval(ids)
    theirs = torch.from_numpy(np.array(llama.scores[: len(ids)]))
    ours = model(torch.tensor([ids])).logits[0].detach().float()
    difference = float((theirs - ours).abs().max()) / float(ours.abs().max())
    assert difference < tolerance, difference
    return difference


def same_tokens(llama, tokenizer, texts):
    for text in texts:
        theirs = llama.tokenize(text.encode(), add_bos=False, special=True)
        assert theirs == tokenizer(text, add_special_tokens=False).input_ids, text
        if text:  # the library skips the call for an empty text
            assert llama.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text).input_ids, text


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        ("qwen2", {}),
        ("gemma", {}),
        ("gemma2", {}),
        ("gemma2", {"layer_types": ["full_attention", "full_attention", "sliding_attention"]}),
        ("gemma3_text", {}),
        ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ],
)
def test_every_family(kind, changes, tmp_path):
    model = model_of(kind, 420, **changes)
    file, _ = export(save(model, tokenizer_for(kind), tmp_path / "source"), tmp_path / "out", type="F16")
    close(load(file), model, list(range(3, 43)), 2e-2)


@pytest.mark.parametrize("rule", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_byte_level(rule, tmp_path):
    tokenizer = byte_tokenizer(rule, bos=rule == "llama-bpe")
    file, _ = export(save(model_of("llama", 340), tokenizer, tmp_path / "source"), tmp_path / "out")
    llama = load(file)
    same_tokens(llama, tokenizer, (*HARD, "use <tool> now", tokenizer.apply_chat_template(CHAT, tokenize=False)))


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces(prefix, tmp_path):
    tokenizer = piece_tokenizer(prefix=prefix)
    file, _ = export(save(model_of("llama", 420), tokenizer, tmp_path / "source"), tmp_path / "out")
    same_tokens(load(file), tokenizer, (*HARD, "thethat  what", "a <tool> b", "x     y"))


# llama.cpp rounds what a block of weights is multiplied with to eight bits, too.
@pytest.mark.parametrize(("kind", "tolerance"), [("F16", 5e-3), ("Q8_0", 6e-2), ("Q4_0", 0.1), ("Q4_1", 6e-2)])
def test_smollm2(kind, tolerance, tmp_path):
    source = REAL / "smollm2-135m-instruct"
    if not source.is_dir():
        pytest.skip("run: kdkit models pull smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(source)
    file, _ = export(source, tmp_path / "out", type=kind)
    llama = load(file)
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    same_tokens(llama, tokenizer, (*HARD, chat))
    ids = tokenizer("The capital of France is Paris, and 12 + 7 is").input_ids
    close(llama, load_model(Model(path=tmp_path / "out", format="gguf"), dtype=torch.float32), ids, tolerance)
    if kind == "F16":
        close(llama, AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), ids, tolerance)


@pytest.mark.shared
def test_stories(shared_data, tmp_path):
    source = shared_data / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(source)
    file, _ = export(source, tmp_path / "out", type="F16")
    llama = load(file)
    same_tokens(llama, tokenizer, HARD)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    close(llama, model, tokenizer("Once upon a time, there was a little girl").input_ids, 2e-2)
