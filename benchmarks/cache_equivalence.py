"""Distillation from a cache against distillation from the live teacher, with three seeds.

    python benchmarks/cache_equivalence.py

Runs `recipes/kd_cache.yaml` on the quickstart's pair with forward KL alone, both trainings from the same seed one after
the other, and compares their KL to the teacher on held-out prompts. Are they equal within 5 %? That is tested as
equivalence (two one-sided paired t tests of the log ratio), not read off a difference that is not significant. Finished
stages are reused, so that the script can be stopped and run again. Speed is learned tokens per second of the optimiser
steps, the first ten left out; it means something on a quiet machine only. Writes docs/cache-equivalence.md and
benchmarks/results/cache_equivalence.json.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import kdkit

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "kd_cache.yaml"
SEEDS = (17, 18, 19)
MARGIN = 0.05
STEPS = 30
STUDENTS = ("kd", "kd-cached")
T_95 = 0.9 / math.sqrt(2 * 0.95 * 0.05)
"""95 % point of Student's t with two degrees of freedom."""


def settings(seed: int, answers: Path) -> dict[str, dict[str, Any]]:
    """Overrides for one seed. Its answers are those of the recipe's own seed: only training differs."""
    rows = {"use": "jsonl", "source": str(answers), "test_fraction": 0.2, "validation_fraction": 0.0}
    values: dict[str, Any] = {
        "seed": seed,
        "stages.eval.models": {name: f"${{stages.{name}.model}}" for name in STUDENTS},
        "stages.eval.data": {**rows, "split": "test"},
        "stages.eval.metrics": [{"use": "teacher-kl"}, {"use": "perplexity"}],
        "stages.report.teacher": None,
        "stages.report.baseline": None,
    }
    for student in STUDENTS:
        values[f"stages.{student}.losses"] = [{"use": "forward-kl"}]
    return {"set": values, "var": {"rows": {**rows, "split": "train"}, "steps": STEPS}}


def measure(seed: int, answers: Path) -> dict[str, Any]:
    """Both students of one seed."""
    chosen = settings(seed, answers)
    result = kdkit.run(RECIPE, only=("cache", *STUDENTS, "eval", "report"), out=ROOT / "runs", **chosen)
    if not result.ok:
        raise SystemExit(f"seed {seed}: {result.error}")
    figures: dict[str, Any] = {"seed": seed}
    for student in STUDENTS:
        lines = result.stage(student).metrics()
        speeds = [line["train/tokens_per_s"] for line in lines if "train/tokens_per_s" in line]
        kl = result.report["models"][student]["metrics"]["teacher-kl"]
        figures[student] = {"teacher-kl": kl["value"], "n": kl["n"], "tokens_per_s": statistics.median(speeds[1:])}
    return figures


def equivalence(ratios: list[float]) -> dict[str, float]:
    """Mean ratio with its 90 % interval, and the larger p of two one-sided t tests against the bounds of the margin."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, error = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    arm, edge = T_95 * error, math.log1p(MARGIN)
    p = max(_above((edge - mean) / error), _above((edge + mean) / error))
    return {"ratio": math.exp(mean), "low": math.exp(mean - arm), "high": math.exp(mean + arm), "p": p}


def _above(t: float) -> float:
    """P(T > t) for Student's t with two degrees of freedom, those of three seeds."""
    return 0.5 - t / (2 * math.sqrt(2 + t * t))


def page(seeds: list[dict[str, Any]], test: dict[str, float], speed: float) -> str:
    """The Markdown page."""
    lines = [
        "# Training from a cache of the teacher",
        "",
        f"Written by `python benchmarks/cache_equivalence.py`: `recipes/kd_cache.yaml` with forward KL alone, {STEPS}",
        "steps of eight rows, SmolLM2-135M-Instruct and its copy without ten layers. KL to the teacher in nats per",
        f"token, {seeds[0]['kd']['n']} held-out prompts; tokens per second of the optimiser steps on two CPU cores.",
        "",
        "| seed | KL, live teacher | KL, cache | ratio | tokens/s, live | tokens/s, cache | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in seeds:
        live, cached = row["kd"], row["kd-cached"]
        cells = [
            f"{live['teacher-kl']:.4f}",
            f"{cached['teacher-kl']:.4f}",
            f"{cached['teacher-kl'] / live['teacher-kl']:.4f}",
        ]
        cells += [f"{live['tokens_per_s']:.0f}", f"{cached['tokens_per_s']:.0f}"]
        cells.append(f"{cached['tokens_per_s'] / live['tokens_per_s']:.2f}")
        lines.append(f"| {row['seed']} | {' | '.join(cells)} |")
    verdict = "equivalent" if test["p"] < 0.05 else "not shown to be equivalent"
    lines += [
        "",
        f"Mean ratio of the KL {test['ratio']:.4f}, 90 % interval {test['low']:.4f} to {test['high']:.4f}: {verdict}",
        f"within {MARGIN:.0%} (two one-sided paired t tests over the seeds, p = {test['p']:.2g}).",
        f"Speed: {speed:.2f} times the live teacher's.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run everything and publish it."""
    first = kdkit.run(RECIPE, until="answers", out=ROOT / "runs")
    if not first.ok:
        raise SystemExit(str(first.error))
    answers = Path(first.stage("answers").outputs["data"].path)
    seeds = [measure(seed, answers) for seed in SEEDS]
    ratios = [row["kd-cached"]["teacher-kl"] / row["kd"]["teacher-kl"] for row in seeds]
    test = equivalence(ratios)
    speed = statistics.median(row["kd-cached"]["tokens_per_s"] / row["kd"]["tokens_per_s"] for row in seeds)
    text = page(seeds, test, speed)
    (ROOT / "docs" / "cache-equivalence.md").write_text(text, encoding="utf-8")
    figures = json.dumps({"steps": STEPS, "seeds": seeds, "kl": test, "speed": speed}, indent=1)
    (ROOT / "benchmarks" / "results" / "cache_equivalence.json").write_text(figures + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
