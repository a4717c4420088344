"""A store as a run leaves it: training stages with losses, an evaluation with predictions, and hostile text."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from made_up_scores import scores, study

HOSTILE = (
    '</script><script>document.title="owned"</script>',
    "<img src=x onerror=\"document.title='owned'\"> & \"quotes\" 'and' more",
    "</style></details></div><h1 id=injected>broken out</h1>",
    "{{ 7 * 7 }} {% raw %} ${stages.x} javascript:alert(1)",
    "x" * 5000,
    "שלום עולם، مرحبا بالعالم \u202eoverride\u2066isolate",
    "👩‍👩‍👧‍👦🏳️‍🌈 ẗ̶̢̛͇̮̲̤͔͕́̓͐e̷̡̧̛̦̙̻̹̥͋̊͘x̸̢̛̖̺̗̲̜̓͑̅͠t̴̢̡̛̰̘̟̤̯̍̀̐͝ \x00\x06\x1b[31m\x7f\x85",
    "line\r\nbreaks\r\nand\ttabs\n" * 200,
    "url(https://example.org/x.png) @import 'https://example.org/x.css'",
    "",
)
PLAIN = (
    "The speaker visited France, Morocco, Finland and Japan, in this order.",
    "It is about delivery: the parcel came late.",
    "A tide is the rise and fall of the sea, caused by the pull of the moon and the sun.",
    "def total(values):\n    result = 0\n    for value in values:\n        result += value\n    return result",
    "1. Boil the water.\n2. Add the leaves.\n3. Wait four minutes.\n4. Pour.",
)


def manifest(entry: Path, kind: str, stage: str, explained: Mapping[str, Any], seconds: float) -> None:
    """Write the manifest of a store entry over the files it has."""
    files = {
        str(file.relative_to(entry)): [file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()]
        for file in sorted(entry.rglob("*"))
        if file.is_file()
    }
    data = {
        "kind": kind,
        "key": entry.name.rpartition("-")[2],
        "recipe": "demo",
        "stage": stage,
        "seed": 17,
        "seconds": seconds,
        "outputs": {},
        "files": files,
        "explained": {"stage": f"kdkit/{kind} v1", "seed": 17, **explained},
        "versions": {"python": "3.11.7", "kdkit": "0.1.0", "torch": "2.13.0+cpu"},
    }
    (entry / "manifest.json").write_text(json.dumps(data))


def trained(
    store: Path, kind: str, stage: str, key: str, losses: Sequence[str], model: str = "input:" + "a" * 64
) -> None:
    """A training stage with 60 logged steps and some held-out losses."""
    entry = store / f"{kind}-{key}"
    entry.mkdir(parents=True)
    lines = []
    for step in range(10, 610, 10):
        row: dict[str, Any] = {"step": step}
        for index, name in enumerate(["loss", *losses]):
            row[f"train/{name}"] = 2.0 + index / 2 + 3 * math.exp(-step / 120) + 0.08 * math.sin(step * (index + 1))
            if step % 100 == 0:
                row[f"eval/{name}"] = 2.3 + index / 2 + 2.8 * math.exp(-step / 120)
        row |= {"train/learning_rate": 1e-4, "train/tokens_per_s": 800.0, "train/learned_tokens": 100 * step}
        lines.append(json.dumps(row))
    (entry / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    uses = {f"losses[{i}].use": f"loss kdkit/{name} v1" for i, name in enumerate(losses)}
    manifest(entry, kind, stage, {"learning_rate": 1e-4, "max_steps": 600, "model.from": model, **uses}, 754.2)


def predictions(directory: Path, model: str, dataset: str, ids: Sequence[str], texts: Sequence[str]) -> None:
    """A predictions file in which every text occurs, each shifted by the model's name."""
    (directory / "predictions").mkdir(exist_ok=True)
    rows = []
    for index, example in enumerate(ids):
        text = texts[(index + len(model)) % len(texts)]
        row = {
            "prompt": f"{texts[index % len(texts)]}\n\nQuestion {index}?",
            "text": text,
            "references": [texts[-index % len(texts)], "b"],
        }
        rows.append(row | {"id": example, "category": f"kind {index % 5}", "truncated": index % 7 == 0})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "predictions" / f"{model}--{dataset}.jsonl").write_text(lines)


def run(store: Path, *, datasets: Sequence[str] = ("dolly",), n: int = 60, texts: Sequence[str] = PLAIN) -> Path:
    """The scores directory of an evaluation of five models, two of them trained by stages of the store."""
    trained(store, "sft", "sft", "5" * 12, ["cross-entropy"])
    trained(store, "distill", "kd", "6" * 12, ["forward-kl", "cross-entropy"], model="input:" + "5" * 12 + "/model")
    entry = store / ("evaluate-" + "e" * 12)
    directory = entry / "scores"
    directory.mkdir(parents=True)
    models = study(datasets, n=n)
    (directory / "scores.json").write_text(json.dumps(scores(models)))
    for name in models:
        for dataset in datasets:
            predictions(directory, name, dataset, [f"row-{i}" for i in range(n)], texts)
    explained = {"models.sft": "input:" + "5" * 12 + "/model", "models.kd.from": "input:" + "6" * 12 + "/model"}
    manifest(entry, "evaluate", "eval", {**explained, "models.base.from": "input:" + "a" * 64}, 93.0)
    return directory


def enrich(report: dict[str, Any], category: str = "kind") -> dict[str, Any]:
    """The report with baselines and per-category scores, as later versions of the scores have them."""
    keys = list(next(iter(report["models"].values()))["metrics"])
    values = {"identity": 11.2, "empty": 0.0, "majority": 3.1, "reference": 100.0}
    rouge = [key for key in keys if key.endswith("rouge-l")]
    report["baselines"] = {
        name: {"metrics": {key: {"value": value, "n": 60, "ci95": [value - 0.5, value + 0.5]} for key in rouge}}
        for name, value in values.items()
    }
    for index, model in enumerate(report["models"].values()):
        model["categories"] = {
            key: {
                f"{category} {number}": {
                    "value": 5.0 + 4 * index + 3 * number,
                    "n": 12 + number,
                    "ci95": [3.0 + 4 * index + 3 * number, 7.0 + 4 * index + 3 * number],
                }
                for number in range(8)
            }
            for key in rouge
        }
    return report
