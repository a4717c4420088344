from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB, make_llama, make_tokenizer
from transformers import AutoConfig

from kdkit.api.artifacts import Model
from kdkit.api.errors import EnvironmentUnmet, ModelError
from kdkit.models.load import check_same_vocabulary, load_model, load_tokenizer, vocabulary
from kdkit.models.locate import fingerprint, model_format


@pytest.fixture
def copy(saved_llama, tmp_path) -> Path:
    return Path(shutil.copytree(saved_llama, tmp_path / "copy"))


def change_config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_load_for_inference(saved_llama):
    model = load_model(Model(path=saved_llama), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"


def test_load_for_training(saved_llama):
    model = load_model(Model(path=saved_llama), dtype=torch.float32, train=True)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    want = make_llama().state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())


def test_keep_layers_is_applied(saved_llama):
    model = load_model(Model(path=saved_llama, keep_layers="every-2nd"), dtype=torch.float32)
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    want = make_llama().model.layers[4].mlp.up_proj.weight
    assert torch.equal(model.model.layers[2].mlp.up_proj.weight, want)
    with pytest.raises(ModelError, match="keep_layers cannot be 9"):
        load_model(Model(path=saved_llama, keep_layers=9), dtype=torch.float32)


def test_attention_is_not_what_the_file_asks_for(copy):
    change_config(copy, _attn_implementation="flash_attention_2")
    assert load_model(Model(path=copy), dtype=torch.float32).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("kind", "said"),
    [("adapter", "format 'adapter'"), ("gptq", "is not quantised"), ("gguf", "has 0 GGUF files")],
)
def test_a_directory_of_another_format_is_refused(kind, said, saved_llama):
    with pytest.raises(ModelError, match=said):
        load_model(Model(path=saved_llama, format=kind), dtype=torch.float32)


def test_a_gguf_file_is_dequantised(saved_llama, tmp_path, gguf_writer):
    directory = tmp_path / "gguf"
    shutil.copytree(saved_llama, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    gguf_writer(make_llama(), directory / "model.gguf")
    assert model_format(directory) == "gguf"
    artifact = Model(path=directory, format="gguf")
    model, plain = (load_model(one, dtype=torch.float32) for one in (artifact, Model(path=saved_llama)))
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    assert load_model(artifact, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert len(load_tokenizer(artifact)) == len(make_tokenizer())
    before = fingerprint(directory)
    with (directory / "model.gguf").open("ab") as file:
        file.write(b"x")
    assert fingerprint(directory) != before
    shutil.copyfile(directory / "model.gguf", directory / "other.gguf")
    with pytest.raises(ModelError, match="has 2 GGUF files"):
        load_model(artifact, dtype=torch.float32)


@pytest.fixture
def reports():
    """What transformers logs."""
    records: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    handler = Handler()
    logging.getLogger("transformers").addHandler(handler)
    yield records
    logging.getLogger("transformers").removeHandler(handler)


def truncate(path: Path) -> None:
    os.truncate(path / "model.safetensors", 5000)


BREAKS = {
    "no directory": (shutil.rmtree, "no such directory"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "safetensors"),
    "cut weights": (truncate, "cannot be loaded"),
    "config is not JSON": (lambda path: (path / "config.json").write_text("{"), "cannot be loaded"),
    "unknown type": (lambda path: change_config(path, model_type="martian"), "martian"),
    "not a language model": (lambda path: change_config(path, model_type="vit"), "cannot be loaded"),
    "wrong type of value": (lambda path: change_config(path, num_attention_heads="x"), "num_attention_heads"),
    "another shape": (lambda path: change_config(path, hidden_size=16, head_dim=8), "cannot be loaded"),
    "layers that are not there": (lambda path: change_config(path, num_hidden_layers=7), r"lack model\.layers\.6"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_model_is_one_line(case, copy, reports):
    change, says = BREAKS[case]
    change(copy)
    with pytest.raises(ModelError, match=says) as caught:
        load_model(Model(path=copy, name="student"), dtype=torch.float32)
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)
    assert reports == []  # no report of transformers around the line


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "", '{"version": "1.0"}', '{"version": "1.0", "added_tokens": [], "model": {"type": "Nope"}}'],
)
def test_a_broken_tokenizer_is_one_line(content, copy):
    (copy / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded") as caught:
        load_tokenizer(Model(path=copy))
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_an_unmet_environment(copy):
    change_config(copy, quantization_config={"quant_method": "compressed-tensors"})
    with pytest.raises(EnvironmentUnmet, match="needs a package"):
        load_model(Model(path=copy), dtype=torch.float32)


REMOTE = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "martian"
class Martian(LlamaForCausalLM):
    config_class = Config
"""


def test_code_of_a_model_runs_only_when_it_is_trusted(copy, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    auto = {"AutoConfig": "martian.Config", "AutoModelForCausalLM": "martian.Martian"}
    change_config(copy, model_type="martian", auto_map=auto)
    (copy / "martian.py").write_text(REMOTE)
    with pytest.raises(ModelError):
        load_model(Model(path=copy), dtype=torch.float32)
    assert not list(tmp_path.rglob("ran"))
    loaded = load_model(Model(path=copy, trust_remote_code=True), dtype=torch.float32)
    assert type(loaded).__name__ == "Martian"


def test_vocabulary_counts_rows_and_tokens(saved_llama):
    tokenizer = load_tokenizer(Model(path=saved_llama))
    model = make_llama(vocab_size=VOCAB + 20)
    found = vocabulary(tokenizer, model)
    assert (found.size, found.tokens) == (VOCAB + 20, VOCAB)
    assert vocabulary(tokenizer, model.config) == found
    assert vocabulary(tokenizer, AutoConfig.from_pretrained(saved_llama)).size == VOCAB


def test_padded_heads_share_the_narrower_width():
    tokenizer = make_tokenizer()
    narrow, wide = (vocabulary(tokenizer, make_llama(vocab_size=VOCAB + extra)) for extra in (0, 64))
    assert check_same_vocabulary(narrow, wide) == check_same_vocabulary(wide, narrow) == VOCAB


def test_an_added_token_makes_another_vocabulary():
    student = vocabulary(make_tokenizer(), make_llama())
    teacher = vocabulary(make_tokenizer(extra=("<think>",)), make_llama(vocab_size=VOCAB + 9))
    with pytest.raises(ModelError) as caught:
        check_same_vocabulary(student, teacher)
    text = str(caught.value)
    assert "\n" not in text
    assert f"student {VOCAB:,} tokens and {VOCAB:,} logits" in text
    assert f"teacher {VOCAB + 1:,} tokens and {VOCAB + 9:,} logits" in text
    assert "share" in text


def test_swapped_ids_make_another_vocabulary():
    """As many tokens and the same ones, but with other ids."""

    class Swapped:
        def __init__(self) -> None:
            self.map = make_tokenizer().get_vocab()
            self.map["a"], self.map["b"] = self.map["b"], self.map["a"]

        def get_vocab(self):
            return self.map

        def __len__(self):
            return len(self.map)

    model = make_llama()
    with pytest.raises(ModelError, match="different vocabularies"):
        check_same_vocabulary(vocabulary(make_tokenizer(), model), vocabulary(Swapped(), model))
