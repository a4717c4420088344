from __future__ import annotations

import pytest
import torch
from tiny_models import make_llama
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, GraniteConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from kdkit.api.errors import ModelError
from kdkit.models import heads
from kdkit.models.heads import split, verify_split

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": None,
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0),
    "cohere": CohereConfig(**SIZES, logit_scale=0.0625),
    "granite": GraniteConfig(**SIZES, logits_scaling=8.0),
}
IDS = torch.arange(24).reshape(2, 12)


def build(name: str):
    torch.manual_seed(0)
    config = CONFIGS[name]
    return make_llama(num_hidden_layers=2) if config is None else AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_halves_make_the_whole(name):
    model = build(name)
    verify_split(model)
    parts = split(model)
    hidden = parts.trunk(input_ids=IDS).last_hidden_state
    assert hidden.shape[:2] == IDS.shape
    logits = parts.project(hidden.reshape(-1, hidden.shape[-1]))
    torch.testing.assert_close(logits, model(IDS).logits.reshape(logits.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_a_transform_that_is_forgotten_is_noticed(name, monkeypatch):
    model = build(name)
    monkeypatch.setattr(heads, "_transform", lambda _: lambda logits: logits)
    with pytest.raises(ModelError, match=f"^{type(model).__name__}: the architecture is not supported") as caught:
        verify_split(model)
    assert "\n" not in str(caught.value)


def test_a_soft_cap_is_noticed_even_where_logits_are_small(monkeypatch):
    """A fresh model has logits near 0, where tanh(x / 30) * 30 is x to the last digit."""
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=30.0)).eval()
    monkeypatch.setattr(heads, "_transform", lambda _: lambda logits: logits)
    with torch.no_grad():
        parts = split(model)
        plain = parts.project(parts.trunk(input_ids=IDS[:1, :8]).last_hidden_state[0])
        torch.testing.assert_close(plain, model(IDS[:1, :8]).logits[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="not supported"):
        verify_split(model)


class ScaledHidden(LlamaForCausalLM):
    """Like MiniCPM: something happens between trunk and projection."""

    def forward(self, input_ids=None, **settings):
        hidden = self.model(input_ids=input_ids, **settings).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden / 4))


class ShiftedLogits(LlamaForCausalLM):
    def forward(self, input_ids=None, **settings):
        logits = super().forward(input_ids=input_ids, **settings).logits
        return CausalLMOutputWithPast(logits=torch.where(logits > 1, logits, logits - 1))


class FewerLogits(LlamaForCausalLM):
    def forward(self, input_ids=None, **settings):
        return CausalLMOutputWithPast(logits=super().forward(input_ids=input_ids, **settings).logits[..., :-1])


@pytest.mark.parametrize("kind", [ScaledHidden, ShiftedLogits, FewerLogits])
def test_an_unknown_architecture_is_refused(kind):
    with pytest.raises(ModelError, match=kind.__name__):
        verify_split(kind(make_llama(num_hidden_layers=2).config))


def test_not_a_number_is_refused():
    model = make_llama(num_hidden_layers=2)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ModelError, match="not supported"):
        verify_split(model)


def test_a_model_without_halves_is_refused():
    with pytest.raises(ModelError, match="LlamaModel: cannot be split"):
        split(make_llama(num_hidden_layers=1).model)


@pytest.mark.parametrize("training", [True, False])
def test_verify_leaves_the_model_as_it_was(training):
    model = make_llama(num_hidden_layers=2).train(training)
    model.lm_head.weight.grad = None
    verify_split(model)
    assert model.training is training
    assert not model.lm_head._forward_hooks
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_verify_in_other_precisions(dtype):
    verify_split(make_llama(num_hidden_layers=2).to(dtype))


def test_a_fresh_head_of_zeros_is_fine():
    model = make_llama(num_hidden_layers=2)
    torch.nn.init.zeros_(model.lm_head.weight)
    verify_split(model)


def test_project_computes_in_the_precision_of_the_head():
    parts = split(make_llama(num_hidden_layers=1))
    hidden = torch.randn(5, 32)
    assert parts.project(hidden.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert parts.project(hidden).dtype == torch.bfloat16
    half = split(make_llama(num_hidden_layers=1).bfloat16())
    assert half.project(hidden).dtype == torch.bfloat16


def test_gradients_reach_trunk_and_tied_head():
    model = make_llama(num_hidden_layers=2, tie_word_embeddings=True)
    parts = split(model)
    assert parts.head.weight is model.model.embed_tokens.weight
    parts.project(parts.trunk(input_ids=IDS).last_hidden_state[0]).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
