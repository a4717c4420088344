"""References between stages, and literal inputs: typed and resolved before anything runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kdkit.api.artifacts import Artifact, Dataset, Model
from kdkit.api.params import Params
from kdkit.api.slots import Found, Lookup, Ref, StageOutput, walk
from kdkit.recipe.fields import references
from kdkit.recipe.nodes import Loc, Node, Report, find, follow, plain, scalars
from kdkit.recipe.paths import exists, is_local, placed
from kdkit.recipe.variables import STAGE_REFERENCE
from kdkit.recipe.words import any_of, did_you_mean, nearest

__all__ = ["Draft", "check_references", "run_order"]

_HUB_ID: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(slots=True)
class Draft:
    """A stage while the recipe is checked.

    Attributes:
        name: As the recipe calls it.
        kind: What ``kind`` says; empty when it is missing.
        found: Its spec; None when there is no such kind.
        params: None when they did not validate.
        upstream: Stages it refers to.
    """

    name: str
    kind: str = ""
    found: Found | None = None
    params: Params | None = None
    upstream: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Use:
    """One reference: where, which artifact is wanted, and what is named."""

    loc: Loc
    wants: type[Artifact]
    source: StageOutput | str


def check_references(drafts: Mapping[str, Draft], report: Report, lookup: Lookup, base_dir: Path) -> None:
    """Check every reference of every stage and fill in ``Draft.upstream``.

    Args:
        drafts: All stages by name, those that did not validate too.
        report: Receives the problems.
        lookup: The catalogue.
        base_dir: What relative paths start from.
    """
    for draft in drafts.values():
        uses = list(_uses(draft, report, lookup))
        for use in uses:
            if isinstance(use.source, StageOutput):
                _check_output(use, use.source, draft, drafts, report)
            else:
                _check_literal(use, use.source, report, base_dir)
        if draft.params is not None:
            _check_strays(draft, {use.loc for use in uses}, report)
        named = [use.source.stage for use in uses if isinstance(use.source, StageOutput)]
        draft.upstream = tuple(dict.fromkeys(name for name in named if name in drafts and name != draft.name))
    _check_cycles(drafts, report)


def _uses(draft: Draft, report: Report, lookup: Lookup) -> Iterator[_Use]:
    """The references of a stage: exact ones of valid parameters, else those its annotations show."""
    prefix: Loc = ("stages", draft.name)
    if draft.params is not None:
        for loc, slot in walk(draft.params, prefix):
            if isinstance(slot, Ref):
                yield _Use(_written(report, loc), slot.artifact, slot.source)
        return
    node = find(report.root, prefix)
    if node is None:
        return
    if draft.found is None:
        yield from _any_stage_references(node, prefix)
        return
    data = plain(node)
    for loc, wants, text in references(draft.found.spec.params, data, lookup, prefix):
        match = STAGE_REFERENCE.fullmatch(text)
        if match is not None:
            yield _Use(_written(report, loc), wants, StageOutput(*match.groups()))
        elif "${" not in text and text:
            yield _Use(_written(report, loc), wants, text)


def _any_stage_references(node: Node, prefix: Loc) -> Iterator[_Use]:
    """What looks like a stage's output, in a stage of which nothing else is known."""
    for loc, scalar in scalars(node, prefix):
        match = STAGE_REFERENCE.fullmatch(scalar.value) if isinstance(scalar.value, str) else None
        if match is not None:
            yield _Use(loc, Artifact, StageOutput(*match.groups()))


def _written(report: Report, loc: Loc) -> Loc:
    """The path of the reference's text, which the mapping form of a model keeps under ``from``."""
    trace = follow(report.root, loc)
    is_default = bool(trace.tags) and trace.tags[-1][0] == len(trace.path)
    if not is_default and isinstance(trace.node.value, Mapping) and "from" in trace.node.value:
        return (*trace.path, "from")
    return trace.path


def _check_output(use: _Use, source: StageOutput, draft: Draft, drafts: Mapping[str, Draft], report: Report) -> None:
    if source.stage == draft.name:
        report.add(use.loc, f"stage {draft.name!r} refers to itself")
        return
    target = drafts.get(source.stage)
    if target is None:
        others = [name for name in drafts if name != draft.name]
        report.add(use.loc, f"no stage {source.stage!r}{did_you_mean(source.stage, others, what='stages')}")
        return
    if target.found is None:
        return
    outputs: Mapping[str, type[Artifact]] = getattr(target.found.spec, "outputs", {})
    given = outputs.get(source.output)
    if given is None:
        close = nearest(source.output, outputs)
        hint = f"; did you mean {close!r}?" if close else f"; it has {', '.join(outputs) or 'none'}"
        report.add(use.loc, f"stage {source.stage!r} has no output {source.output!r}{hint}")
    elif not issubclass(given, use.wants):
        fitting = [name for name, kind in outputs.items() if issubclass(kind, use.wants)]
        hint = f"; did you mean {StageOutput(source.stage, fitting[0])}?" if fitting else ""
        report.add(use.loc, f"wants {_named(use.wants)}, but {source} is {_named(given)}{hint}")


