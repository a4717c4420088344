"""Directories with a GGUF file load as the model of config.json; lone files are refused where that loses something."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from gguf_models import export, model_of, save, tokenizer_for
from transformers import AutoModelForCausalLM

from kdkit.api import Model
from kdkit.api.errors import ModelError
from kdkit.models.gguf_import import read_gguf
from kdkit.models.load import load_model, load_tokenizer

ROWS = 420
IDS = torch.arange(3, 35).unsqueeze(0)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
TURNING = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
}
MODELS = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3}),
    "linear": ("llama", {"rope_parameters": LINEAR}),
    "qwen2": ("qwen2", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "gemma3 pruned": ("gemma3_text", {"layer_types": ["full_attention", *["sliding_attention"] * 2]}),
    "gemma3 capped": ("gemma3_text", {"final_logit_softcapping": 20.0}),
    "gemma3 turning": ("gemma3_text", {"rope_parameters": TURNING}),
    "gemma2 capped": ("gemma2", {"attn_logit_softcapping": 20.0}),
}
LOSSY = {
    "llama with biases": r"biases of llama \(blk.0.attn_k.bias\)",
    "llama 3": "scaled rotary frequencies",
    "linear": r"rotary scaling \(linear\)",
    "gemma": "Gemma 1",
    "gemma3 pruned": "gemma3.attention.sliding_window_pattern",
    "gemma3 capped": "gemma3.final_logit_softcapping",
    "gemma3 turning": "gemma3.rope.freq_base_swa",
    "gemma2 capped": "gemma2.attn_logit_softcapping",
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Source and GGUF directory of a kind of model, made once."""
    made = {}

    def make(name):
        if name not in made:
            kind, changes = MODELS[name]
            root = tmp_path_factory.mktemp("gguf")
            source = save(model_of(kind, ROWS, **changes), tokenizer_for(kind), root / "source")
            export(source, root / "out", type="F16")
            made[name] = source, root / "out"
        return made[name]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_what_was_exported_is_what_is_loaded(name, exported):
    source, directory = exported(name)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    state = {key: value.half().float() if value.dim() > 1 else value for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    artifact = Model(path=directory, format="gguf")
    loaded = load_model(artifact, dtype=torch.float32)
    for key, value in loaded.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=2e-7 if "norm" in key else 0, msg=key)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert len(load_tokenizer(artifact)) > 0


def test_tokens_that_end_an_answer_are_those_of_the_source(tmp_path):
    """A chat model has several, which config.json does not say."""
    model = model_of("llama", ROWS)
    model.generation_config.eos_token_id = [2, 0]
    export(save(model, tokenizer_for("llama"), tmp_path / "source"), tmp_path / "out")
    loaded = load_model(Model(path=tmp_path / "out", format="gguf"), dtype=torch.float32)
    assert loaded.generation_config.eos_token_id == [2, 0]
    assert loaded.config.eos_token_id == 2


def test_it_is_loaded_in_the_precision_that_was_asked_for(exported):
    artifact = Model(path=exported("llama")[1], format="gguf")
    exact, rounded = (load_model(artifact, dtype=dtype).state_dict() for dtype in (torch.float32, torch.bfloat16))
    assert all(torch.equal(rounded[name], value.bfloat16()) for name, value in exact.items())


@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen2", "gemma2", "gemma3"])
def test_a_lone_file_of_which_nothing_is_dropped_is_read(name, exported):
    _, directory = exported(name)
    (file,) = directory.glob("*.gguf")
    model = load_model(Model(path=directory, format="gguf"), dtype=torch.float32)
    torch.testing.assert_close(read_gguf(file)[0](IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LOSSY)
def test_a_lone_file_of_which_transformers_drops_parts_is_refused(name, exported):
    (file,) = exported(name)[1].glob("*.gguf")
    with pytest.raises(ModelError, match=f"does not read {LOSSY[name]}") as error:
        read_gguf(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "is a model of 'llama'"),
        ({"num_hidden_layers": 4}, "lacks blk.3"),
        ({"num_hidden_layers": 2}, "has blk.2.*no part of the model"),
        ({"intermediate_size": 128}, r"config.json says \[128, 64\]"),
        ({"attention_bias": True}, r"lacks blk.0.attn_\w+.bias"),
    ],
    ids=str,
)
def test_a_configuration_of_another_model_is_refused(changes, said, exported, tmp_path):
    directory = shutil.copytree(exported("llama")[1], tmp_path / "copy")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=said):
        load_model(Model(path=directory, format="gguf"), dtype=torch.float32)


def test_a_broken_file_is_one_line(exported, tmp_path):
    directory = shutil.copytree(exported("llama")[1], tmp_path / "copy")
    (file,) = directory.glob("*.gguf")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match="GGUF file cannot be loaded") as error:
        load_model(Model(path=directory, format="gguf"), dtype=torch.float32)
    assert "\n" not in str(error.value)
