"""From what a recipe names (a path, a Hub id, a stage's output) to rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

from kdkit.api.artifacts import Dataset
from kdkit.api.data import Rows
from kdkit.api.errors import DataError, EnvironmentUnmet
from kdkit.api.protocols import LoadContext
from kdkit.api.slots import Ref
from kdkit.plugins.datasets.decontaminate import RawPrompts, contamination, raw_text
from kdkit.plugins.datasets.options import SourceOptions, SplitOptions, is_hub_id
from kdkit.plugins.datasets.readers import read_rows, table_rows
from kdkit.plugins.datasets.splits import Candidate, Convert, collect
from kdkit.plugins.datasets.values import SourceRow

__all__ = ["load_rows", "select_rows", "source_rows"]


def load_rows(
    source: SourceOptions, split: SplitOptions, convert: Convert, ctx: LoadContext, *, hub_split: str
) -> Rows:
    """Read ``source``, convert its rows and take the split; says which rows were skipped or share text with others.

    Args:
        source: Where the rows are.
        split: Which to take.
        convert: See :data:`kdkit.plugins.datasets.splits.Convert`.
        ctx: Resolves references.
        hub_split: The Hub dataset's split when ``source.hub_split`` names none.

    Raises:
        DataError: The source is missing, empty, damaged, or has a broken row and ``on_error`` is ``fail``.
        EnvironmentUnmet: The Hub cannot be reached, or a file cannot be read.
    """
    rows = _Rows(lambda: source_rows(source, ctx, hub_split=hub_split))
    return select_rows(rows, convert, split, ctx, name=str(source.source), on_error=source.on_error)


def select_rows(
    rows: Iterable[SourceRow],
    convert: Convert,
    split: SplitOptions,
    ctx: LoadContext,
    *,
    name: str,
    on_error: Literal["fail", "skip"] = "fail",
) -> Rows:
    """Convert rows that are already there and take the split; ``name`` is what the log calls them."""
    shared = contamination(split.decontaminate, ctx) if split.decontaminate else None
    convert = _raw(convert) if isinstance(ctx, RawPrompts) else convert
    kept, broken = collect(rows, convert, split, on_error=on_error, excluded=shared)
    if broken:
        ctx.log(f"{name}: skipped {kept.counts['broken']} broken rows; the first: {broken}")
    if shared:
        ctx.log(f"{name}: {shared.summary()}")
    return kept


class _Rows:
    """Rows that can be read more than once."""

    def __init__(self, read: Callable[[], Iterator[SourceRow]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[SourceRow]:
        return self._read()


def _raw(convert: Convert) -> Convert:
    """The same conversion with prompts in the words of their source."""

    def plain(row: SourceRow) -> Candidate | str:
        candidate = convert(row)
        if isinstance(candidate, str):
            return candidate
        return replace(candidate, example=replace(candidate.example, prompt=raw_text(candidate)))

    return plain


def source_rows(source: SourceOptions, ctx: LoadContext, *, hub_split: str) -> Iterator[SourceRow]:
    """The rows of ``source``, as they are."""
    ref: Ref[Dataset] = source.source
    if is_hub_id(ref.source):
        table = _hub_table(str(ref.source), source, source.hub_split or hub_split, offline=ctx.offline)
        yield from table_rows(iter(table), str(ref.source))
    else:
        yield from read_rows(ctx.resolve(ref).path)


def _hub_table(repo: str, source: SourceOptions, split: str, *, offline: bool) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HTTPError

    # The prefix keeps a local directory that happens to have this name from being taken instead.
    location = f"hf://datasets/{repo}"
    try:
        with _network(allowed=not offline):
            return load_dataset(location, source.config, split=split, revision=source.revision)
    except DatasetNotFoundError as error:
        hint = f"check the spelling, set HF_TOKEN, or write ./{repo} for a local directory"
        raise DataError("no such dataset on the Hub, or it is private or gated", where=repo, hint=hint) from error
    except (ConnectionError, TimeoutError, FileNotFoundError, HTTPError) as error:
        raise EnvironmentUnmet(
            "not in the Hub cache, and offline" if offline else "not in the Hub cache, and the Hub cannot be reached",
            where=repo,
            hint="name a local file (./path), or connect once so that it is downloaded",
        ) from error
    except (DatasetsError, ValueError, RuntimeError) as error:
        # Unknown configurations and splits, files that do not fit together, repositories with a loading script.
        cause = f": {error.__cause__}" if error.__cause__ else ""
        raise DataError(f"cannot be loaded: {error}{cause}", where=repo) from error


@contextmanager
def _network(*, allowed: bool) -> Iterator[None]:
    """Without it the ``datasets`` library reads its cache only, as with ``HF_HUB_OFFLINE`` set before the import."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or not allowed
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
