"""The other side of a backend: a program that quantizes with gptqmodel or auto-gptq, in a process of its own.

It imports nothing of kdkit, because auto-gptq's interpreter has none. The job comes as one line of JSON on standard
input, so that calibration tokens never touch the disk; the pipe stays open for as long as the parent lives. Answers are
lines of JSON on standard output: ``{"step": [done, total]}`` and at the end ``{"done": {...}}``, with the seconds from
reading the model to the written checkpoint. Everything that the
packages print goes to standard error. A failure is a traceback there and an exit code.

    python peer_process.py probe                  # versions and CUDA, without importing torch
    python peer_process.py gptqmodel | auto-gptq  # the job comes on standard input
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("torch", "transformers", "numpy", "pyarrow", "peft", "accelerate", "datasets", "auto-gptq", "gptqmodel")


def probe() -> dict[str, Any]:
    """What this interpreter has."""
    return {"versions": dict(_versions()), "cuda": has_cuda()}


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def has_cuda() -> bool:
    """Whether the installed torch is built for CUDA; what it sees then is the machine's matter."""
    try:
        return "+cpu" not in version("torch")
    except PackageNotFoundError:
        return False


def has_device() -> bool:
    """Whether this machine has a CUDA device, whatever torch is installed."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    # Both calls return 0 on success.
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


# --- gptqmodel --------------------------------------------------------------------------------------------------------


def gptqmodel(job: dict[str, Any], tell: Callable[..., None]) -> dict[str, Any]:
    """Quantize with gptqmodel 7; its checkpoint is left in ``job["out"]``."""
    from gptqmodel import GPTQModel, QuantizeConfig

    start = time.monotonic()
    settings = QuantizeConfig(
        bits=job["bits"],
        group_size=job["group_size"],
        sym=job["sym"],
        desc_act=job["desc_act"],
        static_groups=job["static_groups"],
        # Its default orders columns inside of groups; True only where a benchmark asks for that.
        act_group_aware=job.get("act_group_aware", False),
        damp_percent=job["damp_percent"],
        true_sequential=job["true_sequential"],
        mse=float(job["mse"]),
        lm_head=job["lm_head"],
        # Zero points as they are: version 1 stores them less one, and a zero point of 0 then takes from its neighbour.
        format="gptq" if job["sym"] else "gptq_v2",
        offload_to_disk=False,
    )
    model = GPTQModel.load(job["source"], settings, device=job["device"])
    total = job["blocks"]

    def finished(*, layer_idx: int, submodule_finalized: bool) -> None:
        # Called twice for a layer: when it is quantized and when its weights are packed.
        if submodule_finalized:
            tell(step=[min(layer_idx + 1, total), total])

    model.layer_callback = finished
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job["rows"]]
    log = model.quantize(rows, batch_size=1, calibration_sort=None)
    model.save(job["out"])
    seconds = time.monotonic() - start
    entries = [entry for entries in log.values() for entry in entries]
    return {"losses": dict(_losses(entries)), "fallback": list(_fallen_back(entries)), "seconds": seconds}


def _name(entry: dict[str, Any]) -> str:
    return f"{entry['layer']}.{entry['module']}"


def _losses(entries: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    for entry in entries:
        try:
            yield _name(entry), float(entry["loss"])
        except ValueError:
            continue


def _fallen_back(entries: list[dict[str, Any]]) -> Iterator[str]:
    """Layers that gptqmodel rounded to nearest: it does so without failing, and says it in the place of the loss."""
    for entry in entries:
        if "fallback" in str(entry["loss"]) or float(entry["damp"]) >= 1:
            yield _name(entry)


# --- auto-gptq --------------------------------------------------------------------------------------------------------


def auto_gptq(job: dict[str, Any], tell: Callable[..., None]) -> dict[str, Any]:
    """Quantize with auto-gptq 0.7; its checkpoint is left in ``job["out"]``."""
    import torch
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    start = time.monotonic()
    settings = BaseQuantizeConfig(
        bits=job["bits"],
        group_size=job["group_size"],
        sym=job["sym"],
        desc_act=job["desc_act"],
        static_groups=job["static_groups"],
        damp_percent=job["damp_percent"],
        true_sequential=job["true_sequential"],
    )
    _check_reading(job["source"], job["check"])
    _search_grids(job["mse"])
    model = AutoGPTQForCausalLM.from_pretrained(job["source"], settings, torch_dtype=torch.float16)
    _count_layers(tell, job["layers"])
    rows = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
            for row in job["rows"]]  # fmt: skip
    model.quantize(rows, batch_size=1, use_triton=False, cache_examples_on_gpu=False)
    model.save_quantized(job["out"], use_safetensors=True)
    return {"losses": {}, "fallback": [], "seconds": time.monotonic() - start}


def _search_grids(mse: float) -> None:
    """auto-gptq's quantizer can search its grids, but nothing that is public asks for it."""
    from auto_gptq.quantization.quantizer import Quantizer

    configure = Quantizer.configure

    def searching(self: Any, *args: Any, **named: Any) -> None:
        configure(self, *args, **{**named, "mse": mse > 0, "norm": mse or 2.4})

    Quantizer.configure = searching


def _check_reading(source: str, check: dict[str, Any]) -> None:
    """Refuse when this old transformers reads the model in another way than kdkit's does."""
    import torch
    from transformers import AutoModelForCausalLM

    row, model = torch.tensor([check["ids"]]), AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.float32)
    with torch.no_grad():
        loss = float(model(input_ids=row, labels=row).loss)
    if not abs(loss - check["loss"]) <= check["tolerance"]:
        raise ValueError(
            f"this transformers reads the model in another way: loss {loss:.4f} instead of {check['loss']:.4f}"
        )


def _count_layers(tell: Callable[..., None], total: int) -> None:
    from auto_gptq.quantization import GPTQ

    solve, done = GPTQ.fasterquant, 0

    def counted(self: Any, *args: Any, **named: Any) -> Any:
        nonlocal done
        result = solve(self, *args, **named)
        done += 1
        tell(step=[done, total])
        return result

    GPTQ.fasterquant = counted


# --- the process ------------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    """Do what the first argument says."""
    # Only answers go to standard output; packages print banners and progress there, and so do their C libraries.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    (what,) = arguments
    if what == "probe":
        print(json.dumps(probe()), file=answers, flush=True)
        return
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quantize = {"gptqmodel": gptqmodel, "auto-gptq": auto_gptq}[what]
    tell(done={**quantize(job, tell), "version": version(what)})


def _end_with_parent() -> None:
    """Standard input ends when the parent does."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
