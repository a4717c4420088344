"""Does GRPO teach a small student to solve more problems? recipes/code_grpo.yaml on a CPU, with three seeds.

    python benchmarks/code_grpo.py [--data DIR]

Every seed warms SmolLM2-135M-Instruct up and goes on with GRPO, and both answer the same held-out problems, whose
templates training never showed. An answer counts when its program passes all tests, whatever its form. The target: for
every seed, the paired difference of pass@1 between GRPO and the warm-up is positive and its 95 % interval leaves out 0.
With a directory that has `code_eval/mbpp.jsonl` and `codeforces/taco_stdio_in_open_r1_schema.jsonl`, the models of the
first seed answer 100 problems of each as well, which are far harder than what they were trained on. Finished stages are
reused, so that the script can be stopped and run again. `kdkit models pull smollm2-135m-instruct`
fetches the model once. Writes benchmarks/results/code_grpo.json and code_grpo.md, and fails when the target is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import kdkit

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "code_grpo.yaml"
RESULT = ROOT / "benchmarks" / "results" / "code_grpo"
SEEDS = (17, 18, 19)
SMALL: dict[str, Any] = {
    "student": "smollm2-135m-instruct",
    "held_out": {"use": "io-problems", "task": "rl", "split": "test", "per_template": 4},
    "warmup_rate": 1e-4,
    "warmup_steps": 20,
    "rate": 2e-5,
    "steps": 16,
    "generations": 8,
    "rollouts": 64,
    "micro_batch": 16,
    "micro_batches": 2,
    "completion": 160,
    "length": 448,
}
"""The header of the recipe has the same values as options."""
METRIC = "pass-at-1"
OTHERS: dict[str, dict[str, Any]] = {
    "mbpp": {"use": "mbpp", "source": "code_eval/mbpp.jsonl", "split": "test"},
    "codeforces": {
        "use": "codeforces",
        "source": "codeforces/taco_stdio_in_open_r1_schema.jsonl",
        "split": "all",
        "incomplete_tests": True,
    },
}
"""Problems of other kinds; sources are relative to the directory of ``--data``."""


def measure(seed: int) -> dict[str, Any]:
    result = kdkit.run(RECIPE, var=SMALL, set={"seed": seed}, out=ROOT / "runs")
    if not result.ok:
        sys.exit(f"seed {seed}: {result.error}")
    report = result.report
    pair = next(p for p in report["pairs"] if (p["a"], p["b"], p["metric"]) == ("grpo", "sft", METRIC))
    scores = {name: model["metrics"] for name, model in report["models"].items()}
    rewards = [line["train/reward/total/mean"] for line in result.stage("grpo").metrics() if _judged(line)]
    return {
        "seed": seed,
        "n": scores["grpo"][METRIC]["n"],
        "scores": {name: {key: round(of["value"], 3) for key, of in all_.items()} for name, all_ in scores.items()},
        "difference": round(pair["difference"], 3),
        "ci95": [round(bound, 3) for bound in pair["ci95"]],
        "p": pair["p"],
        "reward_first_quarter": round(statistics.mean(rewards[: max(1, len(rewards) // 4)]), 3),
        "reward_last_quarter": round(statistics.mean(rewards[-max(1, len(rewards) // 4) :]), 3),
    }


def carried_over(seed: int, data: Path) -> list[dict[str, Any]]:
    """What the models of one seed make of problems that they were not trained for."""
    held_out = {
        name: {**use, "source": str(data / use["source"]), "task": "rl", "prompt_style": "think", "max_rows": 100}
        for name, use in OTHERS.items()
    }
    settings = {"seed": seed, "stages.eval.max_prompt_length": 1536}
    result = kdkit.run(RECIPE, var={**SMALL, "held_out": held_out}, set=settings, out=ROOT / "runs")
    if not result.ok:
        sys.exit(f"other problems: {result.error}")
    models = result.report["models"]
    pairs = {(pair["a"], pair["b"], pair["metric"]): pair for pair in result.report["pairs"]}
    rows = []
    for name in OTHERS:
        key = f"{name}/{METRIC}"
        scores = {model: of["metrics"][key] for model, of in models.items()}
        pair = pairs["grpo", "sft", key]
        row = {"problems": name, "n": scores["grpo"]["n"], "difference": pair["difference"], "ci95": pair["ci95"]}
        rows.append(row | {"scores": {model: of["value"] for model, of in scores.items()}})
    return rows


def _judged(line: dict[str, Any]) -> bool:
    return "train/reward/total/mean" in line


def table(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        "# GRPO on held-out problems, three seeds",
        "",
        "Written by `python benchmarks/code_grpo.py`: pass@1 in per cent, greedy answers, templates that training",
        "never saw. The difference is that of the same problems, with its 95 % interval.",
        "",
        "| seed | n | base | SFT warm-up | GRPO | GRPO - SFT | p | reward, first to last quarter |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base, sft, grpo = (row["scores"][name][METRIC] for name in ("base", "sft", "grpo"))
        low, high = row["ci95"]
        lines.append(
            f"| {row['seed']} | {row['n']} | {base:.1f} | {sft:.1f} | {grpo:.1f} | {row['difference']:+.1f} "
            f"({low:+.1f} to {high:+.1f}) | {row['p']:.2g} | {row['reward_first_quarter']:.3f} to "
            f"{row['reward_last_quarter']:.3f} |"
        )
    if others:
        lines += ["", f"The models of seed {SEEDS[0]} on problems of other kinds:", ""]
        lines += ["| problems | n | base | SFT warm-up | GRPO | GRPO - SFT |", "|---|---|---|---|---|---|"]
    for row in others:
        base, sft, grpo = (row["scores"][name] for name in ("base", "sft", "grpo"))
        interval = "({:+.1f} to {:+.1f})".format(*row["ci95"]) if row["ci95"] else "(the same on every problem)"
        lines.append(
            f"| {row['problems']} | {row['n']} | {base:.1f} | {sft:.1f} | {grpo:.1f} | {row['difference']:+.1f} "
            f"{interval} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, help="directory with MBPP and rows in the schema of Codeforces")
    data: Path | None = parser.parse_args().data
    rows = [measure(seed) for seed in SEEDS]
    others = carried_over(SEEDS[0], data.resolve()) if data else []
    figures = {"settings": SMALL, "seeds": rows, "others": others}
    RESULT.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    text = table(rows, others)
    RESULT.with_suffix(".md").write_text(text, "utf-8")
    print(text)
    missed = [str(row["seed"]) for row in rows if row["ci95"][0] <= 0]
    if missed:
        sys.exit(f"missed: the interval of seed {', '.join(missed)} is not above 0")


if __name__ == "__main__":
    main()
