from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdkit.api.artifacts import Model
from kdkit.api.errors import KdkitError, ModelError
from kdkit.models.load import load_model
from kdkit.models.locate import model_format
from kdkit.models.pretrained import read_model
from kdkit.models.quantized import tensors as tensors_module
from kdkit.models.quantized.checkpoint import GptqFormat, read_checkpoint, write_checkpoint
from kdkit.models.quantized.grid import GridSettings
from kdkit.models.quantized.layers import quantizable
from kdkit.models.quantized.linear import QuantizedLinear, round_to_nearest
from kdkit.models.quantized.tensors import weight_bytes, weight_files
from kdkit.testing.tiny import save_tiny_model

IDS = torch.arange(3, 40).unsqueeze(0)
UP = "model.layers.0.mlp.up_proj"


def rounded(source, *, sym=True):
    layers = quantizable(read_model(source, dtype=torch.float32), lm_head=False)
    return {name: round_to_nearest(layer.weight, GridSettings(4, sym, 0.0), 32) for name, layer in layers.items()}


def form(*, sym=True, **changes) -> GptqFormat:
    return GptqFormat.standard(sym=sym, **({"bits": 4, "group_size": 32} | changes))


def load(path, dtype=torch.float32):
    return load_model(Model(path=path, format=model_format(path)), dtype=dtype)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("m") / "source", tied=True)


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("q") / "model"
    write_checkpoint(source, out, rounded(source), form(), write_head=False)
    return out


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sym", [True, False])
def test_round_trip(tmp_path, tied, sym):
    source = save_tiny_model(tmp_path / "source", tied=tied, layers=1)
    linears = rounded(source, sym=sym)
    size = write_checkpoint(source, tmp_path / "q", linears, form(sym=sym), write_head=False)
    assert size == weight_bytes(tmp_path / "q") == (tmp_path / "q" / "model.safetensors").stat().st_size
    stored, layers = read_checkpoint(tmp_path / "q")
    assert stored == form(sym=sym)
    assert stored.version == (1 if sym else 2)
    for name, linear in linears.items():
        assert torch.equal(layers[name].dequantized(torch.float32), linear.dequantized(torch.float32))
    want = read_model(source, dtype=torch.float32)
    for parameter in want.parameters():  # and not the buffers, which no file has
        parameter.data = parameter.data.half().float()
    for name, linear in linears.items():
        want.get_submodule(name).weight.data = linear.dequantized(torch.float32)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "q")(IDS).logits, want(IDS).logits)
    assert ("lm_head.weight" in load_file(tmp_path / "q" / "model.safetensors")) is not tied


def test_what_other_readers_look_for(written, source):
    config = json.loads((written / "config.json").read_text())
    stored = config.pop("quantization_config")
    assert stored == json.loads((written / "quantize_config.json").read_text())
    assert {key: stored[key] for key in ("quant_method", "bits", "group_size", "sym", "desc_act", "lm_head")} == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
    }
    assert (stored["checkpoint_format"], stored["format"], stored["pack_dtype"]) == ("gptq", "gptq", "int32")
    before = json.loads((source / "config.json").read_text())
    assert config == before | {"dtype": "float16"}
    tensors = load_file(written / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int32, torch.float16}
    assert f"{UP}.weight" not in tensors
    assert {name.rpartition(".")[2] for name in tensors if name.startswith(UP)} == {
        "qweight", "qzeros", "scales", "g_idx",
    }  # fmt: skip
    assert (written / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (written / "config.json").stat().st_mode & 0o777 == (source / "config.json").stat().st_mode & 0o777


def test_the_tied_head_on_request(source, tmp_path):
    write_checkpoint(source, tmp_path / "q", rounded(source), form(), write_head=True)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    model = load(tmp_path / "q")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_groups_that_are_not_neighbours(source, tmp_path):
    linears = rounded(source)
    linear = linears[UP]
    mixed = torch.tensor([1, 0] * 16, dtype=torch.int32)
    twice = {"scales": linear.scales.repeat(1, 2), "zeros": linear.zeros.repeat(1, 2)}
    twice["scales"][:, 1] *= 2
    linears[UP] = QuantizedLinear(codes=linear.codes, g_idx=mixed, bits=4, **twice)
    write_checkpoint(source, tmp_path / "q", linears, form(group_size=16, desc_act=True), write_head=False)
    weight = load(tmp_path / "q").get_submodule(UP).weight
    assert torch.equal(weight, linears[UP].dequantized(torch.float32))
    assert torch.equal(weight[:, 1::2], linear.dequantized(torch.float32)[:, 1::2])
    assert torch.equal(weight[:, ::2], 2 * linear.dequantized(torch.float32)[:, ::2])


def test_several_files(source, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors_module, "_SHARD_BYTES", 8_000)
    write_checkpoint(source, tmp_path / "q", rounded(source), form(), write_head=False)
    files = sorted(file.name for file in (tmp_path / "q").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "q" / "model.safetensors.index.json").read_text())
    stored = {name: file for file in files for name in load_file(tmp_path / "q" / file)}
    assert index["weight_map"] == stored
    total = sum(
        tensor.numel() * tensor.element_size() for file in files for tensor in load_file(tmp_path / "q" / file).values()
    )
    assert index["metadata"]["total_size"] == total
    monkeypatch.undo()
    write_checkpoint(source, tmp_path / "one", rounded(source), form(), write_head=False)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "q")(IDS).logits, load(tmp_path / "one")(IDS).logits)


