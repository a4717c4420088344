"""From a recipe file to a checked recipe, or to everything that is wrong with it.

Nothing here runs a component: names are looked up, parameters validated, references typed. No heavy import.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kdkit.api.errors import ExitCode, KdkitError, PluginError, Problem, RecipeError, StageError
from kdkit.api.params import Params
from kdkit.api.protocols import Tracker
from kdkit.api.slots import LOOKUP, Component, Found
from kdkit.api.specs import StageSpec
from kdkit.host import Catalog, plugin_errors
from kdkit.recipe.compose import compose
from kdkit.recipe.explain_errors import report_errors
from kdkit.recipe.fields import keys_at
from kdkit.recipe.header import Header, read_header
from kdkit.recipe.model import Checked, Locate, Recipe, Stage
from kdkit.recipe.nodes import Loc, Node, Report, find, follow, plain
from kdkit.recipe.refs import Draft, check_references, run_order
from kdkit.recipe.variables import UNTOUCHED
from kdkit.recipe.words import shown

__all__ = ["check_recipe", "exit_code", "load_recipe"]


class _Track(Params):
    track: list[Component[Tracker]]


def check_recipe(
    path: Path, *, catalog: Catalog | None = None, sets: Sequence[str] = (), variables: Sequence[str] = ()
) -> Checked:
    """Check a recipe completely.

    Args:
        path: The recipe file.
        catalog: Components that are installed; found when None. The recipe's plugin files are added to it.
        sets: ``PATH=VALUE`` overrides, such as ``stages.kd.max_steps=50``.
        variables: ``NAME=VALUE`` for variables that the recipe declares.

    Returns:
        The recipe, or all problems. A mistake in a recipe is never raised.
    """
    catalog = Catalog.discover() if catalog is None else catalog
    composed = compose(path, sets, variables)
    if composed.root is None:
        return Checked(None, _ordered(composed.problems, path), catalog)
    return _Check(path, composed.root, catalog).run(composed.problems)


def load_recipe(
    path: Path, *, catalog: Catalog | None = None, sets: Sequence[str] = (), variables: Sequence[str] = ()
) -> Recipe:
    """The checked recipe.

    Raises:
        RecipeError: With every problem; its exit code is that of :func:`exit_code`.
    """
    checked = check_recipe(path, catalog=catalog, sets=sets, variables=variables)
    if checked.recipe is None:
        raise _ERRORS[exit_code(checked.problems)].of(checked.problems)
    return checked.recipe


class _PluginsMissingError(RecipeError):
    """Nothing is wrong but plugins that are missing or broken."""

    exit_code: ClassVar[ExitCode] = ExitCode.PLUGIN


class _EnvironmentUnmetError(RecipeError):
    """Nothing is wrong but what the machine lacks."""

    exit_code: ClassVar[ExitCode] = ExitCode.ENVIRONMENT


_ERRORS: Final[Mapping[ExitCode, type[RecipeError]]] = {
    ExitCode.INVALID: RecipeError,
    ExitCode.PLUGIN: _PluginsMissingError,
    ExitCode.ENVIRONMENT: _EnvironmentUnmetError,
}


def exit_code(problems: Iterable[Problem]) -> ExitCode:
    """``OK`` without problems; ``PLUGIN`` or ``ENVIRONMENT`` when all problems are of that sort; else ``INVALID``."""
    codes = {problem.exit_code for problem in problems}
    if not codes:
        return ExitCode.OK
    (code, *others) = codes
    return code if not others and code in _ERRORS else ExitCode.INVALID


def _ordered(problems: Iterable[Problem], path: Path) -> tuple[Problem, ...]:
    """By place: the recipe itself, then files it extends, then options; each problem once."""

    def place(problem: Problem) -> tuple[int, str, int, int]:
        group = 0 if problem.file == str(path) else 1 if problem.line else 2
        return group, problem.file, problem.line, problem.column

    return tuple(sorted(dict.fromkeys(problems), key=place))


class _Check:
    """One check of one composed recipe."""

    def __init__(self, path: Path, root: Node, catalog: Catalog) -> None:
        self.path = path
        self.base_dir = path.absolute().parent
        self.report = Report(root)
        self.catalog = catalog
        self.plugins_failed = False

    def run(self, earlier: Sequence[Problem]) -> Checked:
        """All checks, cheap ones first; none depends on another one's success."""
        header = read_header(self.report, self.base_dir)
        self._load_plugins(header)
        drafts = {name: self._stage(name) for name in header.stages}
        track = self._track()
        check_references(drafts, self.report, self.catalog, self.base_dir)
        problems = _ordered((*earlier, *self.report.problems), self.path)
        recipe = None if problems or track is None else self._recipe(header, drafts, track)
        return Checked(recipe, problems, self.catalog)

    def _load_plugins(self, header: Header) -> None:
        for loc, file in header.plugins:
            try:
                self.catalog = self.catalog.with_files([file])
            except KdkitError as error:
                self.plugins_failed = True
                self.report.add(loc, str(error), code=error.exit_code)
        for loc, requirement in header.requires:
            for message in self.catalog.check_requires([requirement]):
                code = _requirement_code(requirement)
                self.plugins_failed |= code is ExitCode.PLUGIN
                self.report.add(loc, message, code=code)

    def _stage(self, name: str) -> Draft:
        prefix: Loc = ("stages", name)
        node = find(self.report.root, prefix)
        draft = Draft(name)
        if node is None or not isinstance(node.value, Mapping):
            return draft
        kind = node.child("kind")
        if kind is None:
            kinds = sorted({entry.name for entry in self.catalog.entries("stage")})
            self.report.add(prefix, f"missing key 'kind'; allowed: {', '.join(kinds)}", unwritten=("kind",))
        elif not isinstance(kind.value, str):
            self.report.add((*prefix, "kind"), f"wants the name of a stage kind, got {shown(plain(kind))}")
        elif not kind.broken:
            draft.kind = kind.value
            draft.found = self._find_stage(prefix, kind.value)
        if draft.found is not None:
            draft.params = self._parameters(draft.found, prefix, plain(node))
        return draft

    def _find_stage(self, prefix: Loc, kind: str) -> Found | None:
        try:
            return self.catalog.find("stage", kind)
        except KdkitError as error:
            if not self.plugins_failed:
                self.report.add((*prefix, "kind"), str(error), code=error.exit_code)
            return None

    def _parameters(self, found: Found, prefix: Loc, data: dict[str, Any]) -> Params | None:
        data.pop("kind")
        try:
            params, errors = _validated(found, data, self.catalog)
            checks = [] if params is None else _stage_problems(found, params)
        except KdkitError as error:
            self.report.add((*prefix, "kind"), str(error), code=error.exit_code)
            return None
        self._report_errors(prefix, found.spec.params, data, errors, own=("kind",))
        for loc, message in checks:
            trace = follow(self.report.root, (*prefix, *loc))
            unwritten = tuple(segment for length, segment in trace.tags if length == len(trace.path))
            self.report.add(trace.path, message, unwritten=unwritten)
        return params

    def _report_errors(
        self,
        prefix: Loc,
        model: type[BaseModel],
        data: Any,
        errors: Sequence[ErrorDetails],
        own: tuple[str, ...] = (),
    ) -> None:
        def keys(loc: Loc, instead: Any = None) -> list[str]:
            return [*(own if not loc else ()), *keys_at(model, data, loc, self.catalog, instead)]

        report_errors(self.report, prefix, errors, keys_at=keys, skip_lookups=self.plugins_failed)

    def _track(self) -> tuple[Component[Tracker], ...] | None:
        node = self.report.root.child("track")
        written = [{"use": "jsonl"}] if node is None else plain(node)
        data = {"track": [written] if isinstance(written, dict) else written}
        try:
            return tuple(_Track.model_validate_json(json.dumps(data), context={LOOKUP: self.catalog}).track)
        except ValidationError as error:
            self._report_errors((), _Track, data, error.errors(include_url=False))
            return None

    def _recipe(self, header: Header, drafts: Mapping[str, Draft], track: tuple[Component[Tracker], ...]) -> Recipe:
        stages = [self._finished(drafts[name]) for name in run_order(drafts)]
        data = plain(self.report.root)
        return Recipe(
            name=header.name,
            seed=header.seed,
            stages={stage.name: stage for stage in stages},
            track=track,
            path=self.path,
            base_dir=self.base_dir,
            data={key: value for key, value in data.items() if key not in UNTOUCHED},
            requires=tuple(text for _, text in header.requires),
            catalog=self.catalog,
        )

    def _finished(self, draft: Draft) -> Stage:
        assert draft.found is not None
        assert draft.params is not None
        return Stage(
            name=draft.name,
            kind=draft.kind,
            found=draft.found,
            params=draft.params,
            upstream=draft.upstream,
            locate=_locator(self.report.root, draft.name),
        )


