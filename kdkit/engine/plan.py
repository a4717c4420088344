"""The plan: what each stage of a recipe would do now, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from kdkit.api.errors import RecipeError
from kdkit.api.slots import Component, Ref, StageOutput, walk
from kdkit.engine.boundary import ComponentBoundary
from kdkit.engine.hardware import resolve_precision
from kdkit.engine.inputs import Inputs
from kdkit.engine.keys import KeyMaker, StageKey, differences
from kdkit.engine.selection import Selection
from kdkit.engine.store import Condition, Store
from kdkit.host import check_extras

if TYPE_CHECKING:
    from kdkit.engine.manifest import Manifest
    from kdkit.recipe import Recipe, Stage

__all__ = ["NEVER_RAN", "Plan", "PlannedStage", "State", "assess", "make_plan", "stage_inputs"]

State: TypeAlias = Literal["cached", "resume", "run", "damaged"]

NEVER_RAN: Final = "never ran"
"""Why a stage has no result that was there before; not worth a word while it runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """A stage with its key and what would happen to it.

    Attributes:
        entry_dir: Where its result is or will be.
        state: ``cached`` (done, verified), ``resume`` (from checkpoints), ``run``, or ``damaged`` (made again).
        why: One phrase for people.
        explained: What the key was made of, by parameter path.
        selected: Whether this command is about the stage at all.
    """

    stage: Stage
    key: str
    entry_dir: Path
    state: State
    why: str
    explained: Mapping[str, Any]
    selected: bool = True

    @property
    def name(self) -> str:
        """The stage's name in the recipe."""
        return self.stage.name

    def to_json(self) -> dict[str, Any]:
        """The stage as plain data."""
        return {
            "stage": self.name,
            "kind": self.stage.kind,
            "key": self.key,
            "state": self.state,
            "why": self.why,
            "selected": self.selected,
            "entry": str(self.entry_dir),
            "upstream": list(self.stage.upstream),
            "explained": dict(self.explained),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All stages in the order they run.

    Attributes:
        pins: Where every literal input was found, for the workers.
        precision: What ``auto`` means on this machine.
    """

    recipe: Recipe
    store: Store
    stages: tuple[PlannedStage, ...]
    selection: Selection
    pins: Mapping[str, str]
    precision: str

    def stage(self, name: str) -> PlannedStage:
        """The planned stage called ``name``."""
        return next(planned for planned in self.stages if planned.name == name)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "recipe": self.recipe.name,
            "seed": self.recipe.seed,
            "precision": self.precision,
            "store": str(self.store.root),
            "inputs": dict(self.pins),
            "stages": [planned.to_json() for planned in self.stages],
        }

    def check_environment(self) -> None:
        """Refuse what cannot run on this machine, before hours of work that come before it.

        Raises:
            EnvironmentUnmet: A component of a stage that is to run needs a pip extra, a program or a device that is not
                there.
        """
        for planned in self.stages:
            if planned.selected and planned.state != "cached":
                _check_environment(planned.stage)


def _check_environment(stage: Stage) -> None:
    """Look at the stage's own code and at every component in it."""
    components = [slot for _, slot in walk(stage.params) if isinstance(slot, Component)]
    for found, params in ((stage.found, stage.params), *((slot.found, slot.params) for slot in components)):
        check_extras(found)
        if found.spec.ready is not None:
            with ComponentBoundary(found):
                found.spec.ready(params)


def make_plan(recipe: Recipe, store: Store, selection: Selection | None = None) -> Plan:
    """Compute all keys and look each one up. Reads inputs, changes nothing.

    Raises:
        RecipeError: A selected name is no stage, or a selected stage needs one that is neither done nor selected.
        KdkitError: An input is missing.
    """
    selection = selection or Selection()
    selection.check(recipe.stages)
    precision = resolve_precision("auto")
    inputs = Inputs(recipe.base_dir, store.memo)
    maker = KeyMaker(inputs, store.memo, recipe.base_dir, precision)
    chosen = selection.stages(recipe.stages)
    done: dict[str, PlannedStage] = {}
    whole: dict[str, Manifest | None] = {}
    for name, stage in recipe.stages.items():
        key = _key(maker, recipe, stage, done)
        entry = store.entry(stage.found.spec.name, key.key)
        condition = store.condition(entry)
        state, why = assess(name, condition, stage_inputs(stage, done, whole), selection)
        if state == "run" and not why:
            why = _history(store, recipe, stage, key)
        whole[name] = condition.manifest if state == "cached" else None
        done[name] = PlannedStage(
            stage=stage, key=key.key, entry_dir=entry, state=state, why=why, explained=key.explained,
            selected=name in chosen,
        )  # fmt: skip
    store.memo.save()
    planned = tuple(done.values())
    _check_complete(planned)
    return Plan(
        recipe=recipe, store=store, stages=planned, selection=selection, pins=inputs.pins(), precision=precision
    )


def _key(maker: KeyMaker, recipe: Recipe, stage: Stage, done: Mapping[str, PlannedStage]) -> StageKey:
    spec: Any = stage.found.spec
    facts = {"stage code": f"{stage.found.qualified_name} {stage.found.identity}", "recipe seed": recipe.seed}
    if spec.names_recipe:
        facts["recipe name"] = recipe.name
    upstream = {name: done[name].key for name in stage.upstream}
    return maker.key(facts, stage.params, upstream, stage.locate)


def stage_inputs(
    stage: Stage, planned: Mapping[str, PlannedStage], manifests: Mapping[str, Manifest | None]
) -> dict[str, str | None]:
    """Digest of every artifact of another stage that ``stage`` reads, by ``KEY/OUTPUT``; None while it is unknown."""
    digests: dict[str, str | None] = {}
    for _, slot in walk(stage.params):
        if isinstance(slot, Ref) and isinstance(slot.source, StageOutput):
            source = slot.source
            manifest = manifests.get(source.stage)
            digest = manifest.digest(source.output) if manifest else None
            digests[f"{planned[source.stage].key}/{source.output}"] = digest
    return digests


def assess(
    name: str, condition: Condition, inputs: Mapping[str, str | None], selection: Selection
) -> tuple[State, str]:
    """What would happen to a stage, and why; the reason is empty when only its history can tell.

    Equal keys are not enough to reuse a result: when a stage it read from was computed again and came out different,
    the old result describes something that no longer exists.
    """
    checkpoint = "" if selection.fresh else condition.checkpoint
    manifest = None if name in selection.force else condition.manifest
    if manifest is None:
        reason = "forced" if name in selection.force else condition.damage
        if checkpoint:
            return "resume", f"checkpoint {checkpoint}" + (f" ({reason})" if reason else "")
        if condition.checkpoint:
            return "run", "from the start, checkpoints thrown away"
        return "damaged" if condition.state == "damaged" else "run", reason
    if any(value is not None and manifest.inputs.get(key) != value for key, value in inputs.items()):
        return "run", "a stage it reads from was run again and came out different"
    if condition.state == "finished":
        return "resume", "finished, only to be published"
    unknown = any(value is None for value in inputs.values())
    return "cached", "unless what it reads comes out different" if unknown else ""


def _history(store: Store, recipe: Recipe, stage: Stage, key: StageKey) -> str:
    """Why a stage without a result has none: what changed since its latest result."""
    entries = [manifest for manifest in store.manifests(stage.found.spec.name) if manifest.stage == stage.name]
    same = [manifest for manifest in entries if manifest.recipe == recipe.name]
    latest = next(iter(same or entries), None)
    if latest is None:
        return NEVER_RAN
    changes = differences(latest.explained, key.explained)
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    return ", ".join(changes[:3]) + more or "its result was removed"


def _check_complete(planned: tuple[PlannedStage, ...]) -> None:
    """Refuse a selection that would need results that are not there."""
    usable = {item.name for item in planned if item.selected or item.state == "cached"}
    for item in planned:
        for name in item.stage.upstream:
            if item.selected and item.state != "cached" and name not in usable:
                raise RecipeError(
                    f"stage {item.name!r} needs stage {name!r}, which is left out and has no whole result",
                    hint="leave out --from and --only, or select it too",
                )
