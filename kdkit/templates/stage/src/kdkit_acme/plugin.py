"""What kdkit reads of this package. Keep it light: what lists or checks components imports it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kdkit.api import (
    Artifact,
    Component,
    Dataset,
    DatasetLoader,
    OneOrMore,
    Params,
    StageContext,
    StageSpec,
    hookimpl,
)
from pydantic import Field


class AcmeParams(Params):
    """Rows whose answers are neither too short nor too long."""

    data: OneOrMore[Component[DatasetLoader]]
    """Where rows come from: a dataset, or a list of them."""
    min_words: int = Field(1, ge=0)
    """Rows with fewer words in their answer are left out."""
    max_words: int = Field(200, ge=1)
    """Rows with more words in their answer are left out."""


def _check(params: AcmeParams) -> list[tuple[tuple[str | int, ...], str]]:
    """What is wrong before anything runs: where, and why."""
    if params.min_words <= params.max_words:
        return []
    return [(("min_words",), f"{params.min_words} is above max_words, {params.max_words}")]


def _run(params: AcmeParams, ctx: StageContext) -> Mapping[str, Artifact]:
    from kdkit_acme import stage

    return stage.run(params, ctx)


@hookimpl
def kdkit_stages() -> Iterator[StageSpec[Any]]:
    """The stages of this package."""
    yield StageSpec(
        name="acme",
        summary="Keep the rows whose answers have a certain length",
        params=AcmeParams,
        run=_run,
        outputs={"data": Dataset},
        check=_check,
    )
