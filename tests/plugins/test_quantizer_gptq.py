"""The quantizer ``gptq`` from a directory and rows to a checkpoint that loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from test_gptq_sequential import Context
from transformers import OPTConfig, OPTForCausalLM

from kdkit.api import Example, Message, Model
from kdkit.api.errors import DataError, ModelError, Stopped
from kdkit.models.load import load_model
from kdkit.models.quantized.checkpoint import read_checkpoint
from kdkit.models.quantized.grid import GridSettings
from kdkit.models.quantized.layers import quantizable
from kdkit.models.quantized.linear import round_to_nearest
from kdkit.plugins.quantizers import gptq
from kdkit.plugins.quantizers.backends.peer import PeerResult
from kdkit.plugins.quantizers.gptq import GptqQuantizer, calibration_rows
from kdkit.plugins.quantizers.gptq_plugin import GPTQ, GptqParams
from kdkit.plugins.quantizers.rtn import RtnQuantizer
from kdkit.plugins.quantizers.rtn_plugin import RtnParams
from kdkit.testing.conformance import QuantizerConformance
from kdkit.testing.tiny import save_tiny_model, tiny_model, tiny_tokenizer

SECRET = "The password of the safe is swordfish"
ROWS = [
    Example(id=f"row-{i}", prompt=(Message("user", f"What is {i} + {i}?"),), completion=f"It is {2 * i}. {SECRET}.")
    for i in range(12)
]


class StageContext(Context):
    device = "cpu"

    def precision(self, requested: str) -> str:
        assert requested == "auto"
        return "fp32"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_tiny_model(root / "tied", seed=1)
    # 256 rows fill words of 32 bits, the 259 of the usual tokenizer do not; the last three tokens do not occur.
    save_tiny_model(root / "untied", seed=2, tied=False, vocab=264)
    return root


def quantise(models: Path, tmp_path: Path, name="tied", rows=ROWS, ctx=None, **params):
    ctx = ctx or StageContext(tmp_path)
    out = tmp_path / "out"
    info = GptqQuantizer(GptqParams(**params)).quantize(models / name, rows, out, ctx)
    return info, out, ctx


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"sym": False},
        {"bits": 8, "group_size": 16},
        {"bits": 2, "group_size": -1, "mse": 0.0},
        {"static_groups": False},
        {"desc_act": False, "static_groups": False, "true_sequential": False, "block_size": 8},
    ],
)
def test_the_checkpoint_is_the_model_with_less_error_than_rounding(models, tmp_path, params):
    info, out, ctx = quantise(models, tmp_path, **params)
    form, linears = read_checkpoint(out)
    assert len(linears) == 14
    assert (form.bits, form.sym) == (params.get("bits", 4), params.get("sym", True))
    assert form.version == (1 if form.sym else 2)
    assert form.group_size == info.group_size == params.get("group_size", 32)
    assert form.desc_act == (params == {"static_groups": False})
    source = load_model(Model(path=models / "tied"), dtype=torch.float32)
    loaded = load_model(Model(path=out, format="gptq"), dtype=torch.float32)
    nearest = load_model(Model(path=models / "tied"), dtype=torch.float32)
    grid = GridSettings(bits=form.bits, sym=form.sym, mse=params.get("mse", 2.4))
    for name, linear in linears.items():
        assert torch.equal(loaded.get_submodule(name).weight, linear.dequantized(torch.float32))
        rounded = round_to_nearest(source.get_submodule(name).weight, grid, form.group_size)
        nearest.get_submodule(name).weight.data = rounded.dequantized(torch.float32)
    rows = calibration_rows(ROWS, tiny_tokenizer(), max_length=512, log=lambda _text: None)
    assert divergence(source, loaded, rows) < divergence(source, nearest, rows)
    assert list(info.layer_errors) == list(info.rtn_errors) == sorted(linears, key=list(info.layer_errors).index)
    assert all(0 < info.layer_errors[name] <= info.rtn_errors[name] for name in linears)
    assert info.bytes_on_disk == (out / "model.safetensors").stat().st_size
    size = "a whole row" if form.group_size == -1 else form.group_size
    assert f"14 layers, {form.bits} bits, groups of {size}" in ctx.logs
    own, rounded = (sum(errors.values()) / 14 for errors in (info.layer_errors, info.rtn_errors))
    worst = max(info.layer_errors, key=info.layer_errors.__getitem__)
    said = f"{own:.2%} of a layer's on average, {rounded:.2%} rounded to nearest; most in {worst} "
    assert said in ctx.logs[-1]


def divergence(source, other, rows) -> float:
    total = 0.0
    with torch.no_grad():
        for row in rows:
            want, got = (m(input_ids=torch.tensor([row])).logits.log_softmax(-1) for m in (source, other))
            total += float((want.exp() * (want - got)).sum(-1).mean())
    return total


def test_no_text_of_calibration_is_in_the_checkpoint(models, tmp_path):
    _, out, ctx = quantise(models, tmp_path)
    for file in out.rglob("*"):
        assert b"swordfish" not in file.read_bytes()
    assert "swordfish" not in " ".join(ctx.logs)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["damp_percent"], config["static_groups"], config["desc_act"]) == (0.05, True, False)


def test_the_checkpoint_says_how_it_was_made(models, tmp_path):
    _, out, _ = quantise(models, tmp_path, damp_percent=0.125, true_sequential=False, desc_act=False)
    form, _ = read_checkpoint(out)
    assert (form.damp_percent, form.true_sequential, form.static_groups, form.desc_act) == (0.125, False, True, False)


def test_the_head_is_quantised_when_it_is_no_embedding(models, tmp_path):
    info, out, _ = quantise(models, tmp_path, "untied", lm_head=True)
    form, linears = read_checkpoint(out)
    assert form.lm_head
    assert list(info.layer_errors)[-1] == "lm_head"
    assert linears["lm_head"].codes.shape == (264, 32)
    assert info.layer_errors["lm_head"] < info.rtn_errors["lm_head"]
    assert "transformers puts random numbers" in info.notes[-1]
    assert RtnQuantizer(RtnParams(lm_head=True)).quantize(
        models / "untied", [], tmp_path / "rtn", StageContext(tmp_path)
    ).notes == [info.notes[-1]]
    with pytest.raises(ModelError, match="tied"):
        quantise(models, tmp_path / "tied", lm_head=True)


def test_the_head_is_written_twice_only_for_the_reader_that_needs_it(models, tmp_path):
    def names(out):
        with safe_open(out / "model.safetensors", framework="pt") as file:
            return set(file.keys())

    _, out, _ = quantise(models, tmp_path / "any")
    assert "lm_head.weight" not in names(out)
    _, out, _ = quantise(models, tmp_path / "auto-gptq", target="auto-gptq")
    assert "lm_head.weight" in names(out)


@pytest.mark.parametrize(
    ("params", "rows", "error", "text"),
    [
        ({"group_size": 48}, ROWS, ModelError, "48 does not divide"),
        ({}, [], DataError, "no row is left of 0"),
        ({}, [Example(id="a", prompt="a b")], DataError, "shorter than 8 tokens"),
    ],
)
def test_refusals_leave_nothing_behind(models, tmp_path, params, rows, error, text):
    with pytest.raises(error, match=text):
        quantise(models, tmp_path, rows=rows, **params)
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_model_is_refused(models, tmp_path):
    _, out, _ = quantise(models, tmp_path)
    with pytest.raises(ModelError, match="already quantised"):
        GptqQuantizer(GptqParams()).quantize(out, ROWS, tmp_path / "again", StageContext(tmp_path / "c"))
    assert not (tmp_path / "again").exists()


def test_layers_that_fill_no_words_are_refused_before_the_work(models, tmp_path):
    save_tiny_model(tmp_path / "odd", hidden=40)
    ctx = StageContext(tmp_path)
    with pytest.raises(ModelError, match="32-bit words"):
        GptqQuantizer(GptqParams(bits=2, group_size=-1)).quantize(tmp_path / "odd", ROWS, tmp_path / "out", ctx)
    assert ctx.steps == []


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["swordfish"])
    save_tiny_model(tmp_path / "small", tokenizer=tokenizer)
    with pytest.raises(DataError, match="token 259 is unknown to the model, which has 259"):
        quantise(tmp_path, tmp_path, "small")


def stored_without_prefix(path):
    """A checkpoint of the trunk alone, which transformers reads as the whole tied model."""
    model = tiny_model(seed=1)
    model.model.save_pretrained(path)
    model.config.save_pretrained(path)


def beyond_float16(path):
    model = tiny_model(seed=1)
    model.model.norm.weight.data[3] = 1e6
    model.save_pretrained(path)


@pytest.mark.parametrize(
    ("save", "text"), [(stored_without_prefix, "stored by other names"), (beyond_float16, "not finite in float16")]
)
def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, save, text):
    save(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    ctx = StageContext(tmp_path)
    with pytest.raises(ModelError, match=text):
        quantise(tmp_path, tmp_path, "source", ctx=ctx)
    assert ctx.steps == []
    with pytest.raises(ModelError, match=text):
        RtnQuantizer(RtnParams()).quantize(tmp_path / "source", [], tmp_path / "out", ctx)
    assert ctx.steps == []


def test_rows_are_cut_where_the_positions_of_the_model_end(tmp_path):
    """OPT has a table of positions, and no row behind its end."""
    sizes = {"vocab_size": 259, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "ffn_dim": 64}
    model = OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=48, word_embed_proj_dim=32))
    model.save_pretrained(tmp_path / "opt")
    tiny_tokenizer().save_pretrained(tmp_path / "opt")
    _, out, ctx = quantise(tmp_path, tmp_path, "opt")
    assert "calibration: rows are cut at 48 tokens, all that the model has positions for" in ctx.logs
    assert f"{len(ROWS)} rows, {48 * len(ROWS):,} tokens" in " ".join(ctx.logs)
    assert len(read_checkpoint(out)[1]) == 6
    _, _, ctx = quantise(tmp_path, tmp_path / "short", "opt", max_length=40)
    assert not any("cut at" in line for line in ctx.logs)


def backend_that_rounds(monkeypatch, name="model.layers.1.mlp.up_proj"):
    """Stands in for gptqmodel: it quantises all layers alike, and says that one of them fell back."""
    asked = []

    def work(backend, job, _ctx):
        asked.append(job)
        linears = quantizable(load_model(Model(path=job.source), dtype=torch.float32), lm_head=job.lm_head)
        grid = GridSettings(bits=job.bits, sym=job.sym, mse=0.0)
        made = {key: round_to_nearest(linear.weight, grid, job.group_size) for key, linear in linears.items()}
        return PeerResult(linears=made, program=f"{backend} 7.6.0", losses={name: 3.0}, fell_back=(name,))

    monkeypatch.setattr("kdkit.plugins.quantizers.backends.gptqmodel.ready", lambda: None)
    monkeypatch.setattr("kdkit.plugins.quantizers.backends.work.work_elsewhere", work)
    return asked


def test_another_program_gives_the_errors_of_its_weights(models, tmp_path, monkeypatch):
    asked = backend_that_rounds(monkeypatch)
    info, out, _ = quantise(models, tmp_path, backend="gptqmodel", group_size=16)
    _, linears = read_checkpoint(out)
    source = load_model(Model(path=models / "tied"), dtype=torch.float32)
    assert list(info.layer_errors) == list(asked[0].shapes)
    assert info.kept_rtn == ("model.layers.1.mlp.up_proj",)
    assert set(info.kept_rtn) <= set(info.layer_errors)
    assert info.rtn_errors == {}
    for name, linear in linears.items():
        weight = source.get_submodule(name).weight.detach()
        lost = (linear.dequantized(torch.float32) - weight).square().sum() / weight.square().sum()
        assert info.layer_errors[name] == pytest.approx(float(lost), rel=1e-5)
    assert "quantised by gptqmodel 7.6.0; the errors of its layers are of weights" in info.notes[0]


def test_another_program_is_asked_for_what_the_recipe_says(models, tmp_path, monkeypatch):
    asked = backend_that_rounds(monkeypatch)
    given = {
        "bits": 8, "sym": True, "desc_act": False, "static_groups": False, "damp_percent": 0.125,
        "true_sequential": False, "mse": 1.5, "group_size": 16, "lm_head": False,
    }  # fmt: skip
    _, out, _ = quantise(models, tmp_path, backend="gptqmodel", target="auto-gptq", **given)
    (job,) = asked
    assert {name: getattr(job, name) for name in given} == given
    assert (job.blocks, job.device, job.source) == (2, "cpu", models / "tied")
    assert job.rows == calibration_rows(ROWS, tiny_tokenizer(), max_length=512, log=lambda _text: None)
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118 (not a mapping)


def test_a_model_without_numbers_is_not_given_to_another_program(tmp_path, monkeypatch):
    """gptqmodel rounds all layers to nearest then, and goes on."""
    asked = backend_that_rounds(monkeypatch)
    model = tiny_model()
    model.model.layers[0].input_layernorm.weight.data.fill_(6e4)
    model.model.layers[0].mlp.down_proj.weight.data.fill_(3e38)
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    with pytest.raises(ModelError, match="outputs on the calibration rows are not finite"):
        quantise(tmp_path, tmp_path, "source", backend="gptqmodel")
    assert asked == []


def test_layers_that_stay_rounded_to_nearest_are_told(models, tmp_path, monkeypatch):
    monkeypatch.setattr("kdkit.plugins.quantizers.gptq_solver._factor", lambda *_args: (None, 1.0))
    info, _, ctx = quantise(models, tmp_path)
    assert len(info.kept_rtn) == 14
    assert "not positive definite" in info.notes[0]
    assert "14 of 14 layers keep rounding to nearest" in ctx.logs[-1]
    assert info.layer_errors == info.rtn_errors


def test_a_stopped_run_goes_on_and_ends_in_the_same_files(models, tmp_path):
    _, whole, _ = quantise(models, tmp_path / "whole")
    with pytest.raises(Stopped):
        quantise(models, tmp_path, ctx=StageContext(tmp_path, stop_at=8))
    assert not (tmp_path / "out").exists()
    _, out, ctx = quantise(models, tmp_path)
    assert len(ctx.steps) == 7
    for file in whole.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_are_prompt_and_answer_as_in_training_and_cut():
    logs: list[str] = []
    tokenizer = tiny_tokenizer()
    texts = [Example(id=str(size), prompt="x" * size) for size in (100, 8, 7)]
    rows = calibration_rows([*ROWS[:2], *texts], tokenizer, max_length=80, log=logs.append)
    assert [len(row) for row in rows] == [80, 80, 80, 8]
    assert tokenizer.decode(rows[0]).startswith(
        "<|im_start|>user\nWhat is 0 + 0?<|im_end|>\n<|im_start|>assistant\nIt is 0."
    )
    assert tokenizer.decode(rows[2]) == "x" * 80
    assert "4 rows, 248 tokens; dropped 1 shorter than 8 tokens" in logs[0]
    assert f"fewer than {gptq.FEW:,} tokens" in logs[1]


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_forward_passes_have_the_precision_of_the_stage(models, tmp_path, monkeypatch, precision, dtype):
    seen = []

    class Watched(gptq.Sequential):
        def __init__(self, *given):
            seen.append(given[3].compute)
            super().__init__(*given)

    monkeypatch.setattr(gptq, "Sequential", Watched)
    monkeypatch.setattr(StageContext, "precision", lambda _self, _requested: precision)
    info, _, _ = quantise(models, tmp_path)
    assert seen == [dtype]
    assert all(info.layer_errors[name] < info.rtn_errors[name] for name in info.layer_errors)


def other_weights(path):
    config = (path / "config.json").read_bytes()
    tiny_model(seed=1).half().save_pretrained(path)
    (path / "config.json").write_bytes(config)


def other_configuration(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


@pytest.mark.parametrize("change", [other_weights, other_configuration])
def test_finished_blocks_of_another_model_are_not_taken(models, tmp_path, change):
    shutil.copytree(models / "tied", tmp_path / "other")
    with pytest.raises(Stopped):
        quantise(models, tmp_path, ctx=StageContext(tmp_path, stop_at=8))
    change(tmp_path / "other")
    _, _, ctx = quantise(tmp_path, tmp_path, "other")
    assert len(ctx.steps) == 14


def test_parameters_that_no_reader_takes_are_refused():
    assert GPTQ.needs_calibration
    for params in ({"bits": 3}, {"target": "auto-gptq", "sym": False}, {"backend": "auto-gptq", "sym": False}):
        with pytest.raises(ValidationError):
            GptqParams(**params)


# --- what every quantizer has to fulfil -------------------------------------------------------------------------------


class TestGptq(QuantizerConformance):
    calibrated = True

    def build(self):
        return GptqQuantizer(GptqParams())


class TestAsymmetric(QuantizerConformance):
    calibrated = True

    def build(self):
        return GptqQuantizer(GptqParams(sym=False, bits=8, desc_act=False))