def _named(artifact: type[Artifact]) -> str:
    name = artifact.type_name
    return name if name.endswith("s") else f"a {name}"


def _check_literal(use: _Use, text: str, report: Report, base_dir: Path) -> None:
    message = _literal_problem(use.wants, text, base_dir)
    if message is not None:
        report.add(use.loc, message)


def _literal_problem(wants: type[Artifact], text: str, base_dir: Path) -> str | None:
    """Why a literal cannot be an artifact of this type, or None."""
    if is_local(text):
        path = placed(text, base_dir)
        if issubclass(wants, Model):
            return None if exists(path, directory=True) else f"no such directory: {path}"
        return None if exists(path) else f"no such file or directory: {path}"
    if (issubclass(wants, Model | Dataset)) and _HUB_ID.fullmatch(text):
        return None
    here = f"; write ./{text} for the local path" if exists(base_dir / text) else ""
    if issubclass(wants, Model):
        return _bare_model_problem(text, here)
    if issubclass(wants, Dataset):
        return f"{text!r} is neither a Hub id (org/name) nor a path (./ ../ / ~){here}"
    return f"{text!r} is neither a stage's output (${{stages.NAME.OUTPUT}}) nor a path (./ ../ / ~){here}"


def _bare_model_problem(text: str, here: str) -> str | None:
    from kdkit.models.catalogue import MODEL_NAMES

    if text in MODEL_NAMES:
        return None
    close = nearest(text, MODEL_NAMES)
    hint = here or (f"; did you mean {close!r}?" if close else "")
    known = any_of(MODEL_NAMES)
    return f"no model {text!r}{hint or f'; a model is a Hub id (org/name), a path (./ ../ / ~) or {known}'}"


def _check_strays(draft: Draft, placed: Iterable[Loc], report: Report) -> None:
    """A stage's output in a place that takes plain text would silently be text."""
    placed = set(placed)
    prefix: Loc = ("stages", draft.name)
    node = find(report.root, prefix)
    for use in _any_stage_references(node, prefix) if node is not None else ():
        if use.loc not in placed:
            report.add(use.loc, f"takes no stage's output, got {use.source}")


def _check_cycles(drafts: Mapping[str, Draft], report: Report) -> None:
    """One problem for each cycle, at a reference that is part of it."""
    reported: list[set[str]] = []
    for cycle in _cycles(drafts):
        if set(cycle) not in reported:
            reported.append(set(cycle))
            report.add(_place_of_reference(cycle[0], cycle[1], report), f"stages form a cycle: {' -> '.join(cycle)}")


def _cycles(drafts: Mapping[str, Draft]) -> Iterator[list[str]]:
    """Cycles as ``[a, b, a]``, found depth first without recursion: a recipe may have thousands of stages."""
    done: set[str] = set()
    for start in drafts:
        trail = [] if start in done else [start]
        pending = [iter(drafts[name].upstream) for name in trail]
        while trail:
            following = next(pending[-1], None)
            if following is None:
                pending.pop()
                done.add(trail.pop())
            elif following in trail:
                yield [*trail[trail.index(following) :], following]
            elif following not in done:
                trail.append(following)
                pending.append(iter(drafts[following].upstream))


def _place_of_reference(stage: str, target: str, report: Report) -> Loc:
    prefix: Loc = ("stages", stage)
    node = find(report.root, prefix)
    for use in _any_stage_references(node, prefix) if node is not None else ():
        if isinstance(use.source, StageOutput) and use.source.stage == target:
            return use.loc
    return prefix


def run_order(drafts: Mapping[str, Draft]) -> list[str]:
    """Stage names so that each follows what it reads; written order decides between stages that are free to run."""
    order: list[str] = []
    waiting = {name: set(draft.upstream) for name, draft in drafts.items()}
    while waiting:
        ready = next(name for name, needs in waiting.items() if needs.isdisjoint(waiting))
        order.append(ready)
        del waiting[ready]
    return order
