"""Block after block against a reference that runs the whole model, row by row, for every group of layers."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from kdkit.api.errors import DataError, EnvironmentUnmet, ModelError, Stopped
from kdkit.models.quantized.grid import GridSettings
from kdkit.models.quantized.layers import blocks, quantizable
from kdkit.plugins.quantizers import block_pass, calls, gptq_solver
from kdkit.plugins.quantizers.calls import plan_of
from kdkit.plugins.quantizers.gptq_solver import SolverSettings, solve
from kdkit.plugins.quantizers.hessian import Hessian
from kdkit.plugins.quantizers.sequential import Sequential, SequentialSettings
from kdkit.testing.tiny import tiny_model

SOLVER = SolverSettings(
    grid=GridSettings(bits=4, sym=True, mse=0.0),
    group_size=16,
    desc_act=True,
    static_groups=True,
    damp_percent=0.05,
    block_size=128,
)
SETTINGS = SequentialSettings(
    solver=SOLVER, true_sequential=True, compute=torch.float64, device="cpu", identity="model"
)


class Context:
    """What the quantizer uses of a stage; ``killed_at`` ends everything after so many layers, ``stop_at`` asks to."""

    def __init__(self, root: Path, *, killed_at: int | None = None, stop_at: int | None = None) -> None:
        self.checkpoints = root / "checkpoints"
        self.killed_at, self.stop_at = killed_at, stop_at
        self.steps: list[tuple[int, int, dict[str, float]]] = []
        self.values: list[tuple[int, dict[str, float]]] = []
        self.logs: list[str] = []

    def log(self, message: str) -> None:
        self.logs.append(message)

    def progress(self, step: int, total: int, **values: float) -> None:
        self.steps.append((step, total, values))
        if len(self.steps) == self.killed_at:
            raise KeyboardInterrupt

    def metrics(self, values, *, step: int) -> None:
        self.values.append((step, dict(values)))

    def stopping(self) -> bool:
        return self.stop_at is not None and len(self.steps) >= self.stop_at


def make_rows(count: int = 6, *, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(250) for _ in range(rng.randint(9, 24))] for _ in range(count)]


def quantise(model, tmp_path, settings=SETTINGS, *, rows=None, lm_head=False, ctx=None):
    ctx = ctx or Context(tmp_path)
    work = Sequential(model, quantizable(model, lm_head=lm_head), rows or make_rows(), settings, ctx)
    figures = work.run()
    return {name: work.finished[name] for name in work.finished}, figures


def reference(model, groups, rows, settings=SETTINGS):
    """All rows through the whole model, one by one, for every group; ``groups`` by block."""
    model = model.to(settings.compute)
    linears = quantizable(model, lm_head=any("lm_head" in group for block in groups for group in block))
    result = {}
    for block in groups:
        for stage in [[group] for group in block] if settings.true_sequential else [block]:
            moments = {group[0]: gathered(model, linears[group[0]], rows) for group in stage}
            for group in stage:
                for name in group:
                    result[name] = solve(linears[name].weight.detach(), moments[group[0]], settings.solver)
                    linears[name].weight.data = result[name].linear.dequantized(settings.compute)
    return result


def gathered(model, linear, rows):
    inputs = []
    hook = linear.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]), use_cache=False)
    hook.remove()
    inputs = torch.cat(inputs)
    return inputs.T @ inputs / inputs.shape[0]


def same(got, want) -> None:
    assert list(got) == list(want)
    for name, linear in got.items():
        other = getattr(want[name], "linear", want[name])
        assert torch.equal(linear.codes, other.codes), name
        assert torch.equal(linear.scales, other.scales), name
        assert torch.equal(linear.g_idx, other.g_idx), name


LLAMA = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def llama_groups(model):
    def full(prefix, name):
        return f"{prefix}.{'mlp' if name.split('_')[0] in {'gate', 'up', 'down'} else 'self_attn'}.{name}"

    return [[tuple(full(prefix, name) for name in group) for group in LLAMA] for prefix, _ in blocks(model)]


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("true_sequential", [True, False])
def test_the_model_is_what_the_reference_makes_of_it(tmp_path, true_sequential):
    settings, model = replace(SETTINGS, true_sequential=true_sequential), tiny_model(tied=False)
    got, figures = quantise(tiny_model(tied=False), tmp_path, settings, lm_head=True)
    want = reference(model, [*llama_groups(model), [("lm_head",)]], make_rows(), settings)
    same(got, want)
    for layer in figures:
        assert layer.error == pytest.approx(want[layer.name].error, rel=1e-6)
        assert layer.rtn_error == pytest.approx(want[layer.name].rtn_error, rel=1e-6)
        assert layer.error < layer.rtn_error
        assert (layer.kept, layer.note) == ("gptq", None)


def other_models():
    from transformers import (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        OPTConfig,
        OPTForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    sizes = {"vocab_size": 259, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    more = {"intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2}
    qwen = Qwen2Config(**sizes, **more, num_key_value_heads=2, tie_word_embeddings=True)
    gemma = Gemma3TextConfig(
        **sizes, **more, num_key_value_heads=2, head_dim=8, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    opt = OPTConfig(**sizes, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.2)
    neox = GPTNeoXConfig(**sizes, **more, use_parallel_residual=True)
    return {"qwen2": (Qwen2ForCausalLM, qwen), "gemma3": (Gemma3ForCausalLM, gemma), "opt": (OPTForCausalLM, opt),
            "neox": (GPTNeoXForCausalLM, neox)}  # fmt: skip


GROUPS = {
    "qwen2": LLAMA,
    "gemma3": LLAMA,
    "opt": (("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",)),
    "neox": (("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)),
}


@pytest.mark.parametrize("name", GROUPS)
def test_other_architectures_need_no_code_of_their_own(tmp_path, name):
    """Biases, windows that differ from block to block, learned positions, attention and MLP side by side."""
    kind, config = other_models()[name]
    torch.manual_seed(0)
    model, copy = kind(config).eval(), kind(config).eval()
    copy.load_state_dict(model.state_dict())
    plans = plan_of(model, blocks(model), quantizable(model, lm_head=False))
    groups = [list(plan.groups) for plan in plans]
    short = [tuple(sorted(layer.rsplit(".", 1)[1] for layer in group)) for group in groups[0]]
    assert short == [tuple(sorted(group)) for group in GROUPS[name]]
    got, _ = quantise(model, tmp_path)
    want = reference(copy, groups, make_rows())
    same(got, {layer: want[layer] for layer in got})


def test_padding_batches_and_kept_outputs_change_nothing(tmp_path, monkeypatch):
    rows = make_rows(8)
    want, _ = quantise(tiny_model(), tmp_path / "a", rows=rows)
    monkeypatch.setattr(calls, "BATCH_TOKENS", 1)
    one_by_one, _ = quantise(tiny_model(), tmp_path / "b", rows=rows)
    same(one_by_one, want)
    # Room for nothing, and for what some of the rows make of a layer.
    for room in (0, 20_000):
        monkeypatch.setattr(block_pass, "KEPT_BYTES", room)
        less_kept, _ = quantise(tiny_model(), tmp_path / str(room), rows=rows[::-1])
        same(less_kept, want)


def test_what_padding_looks_like_is_never_seen(tmp_path, monkeypatch):
    """Ids that fill a row are ordinary tokens of the model; others in their place must not change anything."""
    want, _ = quantise(tiny_model(), tmp_path / "a")
    zeros = torch.zeros

    def sevens(*size, **options):
        made = zeros(*size, **options)
        return made + 7 if options.get("dtype") == torch.int64 else made

    monkeypatch.setattr(calls.torch, "zeros", sevens)
    made = calls.batches(make_rows(), "cpu")
    assert any(bool((batch.ids.flatten()[~batch.real] == 7).all()) for batch in made if batch.real is not None)
    got, _ = quantise(tiny_model(), tmp_path / "b")
    same(got, want)


def test_a_block_that_writes_to_what_its_parts_returned(tmp_path, monkeypatch):
    """Such an output is not that of its part any more, and must not be used as it in a later pass."""

    def forward(self, hidden_states, **kwargs):
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden = attended.add_(hidden_states)
        return self.mlp(self.post_attention_layernorm(hidden)).add_(hidden)

    model, copy = tiny_model(), tiny_model()
    monkeypatch.setattr(type(model.model.layers[0]), "forward", forward)
    got, _ = quantise(model, tmp_path)
    same(got, reference(copy, llama_groups(copy), make_rows()))


def work_of_layers(tmp_path, monkeypatch):
    """How often each kind of layer of a model of one block is run."""
    model = tiny_model(layers=1)
    linears = quantizable(model, lm_head=False)
    worked = dict.fromkeys(linears, 0)
    names = {linear: name for name, linear in linears.items()}
    forward = nn.Linear.forward

    def counting(self, inputs):
        worked[names[self]] += 1
        return forward(self, inputs)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    quantise(model, tmp_path)
    return {name.rsplit(".", 1)[1]: count for name, count in worked.items()}


def test_finished_layers_do_not_work_again(tmp_path, monkeypatch):
    worked = work_of_layers(tmp_path, monkeypatch)
    # Twice to look how the model works, and once for all rows, which are one batch.
    assert worked == dict.fromkeys(worked, 3)


def test_no_more_is_kept_than_there_is_room_for(tmp_path, monkeypatch):
    (batch,) = calls.batches(make_rows(), "cpu")
    # q, k and v put out 32 + 16 + 16 float64 for every token; the 32 of attention come on top.
    monkeypatch.setattr(block_pass, "KEPT_BYTES", batch.ids.numel() * 64 * 8)
    worked = work_of_layers(tmp_path, monkeypatch)
    assert {worked[name] for name in ("q_proj", "k_proj", "v_proj")} == {3}
    assert worked["o_proj"] == 5


def test_a_whole_takes_the_place_of_its_parts(tmp_path, monkeypatch):
    """Attention (32 float64 for every token) that of q, k and v (64), which leaves room for gate and up (64 each)."""
    (batch,) = calls.batches(make_rows(), "cpu")
    monkeypatch.setattr(block_pass, "KEPT_BYTES", batch.ids.numel() * (32 + 64 + 64) * 8)
    worked = work_of_layers(tmp_path, monkeypatch)
    assert worked == dict.fromkeys(worked, 3)


def test_memory_of_finished_blocks_is_given_back(tmp_path):
    model = tiny_model()
    quantise(model, tmp_path)
    assert {p.device.type for p in model.model.layers.parameters()} == {"meta"}


def test_lower_precision_computes_but_does_not_round_the_weights(tmp_path):
    """In bfloat16 activations round; a group of weights still gets the grid of the weights as they were."""
    settings = replace(SETTINGS, compute=torch.bfloat16)
    got, figures = quantise(tiny_model(), tmp_path / "a", settings)
    want, _ = quantise(tiny_model(), tmp_path / "b")
    for name, linear in got.items():
        assert torch.equal(linear.scales, want[name].scales)
        assert not torch.equal(linear.codes, torch.zeros_like(linear.codes))
    assert all(layer.error < layer.rtn_error for layer in figures)


def test_lower_precision_leaves_the_tables_of_angles_alone(tmp_path):
    """In bfloat16 a position of some hundreds would be another one."""
    model = tiny_model()
    quantise(model, tmp_path, replace(SETTINGS, compute=torch.bfloat16))
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


# --- what is told, refused and stopped --------------------------------------------------------------------------------


def test_every_layer_is_told_with_its_errors(tmp_path):
    ctx = Context(tmp_path)
    _, figures = quantise(tiny_model(), tmp_path, ctx=ctx)
    assert [(step, total) for step, total, _ in ctx.steps] == [(i, 14) for i in range(1, 15)]
    assert [values["error"] for _, _, values in ctx.steps] == [layer.error for layer in figures]
    assert [values["quantize/rtn_error"] for _, values in ctx.values] == [layer.rtn_error for layer in figures]
    assert ctx.logs == []


def test_more_damping_than_asked_for_is_told(tmp_path, monkeypatch):
    factor, ctx = gptq_solver._factor, Context(tmp_path)
    monkeypatch.setattr(gptq_solver, "_factor", lambda *given: (factor(*given)[0], 0.3))
    _, figures = quantise(tiny_model(), tmp_path, ctx=ctx)
    assert ctx.logs == [f"{layer.name}: took damping 0.3" for layer in figures]


def test_weights_and_inputs_that_are_not_finite_are_refused_by_name(tmp_path):
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.gate_proj, model\.layers\.1\.mlp\.up_proj.*not finite"):
        quantise(model, tmp_path / "a")
    model = tiny_model()
    model.model.layers[0].post_attention_layernorm.weight.data[0] = float("inf")
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.gate_proj.*inputs .*not finite"):
        quantise(model, tmp_path / "b")


@pytest.mark.parametrize("rows", [[], [[1, 2], []]])
def test_rows_that_are_missing_or_empty_are_refused(tmp_path, rows):
    model = tiny_model()
    with pytest.raises(DataError, match="rows"):
        Sequential(model, quantizable(model, lm_head=False), rows, SETTINGS, Context(tmp_path))


def test_layers_that_do_not_see_every_token_are_refused(monkeypatch):
    model = tiny_model()
    mlp = model.model.layers[1].mlp
    whole = type(mlp).forward
    monkeypatch.setattr(mlp, "forward", lambda x: torch.cat([whole(mlp, x[:, :4]), x[:, 4:]], 1), raising=False)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.gate_proj.*every token exactly once"):
        plan_of(model, blocks(model), quantizable(model, lm_head=False))


def test_blocks_that_know_more_than_hidden_states_are_refused(monkeypatch):
    class Counting(nn.Module):
        """Adds how often it was called."""

        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, hidden_states, **kwargs):
            self.calls += 1
            return self.inner(hidden_states, **kwargs) + self.calls

    model = tiny_model()
    linears = quantizable(model, lm_head=False)
    model.model.layers[0] = Counting(model.model.layers[0])
    named = {name.replace("layers.0.", "layers.0.inner."): linear for name, linear in linears.items()}
    with pytest.raises(ModelError, match="block by block"):
        plan_of(model, blocks(model), named)


def test_a_stop_keeps_finished_blocks_and_the_next_run_goes_on(tmp_path):
    want, all_figures = quantise(tiny_model(layers=3), tmp_path / "whole")
    with pytest.raises(Stopped, match="1 of 3 blocks are finished"):
        quantise(tiny_model(layers=3), tmp_path, ctx=Context(tmp_path, stop_at=9))
    ctx = Context(tmp_path)
    got, figures = quantise(tiny_model(layers=3), tmp_path, ctx=ctx)
    same(got, want)
    assert figures == all_figures
    assert [step for step, _, _ in ctx.steps] == list(range(8, 22))


def test_a_stop_after_the_last_layer_lets_it_finish(tmp_path):
    got, _ = quantise(tiny_model(), tmp_path, ctx=Context(tmp_path, stop_at=14))
    assert len(got) == 14


@pytest.mark.parametrize("killed_at", [1, 7, 8, 14, 15])
def test_resuming_after_any_layer_ends_in_the_same_bits(tmp_path, killed_at):
    want, _ = quantise(tiny_model(tied=False), tmp_path / "whole", lm_head=True)
    with pytest.raises(KeyboardInterrupt):
        quantise(tiny_model(tied=False), tmp_path, lm_head=True, ctx=Context(tmp_path, killed_at=killed_at))
    ctx = Context(tmp_path)
    got, _ = quantise(tiny_model(tied=False), tmp_path, lm_head=True, ctx=ctx)
    same(got, want)
    assert len(ctx.steps) == 15 - (killed_at - 1) // 7 * 7


def test_a_finished_run_is_not_done_again(tmp_path):
    want, _ = quantise(tiny_model(), tmp_path)
    ctx = Context(tmp_path)
    got, _ = quantise(tiny_model(), tmp_path, ctx=ctx)
    same(got, want)
    assert ctx.steps == []


def test_damaged_blocks_are_made_again(tmp_path):
    want, _ = quantise(tiny_model(), tmp_path)
    file = tmp_path / "checkpoints" / "gptq" / "block-00001" / "linears.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    ctx = Context(tmp_path)
    got, _ = quantise(tiny_model(), tmp_path, ctx=ctx)
    same(got, want)
    assert [step for step, _, _ in ctx.steps] == list(range(8, 15))
    assert "block-00001" in ctx.logs[0]


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "another model"},
        {"solver": replace(SOLVER, damp_percent=0.2)},
        {"true_sequential": False},
        {"compute": torch.float32},
        {"rows": make_rows(seed=1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_blocks_of_another_run_are_made_again(tmp_path, change):
    quantise(tiny_model(), tmp_path)
    settings = replace(SETTINGS, **{name: value for name, value in change.items() if name != "rows"})
    ctx = Context(tmp_path)
    quantise(tiny_model(), tmp_path, settings, rows=change.get("rows"), ctx=ctx)
    assert len(ctx.steps) == 14


def test_a_disk_that_takes_no_block_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "kdkit.train.checkpoint.save_file", lambda *_args, **_kwargs: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(EnvironmentUnmet, match="cannot be written"):
        quantise(tiny_model(), tmp_path)


KILL = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_gptq_sequential import Context, quantise, tiny_model
class Killed(Context):
    def progress(self, step, total, **values):
        if step == 9:
            os.kill(os.getpid(), signal.SIGKILL)
quantise(tiny_model(), Path(sys.argv[2]), ctx=Killed(Path(sys.argv[2])))
"""


