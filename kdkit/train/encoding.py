"""Rows of a dataset as token ids, with every row that does not fit counted and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from kdkit.api.errors import DataError

if TYPE_CHECKING:
    from kdkit.api import Example
    from kdkit.models.chat import ChatEncoder, Encoded

__all__ = ["encode_prompts", "encode_rows", "row_limit"]


def row_limit(max_length: int, positions: tuple[int | None, int | None]) -> tuple[int, str]:
    """The most tokens of a row that student and teacher both read, and what bounds it, in words.

    Args:
        max_length: What the recipe allows.
        positions: How many tokens the student and the teacher can read; None where they do not say.
    """
    bounds = [(max_length, f"max_length={max_length}")]
    for whose, count in zip(("student", "teacher"), positions, strict=True):
        if count is not None:
            bounds.append((count, f"the {whose}'s {count} positions"))
    return min(bounds, key=lambda bound: bound[0])


def encode_rows(
    examples: Sequence[Example],
    encoder: ChatEncoder,
    *,
    max_length: int,
    overlong: Literal["drop", "truncate"],
    log: Callable[[str], None],
    name: str,
    positions: tuple[int | None, int | None] = (None, None),
) -> list[Encoded]:
    """Training rows with at least one learned token, as long as :func:`row_limit` allows.

    Raises:
        DataError: No row is left.
    """
    kept: list[Encoded] = []
    dropped: Counter[str] = Counter()
    lengths: list[int] = []
    limit, bound = row_limit(max_length, positions)
    for example in examples:
        if not example.completion:
            dropped["without an answer"] += 1
            continue
        row = encoder.training(example)
        lengths.append(len(row.ids))
        if len(row.ids) > limit:
            if overlong == "drop":
                dropped[f"longer than {bound}"] += 1
                continue
            row = row.cut(limit)
        if not row.targets:
            dropped[f"with a prompt over {bound}"] += 1
            continue
        kept.append(row)
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not kept:
        shortest = f"; the shortest has {min(lengths)} tokens" if lengths else ""
        raise DataError(f"no row is left of {len(examples)}: {reasons or 'the dataset is empty'}{shortest}", where=name)
    if dropped:
        log(f"{name}: {len(kept)} of {len(examples)} rows kept; dropped {reasons}")
    return kept


def encode_prompts(
    examples: Sequence[Example], encoder: ChatEncoder, *, max_prompt_length: int, name: str
) -> list[list[int]]:
    """Prompt ids of all examples; every model has to answer the same prompts, so none is dropped or cut.

    Raises:
        DataError: A prompt is longer than ``max_prompt_length`` tokens.
    """
    prompts = [encoder.prompt(example) for example in examples]
    long = [(e.id, len(ids)) for e, ids in zip(examples, prompts, strict=True) if len(ids) > max_prompt_length]
    if long:
        worst = max(long, key=lambda item: item[1])
        raise DataError(
            f"{len(long)} of {len(prompts)} prompts have more than max_prompt_length={max_prompt_length} tokens, "
            f"the longest is {worst[0]} with {worst[1]}",
            where=name,
            hint="raise max_prompt_length or filter the dataset",
        )
    return prompts
