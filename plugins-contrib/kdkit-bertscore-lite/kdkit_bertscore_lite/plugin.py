"""What kdkit sees of this package. Light: vectors and models are loaded when the metric is built."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from kdkit.api import MetricSpec, Params, hookimpl

if TYPE_CHECKING:
    from kdkit.api import Metric


class BertscoreLiteParams(Params):
    """Every token of the answer is matched with the most similar one of the reference, and the other way round
    (BERTScore, Zhang et al. 2020); the best over the references, times 100. Similarity is the cosine of embeddings;
    below 0 it counts as 0. Tokens count the same, and the values are not rescaled.

    Without `model` a token has one vector, wherever it stands: words with a similar meaning match, and their order does
    not matter.
    """

    measure: Literal["f1", "precision", "recall"] = "f1"
    """`precision` is the mean over the answer's tokens, `recall` over the reference's, `f1` their harmonic mean.
    Reports call the metric `bertscore-lite`, `bertscore-lite-precision`, `bertscore-lite-recall`."""
    model: Path | None = None
    """Directory of a transformers model whose hidden states are the embeddings, such as a BERT encoder; a relative path
    starts at the recipe. Its name is part of the metric's name in reports. Left out, the vectors of the
    package wordllama are taken, which comes with this one."""
    layer: int | None = Field(None, ge=0)
    """Which hidden states: 0 is the embedding, i what layer i puts out. The last ones unless given. Needs `model`."""

    @model_validator(mode="after")
    def _layers_are_a_models(self) -> Self:
        if self.layer is not None and self.model is None:
            raise ValueError("layer needs model: the vectors of wordllama have no layers")
        return self


def _key(params: BertscoreLiteParams) -> str:
    """Numbers of different embeddings never share a column."""
    name = "" if params.model is None else re.sub(r"[^a-z0-9]+", "-", params.model.name.lower()).strip("-")
    parts = ("bertscore-lite", name, "" if params.layer is None else f"layer-{params.layer}")
    measure = "" if params.measure == "f1" else params.measure
    return "-".join(part for part in (*parts, measure) if part)


def _build(params: BertscoreLiteParams) -> Metric:
    from kdkit_bertscore_lite.metric import BertscoreLite
    from kdkit_bertscore_lite.vectors import encoder_of, static_vectors

    vectors = static_vectors() if params.model is None else encoder_of(params.model, params.layer)
    return BertscoreLite(vectors, params.measure)


@hookimpl
def kdkit_metrics() -> Iterator[MetricSpec[BertscoreLiteParams]]:
    """The metric of this package."""
    yield MetricSpec(
        name="bertscore-lite",
        summary="Tokens of answer and reference matched by their embeddings",
        params=BertscoreLiteParams,
        build=_build,
        higher_is_better=True,
        key=_key,
        unit="0-100",
    )
