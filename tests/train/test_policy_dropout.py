from __future__ import annotations

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from kdkit.testing.tiny import tiny_model
from kdkit.train.policy.dropout import without_dropout

IDS = torch.arange(1, 21)[None]


def llama():
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return model


def gpt2(attention="sdpa"):
    sizes = {"vocab_size": 259, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    drops = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    return GPT2LMHeadModel(GPT2Config(**sizes, **drops, attn_implementation=attention))


def opt():
    sizes = {"vocab_size": 259, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "word_embed_proj_dim": 32, "max_position_embeddings": 64}  # fmt: skip
    return OPTForCausalLM(OPTConfig(**sizes, dropout=0.3, attention_dropout=0.3, layerdrop=0.3))


def bloom():
    return BloomForCausalLM(
        BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.3, attention_dropout=0.3)
    )


@pytest.mark.parametrize("make", [llama, gpt2, lambda: gpt2("eager"), opt, bloom],
                         ids=["llama", "gpt2", "gpt2-eager", "opt", "bloom"])  # fmt: skip
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_mode_computes_what_evaluation_does(make, checkpointing):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = model.config.to_dict()

    def train():
        model.zero_grad()
        logits = model(input_ids=IDS, use_cache=False).logits
        logits.log_softmax(-1)[..., 0].sum().backward()
        return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    with without_dropout(model):
        first, second = train(), train()
    torch.testing.assert_close(first[0], wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert model.training
    assert model.config.to_dict() == config
    assert not torch.allclose(train()[0], wanted, atol=1e-4), "the dropout is back afterwards"


def test_the_dropout_is_back_after_an_error():
    model = gpt2()

    def fails():
        with without_dropout(model):
            raise RuntimeError(f"{model.transformer.drop.p} {model.config.attn_pdrop}")

    with pytest.raises(RuntimeError, match=r"0\.0 0\.0"):
        fails()
    assert (model.transformer.drop.p, model.config.attn_pdrop) == (0.3, 0.3)
