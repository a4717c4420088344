"""What kdkit reads of this package. Keep it light: what lists or checks components imports it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kdkit.api import Dataset, DatasetSpec, Params, Ref, hookimpl
from pydantic import Field

if TYPE_CHECKING:
    from kdkit.api import DatasetLoader


class AcmeParams(Params):
    """Questions with answers, one JSON object a line: ``question``, ``answer``, maybe ``topic``."""

    source: Ref[Dataset] | None = None
    """A file of yours, such as ./rows.jsonl; without one, the rows that come with the package."""
    max_rows: int | None = Field(None, ge=1)
    """Take the first so many rows; null takes all."""


def _build(params: AcmeParams) -> DatasetLoader:
    from kdkit_acme import dataset

    return dataset.AcmeRows(params)


@hookimpl
def kdkit_datasets() -> Iterator[DatasetSpec[Any]]:
    """The datasets of this package."""
    yield DatasetSpec(
        name="acme",
        summary="Questions with answers from JSON Lines",
        params=AcmeParams,
        build=_build,
        rows="prompt-completion",
    )
