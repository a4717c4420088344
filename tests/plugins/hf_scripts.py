"""Scripts of metrics for the package evaluate, and caches of their own for tests that load them."""

from __future__ import annotations

from pathlib import Path

import pytest

SCRIPT = """
import datasets
import evaluate


class {name}(evaluate.{kind}):
    def _info(self):
        return evaluate.{kind}Info(
            description="d", citation="c", inputs_description="i",
            features=datasets.Features({features}),
        )

    def _compute(self, {arguments}):
        {body}
"""
TEXT = 'datasets.Value("string")'
BOTH = f'{{"predictions": {TEXT}, "references": {TEXT}}}'
LISTS = f'{{"predictions": {TEXT}, "references": datasets.Sequence({TEXT})}}'
WORDS = "overlap = [len(set(p.split()) & set(r.split())) for p, r in zip(predictions, references)]\n        "
MEAN = WORDS + 'return {"words": sum(overlap) / len(overlap), "most": max(overlap)}'
POOLED = WORDS + 'return {"words": sum(overlap) / max(1, sum(len(r.split()) for r in references))}'


def write_script(
    place: Path, name: str = "words", *, body: str, features: str = BOTH, arguments: str = "predictions, references",
    kind: str = "Metric",
) -> str:  # fmt: skip
    """A script in a directory of its name."""
    file = place / name / f"{name}.py"
    file.parent.mkdir(parents=True)
    source = SCRIPT.format(name=name.title(), features=features, arguments=arguments, body=body, kind=kind)
    file.write_text(source, encoding="utf-8")
    return str(file.parent)


def own_caches(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scripts are copied to a package before they run: not to that of the person who runs the tests."""
    import evaluate.config as config
    import evaluate.loading as loading

    package = place / "cache" / f"evaluate_modules_{abs(hash(str(place)))}"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(config, "HF_METRICS_CACHE", place / "metrics")
    monkeypatch.setattr(loading, "init_dynamic_modules", lambda *args: str(package))
    return package
