"""Backend auto-gptq with the real package, as far as a machine without CUDA goes.

Needs the interpreter that `kdkit doctor` describes in KDKIT_AUTO_GPTQ_PYTHON, and is skipped without it. Calls to CUDA
are replaced here, in the test alone: an executable that stands in for that interpreter lets the program take the
processor for a CUDA device.
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from kdkit.api import Model
from kdkit.api.errors import StageError
from kdkit.models.load import load_model
from kdkit.models.quantized.checkpoint import write_checkpoint
from kdkit.models.quantized.form import GptqFormat
from kdkit.models.quantized.layers import quantizable
from kdkit.plugins.quantizers.backends import auto_gptq, environment
from kdkit.plugins.quantizers.backends.peer import PeerJob
from kdkit.testing.tiny import tiny_tokenizer

PYTHON = os.environ.get(environment.AUTO_GPTQ_PYTHON, "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PYTHON, reason=f"{environment.AUTO_GPTQ_PYTHON} is not set; see kdkit doctor"),
]
IDS = [(7 * place * place + 3 * place) % 256 for place in range(48)]
STAND_IN = """#!{python}
import importlib.util, sys
spec = importlib.util.spec_from_file_location("peer_process", sys.argv[2])
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
program.has_cuda = lambda: True
if sys.argv[3] != "probe":
    import os
    real = os.dup(1)
    os.dup2(2, 1)
    import torch
    import auto_gptq.modeling._base, auto_gptq.modeling._const, auto_gptq.modeling._utils
    for module in (auto_gptq.modeling._base, auto_gptq.modeling._const, auto_gptq.modeling._utils):
        module.CUDA_0 = torch.device("cpu")
    torch.cuda.is_available = lambda: True
    torch.cuda.synchronize = lambda *_: None
    os.dup2(real, 1)
program.main(sys.argv[3:])
"""
READER = """
import json, sys
import torch
from auto_gptq import AutoGPTQForCausalLM
from safetensors.torch import save_file
path, ids, out = sys.argv[1:]
model = AutoGPTQForCausalLM.from_quantized(
    path, device="cpu", use_safetensors=True, inject_fused_attention=False, inject_fused_mlp=False
)
with torch.no_grad():
    logits = model.model.float()(input_ids=torch.tensor([json.loads(ids)])).logits[0]
save_file({"logits": logits.float().contiguous()}, out)
"""


def save_model(path, theta):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=259,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=258,
        pad_token_id=258,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        LlamaForCausalLM(config).half().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job for the real package on the processor."""
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.replace("{python}", PYTHON), encoding="utf-8")
    stand_in.chmod(0o755)
    monkeypatch.setenv(environment.AUTO_GPTQ_PYTHON, str(stand_in))
    monkeypatch.setattr(environment, "has_device", lambda: True)
    source = save_model(tmp_path / "source", 50000.0)
    layers = quantizable(load_model(Model(path=source), dtype=torch.float32), lm_head=False)
    return PeerJob(
        source=source,
        rows=[[(5 * row + place * place) % 256 for place in range(64)] for row in range(4)],
        shapes={name: (layer.out_features, layer.in_features) for name, layer in layers.items()},
        blocks=2,
        bits=4,
        group_size=32,
        sym=True,
        desc_act=True,
        static_groups=True,
        damp_percent=0.05,
        true_sequential=True,
        mse=2.4,
        lm_head=False,
        device="cuda",
    )


def quantize(job, tmp_path):
    auto_gptq.ready()
    auto_gptq.check(job)
    work = tmp_path / "work"
    work.mkdir()
    return auto_gptq.quantize(job, work)


def test_auto_gptq_quantises_and_reads_what_kdkit_writes_of_it(job, tmp_path):
    result = quantize(job, tmp_path)
    assert result.program == "auto-gptq 0.7.1"
    model = load_model(Model(path=job.source), dtype=torch.float32)
    for name, linear in result.linears.items():
        weight = model.get_submodule(name).weight
        error = (linear.dequantized(torch.float32) - weight).norm() / weight.norm()
        assert 0.01 < float(error) < 0.2, name
        assert bool((linear.g_idx == torch.arange(linear.g_idx.numel()) // 32).all()), name
        model.get_submodule(name).weight.data = linear.dequantized(torch.float32)
    form = GptqFormat.standard(
        sym=True, bits=4, group_size=32, damp_percent=0.05, true_sequential=True, static_groups=True
    )
    write_checkpoint(job.source, tmp_path / "out", result.linears, form, write_head=True)
    command = [PYTHON, "-I", "-c", READER, str(tmp_path / "out"), json.dumps(IDS), str(tmp_path / "logits")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([IDS])).logits[0]
    theirs = load_file(tmp_path / "logits")["logits"]
    # Zeros in the place of a head that is not stored, or other rotary frequencies, would be far off.
    assert float((theirs - ours).norm() / ours.norm()) < 0.01


def test_the_grid_search_reaches_auto_gptq(job, tmp_path):
    from dataclasses import replace

    searched = quantize(job, tmp_path)
    (tmp_path / "again").mkdir()
    plain = quantize(replace(job, mse=0.0), tmp_path / "again")
    name = next(iter(job.shapes))
    assert bool((searched.linears[name].scales <= plain.linears[name].scales).all())
    assert bool((searched.linears[name].scales < plain.linears[name].scales).any())


def test_a_model_that_old_transformers_reads_in_another_way_is_refused(job, tmp_path, monkeypatch):
    monkeypatch.setattr(auto_gptq, "old_config", dict)
    with pytest.raises(StageError, match="reads the model in another way: loss"):
        quantize(job, tmp_path)
