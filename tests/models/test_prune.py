from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
import torch
from tiny_models import make_llama
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    SmolLM3Config,
)

from kdkit.api.errors import ModelError
from kdkit.models.prune import keep_layers, parse_keep_layers, prune

IDS = torch.arange(3, 15).unsqueeze(0)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=8),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-windows": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=3),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, sliding_window=4),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4),
    "smollm3": SmolLM3Config(**SIZES),
    "qwen2-moe": Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=16, mlp_only_layers=[0, 3]),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=6, n_head=4, n_positions=64, initializer_range=0.2),
}


def build(name: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()


@pytest.mark.parametrize(
    ("value", "total", "layers"),
    [
        (4, 5, (0, 1, 3, 4)),
        (3, 5, (0, 2, 4)),
        (2, 30, (0, 29)),
        (3, 4, (0, 2, 3)),  # 1.5 rounds up
        (5, 5, (0, 1, 2, 3, 4)),
        (1, 1, (0,)),
        (20, 30, (0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21, 23, 24, 26, 27, 29)),
        ("every-2nd", 5, (0, 2, 4)),
        ("every-2nd", 6, (0, 2, 4)),
        ("every-3rd", 7, (0, 3, 6)),
        ("every-4th", 6, (0, 4)),
        ((0, 2, 5), 6, (0, 2, 5)),
        ((3,), 6, (3,)),
    ],
)
def test_what_is_kept(value, total, layers):
    assert parse_keep_layers(value, total) == layers


@pytest.mark.parametrize("total", range(2, 40))
def test_a_count_keeps_that_many_from_first_to_last_evenly(total):
    for count in range(2, total + 1):
        layers = parse_keep_layers(count, total)
        gaps = {high - low for low, high in pairwise(layers)}
        assert (len(layers), layers[0], layers[-1]) == (count, 0, total - 1)
        assert min(gaps) >= 1
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    "value",
    [
        *(0, 1, 7, -1, True),
        *("every-1st", "every-0th", "every-6th", "every2nd", "every-2", "3", ""),
        *((), (0, 0), (2, 1), (0, 6), (-1, 2), (0, True), (0, "1")),
    ],
)
def test_what_is_refused_says_what_is_allowed(value):
    with pytest.raises(ModelError, match=r"allowed: a count from 2 to 6, every-Nth .* indices from 0 to 5") as caught:
        parse_keep_layers(value, 6)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pruned_model_is_sound(name, tmp_path):
    model = build(name)
    full = model(IDS).logits
    keep_layers(model, (0, 2, 3, 5))
    assert model.config.num_hidden_layers == 4
    logits = model(IDS).logits
    assert not torch.allclose(logits, full)

    cached = model.generate(IDS, max_new_tokens=10, do_sample=False, eos_token_id=-1, pad_token_id=0)
    uncached = IDS
    for _ in range(10):
        following = model(uncached, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        uncached = torch.cat([uncached, following], dim=1)
    assert cached.tolist() == uncached.tolist()

    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(again(IDS).logits, logits, rtol=0, atol=0)


def test_the_kept_layers_are_the_ones_named():
    model, pruned = make_llama(), make_llama()
    keep_layers(pruned, (1, 4))
    for new, old in enumerate((1, 4)):
        for theirs, ours in zip(
            model.model.layers[old].parameters(), pruned.model.layers[new].parameters(), strict=True
        ):
            assert torch.equal(theirs, ours)
        assert pruned.model.layers[new].self_attn.layer_idx == new


def test_lists_with_one_entry_for_each_layer_follow():
    windows = build("qwen2-windows")
    keep_layers(windows, (0, 2, 3, 5))
    assert windows.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    experts = build("qwen2-moe")
    keep_layers(experts, (1, 3, 5))
    assert experts.config.mlp_only_layers == [1]


def test_a_configuration_that_no_longer_fits_is_refused():
    class Uneven(type(make_llama())):
        """The last layer is special in a way that no configuration list tells."""

        def __init__(self, config):
            super().__init__(config)
            self.model.layers[-1].extra = torch.nn.Linear(2, 2)

    with pytest.raises(ModelError, match=r"layers that are left \(model\.layers\.1\.extra"):
        keep_layers(Uneven(LlamaConfig(**SIZES)), (0, 1))


def test_decoder_layers_that_cannot_be_told_are_refused():
    model = make_llama()
    model.model.other = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(6))
    with pytest.raises(ModelError, match=r"cannot tell .* \(model\.layers, model\.other\)"):
        keep_layers(model, (0, 1))


def test_lists_inside_a_layer_are_not_the_decoder():
    """Experts: as many in each layer as the model has layers."""

    class Experts(type(make_llama())):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.model.layers:
                layer.experts = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(6))

    model = Experts(LlamaConfig(**SIZES))
    keep_layers(model, (0, 5))
    assert len(model.model.layers) == 2
    assert len(model.model.layers[1].experts) == 6


def test_prune_writes_a_model_that_loads_without_kdkit(saved_llama, tmp_path):
    assert prune(saved_llama, tmp_path / "small", 3) == (0, 3, 5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    expected = make_llama()
    keep_layers(expected, (0, 3, 5))
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "small")("a 12").input_ids
    facts = json.loads((tmp_path / "small" / "kdkit.json").read_text())
    assert facts["kept_layers"] == [0, 3, 5]
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())


def test_prune_keeps_the_precision_of_the_file(saved_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved_llama, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(saved_llama).save_pretrained(tmp_path / "half")
    prune(tmp_path / "half", tmp_path / "small", (0, 5))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").dtype == torch.bfloat16


def test_prune_never_replaces_and_leaves_nothing_behind(saved_llama, tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "file").write_text("")
    with pytest.raises(ModelError, match="already exists"):
        prune(saved_llama, tmp_path / "small", 3)
    with pytest.raises(ModelError, match="keep_layers cannot be 99"):
        prune(saved_llama, tmp_path / "other", 99)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


@pytest.mark.slow
def test_smollm2_pruned_generates_the_same_with_and_without_cache(smollm2, tmp_path):
    prune(smollm2, tmp_path / "small", 20)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    cached, uncached = (
        model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert cached.tolist() == uncached.tolist()
