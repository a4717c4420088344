"""recipes/paper/english_dolly.yaml at a size for a laptop: SmolLM2-135M and a pruned copy instead of Qwen 3B and 0.5B.

    python benchmarks/english_dolly_small.py --rows databricks-dolly-15k.jsonl

writes docs/english-dolly-small.md and benchmarks/results/english_dolly_small.json, in about a quarter of an hour on two
cores.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import kdkit

ROOT = Path(__file__).parents[1]
KEPT = [*range(8), *range(18, 30)]
STEPS = 40


def settings(rows: Path) -> dict[str, dict[str, object]]:
    """Overrides of the recipe: what ``kdkit run`` would take as --set and --var."""
    small: dict[str, object] = {
        "stages.eval.num_samples": 2,
        "stages.eval.sampling.max_new_tokens": 96,
        "stages.eval.max_prompt_length": 400,
    }
    for stage, rate in (("teacher", 5e-5), ("sft", 3e-4), ("kd", 3e-4)):
        small[f"stages.{stage}.max_steps"] = STEPS
        small[f"stages.{stage}.eval_steps"] = STEPS // 2
        small[f"stages.{stage}.eval_rows"] = 16
        small[f"stages.{stage}.gradient_accumulation_steps"] = 1
        small[f"stages.{stage}.learning_rate"] = rate
    part = {"use": "dolly", "source": str(rows.resolve()), "prompt_style": "alpaca"}
    return {
        "set": small,
        "var": {
            "teacher": "smollm2-135m-instruct",
            "student": {"from": "smollm2-135m-instruct", "keep_layers": KEPT},
            "rows": str(rows.resolve()),
            "test": {**part, "split": "test", "max_rows": 60},
        },
    }


def main() -> None:
    """Run, and publish the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="Dolly rows: instruction, context, response, category")
    rows = parser.parse_args().rows
    started = time.monotonic()
    result = kdkit.run(ROOT / "recipes" / "paper" / "english_dolly.yaml", **settings(rows))
    if not result.ok:
        raise SystemExit(str(result.error))
    publish(result.run_dir, (time.monotonic() - started) / 60)


def publish(run: Path, minutes: float) -> None:
    """Write the page and the figures of a finished run."""
    # Without its title, since the page has one, and as every reader of Markdown shows it.
    _, _, report = (run / "report.md").read_text(encoding="utf-8").partition("\n\n")
    head = (
        "# The English experiment of the paper, at a size for a laptop\n\n"
        "Made by `benchmarks/english_dolly_small.py`, not by hand. Teacher: SmolLM2-135M-Instruct after "
        f"{STEPS} steps on Dolly. Student: the same model without ten of its thirty layers, after {STEPS} steps of SFT "
        f"or KD, eight rows each; {minutes:.0f} minutes on two CPU cores. It shows that the recipe works and how its "
        "report reads; it says nothing about the paper's models.\n\n"
    )
    (ROOT / "docs" / "english-dolly-small.md").write_text(head + report.replace("\\<", "&lt;"), encoding="utf-8")
    figures = json.loads((run / "report.json").read_text(encoding="utf-8"))
    for model in figures["models"].values():
        del model["path"]  # of one machine
    facts = {"steps": STEPS, "minutes": round(minutes, 1), "report": figures}
    text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
    (ROOT / "benchmarks" / "results" / "english_dolly_small.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
