"""The checkpoint loads and says what it is, folding changes nothing, and uneven inputs lose less than by rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdkit
from kdkit.api import DataError, Example, Model, ModelError, QuantizedInfo, Quantizer, Stopped
from kdkit.models.load import load_model
from kdkit.models.quantized.checkpoint import read_checkpoint
from kdkit.testing.conformance import QuantizerConformance
from kdkit.testing.conformance.quantizer import PretendContext
from kdkit.testing.tiny import save_tiny_model, tiny_model, tiny_tokenizer

RECIPE = Path(__file__).parents[1] / "recipe.yaml"
ROWS = [Example(id=str(n), prompt=f"Row {n * 7919} says {n % 13}. " * 8, completion="Yes. " * 20) for n in range(16)]
IDS = torch.arange(3, 67).unsqueeze(0)


def build(**params: Any) -> Quantizer:
    built: Quantizer = kdkit.build("quantizer", "awq", **params)
    return built


def context(work: Path, **changes: Any) -> PretendContext:
    for name in ("out", "checkpoints", "run"):
        (work / name).mkdir(parents=True)
    return PretendContext(out=work / "out", checkpoints=work / "checkpoints", run_dir=work / "run", **changes)


def quantized(source: Path, work: Path, name: str = "awq", **params: Any) -> tuple[Path, QuantizedInfo]:
    ctx = context(work)
    quantizer = kdkit.build("quantizer", name, **params)
    return ctx.out / "model", quantizer.quantize(source, ROWS if name == "awq" else [], ctx.out / "model", ctx)


def logits(path: Path, form: str = "full") -> Tensor:
    with torch.no_grad():
        found: Tensor = load_model(Model(path=path, format=form), dtype=torch.float32)(IDS).logits
    return found


def uneven(directory: Path) -> Path:
    """A tiny Llama with some inputs 30 times larger than others, which meet smaller weights, as in large models."""
    model = tiny_model(hidden=64)
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            layer.input_layernorm.weight[::16] *= 30
            layer.post_attention_layernorm.weight[::16] *= 30
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                linear.weight[:, ::16] /= 20
            mlp.up_proj.weight[5::32] *= 30
            mlp.down_proj.weight[:, 5::32] /= 20
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


class TestAwq(QuantizerConformance):
    calibrated = True

    def build(self) -> Quantizer:
        return build()


class TestAwqWithZeroPoints(QuantizerConformance):
    calibrated = True

    def build(self) -> Quantizer:
        return build(sym=False, group_size=32, steps=4)


def test_uneven_inputs_lose_less_than_by_rounding_to_nearest(tmp_path: Path) -> None:
    source = uneven(tmp_path / "source")
    exact = logits(source)
    lost = {}
    for name in ("awq", "rtn"):
        out, _ = quantized(source, tmp_path / name, name)
        lost[name] = float((logits(out, "gptq") - exact).square().mean() / exact.square().mean())
    assert lost["awq"] < 0.5 * lost["rtn"]


def test_figures_are_errors_of_outputs_and_never_worse_than_rounding(tmp_path: Path) -> None:
    source = uneven(tmp_path / "source")
    _, info = quantized(source, tmp_path / "awq")
    assert set(info.layer_errors) == set(info.rtn_errors)
    assert all(info.layer_errors[name] <= 1.001 * info.rtn_errors[name] for name in info.layer_errors)
    scaled = set(info.layer_errors) - set(info.kept_rtn)
    assert {name.rpartition(".")[2] for name in scaled} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    better = [name for name in scaled if info.layer_errors[name] < 0.7 * info.rtn_errors[name]]
    assert len(better) > len(scaled) / 2
    assert all(info.layer_errors[name] == info.rtn_errors[name] for name in info.kept_rtn)


def test_the_figures_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    """A layer of the first block: its inputs do not depend on other rounded layers."""
    source = uneven(tmp_path / "source")
    out, info = quantized(source, tmp_path / "awq", search_tokens=100_000)
    rows = [torch.tensor(_ids(row))[:512] for row in ROWS]
    sums = [0.0, 0.0]
    models = [load_model(Model(path=p, format=f), dtype=torch.float32) for p, f in ((source, "full"), (out, "gptq"))]
    for row in rows:
        exact, rounded = (_outputs(model, row, "self_attn.q_proj") for model in models)
        sums[0] += float((rounded - exact).square().sum())
        sums[1] += float(exact.square().sum())
    assert info.layer_errors["model.layers.0.self_attn.q_proj"] == pytest.approx(sums[0] / sums[1], rel=1e-3)


def _ids(row: Example) -> list[int]:
    from kdkit.models.chat import ChatEncoder

    return list(ChatEncoder(tiny_tokenizer()).training(row).ids)


def _outputs(model: Any, row: Tensor, name: str) -> Tensor:
    found: list[Tensor] = []
    hook = model.model.layers[0].get_submodule(name).register_forward_hook(lambda _m, _a, out: found.append(out))
    with torch.no_grad():
        model(input_ids=row.unsqueeze(0))
    hook.remove()
    return found[0]


# --- what can carry a scale


def save(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def small(kind: str, **changes: Any) -> Any:
    import transformers

    sizes = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 512, "eos_token_id": 258, "pad_token_id": 258}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **heads, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases of a fresh model are 1 and 0, which would hide mistakes.
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.05))
            if "norm" in name and parameter.dim() == 1 and name.endswith("weight"):
                parameter[::8] *= 20
    return model


ATTENTION = {"q_proj", "k_proj", "v_proj"}
GATED = {"gate_proj", "up_proj", "down_proj"}
MODELS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "a head for each value": (lambda: small("Llama", num_key_value_heads=4), ATTENTION | GATED | {"o_proj"}),
    "heads that share values": (lambda: small("Llama", num_key_value_heads=2), ATTENTION | GATED),
    "biases": (lambda: small("Qwen2", num_key_value_heads=4), ATTENTION | GATED | {"o_proj"}),
    "norms that add one": (lambda: small("Gemma", num_key_value_heads=2, head_dim=16), ATTENTION | GATED),
    "norms after layers": (lambda: small("Olmo2", num_key_value_heads=2), {"down_proj"}),
    "layer norms, one for both halves": (
        lambda: small("Phi", num_key_value_heads=2),
        ATTENTION | {"fc1"},
    ),
    "fused layers": (lambda: small("Phi3", num_key_value_heads=2), {"qkv_proj", "gate_up_proj"}),
}


@pytest.mark.parametrize("what", MODELS)
def test_scales_are_folded_where_that_is_exact(what: str, tmp_path: Path) -> None:
    make, scaled = MODELS[what]
    source = save(make(), tmp_path / "source")
    # At 8 bits rounding hides nothing: a scale that is not folded away would be seen at once.
    out, info = quantized(source, tmp_path / "awq", bits=8, group_size=32)
    rounded, _ = quantized(source, tmp_path / "rtn", "rtn", bits=8, group_size=32)
    names = {name.rpartition(".")[2] for name in set(info.layer_errors) - set(info.kept_rtn)}
    assert names <= scaled
    assert names, "nothing is scaled"
    missing = {name.rpartition(".")[2] for name in info.layer_errors} & scaled - names
    assert len(missing) <= len(scaled) / 2, missing
    exact = logits(source)
    gap, nearest = (float((logits(path, "gptq") - exact).norm() / exact.norm()) for path in (out, rounded))
    assert gap < 2 * nearest < 0.6


def carriers(model: Any) -> dict[str, str | None]:
    from kdkit.models.quantized.layers import blocks, quantizable
    from kdkit_awq.carriers import groups_of

    model = model.eval()
    stored = dict(model.named_parameters())
    groups = groups_of(model, blocks(model), quantizable(model, lm_head=False), stored)
    kept = {name: value.clone() for name, value in stored.items()}
    found = {
        group.names[0].removeprefix("model.layers.1."): group.carrier
        and f"{group.carrier.name.removeprefix('model.layers.1.')}: {group.carrier.form}"
        for group in groups[1]
    }
    assert all(torch.equal(kept[name], value) for name, value in model.named_parameters()), "a trial left traces"
    return found


def test_carriers_are_found_by_trying() -> None:
    llama = {
        "self_attn.q_proj": "input_layernorm: factor",
        "self_attn.o_proj": "self_attn.v_proj: rows",
        "mlp.gate_proj": "post_attention_layernorm: factor",
        "mlp.down_proj": "mlp.up_proj: rows",
    }
    assert carriers(small("Llama", num_key_value_heads=4)) == llama
    assert carriers(small("Llama", num_key_value_heads=2)) == {**llama, "self_attn.o_proj": None}
    gemma = carriers(small("Gemma", num_key_value_heads=2, head_dim=16))
    assert gemma["self_attn.q_proj"] == "input_layernorm: offset"
    assert carriers(small("Phi", num_key_value_heads=2)) == {
        "self_attn.q_proj": "input_layernorm: factor",
        "self_attn.dense": None,
        "mlp.fc2": None,
    }
    assert carriers(small("Olmo2", num_key_value_heads=2))["self_attn.q_proj"] is None


def test_a_norm_is_divided_without_rounding() -> None:
    from kdkit_awq.carriers import Carrier

    for form, one in (("factor", 0.0), ("offset", 1.0)):
        norm = nn.RMSNorm(8)
        norm.weight.data = torch.tensor([0.3, -2.7, 0.0, 1.0, 60_000.0, 1e-7, 5.0, 0.01]) - one
        carrier = Carrier("norm", norm, form)
        asked = torch.tensor([0.7, 3.3, 2.0, 1.0, 0.1, 9.0, 1.1, 1e3])
        scale = carrier.exact(asked)
        divided = carrier.divided(scale)["weight"]
        # Where a factor is nothing, or has no ordinary float16 once it is divided, the scale is 1.
        assert [place for place in range(8) if scale[place] == 1] == [2, 3, 4, 5, 7]
        assert torch.equal(divided[scale == 1], norm.weight.data[scale == 1])
        near = scale != 1
        assert torch.allclose(scale[near], asked[near], rtol=1e-3)
        stored = divided.half().float() + one
        assert torch.allclose((stored * scale)[near], (norm.weight.data + one)[near], rtol=1e-6)


# --- the search


def test_scales_have_a_mean_of_one_and_bounds() -> None:
    from kdkit_awq.search import scales_of

    size = torch.tensor([1.0, 4.0, 16.0])
    assert torch.equal(scales_of(size, 0.0), torch.ones(3))
    assert torch.allclose(scales_of(size, 0.5), torch.tensor([0.5, 1.0, 2.0]))
    assert torch.allclose(scales_of(size, 1.0), torch.tensor([0.25, 1.0, 4.0]))
    dead = scales_of(torch.tensor([0.0, 0.0, 1e6]), 1.0)
    assert torch.isfinite(dead).all()
    assert dead.max() <= 1e3
    assert torch.equal(scales_of(torch.zeros(3), 0.5), torch.ones(3))


def test_the_search_takes_the_best_of_all_steps() -> None:
    from kdkit.models.quantized.grid import GridSettings
    from kdkit.models.quantized.linear import round_to_nearest
    from kdkit_awq.search import lost_output, scales_of, search

    generator = torch.Generator().manual_seed(0)
    weight, sample = torch.randn(16, 32, generator=generator), torch.randn(64, 32, generator=generator)
    sample[:, :4] *= 40
    size = sample.abs().mean(0)
    grid = GridSettings(bits=4, sym=True, mse=0.0)
    scale, alpha = search(
        [weight], size, sample, steps=4, exact=lambda s: s, rounded=lambda w: round_to_nearest(w, grid, 32)
    )
    errors = {}
    for step in range(5):
        tried = scales_of(size, step / 4)
        effective = round_to_nearest(weight * tried, grid, 32).dequantized(torch.float32) / tried
        errors[step / 4] = float((sample @ (effective - weight).T).square().sum() / (sample @ weight.T).square().sum())
    assert alpha == min(errors, key=lambda a: errors[a]) != 0
    assert lost_output(weight, round_to_nearest(weight * scale, grid, 32), sample, scale) == pytest.approx(
        errors[alpha]
    )


class Kept:
    """A weight that was rounded to itself plus ``off``."""

    def __init__(self, weight: torch.Tensor, off: float) -> None:
        self._weight, self._off = weight, off

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        return (self._weight + self._off).to(dtype)


@pytest.mark.parametrize("wanted", [0, 1, 4])
def test_the_search_tries_every_step_and_takes_the_smallest_where_nothing_is_gained(wanted: int) -> None:
    from kdkit_awq.search import search

    # Powers of 2 are undone without rounding, so that errors are exactly 0.
    weight, scales = torch.tensor([[1.0, 2.0, 3.0]]), [torch.tensor([0.5**n, 1.0, 2.0**n]) for n in range(5)]

    def rounded(scaled: torch.Tensor) -> Kept:
        """Without loss from the wanted step on."""
        step = next(n for n, scale in enumerate(scales) if torch.equal(weight * scale, scaled))
        return Kept(scaled, 0.0 if step >= wanted else 1.0)

    scale, alpha = search(
        [weight],
        torch.tensor([1 / 16, 1.0, 16.0]),
        torch.eye(3),
        steps=4,
        exact=lambda s: torch.exp2(s.log2().round()),
        rounded=rounded,  # type: ignore[arg-type]
    )
    assert alpha == wanted / 4
    assert torch.equal(scale, scales[wanted])


def test_inputs_are_measured_over_all_tokens_and_kept_for_some() -> None:
    from kdkit_awq.inputs import Inputs

    values = torch.arange(40.0).view(10, 4) - 20
    inputs = Inputs(4, torch.tensor([0, 3, 4, 9]))
    for part in values.split([4, 1, 5]):
        inputs.add(part)
    assert torch.allclose(inputs.size, values.abs().mean(0))
    assert torch.equal(inputs.sample, values[[0, 3, 4, 9]])


# --- what it refuses, and what it leaves


def test_scales_that_change_the_model_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A carrier that was wrongly taken for one must not make a broken checkpoint."""
    from kdkit_awq import carriers as implementation

    monkeypatch.setattr(implementation._Call, "unchanged", lambda *_: True)
    ctx = context(tmp_path / "work")
    with pytest.raises(ModelError, match="computes something else"):
        build().quantize(uneven(tmp_path / "source"), ROWS, ctx.out / "model", ctx)
    assert not list(ctx.out.iterdir())


