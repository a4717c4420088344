"""Body of ``kdkit plugins check``."""

from __future__ import annotations

from dataclasses import asdict

from kdkit.api.errors import ExitCode
from kdkit.cli.output import emit, emit_json
from kdkit.host import Catalog
from kdkit.host.check import CheckResult, check_distribution

__all__ = ["check_plugin"]


def check_plugin(dist: str, *, as_json: bool) -> int:
    """Print every check of an installed distribution, what failed last.

    Returns:
        0, or 3 when a check failed.

    Raises:
        PluginError: It is not installed, it is disabled, or it provides no plugin.
    """
    results = check_distribution(Catalog.discover(strict=False), dist)
    failed = [result for result in results if not result.ok]
    if as_json:
        emit_json({"dist": dist, "ok": not failed, "checks": [asdict(result) for result in results]})
    else:
        _print(results)
        count = f"{len(failed)} of {len(results)} checks failed" if failed else f"{len(results)} checks passed"
        emit(f"{dist}: {count}")
    return ExitCode.PLUGIN if failed else ExitCode.OK


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