def _locator(root: Node, stage: str) -> Locate:
    def locate(path: tuple[str | int, ...]) -> tuple[str, int, int]:
        mark = follow(root, ("stages", stage, *path)).node.mark
        return mark.file, mark.line, mark.column

    return locate


def _requirement_code(text: str) -> ExitCode:
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        Requirement(text)
    except InvalidRequirement:
        return ExitCode.INVALID
    return ExitCode.PLUGIN


def _validated(found: Found, data: Mapping[str, Any], catalog: Catalog) -> tuple[Params | None, list[ErrorDetails]]:
    """Parameters or errors. Validators are a plugin's code, so whatever else they raise names the plugin.

    Raises:
        PluginError: A validator is broken.
    """
    try:
        with plugin_errors(found):
            try:
                return found.spec.params.model_validate_json(json.dumps(data), context={LOOKUP: catalog}), []
            except ValidationError as error:
                return None, error.errors(include_url=False)
    except StageError as error:
        raise PluginError(error.what, where=error.where) from error


def _stage_problems(found: Found, params: Params) -> list[tuple[Loc, str]]:
    """What the stage's own check says.

    Raises:
        PluginError: The check is broken.
    """
    spec = found.spec
    if not isinstance(spec, StageSpec) or spec.check is None:
        return []
    try:
        with plugin_errors(found):
            return [(tuple(loc), str(message)) for loc, message in spec.check(params)]
    except StageError as error:
        raise PluginError(error.what, where=error.where) from error