def test_a_killed_process_leaves_what_the_next_one_goes_on_from(tmp_path):
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", KILL, here, str(tmp_path)], env=dict(os.environ), check=False)
    assert done.returncode == -9
    facts = json.loads((tmp_path / "checkpoints" / "gptq" / "block-00000" / "layers.json").read_text())
    assert len(facts["layers"]) == 7
    ctx = Context(tmp_path)
    got, _ = quantise(tiny_model(), tmp_path, ctx=ctx)
    want, _ = quantise(tiny_model(), tmp_path / "whole")
    same(got, want)
    assert [step for step, _, _ in ctx.steps] == list(range(8, 15))


# --- second moments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 256, 300, 640])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_second_moments_however_they_are_cut(width, dtype):
    inputs = torch.randn(50, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    exact = inputs.double().T @ inputs.double() / 50
    for cut in ([50], [1, 20, 29], [25, 0, 25]):
        moments = Hessian.like(inputs)
        for part in inputs.split(cut):
            moments.add(part)
        value = moments.value()
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(value, value.T)
        assert moments.tokens == 50
        assert torch.allclose(value.double(), exact, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)


def test_second_moments_of_nothing_are_zero():
    assert torch.equal(Hessian(4, device="cpu").value(), torch.zeros(4, 4))
