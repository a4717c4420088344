from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from kdkit.models.positions import learned_positions, positions
from kdkit.testing.tiny import tiny_model


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=1, n_head=4))


def opt():
    sizes = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=24))


def bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4))


@pytest.mark.parametrize(("make", "read", "learned"), [(gpt2, 64, 64), (opt, 24, 24), (bloom, None, None),
                                                       (tiny_model, 2048, None)],
                         ids=["gpt2", "opt", "bloom", "llama"])  # fmt: skip
def test_what_a_model_reads(make, read, learned):
    model = make()
    assert positions(model.config) == read
    assert learned_positions(model) == learned


@pytest.mark.parametrize("limit", [None, -1, 0, "many"])
def test_what_is_no_limit(limit):
    text = SimpleNamespace(max_position_embeddings=limit)
    assert positions(SimpleNamespace(get_text_config=lambda: text)) is None