def test_a_dequantised_model_forgets_that_it_was_one(written, tmp_path):
    model = load(written, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == 258
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert model_format(tmp_path / "plain") == "full"


def test_tokens_that_end_an_answer_are_those_of_the_source(source, tmp_path):
    """A chat model has several, which config.json does not say."""
    shutil.copytree(source, tmp_path / "s")
    file = tmp_path / "s" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [258, 257]}))
    write_checkpoint(tmp_path / "s", tmp_path / "q", rounded(source), form(), write_head=False)
    model = load(tmp_path / "q")
    assert model.generation_config.eos_token_id == [258, 257]
    assert model.config.eos_token_id == 258


def test_a_quantised_source_is_refused(written, tmp_path):
    with pytest.raises(ModelError, match=r"is already quantised \(gptq\)"):
        write_checkpoint(written, tmp_path / "q", {}, form(), write_head=False)
    assert not (tmp_path / "q").exists()


def broken_name(linears):
    return {f"{name}x" if name == UP else name: linear for name, linear in linears.items()}


def broken_shape(linears):
    return linears | {UP: linears["model.layers.0.mlp.down_proj"]}


class _Failing(dict):
    def __getitem__(self, name):
        if name == UP:
            raise OSError(28, "No space left on device")
        return super().__getitem__(name)


@pytest.mark.parametrize(
    ("change", "changes", "said"),
    [
        (broken_name, {}, rf"has no tensor {UP}x\.weight"),
        (broken_shape, {}, r"\[32, 64\] codes of 4 bits for a weight of shape \[64, 32\]"),
        (dict, {"bits": 8}, "codes of 4 bits for a weight"),
        (_Failing, {}, "not enough room on the disk"),
    ],
)
def test_what_does_not_fit_leaves_nothing(source, tmp_path, change, changes, said):
    with pytest.raises(KdkitError, match=said):
        write_checkpoint(source, tmp_path / "x" / "q", change(rounded(source)), form(**changes), write_head=False)
    assert not list((tmp_path / "x").glob("*"))
    assert not list((tmp_path / "x").glob(".*"))


def test_asymmetric_needs_version_2(source, tmp_path):
    odd = GptqFormat(bits=4, group_size=32, sym=False, version=1)
    with pytest.raises(ModelError, match="gptq_v2"):
        write_checkpoint(source, tmp_path / "q", rounded(source, sym=False), odd, write_head=False)


def test_values_beyond_float16_are_refused(tmp_path):
    source = save_tiny_model(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not finite in float16") as caught:
        write_checkpoint(source, tmp_path / "q", rounded(source), form(), write_head=False)
    assert caught.value.where == "model.norm.weight"
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("names", [{"lm_head"}, {"lm_head", "model.embed_tokens"}])
def test_a_tied_table_is_stored_once_whatever_it_is_called(source, written, tmp_path, names, head):
    tensors = tensors_of(source)
    table = tensors.pop("model.embed_tokens.weight")
    shutil.copytree(source, tmp_path / "s")
    replaced(tmp_path / "s", tensors | {f"{name}.weight": table.clone() for name in names})
    write_checkpoint(tmp_path / "s", tmp_path / "q", rounded(source), form(), write_head=head)
    extra = {"lm_head.weight"} if head else set()
    assert tensors_of(tmp_path / "q").keys() == tensors_of(written).keys() | extra
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "q")(IDS).logits, load(written)(IDS).logits)


def test_another_copy_of_the_weights_beside_the_model_is_not_taken_along(source, tmp_path):
    """Some models lie twice on the Hub, the second time in the names of another program."""
    shutil.copytree(source, tmp_path / "source")
    save_file({"layers.0.wq.weight": torch.zeros(64, 64)}, tmp_path / "source" / "consolidated.safetensors")
    assert weight_bytes(tmp_path / "source") == weight_bytes(source)
    for path, out in ((source, "a"), (tmp_path / "source", "b")):
        write_checkpoint(path, tmp_path / out, rounded(source), form(), write_head=False)
    assert tensors_of(tmp_path / "b").keys() == tensors_of(tmp_path / "a").keys()


