"""The quickstart at several student sizes: python benchmarks/quickstart_sweep.py [NAME ...]

Every variant is the shipped recipe with another `student`; finished stages are reused, so that the script can be
stopped and run again. Writes docs/quickstart-sweep.md and benchmarks/results/quickstart_sweep.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import kdkit

ROOT = Path(__file__).parents[1]
BLOCK = [*range(8), *range(18, 30)]
VARIANTS = {
    "24 layers, evenly spaced": 24,
    "20 layers, a block of ten left out (the recipe)": BLOCK,
    "20 layers, evenly spaced": 20,
}
# A fifth of the steps and fewer test prompts than the recipe: a comparison of sizes, not of final quality.
SMALL = {
    "stages.sft.max_steps": 12,
    "stages.kd.max_steps": 12,
    "stages.eval.data.max_rows": 32,
    "stages.eval.sampling.max_new_tokens": 48,
}
HEAD = """# Quickstart at several student sizes

Written by `python benchmarks/quickstart_sweep.py`; every row is `recipes/quickstart.yaml` with other `keep_layers`, 12
steps instead of 60 and 32 test prompts. A comparison of sizes: the recipe's own figures are in the README.

Teacher: SmolLM2-135M-Instruct, 30 layers, {parameters:.1f}M parameters. SFT and KD learn the same {tokens:,} tokens.
Perplexity and KL (nats per token) are over the teacher's answers to held-out prompts, Rouge-L compares with them
(n = {n}); ± is the longer arm of the 95 % bootstrap interval. One training seed each.

| kept layers | parameters | student | perplexity | KL to the teacher | Rouge-L |
|---|---|---|---|---|---|
"""


def shown(metric: dict) -> str:
    low, high = metric["ci95"] or (metric["value"], metric["value"])
    arm = max(metric["value"] - low, high - metric["value"])
    return f"{metric['value']:.4g} ± {arm:.2g}"


def rows(name: str, models: dict) -> str:
    out = ""
    for model in ("base", "sft", "kd"):
        facts = models[model]
        cells = [shown(facts["metrics"][metric]) for metric in ("perplexity", "teacher-kl", "rouge-l")]
        out += f"| {name} | {facts['parameters'] / 1e6:.1f}M | {model} | {' | '.join(cells)} |\n"
    return out


def main(names: list[str]) -> None:
    reports = {}
    for name, layers in VARIANTS.items():
        if names and not any(wanted in name for wanted in names):
            continue
        student = {"from": "smollm2-135m-instruct", "keep_layers": layers}
        result = kdkit.run(ROOT / "recipes" / "quickstart.yaml", set=SMALL, var={"student": student}, out=ROOT / "runs")
        if not result.ok:
            raise SystemExit(f"{name}: {result.error}")
        reports[name] = result.report
        print(rows(name, result.report["models"]), flush=True)
    first = next(iter(reports.values()))["models"]
    head = HEAD.format(
        parameters=first["teacher"]["parameters"] / 1e6,
        tokens=first["kd"]["trained_tokens"],
        n=first["kd"]["metrics"]["rouge-l"]["n"],
    )
    table = "".join(rows(name, report["models"]) for name, report in reports.items())
    (ROOT / "docs" / "quickstart-sweep.md").write_text(head + table, encoding="utf-8")
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    # Paths belong to one machine.
    figures = {
        name: {model: {k: v for k, v in facts.items() if k != "path"} for model, facts in report["models"].items()}
        for name, report in reports.items()
    }
    text = json.dumps(figures, indent=1)
    (results / "quickstart_sweep.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
