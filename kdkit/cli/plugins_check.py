"""Body of ``kdkit plugins check``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from packaging.utils import canonicalize_name, is_normalized_name

from kdkit.api.errors import ExitCode, RecipeError
from kdkit.cli.output import emit, emit_json
from kdkit.host import Catalog
from kdkit.host.check import CheckResult, check_distribution
from kdkit.host.compat import installed_version

__all__ = ["check_plugin"]


def check_plugin(dist: str, *, as_json: bool) -> int:
    """Print every check of an installed distribution, what failed last.

    Returns:
        0, or 3 when a check failed.

    Raises:
        RecipeError: ``dist`` is no name of a distribution, but that of a component, or a path.
        PluginError: It is not installed, it is disabled, or it provides no plugin.
    """
    catalog = Catalog.discover(strict=False)
    _check_name(dist, catalog)
    results = check_distribution(catalog, dist)
    failed = [result for result in results if not result.ok]
    if as_json:
        emit_json({"dist": dist, "ok": not failed, "checks": [asdict(result) for result in results]})
    else:
        _print(results)
        count = f"{len(failed)} of {len(results)} checks failed" if failed else f"{len(results)} checks passed"
        emit(f"{dist}: {count}")
    return ExitCode.PLUGIN if failed else ExitCode.OK


def _check_name(text: str, catalog: Catalog) -> None:
    """Refuse what names no distribution, such as a directory that TAB completed, and the name of a component."""
    if not is_normalized_name(canonicalize_name(text)):
        known = {entry.dist for entry in catalog.entries()} | {plugin.dist for plugin in catalog.broken}
        meant = [part for part in map(canonicalize_name, text.split("/")) if part in known]
        raise RecipeError(f"{text!r} is no name of a distribution", hint=_did_you_mean(meant))
    providers = [entry.dist for entry in catalog.entries() if entry.name == text]
    if providers and installed_version(text) is None:
        raise RecipeError(f"{text!r} is a component, and no distribution", hint=_did_you_mean(providers))


def _did_you_mean(dists: Sequence[str]) -> str:
    return f"did you mean {' or '.join(dict.fromkeys(dists))}?" if dists else "give one such as kdkit-acme"


def _print(results: list[CheckResult]) -> None:
    """A line for what passed of the distribution and of each component, then a line for every check that failed."""
    subjects = list(dict.fromkeys(result.subject for result in results))
    width = max(map(len, subjects))
    for subject in subjects:
        passed = [result.what for result in results if result.ok and result.subject == subject]
        if passed:
            emit(f"ok      {subject:<{width}}  {', '.join(passed)}")
    for result in results:
        if not result.ok:
            emit(f"FAILED  {result.subject:<{width}}  {result.what}: {result.detail}")