def test_the_files_of_an_index_are_the_model(source, tmp_path):
    tensors = list(tensors_of(source).items())
    shutil.copytree(source, tmp_path / "s", ignore=shutil.ignore_patterns("*.safetensors"))
    for number, part in ((1, tensors[:5]), (2, tensors[5:]), (3, tensors[:2])):
        save_file(dict(part), tmp_path / "s" / f"m-{number}.safetensors", metadata={"format": "pt"})
    index = tmp_path / "s" / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {name: f"m-{1 + (i >= 5)}.safetensors" for i, (name, _) in enumerate(tensors)}})
    )
    assert [file.name for file in weight_files(tmp_path / "s")] == ["m-1.safetensors", "m-2.safetensors"]
    write_checkpoint(tmp_path / "s", tmp_path / "q", rounded(source), form(), write_head=False)
    for broken in ("[]", "{}", '{"weight_map": {"a": 1}}'):
        index.write_text(broken)
        with pytest.raises(ModelError, match=r"not a JSON object|no weight_map"):
            weight_bytes(tmp_path / "s")


# --- hostile checkpoints ----------------------------------------------------------------------------------------------


def edit(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 3}, "bits is 3"),
        ({"bits": 10**30}, "bits is 1000"),
        ({"bits": True}, "bits is True"),
        ({"bits": [4]}, "bits is"),
        ({"bits": 8}, "qweight is int32|qzeros is int32"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": "64"}, "group_size is '64'"),
        ({"sym": "yes"}, "sym is 'yes'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"checkpoint_format": {"a": 1}}, "checkpoint_format is"),
        ({"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
        ({"dynamic": {"+:.*": {"bits": 8}}}, "dynamic"),
    ],
)
def test_descriptions_that_cannot_be(copy, changes, said):
    edit(copy, **changes)
    with pytest.raises(ModelError, match=said) as caught:
        load(copy)
    assert len(str(caught.value)) < 500


def tensors_of(path):
    return load_file(path / "model.safetensors")


def replaced(path, tensors):
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("part", "tensor", "said"),
    [
        ("qweight", torch.zeros(4, 63, dtype=torch.int32), "qweight is int32 of shape"),
        ("qweight", torch.zeros(5, 64, dtype=torch.int32), "g_idx is int32 of shape"),
        ("qzeros", torch.zeros(2, 8, dtype=torch.int32), "qzeros is int32"),
        ("scales", torch.full((1, 64), float("inf"), dtype=torch.float16), "not finite"),
        ("g_idx", torch.full((32,), 7, dtype=torch.int32), "g_idx from 7 to 7"),
        ("g_idx", torch.full((32,), -(2**31), dtype=torch.int32), "g_idx from -2147483648"),
        ("qzeros", None, "has no qzeros"),
    ],
)
def test_tensors_that_do_not_fit_are_named(copy, part, tensor, said):
    tensors = tensors_of(copy)
    if tensor is None:
        del tensors[f"{UP}.{part}"]
    else:
        tensors[f"{UP}.{part}"] = tensor
    replaced(copy, tensors)
    with pytest.raises(ModelError, match=said) as caught:
        load(copy)
    assert UP in str(caught.value.where)


def test_a_layer_that_the_model_has_not(copy):
    tensors = tensors_of(copy)
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        tensors[f"model.layers.7.mlp.up_proj.{part}"] = tensors[f"{UP}.{part}"].clone()
    replaced(copy, tensors)
    with pytest.raises(ModelError, match="no such linear layer"):
        load(copy)


def test_a_layer_that_is_absent(copy):
    tensors = {name: tensor for name, tensor in tensors_of(copy).items() if not name.startswith(UP)}
    replaced(copy, tensors)
    with pytest.raises(ModelError, match=rf"the weights lack {UP}\.weight"):
        load(copy)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 2**40, "head_dim": 8}, "configuration asks for"),
        ({"num_hidden_layers": 10**9}, "config.json has 1000000000 layers"),
        ({"intermediate_size": 128}, r"has shape \[32, 64\], and the configuration asks for \[32, 128\]"),
        ({"model_type": "nonsense"}, "cannot be loaded"),
    ],
)
def test_configurations_that_claim_too_much(copy, changes, said):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=said):
        load(copy)


def test_no_codes_at_all(copy, source):
    shutil.copyfile(source / "model.safetensors", copy / "model.safetensors")
    with pytest.raises(ModelError, match="has no quantised layers"):
        load(copy)


def test_files_that_are_cut_off(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="cannot be read"):
        load(copy)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_no_configuration(copy, text):
    (copy / "config.json").write_text(text)
    with pytest.raises(ModelError):
        read_checkpoint(copy)


def test_the_description_in_a_file_of_its_own(copy):
    config = json.loads((copy / "config.json").read_text())
    stored = config.pop("quantization_config")
    (copy / "config.json").write_text(json.dumps(config))
    del stored["quant_method"]
    (copy / "quantize_config.json").write_text(json.dumps(stored))
    assert model_format(copy) == "gptq"
    load(copy)
