from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny_models import make_llama, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdkit.api.errors import EnvironmentUnmet, ModelError
from kdkit.models import gguf_import
from kdkit.models.gguf_import import import_gguf

IDS = torch.arange(3, 35).unsqueeze(0)


@pytest.mark.parametrize("tied", [True, False])
def test_the_imported_model_is_the_one_in_the_file(tied, tmp_path, gguf_writer):
    model = make_llama(tie_word_embeddings=tied)
    gguf_writer(model, tmp_path / "m.gguf")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is tied
    # Only the weights: rotary frequencies are not saved and stay exact.
    model.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()})
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    pytest.importorskip("gguf")
    from tiny_models import write_gguf

    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(make_llama(rms_norm_eps=1e-5), folder / "m.gguf")
    import_gguf(folder / "m.gguf", folder / "out")
    return folder / "out"


def test_nothing_of_gguf_remains(imported):
    config = json.loads((imported / "config.json").read_text())
    assert not {"quantization_config", "_model_name_or_path", "_name_or_path"} & config.keys()
    assert config["dtype"] == "bfloat16"
    assert config["rms_norm_eps"] == 1e-5  # float32 in the file: 9.999999747378752e-06
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert sorted(file.name for file in imported.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_it_loads_without_kdkit_and_without_gguf(imported):
    code = (
        "import sys; sys.modules['gguf'] = None; sys.modules['kdkit'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"m, info = AutoModelForCausalLM.from_pretrained({str(imported)!r}, output_loading_info=True)\n"
        f"t = AutoTokenizer.from_pretrained({str(imported)!r})\n"
        "print(m.dtype, sum(map(len, info.values())), t.eos_token)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torch.bfloat16", "0", "<|im_end|>"]


def test_end_and_pad_are_those_of_the_chat(imported):
    tokenizer = AutoTokenizer.from_pretrained(imported)
    generation = AutoModelForCausalLM.from_pretrained(imported).generation_config
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert generation.eos_token_id == generation.pad_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == 64
    assert tokenizer.chat_template
    for token, token_id in (("<|endoftext|>", 0), ("<|im_start|>", 1), ("<|im_end|>", 2)):
        assert tokenizer(token, add_special_tokens=False).input_ids == [token_id]


@pytest.mark.parametrize("text", ["a\n\n1. b\n\n22. c", "x  7", "ab ab 123 4", "é\t9"])
def test_text_is_split_as_the_name_in_the_file_says(text, imported):
    assert AutoTokenizer.from_pretrained(imported)(text).input_ids == make_tokenizer()(text).input_ids


def test_the_rule_makes_a_difference(tmp_path, gguf_writer):
    gguf_writer(make_llama(num_hidden_layers=1), tmp_path / "m.gguf", pre="gpt-2")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    plain = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert plain("a\n\n1.").input_ids != make_tokenizer()("a\n\n1.").input_ids


def test_an_unknown_rule_is_refused(tmp_path, gguf_writer):
    gguf_writer(make_llama(num_hidden_layers=1), tmp_path / "m.gguf", pre="martian")
    with pytest.raises(ModelError, match="unknown rule 'martian'"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name != "xdg"] == ["m.gguf"]


def test_a_missing_weight_is_refused(tmp_path, gguf_writer):
    gguf_writer(make_llama(num_hidden_layers=2), tmp_path / "m.gguf", drop="blk.1.ffn_up.weight")
    with pytest.raises(ModelError, match=r"lacks .*layers\.1\.mlp\.up_proj"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a gguf file at all"])
def test_a_broken_file_is_one_line(content, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_no_such_file(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_without_gguf(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_import, "find_spec", lambda _: None)
    with pytest.raises(EnvironmentUnmet, match=r'pip install "kdkit\[gguf\]"'):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.slow
def test_smollm2(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.bfloat16
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=5, do_sample=False)[0])
    assert "Paris" in text
    ids = {token: tokenizer(token, add_special_tokens=False).input_ids for token in ("<|im_start|>", "<|im_end|>")}
    assert ids == {"<|im_start|>": [1], "<|im_end|>": [2]}
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == 2
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n\n1.").input_ids) == ["ĊĊ", "1", "."]


@pytest.mark.slow
def test_smollm2_chat_template(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    user = {"role": "user", "content": "Hi"}
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    chat = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for messages, system in (([user], default), ([{"role": "system", "content": "Be brief."}, user], "Be brief.")):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == f"<|im_start|>system\n{system}<|im_end|>\n{chat}"
