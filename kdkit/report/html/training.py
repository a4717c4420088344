"""What led to the scores: the stages behind them and the curves of their losses and rewards.

An evaluate stage's manifest lies beside its scores and names every input by its content key, so the stages are found
in the same store by key, without a path that could have moved or changed. What is shown is therefore what the scores
were made from, however old the store is. Scores that lie elsewhere (copied, hand-made) have no such history.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

__all__ = ["Curve", "History", "Stage", "read_history"]

_INPUT: Final = re.compile(r"input:([0-9a-f]{8,64})/[\w.-]+")
"""How a manifest explains an input that another stage made: its key and the output's name."""
_LOSS: Final = re.compile(r"losses\[\d+\]\.use")
_REWARD: Final = re.compile(r"train/(reward/.+)/mean")
_POINTS: Final = 240
"""Points of a curve; more cannot be told apart at the width of a chart."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A loss or a reward by optimiser step.

    Attributes:
        name: ``loss``, a loss plugin's name, a reward's name, or ``total``.
        held_out: Measured on held-out rows instead of the training rows.
        points: Step, and loss per token or mean reward; None where it was not finite.
    """

    name: str
    held_out: bool
    points: tuple[tuple[float, float | None], ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """A finished stage as its manifest records it.

    Attributes:
        seconds: Wall time.
        settings: Every parameter that its key covers, by path; literal inputs by content hash.
        versions: Of kdkit, Python and the libraries.
        curves: Losses of a training stage; empty for others.
        rewards: Mean rewards of what a stage sampled, their weighted sum first; empty for stages without rewards.
    """

    name: str
    kind: str
    key: str
    seconds: float | None
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    curves: tuple[Curve, ...] = ()
    rewards: tuple[Curve, ...] = ()


@dataclass(slots=True)
class History:
    """The stages behind some scores, each after those it reads from.

    Attributes:
        stages: Stages by key.
        made_by: Name of an evaluated model to the key of the stage that made it.
    """

    stages: dict[str, Stage] = field(default_factory=dict)
    made_by: dict[str, str] = field(default_factory=dict)


def read_history(directories: Sequence[Path]) -> History:
    """The history of the scores in ``directories``, as far as the store around them has it."""
    history = History()
    for directory in dict.fromkeys(directories):
        entry = directory.absolute().parent
        manifest = _manifest(entry)
        if manifest is None or not _describes(manifest, directory):
            continue
        explained = manifest["explained"]
        for name in _models(directory):
            found = _INPUT.fullmatch(str(explained.get(f"models.{name}", explained.get(f"models.{name}.from"))))
            if found:
                history.made_by[name] = found[1]
        _follow(history, entry, manifest)
    history.made_by = {name: key for name, key in history.made_by.items() if key in history.stages}
    return history


def _follow(history: History, entry: Path, manifest: Mapping[str, Any]) -> None:
    """Add what a stage reads from, then the stage."""
    for value in manifest["explained"].values():
        found = _INPUT.fullmatch(str(value))
        if found and found[1] not in history.stages:
            for other in sorted(entry.parent.glob(f"*-{found[1]}")):
                made = _manifest(other)
                if made is not None and made["key"] == found[1]:
                    _follow(history, other, made)
                    break
    history.stages.setdefault(manifest["key"], _stage(entry, manifest))


def _stage(entry: Path, manifest: Mapping[str, Any]) -> Stage:
    seconds = manifest.get("seconds")
    explained = manifest["explained"]
    losses = [str(value).split() for path, value in explained.items() if _LOSS.fullmatch(path)]
    names = [words[1].rpartition("/")[2] for words in losses if len(words) > 1]
    rows = list(_rows(entry / "metrics.jsonl"))
    return Stage(
        name=str(manifest["stage"]),
        kind=str(manifest["kind"]),
        key=manifest["key"],
        seconds=float(seconds) if isinstance(seconds, int | float) else None,
        settings=dict(explained),
        versions={str(name): str(version) for name, version in manifest.get("versions", {}).items()},
        curves=tuple(_curves(rows, names)),
        rewards=tuple(_rewards(rows)),
    )


def _curves(rows: Sequence[Mapping[str, Any]], losses: Sequence[str]) -> Iterator[Curve]:
    """The whole loss and its parts, in training and held out; the parts only where there are several."""
    for prefix, held_out in (("train", False), ("eval", True)):
        for name in ("loss", *(losses if len(losses) > 1 else ())):
            yield from _curve(rows, f"{prefix}/{name}", name, held_out=held_out)


def _rewards(rows: Sequence[Mapping[str, Any]]) -> Iterator[Curve]:
    """The sum, and its parts where there are several."""
    keys = dict.fromkeys(found[1] for row in rows for key in row if (found := _REWARD.fullmatch(key)))
    names = [key.removeprefix("reward/") for key in keys if key != "reward/total"]
    for name in ("total", *(names if len(names) > 1 else ())):
        yield from _curve(rows, f"train/reward/{name}/mean", name)


def _curve(rows: Sequence[Mapping[str, Any]], key: str, name: str, *, held_out: bool = False) -> Iterator[Curve]:
    """The curve of a key, if any row has it."""
    points = [(float(row["step"]), row[key]) for row in rows if key in row]
    if points:
        yield Curve(name, held_out, tuple((step, _finite(value)) for step, value in _thinned(points)))


def _rows(file: Path) -> Iterator[Mapping[str, Any]]:
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
            float(row["step"])
        except (ValueError, KeyError, TypeError):
            continue
        yield row


def _thinned(points: Sequence[tuple[float, Any]]) -> list[tuple[float, Any]]:
    """Every n-th point, counted from the last."""
    every = math.ceil(len(points) / _POINTS)
    return list(points[::-1][::every][::-1])


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _manifest(entry: Path) -> Mapping[str, Any] | None:
    """The manifest of a store entry; None when there is none to be understood."""
    try:
        data: Any = json.loads((entry / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return None
    whole = isinstance(data, dict) and {"kind", "key", "stage", "explained", "files"} <= data.keys()
    if not whole or not isinstance(data["explained"], dict) or not isinstance(data["files"], dict):
        return None
    found: Mapping[str, Any] = data
    return found


def _describes(manifest: Mapping[str, Any], directory: Path) -> bool:
    """Whether the manifest was written for these very scores."""
    recorded = manifest["files"].get(f"{directory.name}/scores.json")
    digest = hashlib.sha256((directory / "scores.json").read_bytes()).hexdigest()
    return isinstance(recorded, list) and recorded[-1:] == [digest]


def _models(directory: Path) -> list[str]:
    return list(json.loads((directory / "scores.json").read_bytes())["models"])
