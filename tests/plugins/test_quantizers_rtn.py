from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from kdkit.api.artifacts import Model
from kdkit.api.errors import ModelError, Stopped
from kdkit.models.load import load_model
from kdkit.models.quantized.checkpoint import read_checkpoint
from kdkit.models.quantized.grid import GridSettings
from kdkit.models.quantized.layers import quantizable
from kdkit.models.quantized.linear import round_to_nearest
from kdkit.plugins.quantizers.rtn import RtnQuantizer
from kdkit.plugins.quantizers.rtn_plugin import RtnParams
from kdkit.testing.conformance import QuantizerConformance
from kdkit.testing.conformance.quantizer import PretendContext
from kdkit.testing.tiny import save_tiny_model, tiny_model, tiny_tokenizer


def quantizer(**params):
    return RtnQuantizer(RtnParams.model_validate_json(json.dumps(params)))


class TestSymmetric(QuantizerConformance):
    def build(self):
        return quantizer()


class TestAsymmetric8(QuantizerConformance):
    tolerance = 0.05

    def build(self):
        return quantizer(bits=8, sym=False, mse=2.4, group_size=-1)


@pytest.fixture
def ctx(tmp_path):
    for name in ("out", "checkpoints", "run"):
        (tmp_path / name).mkdir()
    return PretendContext(out=tmp_path / "out", checkpoints=tmp_path / "checkpoints", run_dir=tmp_path / "run")


@pytest.mark.parametrize(("sym", "mse"), [(True, 0.0), (False, 0.0), (True, 2.4)])
def test_every_weight_is_the_nearest_of_its_group(ctx, tmp_path, sym, mse):
    source = save_tiny_model(tmp_path / "m", tied=False)
    info = quantizer(bits=4, group_size=16, sym=sym, mse=mse).quantize(source, [], ctx.out / "q", ctx)
    form, layers = read_checkpoint(ctx.out / "q")
    assert (form.bits, form.group_size, form.sym, form.desc_act) == (4, 16, sym, False)
    assert form.version == (1 if sym else 2)
    originals = quantizable(tiny_model(tied=False), lm_head=False)
    assert list(info.layer_errors) == list(originals)
    assert set(layers) == set(originals)
    for name, layer in originals.items():
        want = round_to_nearest(layer.weight, GridSettings(4, sym, mse), 16).dequantized(torch.float32)
        got = layers[name].dequantized(torch.float32)
        assert torch.equal(got, want)
        error = float((want - layer.weight.detach()).square().sum() / layer.weight.detach().square().sum())
        assert info.layer_errors[name] == pytest.approx(error, rel=1e-5)
        assert 0.001 < error < 0.02
    assert (info.bits, info.group_size) == (4, 16)


def test_auto_takes_32_here_and_says_so(ctx, tmp_path):
    info = quantizer().quantize(save_tiny_model(tmp_path / "m"), [], ctx.out / "q", ctx)
    assert info.group_size == 32
    assert ctx.lines == ["rounding 14 layers to 4 bits, group_size 32"]


def test_the_head_on_request(ctx, tmp_path):
    source = save_tiny_model(tmp_path / "m", tied=False, vocab=264)
    quantizer(lm_head=True).quantize(source, [], ctx.out / "q", ctx)
    form, layers = read_checkpoint(ctx.out / "q")
    assert form.lm_head
    assert "lm_head" in layers
    model = load_model(Model(path=ctx.out / "q", format="gptq"), dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, layers["lm_head"].dequantized(torch.float32))


@pytest.mark.parametrize(
    ("params", "tied", "said"),
    [
        ({"lm_head": True}, True, "embedding itself"),
        ({"group_size": 48}, True, r"group_size 48 does not divide the input widths of the layers \(32, 64\)"),
        ({"lm_head": True}, False, "259 outputs by 32 inputs of 4 bits do not fill"),
    ],
)
def test_refusals_leave_nothing(ctx, tmp_path, params, tied, said):
    source = save_tiny_model(tmp_path / "m", tied=tied)
    with pytest.raises(ModelError, match=said):
        quantizer(**params).quantize(source, [], ctx.out / "q", ctx)
    assert not any(ctx.out.iterdir())


def test_weights_that_are_not_finite_are_refused_by_name(ctx, tmp_path):
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match="not finite") as caught:
        quantizer().quantize(tmp_path / "m", [], ctx.out / "q", ctx)
    assert caught.value.where == "model.layers.1.mlp.up_proj"
    assert not any(ctx.out.iterdir())


def test_a_stop_leaves_nothing(ctx, tmp_path):
    ctx.stops = True
    with pytest.raises(Stopped, match=r"stopped before model\.layers\.0\.self_attn\.q_proj"):
        quantizer().quantize(save_tiny_model(tmp_path / "m"), [], ctx.out / "q", ctx)
    assert not any(ctx.out.iterdir())


@pytest.mark.parametrize("tied", [True, False])
def test_qwen2_keeps_its_biases(ctx, tmp_path, tied):
    config = Qwen2Config(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    quantizer(bits=8).quantize(tmp_path / "m", [], ctx.out / "q", ctx)
    loaded = load_model(Model(path=ctx.out / "q", format="gptq"), dtype=torch.float32)
    got, want = loaded.model.layers[0].self_attn.q_proj.bias, model.model.layers[0].self_attn.q_proj.bias
    assert torch.equal(got, want.half().float())
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        gap = (loaded(ids).logits - model(ids).logits).abs().max() / model(ids).logits.abs().max()
    assert gap < 0.03
