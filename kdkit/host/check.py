"""Checks an installed plugin distribution as its users meet it: metadata, imports, declarations, builders, samples.

Suites of checks for what components do are in :mod:`kdkit.testing.conformance`; these here need no test file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, Final

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from pydantic import ConfigDict, TypeAdapter
from pydantic.fields import FieldInfo

from kdkit.api.data import Example
from kdkit.api.errors import EnvironmentUnmet, KdkitError, PluginError
from kdkit.api.slots import LOOKUP
from kdkit.host.catalog import Catalog
from kdkit.host.compat import api_range, check_extras, installed_version
from kdkit.host.describe import describe_params
from kdkit.host.records import BUILT_IN, Entry
from kdkit.host.runtime import plugin_errors
from kdkit.host.snippet import yaml_snippet

__all__ = ["HEAVY", "CheckResult", "check_distribution"]

HEAVY: Final = ("torch", "transformers", "datasets", "accelerate")
"""Packages that a plugin module must not load: listing and validating would wait for them."""
_METHODS: Final = {
    "loss": ("__call__",),
    "dataset": ("load", "sample"),
    "quantizer": ("quantize",),
    "metric": ("score",),
    "sandbox": ("probe", "open"),
}
"""What a component of the kinds that are built from parameters alone must be able to do."""
_SAMPLE: Final = 8
_STRICT: Final = ConfigDict(strict=True, arbitrary_types_allowed=True)
_LOAD: Final = """
import json, sys, time
import kdkit.api
from importlib.metadata import distribution
heavy, found, begin = sys.argv[2].split(","), {}, time.perf_counter()
for point in distribution(sys.argv[1]).entry_points.select(group="kdkit.plugins"):
    point.load()
    for name in heavy:
        if name in sys.modules:
            found.setdefault(name, point.value)
