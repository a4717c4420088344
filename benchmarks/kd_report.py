"""The page that benchmarks/kd_step.py writes."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "accelerate", "trl", "liger-kernel")
TITLES = {
    "kdkit": "kdkit",
    "trl-gkd": "TRL GKDTrainer, lmbda 0",
    "trl-distillation": "TRL DistillationTrainer, answers given",
    "plain": "plain loop, full logits",
    "liger": "loop with Liger's chunked JSD",
}
PAIRS = {
    "smollm2": "SmolLM2-135M-Instruct, student of 15 of its 30 layers, vocabulary 49,152",
    "tiny": "Tiny random models, only to try the script",
    "qwen-shape": "Random weights in the shape of Qwen2.5-0.5B, {} and {} layers, vocabulary 151,936",
}
LAYOUTS = {"natural": "natural lengths", "grouped": "the same rows, sorted by length", "equal": "equal lengths"}
NOTES = """\
Ratios are kdkit's figure over the other's, in this run: a speed ratio of 3 means three times as fast, a memory ratio of
0.25 a quarter of the memory. Rows sorted by length are compared with kdkit on the rows as they come. Memory is the peak
of the measured steps above what is there at the end of a step: weights of both models, gradients, optimiser state, the
interpreter. All train float32 master weights with fused AdamW; "bf16" is autocast, with the teacher in bfloat16. None
of them recomputes activations: TRL's default does, which takes it longer and needs less memory, and so does kdkit's
`gradient_checkpointing`. DistillationTrainer samples its answers itself; here it is handed the data's, so that no time
of generating is counted. Padding prompts and answers apart is its own way."""


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    found: dict[str, Any] = {"python": platform.python_version()}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        found["cpu"] = named[0] if named else platform.machine()
        found["threads"] = torch.get_num_threads()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def page(result: dict[str, Any]) -> str:
    """The whole page in Markdown."""
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if value is not None)
    parts = [
        "# The cost of a distillation step",
        f"Written by `python benchmarks/kd_step.py --device {result['settings']['device']}`, not by hand. {facts}.",
    ]
    for name, bound in result["bounds"].items():
        kept = "kept" if bound["kept"] else "missed"
        parts.append(
            f"{name.capitalize()} against TRL's GKDTrainer: {bound['ratio']} (bound {bound['bound']}, {kept})."
        )
    for pair in dict.fromkeys(entry["pair"] for entry in result["cases"]):
        parts += [f"## {PAIRS[pair].format(*result['settings']['qwen_layers'])}", _table(pair, result)]
        for layout in dict.fromkeys(e["layout"] for e in result["cases"] if e["pair"] == pair):
            rows = result["layouts"][f"{pair}/{layout}"]
            parts.append(
                f"{LAYOUTS[layout].capitalize()}: {rows['tokens']:,} tokens per step, {rows['response_tokens']:,} of "
                f"them learned, {rows['padded_tokens']:,} when padded."
            )
    parts += _agreement(result["agreement"])
    return "\n\n".join([*parts, NOTES.replace("\n", " ")]) + "\n"


def _table(pair: str, result: dict[str, Any]) -> str:
    lines = [
        "| rows | who | precision | s / step | response tokens / s | kdkit's speed | peak memory | kdkit's memory |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for entry in (e for e in result["cases"] if e["pair"] == pair):
        head = f"| {LAYOUTS[entry['layout']]} | {TITLES[entry['who']]} | {entry['precision']} |"
        if "failed" in entry:
            lines.append(f"{head} {entry['failed']} | | | | |")
            continue
        speed, memory = (entry.get(f"kdkit_{what}_ratio") for what in ("speed", "memory"))
        lines.append(
            f"{head} {entry['seconds_per_step']:.2f} | {entry['response_tokens_per_s']:,.1f} | "
            f"{'' if speed is None else f'{speed:.2f} x'} | {entry['peak_bytes'] / 1e6:,.0f} MB | "
            f"{'' if memory is None else f'{memory:.2f} x'} |"
        )
    return "\n".join(lines)


def _agreement(pairs: dict[str, Any]) -> list[str]:
    parts = []
    for pair, betas in pairs.items():
        parts += [
            f"## The same loss: {pair}, one batch, float32, kdkit against TRL's GKDTrainer",
            "\n".join(
                [
                    "| | loss | relative difference | of the gradient |",
                    "| --- | ---: | ---: | ---: |",
                    *(
                        f"| {beta} | {v['loss']:.6f} | {v['loss_difference']:.1e} | {v['gradient_difference']:.1e} |"
                        for beta, v in betas.items()
                    ),
                ]
            ),
        ]
    return parts