def test_stops_between_groups(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")

    class After(PretendContext):
        left = 0

        def stopping(self) -> bool:
            self.left -= 1
            return self.left < 0

    for number, where in (
        (0, "measured"),
        (len(ROWS), "before model.layers.0"),
        (len(ROWS) + 5, "before model.layers.1"),
    ):
        ctx = After(**vars(context(tmp_path / str(number))))
        ctx.left = number
        with pytest.raises(Stopped, match=where):
            build().quantize(source, ROWS, ctx.out / "model", ctx)
        assert not list(ctx.out.iterdir())


def test_tokens_that_the_model_has_not_are_refused(tmp_path: Path) -> None:
    source = save(small("Llama", vocab_size=100, eos_token_id=99, pad_token_id=99), tmp_path / "source")
    ctx = context(tmp_path / "work")
    with pytest.raises(DataError, match="unknown to the model, which has 100"):
        build().quantize(source, ROWS, ctx.out / "model", ctx)


def test_inputs_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    ctx = context(tmp_path / "work")
    with pytest.raises(ModelError, match=r"model\.layers\.1\."):
        build().quantize(save(model, tmp_path / "source"), ROWS, ctx.out / "model", ctx)


def test_only_what_was_folded_differs_from_the_model(tmp_path: Path) -> None:
    from kdkit.models.quantized.tensors import StoredTensors

    source = uneven(tmp_path / "source")
    out, info = quantized(source, tmp_path / "awq")
    form, layers = read_checkpoint(out)
    assert (form.bits, form.group_size, form.sym, form.version) == (4, info.group_size, True, 1)
    assert set(layers) == set(info.layer_errors)
    with StoredTensors(source) as before, StoredTensors(out) as after:
        plain = [name for name in after.names if name in before.names]
        changed = {name for name in plain if not torch.equal(before.read(name).half(), after.read(name))}
    norms = {f"model.layers.{n}.{norm}_layernorm.weight" for n in (0, 1) for norm in ("input", "post_attention")}
    assert changed == norms
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"


def test_the_work_leaves_nothing_behind(tmp_path: Path) -> None:
    ctx = context(tmp_path / "work")
    build().quantize(save_tiny_model(tmp_path / "source"), ROWS, ctx.out / "model", ctx)
    assert not list(ctx.checkpoints.iterdir())


def test_the_recipe_compares_three_quantizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDKIT_STORE", str(tmp_path / "store"))
    source = uneven(tmp_path / "source")
    few = {f"stages.{name}.max_rows": 8 for name in ("awq", "gptq")} | {"stages.eval.data.max_rows": 4}
    result = kdkit.run(RECIPE, var={"model": str(source)}, set=few, out=tmp_path)
    assert result.ok, result.error
    found = {name: model["metrics"]["perplexity"]["value"] for name, model in result.report["models"].items()}
    assert set(found) == {"full", "rtn", "awq", "gptq"}
