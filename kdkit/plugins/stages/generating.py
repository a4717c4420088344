"""The generate stage: a teacher answers prompts, in chunks that survive an interruption."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kdkit.api.artifacts import Dataset
from kdkit.api.errors import DataError, Stopped
from kdkit.models.examples import example_to_json
from kdkit.plugins.stages.served import check_same_teacher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kdkit.api import Completion, Example, StageContext, Teacher
    from kdkit.api.protocols import StageOutputs
    from kdkit.plugins.stages.plugin import GenerateParams

__all__ = ["run"]

CHUNK: Final = 64
"""Prompts between two points where the stage can stop and resume."""


def run(params: GenerateParams, ctx: StageContext) -> StageOutputs:
    """Write ``data.jsonl`` with one answered example a line.

    Raises:
        DataError: No answer was usable.
        Stopped: A signal asked for it; finished chunks are kept.
    """
    prompts = [example for component in params.data for example in ctx.load(component).examples]
    # Answers depend on the chunk a prompt is in, not on where a run was interrupted.
    chunks = [prompts[start : start + CHUNK] for start in range(0, len(prompts), CHUNK)]
    files = [ctx.checkpoints / f"chunk-{index:05d}.jsonl" for index in range(len(chunks))]
    ctx.checkpoints.mkdir(parents=True, exist_ok=True)
    if not all(file.exists() for file in files):
        teacher = ctx.build(params.teacher)
        try:
            check_same_teacher(teacher, ctx)
            _answer(chunks, files, teacher, params, ctx)
        finally:
            teacher.close()
    counts = _collect(files, ctx.out / "data.jsonl")
    ctx.log(", ".join(f"{count} answers {what}" for what, count in counts.items() if count))
    if not counts["kept"]:
        raise DataError(
            f"none of {len(prompts)} answers is usable",
            where=f"stage {ctx.name}",
            hint=f"raise sampling.max_new_tokens (now {params.sampling.max_new_tokens})",
        )
    return {"data": Dataset(path=ctx.out / "data.jsonl", info=counts)}


def _answer(
    chunks: Sequence[Sequence[Example]],
    files: Sequence[Path],
    teacher: Teacher,
    params: GenerateParams,
    ctx: StageContext,
) -> None:
    seed = ctx.seed_for("sampling")
    done = 0
    for index, (chunk, file) in enumerate(zip(chunks, files, strict=True)):
        if not file.exists():
            started = time.monotonic()
            completions = teacher.generate(chunk, params.sampling, seed + index * CHUNK)
            _write(file, chunk, completions)
            tokens = sum(len(completion.token_ids) for completion in completions)
            speed = tokens / max(time.monotonic() - started, 1e-9)
            ctx.progress(done + len(chunk), sum(map(len, chunks)), tokens_per_s=speed)
        done += len(chunk)
        if ctx.stopping() and index + 1 < len(chunks):
            raise Stopped(f"stopped after {done} answers, which are kept")


def _write(file: Path, chunk: Sequence[Example], completions: Sequence[Completion]) -> None:
    lines = []
    for example, completion in zip(chunk, completions, strict=True):
        answered = replace(example, completion=completion.text, references=(), every_turn=False)
        lines.append(json.dumps({"example": example_to_json(answered), "truncated": completion.truncated}))
    temporary = file.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(file)


def _collect(files: Sequence[Path], target: Path) -> dict[str, int]:
    counts = {"kept": 0, "truncated": 0, "empty": 0, "with a NUL": 0}
    with target.open("w", encoding="utf-8") as out:
        for file in files:
            for line in file.read_text(encoding="utf-8").split("\n")[:-1]:
                row = json.loads(line)
                what = _verdict(row["example"]["completion"], truncated=row["truncated"])
                counts[what] += 1
                if what == "kept":
                    out.write(json.dumps(row["example"], ensure_ascii=False) + "\n")
    return counts


def _verdict(answer: str, *, truncated: bool) -> str:
    if truncated:
        return "truncated"
    if "\0" in answer:  # readers of text files refuse it
        return "with a NUL"
    return "kept" if answer.strip() else "empty"
