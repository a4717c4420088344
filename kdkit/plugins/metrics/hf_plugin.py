"""Parameters of the metric hf-evaluate. Light: the package evaluate is imported when the metric is built."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import Field

from kdkit.api.params import Params
from kdkit.api.protocols import Metric
from kdkit.api.specs import MetricSpec

__all__ = ["HF_EVALUATE", "HfEvaluateParams"]

_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?"


class HfEvaluateParams(Params):
    """A metric of Hugging Face's package `evaluate`, from a script on this machine.

    Such a metric is a Python script that runs with all your rights. The package fetches scripts from the Hub by name;
    kdkit does not: give the directory of a script that you have read, or the name of one that `evaluate` has fetched
    before on this machine. Models the script fetches for itself, and other scripts it names, are its own affair.

    The metric gets the answers and their references (all of them where it takes lists, else the first); answers without
    a reference are left out. Where it gives a value per example, or is the mean of what it gives for each example
    alone, models are compared example by example. Else its interval comes from resamples of the examples, and models
    are not compared. Reports call it `hf-NAME`, or `hf-NAME-VALUE`.
    """

    name: str = Field(pattern=f"^{_NAME}$")
    """What the metric is called; without `path`, its name in `evaluate`, such as `bleu` or `org/name`. The content key
    does not see a script that is found by name."""
    path: Path | None = None
    """The script, or its directory, in which it has the directory's name: `./metrics/bleu` with `bleu.py`."""
    value: str | None = None
    """Which of its results counts, such as `rougeL`; left out, the one of the metric's own name, or the only number."""
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Arguments of its `compute`, such as `{max_order: 2}`."""
    higher_is_better: bool | None = None
    """The direction; left out, models are not compared."""
    resamples: int = Field(200, ge=0)
    """How often it is computed for its interval, where it has no value per example; 0 gives none."""


def _build(params: HfEvaluateParams) -> Metric:
    from kdkit.plugins.metrics.hf_evaluate import HfEvaluate

    return HfEvaluate(params)


def _key(params: HfEvaluateParams) -> str:
    text = f"hf-{params.name}" + (f"-{params.value}" if params.value else "")
    words = "".join(char if char.isascii() and char.isalnum() else "-" for char in text.lower()).split("-")
    return "-".join(word for word in words if word)


HF_EVALUATE: MetricSpec[HfEvaluateParams] = MetricSpec(
    name="hf-evaluate",
    summary="A metric of Hugging Face's evaluate, from a script on this machine",
    params=HfEvaluateParams,
    build=_build,
    key=_key,
    extras=("evaluate",),
    higher_is_better=lambda params: params.higher_is_better,
)
