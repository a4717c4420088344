"""Which rows should calibrate GPTQ? recipes/quantize.yaml with three kinds, on the same student and held-out prompts.

    python benchmarks/calibration.py [--text FILE]

The student's own answers, the teacher's answers that it was trained on, and generic text (JSON Lines with `text`, by
default children's stories that have nothing to do with the task), which becomes rows without answers. Differences are
those of the same held-out prompts between a quantised student and the student in 16 bits, with their 95 % interval.
Finished stages are reused. `kdkit models pull smollm2-135m-instruct` fetches the model once. Writes
benchmarks/results/calibration.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import kdkit

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "quantize.yaml"
RESULT = ROOT / "benchmarks" / "results" / "calibration"
TEXT = ROOT / ".." / "shared" / "data" / "tinystories" / "stories.jsonl"
METRICS = {"perplexity": "perplexity", "teacher-kl": "distance to the teacher (KL)", "rouge-l": "Rouge-L"}
FULL = "kd"


def report(**settings: Any) -> dict[str, Any]:
    result = kdkit.run(RECIPE, set={f"stages.{path}": value for path, value in settings.items()}, out=ROOT / "runs")
    if not result.ok:
        sys.exit(f"{RECIPE.name}: {result.error}")
    return result.report


def prompts(text: Path) -> Path:
    """The texts as rows that kdkit reads, at a place that stays, so that what was calibrated with them is reused."""
    lines = (json.loads(line)["text"] for line in text.read_text("utf-8").splitlines() if line.strip())
    rows = ROOT / "runs" / "calibration-text.jsonl"
    rows.parent.mkdir(exist_ok=True)
    rows.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines), "utf-8")
    return rows


def row(title: str, made: dict[str, Any], model: str) -> dict[str, Any]:
    """Value of every metric, and its difference from the model in 16 bits."""
    found: dict[str, Any] = {"student": title}
    for metric in METRICS:
        pair = next((p for p in made["pairs"] if (p["a"], p["b"], p["metric"]) == (model, FULL, metric)), None)
        entry = made["models"][model]["metrics"][metric]
        found[metric] = {"value": entry["value"], "n": entry["n"]}
        found[metric] |= {"difference": pair["difference"], "ci95": pair["ci95"]} if pair else {}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Which rows calibrate",
        "",
        "Written by `python benchmarks/calibration.py`: recipes/quantize.yaml, 4 bits, the quickstart's student. In",
        "brackets the difference from 16 bits on the same held-out prompts, with its 95 % interval.",
        "",
        f"| student | {' | '.join(METRICS.values())} |",
        "|---" * (1 + len(METRICS)) + "|",
    ]
    lines += [f"| {found['student']} | {' | '.join(_cell(found[metric]) for metric in METRICS)} |" for found in rows]
    return "\n".join(lines) + "\n"


def _cell(of: dict[str, Any]) -> str:
    if "difference" not in of:
        return f"{of['value']:.3f}"
    low, high = of["ci95"]
    return f"{of['value']:.3f} ({of['difference']:+.3f}; {low:+.3f} to {high:+.3f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, default=TEXT, help="generic text, JSON Lines with `text`")
    text = parser.parse_args().text.resolve()
    task = report()
    few = {
        "eval.models": {name: f"${{stages.{name}.model}}" for name in (FULL, "gptq-answers")},
        "report.teacher": None,
    }
    rows_of_text = {"use": "jsonl", "source": str(prompts(text)), "split": "all"}
    generic = report(**{"gptq-answers.calibration": rows_of_text}, **few)
    rows = [
        row("16 bits", task, FULL),
        row("rounded to nearest", task, "rtn"),
        row("GPTQ, the student's own answers", task, "gptq-rollouts"),
        row("GPTQ, the teacher's answers", task, "gptq-answers"),
        row("GPTQ, generic text", generic, "gptq-answers"),
    ]
    RESULT.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    RESULT.with_suffix(".md").write_text(table(rows), "utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
