"""The work of the stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from kdkit.api import Artifact, DataError, Dataset, Stopped

if TYPE_CHECKING:
    from kdkit.api import Example, StageContext

    from kdkit_acme import plugin


def run(
    params: plugin.AcmeParams,
    ctx: StageContext,
) -> Mapping[str, Artifact]:
    """Write ``data.jsonl``, which the dataset ``jsonl`` reads: one example a line.

    Raises:
        DataError: No row is left.
        Stopped: A signal asked for it; the next run starts from the beginning.
    """
    examples = [example for component in params.data for example in ctx.load(component).examples]
    file = ctx.out / "data.jsonl"
    kept = 0
    with file.open("w", encoding="utf-8") as out:
        for done, example in enumerate(examples, start=1):
            if ctx.stopping():
                raise Stopped(f"stopped after {done - 1} rows")
            if params.min_words <= words(example) <= params.max_words:
                kept += 1
                out.write(json.dumps(asdict(example), ensure_ascii=False) + "\n")
            ctx.progress(done, len(examples))
    if not kept:
        why = f"no answer of {len(examples)} has {params.min_words} to {params.max_words} words"
        raise DataError(why, where=f"stage {ctx.name}")
    ctx.log(f"{kept} of {len(examples)} rows kept")
    return {"data": Dataset(path=file, info={"rows": kept, "left_out": len(examples) - kept})}


def words(example: Example) -> int:
    """Words of the answer; 0 without one."""
    return len((example.completion or "").split())
