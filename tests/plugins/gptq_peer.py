"""Runs in a process of its own, because gptqmodel changes transformers when it is imported. No test in here.

python gptq_peer.py TASKS    # a JSON file: [{"do": NAME, "out": FILE, ...}, ...]; every task writes safetensors
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization import GPTQ
from safetensors.torch import load_file, save_file


def gptqmodel(task):
    """Logits [tokens, vocab] of a checkpoint by gptqmodel's own kernel."""
    return {"logits": logits(GPTQModel.load(task["path"], device="cpu").model, task["ids"])}


def transformers(task):
    """The same by transformers and optimum."""
    from transformers import AutoModelForCausalLM

    return {"logits": logits(AutoModelForCausalLM.from_pretrained(task["path"], dtype=torch.bfloat16), task["ids"])}


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float().contiguous()


def dequantize(task):
    """Weights [out, in] of every quantised layer as gptqmodel reads them."""
    model = GPTQModel.load(task["path"], device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    quantised = {name: module for name, module in model.named_modules() if hasattr(module, "dequantize_weight")}
    return {name: module.dequantize_weight().T.float().contiguous() for name, module in quantised.items()}


def solve(task):
    """gptqmodel's solver on one layer."""
    given = load_file(task["given"])
    layer = torch.nn.Linear(*given["weight"].T.shape, bias=False)
    layer.weight.data = given["weight"].clone()
    settings = QuantizeConfig(**task["settings"], act_group_aware=False, offload_to_disk=False)
    solver = GPTQ(layer, settings)
    solver.quantizer.configure(perchannel=True)
    for rows in given["inputs"]:
        solver.add_batch(rows.unsqueeze(0), layer(rows.unsqueeze(0)))
    return {"weight": solver.quantize()[0].float().contiguous()}


if __name__ == "__main__":
    for task in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        done = {"gptqmodel": gptqmodel, "transformers": transformers, "dequantize": dequantize, "solve": solve}
        save_file(done[task["do"]](task), task["out"])
