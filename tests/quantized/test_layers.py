from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen2Config, Qwen2MoeConfig

from kdkit.api.errors import ModelError
from kdkit.models.quantized.layers import blocks, quantizable
from kdkit.testing.tiny import tiny_model

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PER_BLOCK = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


def build(config):
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SIZES), Qwen2Config(**SIZES), Gemma3TextConfig(**SIZES, head_dim=8)],
    ids=["llama", "qwen2", "gemma3"],
)
def test_the_linear_layers_of_the_blocks_in_order(config):
    model = build(config)
    found = quantizable(model, lm_head=False)
    assert list(found) == [f"model.layers.{block}.{name}" for block in range(3) for name in PER_BLOCK]
    assert all(model.get_submodule(name) is module for name, module in found.items())
    assert [name for name, _ in blocks(model)] == ["model.layers.0", "model.layers.1", "model.layers.2"]


def test_a_model_of_one_layer():
    model = tiny_model(layers=1)
    assert list(quantizable(model, lm_head=False)) == [f"model.layers.0.{name}" for name in PER_BLOCK]


def test_the_head_comes_last():
    model = tiny_model(tied=False)
    found = quantizable(model, lm_head=True)
    assert list(found)[-1] == "lm_head"
    assert found["lm_head"] is model.lm_head
    assert "lm_head" not in quantizable(model, lm_head=False)


def test_a_tied_head_is_refused():
    with pytest.raises(ModelError, match="embedding itself") as caught:
        quantizable(tiny_model(tied=True), lm_head=True)
    assert caught.value.where == "lm_head"


def test_gpt2_is_refused_by_the_name_of_its_layer():
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    with pytest.raises(ModelError) as caught:
        quantizable(build(config), lm_head=False)
    assert "Conv1D.weight of shape [32, 96]" in caught.value.what
    assert caught.value.where == "GPT2LMHeadModel transformer.h.0.attn.c_attn"


def test_stacked_experts_are_refused():
    config = Qwen2MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    )
    with pytest.raises(ModelError, match=r"Qwen2Moe\w+\.\w+ of shape"):
        quantizable(build(config), lm_head=False)


def test_a_weight_of_two_layers_is_refused():
    model = tiny_model()
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(ModelError, match=r"shares its weight with model\.layers\.0\.self_attn\.q_proj") as caught:
        quantizable(model, lm_head=False)
    assert caught.value.where == "model.layers.1.self_attn.q_proj"


def test_a_subclass_of_linear_is_no_plain_matrix():
    class Odd(nn.Linear):
        pass

    model = tiny_model()
    model.model.layers[1].mlp.up_proj = Odd(32, 64, bias=False)
    with pytest.raises(ModelError, match=r"Odd\.weight"):
        quantizable(model, lm_head=False)


def test_vectors_of_a_block_are_left_alone():
    model = tiny_model()
    model.model.layers[0].gate = nn.Module()
    model.model.layers[0].gate.own = nn.Parameter(torch.zeros(32))
    assert len(quantizable(model, lm_head=False)) == 14
