from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def metric(
    values: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    link: str = "identity",
    higher: bool | None = True,
    unit: str = "0-100",
    ids: Sequence[str] | None = None,
) -> dict[str, Any]:
    x = np.asarray(values, dtype=float)
    mean = float(np.average(x, weights=weights)) if len(x) else 0.0
    return {
        "value": float(np.exp(mean)) if link == "exp" else mean,
        "n": len(x),
        "per_example": [float(v) for v in x],
        "weights": None if weights is None else [float(w) for w in weights],
        "link": link,
        "ids": [f"row-{i}" for i in range(len(x))] if ids is None else list(ids),
        "higher_is_better": higher,
        "unit": unit,
    }


def model(results: Mapping[str, Mapping[str, Any]], **facts: Any) -> dict[str, Any]:
    n = {name: max((part["n"] for part in metrics.values()), default=0) for name, metrics in results.items()}
    return {
        "path": "some/model",
        "parameters": 124_439_808,
        "bytes": 497_774_208,
        "trained_tokens": 0,
        "decoding": {"do_sample": False, "temperature": 1.0, "max_new_tokens": 128},
        "speed": {"generated_tokens_per_s": 512.3, "prompts_per_s": 4.0, "peak_memory_bytes": 1_500_000_000},
        "results": {name: dict(metrics) for name, metrics in results.items()},
        "counts": {name: {"n": n[name], "truncated": n[name] // 20, "empty": 0} for name in results},
        **facts,
    }


def scores(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    n = {name: part["n"] for entry in models.values() for name, part in entry["counts"].items()}
    return {"models": dict(models), "datasets": {name: {"n": n[name], "categories": {}} for name in n}}


def study(datasets: Sequence[str] = ("dolly",), n: int = 400) -> dict[str, dict[str, Any]]:
    """A base, two students, a quantised one and a teacher whose scores are known to differ."""
    rng = np.random.default_rng(5)
    skill = rng.normal(size=(len(datasets), n))
    tokens = rng.integers(5, 60, size=n)
    quality = {"base": 8.0, "sft": 22.0, "kd": 24.5, "kd-int4": 24.3, "teacher": 28.0}
    size = {"kd-int4": 140_000_000, "teacher": 3_090_000_000}
    trained = {"base": 0, "teacher": None, "sft": 1_200_000}
    models = {}
    for name, level in quality.items():
        results = {}
        for index, dataset in enumerate(datasets):
            rouge = np.clip(level + 9 * skill[index] + rng.normal(0, 4, n), 0, 100)
            nll = np.clip(3.2 - level / 20 + 0.3 * skill[index] + rng.normal(0, 0.1, n), 0.01, None)
            kl = np.zeros(n) if name == "teacher" else np.clip((28 - level) / 20 + rng.normal(0, 0.1, n), 0, None)
            results[dataset] = {
                "rouge-l": metric(rouge),
                "exact-match": metric((rng.random(n) < level / 100) * 100.0),
                "perplexity": metric(nll, weights=tokens, link="exp", higher=False, unit=""),
                "teacher-kl": metric(kl, weights=tokens, higher=False, unit="nats/token"),
            }
        models[name] = model(
            results,
            path=f"${{stages.{name}.model}}" if trained.get(name, 1) else f"org/{name}",
            parameters=1_543_714_304 if name == "teacher" else 124_439_808,
            bytes=size.get(name, 497_774_208),
            trained_tokens=trained.get(name, 4_800_000),
        )
    return models
