"""Body of ``kdkit runs rollouts``: what a student wrote in training, and what it was rewarded for."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdkit.api.errors import ExitCode, RecipeError
from kdkit.cli.output import emit, emit_json, shown, table, visible
from kdkit.engine.history import find_run

if TYPE_CHECKING:
    from kdkit.train.policy.records import Record

__all__ = ["Choice", "show_rollouts"]


@dataclass(frozen=True, slots=True)
class Choice:
    """Which rollouts: of which stage and iteration (all by default), and how many with the lowest and highest total."""

    stage: str | None = None
    iteration: int | None = None
    worst: int = 0
    best: int = 0


@dataclass(slots=True)
class _Iteration:
    """Sums over the completions of an iteration."""

    number: int
    step: int
    count: int = 0
    counted: int = 0
    truncated: int = 0
    tokens: int = 0
    totals: list[float] = field(default_factory=list)
    rewards: dict[str, list[float]] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        self.count += 1
        self.counted += record.counts
        self.truncated += record.truncated
        self.tokens += record.tokens
        if record.total is not None:
            self.totals.append(record.total)
        for name, value in record.rewards.items():
            values = self.rewards.setdefault(name, [])
            if value is not None:
                values.append(value)

    def to_json(self) -> dict[str, Any]:
        return {
            "iteration": self.number,
            "step": self.step,
            "completions": self.count,
            "learned_from": self.counted,
            "judged": len(self.totals),
            "tokens": self.tokens / self.count,
            "truncated": self.truncated / self.count,
            "total": _mean(self.totals),
            "rewards": {name: _mean(values) for name, values in self.rewards.items()},
        }


def show_rollouts(name: str, out: Path, choice: Choice, *, as_json: bool) -> int:
    """Print the rollouts of a run: a line for every iteration, or the completions that were asked for; returns 0.

    Raises:
        RecipeError: There is no such run, or none of its stages (not the one that was asked for) has rollouts.
        DataError: A file cannot be read.
    """
    from kdkit.train.policy.records import read_records

    run = find_run(name, out)
    stage, root = _root(run, choice.stage)
    iterations: dict[int, _Iteration] = {}
    every = _counted(read_records(root), iterations, choice.iteration)
    worst, best = _extremes(every, choice)
    if not iterations:
        raise RecipeError(f"iteration {choice.iteration} has no rollouts", where=f"stage {stage}")
    lines = [iterations[number] for number in sorted(iterations)]
    if as_json:
        emit_json(
            {
                "run": str(run),
                "stage": stage,
                "iterations": [line.to_json() for line in lines],
                "worst": [record.to_json() for record in worst],
                "best": [record.to_json() for record in best],
            }
        )
        return int(ExitCode.OK)
    if choice.worst or choice.best:
        for title, records in (("worst", worst), ("best", best)):
            for place, record in enumerate(records, 1):
                emit(_text(f"{title} {place}", record))
    else:
        emit(_table(lines))
        emit(f"\nthe completions: kdkit runs rollouts {shown(run)} --stage {stage} --worst 5")
    return int(ExitCode.OK)


def _root(run: Path, stage: str | None) -> tuple[str, Path]:
    found = {path.parent.name: path for path in sorted(run.glob("stages/*/rollouts")) if path.is_dir()}
    if not found:
        raise RecipeError("no stage of this run has rollouts", where=str(run), hint="stages of kind grpo keep them")
    if stage is not None and stage not in found:
        raise RecipeError(f"stage {stage!r} has no rollouts", where=str(run), allowed=", ".join(found))
    if stage is None and len(found) > 1:
        raise RecipeError(
            "several stages have rollouts", where=str(run), allowed=", ".join(found), hint="choose one with --stage"
        )
    name = stage or next(iter(found))
    return name, found[name]


def _counted(records: Iterable[Record], iterations: dict[int, _Iteration], only: int | None) -> Iterator[Record]:
    """The records, counted on the way."""
    for record in records:
        if only is None or record.iteration == only:
            iterations.setdefault(record.iteration, _Iteration(record.iteration, record.step)).add(record)
            yield record


def _extremes(records: Iterator[Record], choice: Choice) -> tuple[list[Record], list[Record]]:
    """Those with the lowest and with the highest total; of equal ones the newest first."""
    worst: list[tuple[float, int, Record]] = []
    best: list[tuple[float, int, Record]] = []
    for number, record in enumerate(records):
        if record.total is None:
            continue
        for heap, size, value in ((worst, choice.worst, -record.total), (best, choice.best, record.total)):
            if size:
                # The smallest entry of a heap is the one to give up.
                (heapq.heappush if len(heap) < size else heapq.heappushpop)(heap, (value, number, record))
    return tuple([record for _, _, record in sorted(heap, reverse=True)] for heap in (worst, best))  # type: ignore[return-value]


def _table(lines: Sequence[_Iteration]) -> str:
    names = list(dict.fromkeys(name for line in lines for name in line.rewards))
    head = ("ITERATION", "STEP", "COMPLETIONS", "LEARNED", "TOKENS", "TRUNCATED", "TOTAL", *names)
    return table(head, [_row(line, names) for line in lines])


def _row(line: _Iteration, names: Sequence[str]) -> list[str]:
    return [
        str(line.number),
        str(line.step),
        str(line.count),
        str(line.counted),
        f"{line.tokens / line.count:.1f}",
        f"{line.truncated / line.count:.0%}",
        _number(_mean(line.totals)),
        *(_number(_mean(line.rewards.get(name, []))) for name in names),
    ]


def _text(title: str, record: Record) -> str:
    marks = [
        f"total {_number(record.total)}",
        "not learned from" if not record.counts else f"advantage {_number(record.advantage)}",
        f"iteration {record.iteration}",
        f"prompt {record.id}",
        f"{record.tokens} tokens{', truncated' if record.truncated else ''}",
    ]
    rewards = [
        f"  {name} {_number(value)}" + (f" ({record.notes[name]})" if record.notes.get(name) else "")
        for name, value in record.rewards.items()
    ]
    parts = [f"== {title}: {' · '.join(marks)}", *rewards, "-- prompt", record.prompt, "-- completion", record.text]
    return visible("\n".join(parts)) + "\n"


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
