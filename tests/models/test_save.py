from __future__ import annotations

import errno
import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_llama, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdkit.api.errors import EnvironmentUnmet, ModelError, StageError
from kdkit.models.locate import check_directory
from kdkit.models.save import read_provenance, save_model

IDS = torch.arange(3, 15).unsqueeze(0)
FACTS = {"trained_tokens": 1234, "parameters": 5}


def save(model, dest, dtype=torch.bfloat16, card=None, facts=FACTS):
    save_model(model, make_tokenizer(), dest, dtype=dtype, card=card, provenance=facts)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saved_as_asked_and_loaded_by_plain_transformers(tied, dtype, tmp_path):
    model = make_llama(tie_word_embeddings=tied)
    save(model, tmp_path / "deep" / "m", dtype=dtype)
    stored = load_file(tmp_path / "deep" / "m" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert ("lm_head.weight" in stored) is not tied
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "m", output_loading_info=True)
    assert loaded.dtype == dtype  # from config.json, which save_pretrained fills from the model in memory
    assert not any(info.values())
    want = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, want[name]) for name, tensor in loaded.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "deep" / "m").chat_template
    check_directory(tmp_path / "deep" / "m")


def test_the_model_in_memory_does_not_change(tmp_path):
    model = make_llama(tie_word_embeddings=True).train()
    before = model(IDS).logits
    save(model, tmp_path / "m")
    assert model.training
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(IDS).logits, before)


def test_a_second_save_replaces_the_first(tmp_path):
    save(make_llama(seed=0), tmp_path / "m")
    save(make_llama(seed=1), tmp_path / "m", dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(loaded.lm_head.weight, make_llama(seed=1).lm_head.weight)


def test_card_and_provenance(tmp_path):
    save(make_llama(), tmp_path / "m", card="# Card é\n")
    assert (tmp_path / "m" / "README.md").read_text(encoding="utf-8") == "# Card é\n"
    assert json.loads((tmp_path / "m" / "kdkit.json").read_text()) == FACTS == read_provenance(tmp_path / "m")


def test_no_card_is_no_file(tmp_path):
    save(make_llama(), tmp_path / "m")
    assert not (tmp_path / "m" / "README.md").exists()


def test_provenance_of_a_model_from_elsewhere(tmp_path):
    assert read_provenance(tmp_path) == {}
    for content in ("{", "[1]"):
        (tmp_path / "kdkit.json").write_text(content)
        with pytest.raises(ModelError, match=r"kdkit\.json.*JSON"):
            read_provenance(tmp_path)


def test_others_can_read_the_files(tmp_path):
    before = os.umask(0o022)
    try:
        save(make_llama(), tmp_path / "m", card="x")
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "m").iterdir()}
    assert set(modes.values()) == {0o644}
    assert "model.safetensors" in modes


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_before_anything_is_written(value, tmp_path):
    model = make_llama()
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, :2] = value
    with pytest.raises(StageError, match=r"layers\.3\.mlp\.up_proj\.weight has 2 values that are not finite"):
        save(model, tmp_path / "m")
    assert not any((tmp_path / "m").glob("*"))


def test_weights_too_large_for_the_file_are_refused(tmp_path):
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    with pytest.raises(StageError, match="1 values too large for float16"):
        save(model, tmp_path / "m", dtype=torch.float16)
    save(model, tmp_path / "m", dtype=torch.bfloat16)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(EnvironmentUnmet, match="not enough room") as caught:
        save(make_llama(), tmp_path / "m")
    assert str(tmp_path / "m") in str(caught.value)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentUnmet, match="cannot be written"):
        save(make_llama(), tmp_path / "file" / "m")