print("\\n" + sys.argv[3] + json.dumps({"heavy": found, "seconds": time.perf_counter() - begin}))
"""
_MARK: Final = "kdkit-plugins-check: "
"""Before the answer: a plugin may print as well, even when its process ends."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check.

    Attributes:
        subject: The distribution, or ``KIND NAME``.
        what: What was checked.
        ok: Whether it passed.
        detail: What was found; for a failure the reason and what to do.
    """

    subject: str
    what: str
    ok: bool
    detail: str = ""


def check_distribution(catalog: Catalog, dist: str) -> list[CheckResult]:
    """Every check of a distribution, in a stable order. Its plugins are loaded once more in a process of their own.

    Raises:
        PluginError: It is not installed, it is disabled, or it provides no plugin.
    """
    name = canonicalize_name(dist)
    entries = [entry for entry in catalog.entries() if entry.dist == name]
    broken = [item for item in catalog.broken if item.dist == name]
    if not entries and not broken:
        raise _nothing_to_check(catalog, name)
    results = [CheckResult(name, "loads", ok=False, detail=f"{b.entry_point}: {b.error}") for b in broken]
    results += [] if broken else [CheckResult(name, "loads", ok=True, detail=f"{len(entries)} components")]
    if installed_version(name) is not None and name != BUILT_IN:
        results.append(_says_which_kdkit(name))
    if not broken:
        results.append(_is_light(name))
    return [*results, *(result for entry in entries for result in _Component(catalog, entry).results())]


def _nothing_to_check(catalog: Catalog, dist: str) -> PluginError:
    if installed_version(dist) is None:
        return PluginError(f"the distribution {dist!r} is not installed", hint=f"install it with: pip install {dist}")
    if dist in {name.partition("/")[0] for name in catalog.disabled}:
        return PluginError(f"{dist} is disabled by KDKIT_DISABLE_PLUGINS")
    hint = 'name its module under [project.entry-points."kdkit.plugins"] in pyproject.toml and install it again'
    return PluginError(f"{dist} provides no plugin of kdkit", hint=hint)


def _says_which_kdkit(dist: str) -> CheckResult:
    what = "says which kdkit it needs"
    for text in distribution(dist).requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if canonicalize_name(requirement.name) == BUILT_IN and applies:
            if requirement.specifier:
                return CheckResult(dist, what, ok=True, detail=text)
            detail = f"it takes any kdkit; name a version, as in kdkit{api_range()}"
            return CheckResult(dist, what, ok=False, detail=detail)
    detail = f"it does not name kdkit; add kdkit{api_range()} to its dependencies"
    return CheckResult(dist, what, ok=False, detail=detail)


def _is_light(dist: str) -> CheckResult:
    what = "imports nothing heavy"
    command = [sys.executable, "-c", _LOAD, dist, ",".join(HEAVY), _MARK]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603 - ours
    said = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not said:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        return CheckResult(dist, what, ok=False, detail=f"it cannot be loaded in a process of its own: {last}")
    found = json.loads(said[-1].removeprefix(_MARK))
    if found["heavy"]:
        loads = ", ".join(f"{module} loads {name}" for name, module in found["heavy"].items())
        return CheckResult(dist, what, ok=False, detail=f"{loads}; import it inside the function that needs it")
    return CheckResult(dist, what, ok=True, detail=f"{1000 * found['seconds']:.0f} ms")


def _validated(field: FieldInfo, context: Mapping[str, Any]) -> None:
    """Validate a default as if a recipe gave it. Raises what pydantic does."""
    adapter = TypeAdapter(field.rebuild_annotation(), config=_STRICT)
    adapter.validate_json(json.dumps(field.default), context=dict(context))


class _Component:
    """The checks of one component."""

    def __init__(self, catalog: Catalog, entry: Entry) -> None:
        self._catalog, self._entry, self._found = catalog, entry, entry.found()
        self._subject = f"{entry.kind} {entry.name}"

    def results(self) -> Iterator[CheckResult]:
        """All of them; what builds on a check that failed is left out."""
        yield self._documented()
        yield self._source()
        # What ``kdkit plugins show`` prints.
        yield self._tried("has a snippet for recipes", lambda: yaml_snippet(self._entry, self._catalog))[0]
        extras, installed = self._extras()
        yield extras
        defaults, params = self._defaults()
        yield defaults
        if params is None or not installed or self._entry.kind not in _METHODS:
            return
        built, component = self._tried("builds with its defaults", lambda: self._found.spec.build(params))  # type: ignore[attr-defined]
        if not built.ok:
            yield built
            return
        missing = [name for name in _METHODS[self._entry.kind] if not callable(getattr(component, name, None))]
        what = f"what it builds has no {', '.join(missing)}" if missing else type(component).__name__
        yield self._result("builds with its defaults", what, ok=not missing)
        if self._entry.kind == "dataset" and not missing:
            yield self._sample(component)

    def _result(self, what: str, detail: str = "", *, ok: bool = True) -> CheckResult:
        return CheckResult(self._subject, what, ok=ok, detail=detail)

    def _documented(self) -> CheckResult:
        docs = describe_params(self._entry.spec.params)
        silent = [doc.name for doc in docs if not doc.doc]
        if silent:
            detail = f"no text for {', '.join(silent)}; write a string below each field"
            return self._result("documents its parameters", detail, ok=False)
        return self._result("documents its parameters", f"{len(docs)} parameters")

    def _source(self) -> CheckResult:
        """Errors and ``kdkit plugins show`` name the place where a component is defined."""
        file = Path(self._entry.source.rpartition(":")[0] or self._entry.source)
        if file.is_file():
            return self._result("says where its code is", self._entry.source)
        return self._result("says where its code is", f"{self._entry.source} is no file; give a function", ok=False)

    def _extras(self) -> tuple[CheckResult, bool]:
        """The check, and whether everything is there."""
        what = "declares its extras"
        try:
            check_extras(self._found)
        except EnvironmentUnmet as error:
            return self._result(what, f"not installed here: {error.what}"), False
        except PluginError as error:
            return self._result(what, str(error), ok=False), False
        return self._result(what, ", ".join(self._entry.spec.extras) or "none"), True

    def _defaults(self) -> tuple[CheckResult, Any]:
        """The check, and the parameters when there are defaults for all."""
        what, model, context = "accepts its defaults", self._entry.spec.params, {LOOKUP: self._catalog}
        for name, field in model.model_fields.items():
            # pydantic validates no defaults: one of another type would be found in the middle of a run.
            if field.default is None or isinstance(field.default, bool | int | float | str):
                tried, _ = self._tried(what, partial(_validated, field, context))
                if not tried.ok:
                    return self._result(what, f"{name} is {field.default!r}: {tried.detail}", ok=False), None
        if required := [name for name, field in model.model_fields.items() if field.is_required()]:
            return self._result(what, f"needs {', '.join(required)}"), None
        return self._tried(what, partial(model.model_validate_json, "{}", context=context))

    def _sample(self, loader: Any) -> CheckResult:
        what = f"ships a sample of {_SAMPLE} rows or more"
        tried, rows = self._tried(what, lambda: list(loader.sample().examples))
        if not tried.ok:
            return tried
        odd = next((row for row in rows if not isinstance(row, Example)), None)
        if odd is not None:
            return self._result(what, f"a row is a {type(odd).__name__}, not an Example", ok=False)
        if len({row.id for row in rows}) < len(rows):
            return self._result(what, "two rows have the same id", ok=False)
        return self._result(what, f"{len(rows)} rows", ok=len(rows) >= _SAMPLE)

    def _tried(self, what: str, call: Callable[[], Any]) -> tuple[CheckResult, Any]:
        """A check that passes when the component's code raises nothing, and what it returned."""
        try:
            with plugin_errors(self._found):
                return self._result(what), call()
        except KdkitError as error:
            return self._result(what, str(error), ok=False), None
