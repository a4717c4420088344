"""Build and run the built-in metrics as an evaluation does."""

from __future__ import annotations

import json
import math

from kdkit.api import Prediction
from kdkit.plugins.metrics import plugin

SPECS = {spec.name: spec for spec in plugin.kdkit_metrics()}


def build(name, **given):
    return SPECS[name].build(SPECS[name].params.model_validate_json(json.dumps(given)))


def key(name, **given):
    spec = SPECS[name]
    return spec.key(spec.params.model_validate_json(json.dumps(given))) if spec.key else spec.name


def predict(*pairs):
    return [Prediction("p", text, references, id=f"id{n}") for n, (text, *references) in enumerate(pairs)]


def score(name, *pairs, **given):
    return build(name, **given).score(predict(*pairs))


def linked_mean(result):
    weights = result.weights or (1.0,) * result.n
    mean = sum(w * x for w, x in zip(weights, result.per_example, strict=True)) / sum(weights)
    return math.exp(mean) if result.link == "exp" else mean
