"""Body of ``kdkit sandbox check``: every sandbox is tried for real."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, cast

from kdkit.api.errors import EnvironmentUnmet, ExitCode
from kdkit.api.sandboxes import SandboxReport
from kdkit.api.specs import SandboxSpec
from kdkit.cli.output import emit, emit_json, table, visible
from kdkit.host import Catalog, Entry, plugin_errors

__all__ = ["check_sandboxes"]


@dataclass(frozen=True, slots=True)
class _Checked:
    name: str
    report: SandboxReport

    @property
    def status(self) -> str:
        if not self.report.usable:
            return "unusable"
        return "ok" if self.report.isolates else "unsafe"


def check_sandboxes(name: str | None, *, as_json: bool) -> int:
    """Run the canaries of every sandbox, or of one, and print what came of them.

    Returns:
        0 when a sandbox that isolates works (the one named, when one is), else 4.

    Raises:
        RecipeError: No sandbox has that name.
    """
    catalog = Catalog.discover()
    # ``auto`` is no sandbox of its own: asked for everything, it would run the canaries of the others once more.
    entries = [catalog.entry("sandbox", name)] if name else [e for e in catalog.entries("sandbox") if e.name != "auto"]
    checked = [_Checked(entry.name, _probe(entry)) for entry in entries]
    if as_json:
        emit_json({"sandboxes": [{"name": c.name, "status": c.status, **asdict(c.report)} for c in checked]})
    else:
        emit(_text(checked))
    works = any(c.report.usable and (c.report.isolates or name) for c in checked)
    return int(ExitCode.OK if works else ExitCode.ENVIRONMENT)


def _probe(entry: Entry) -> SandboxReport:
    found = entry.found()
    spec = cast("SandboxSpec[Any]", found.spec)
    with plugin_errors(found):
        try:
            return spec.build(spec.params()).probe()
        except EnvironmentUnmet as error:
            return SandboxReport(usable=False, reason=error.what, hint=error.hint or "")


def _text(checked: list[_Checked]) -> str:
    names = list(dict.fromkeys(canary.name for c in checked for canary in c.report.canaries))
    tried = [c for c in checked if c.report.canaries]
    parts = []
    if names:
        cells = [{canary.name: "ok" if canary.passed else "FAILED" for canary in c.report.canaries} for c in tried]
        rows = [(name, *(cell.get(name, "-") for cell in cells)) for name in names]
        parts.append(table(("CANARY", *(c.name for c in tried)), rows))
    parts.append("\n".join(_lines(c) for c in checked))
    return visible("\n\n".join(parts))


def _lines(checked: _Checked) -> str:
    report = checked.report
    text = ", ".join(report.isolates) if report.usable and report.isolates else report.reason
    line = f"{checked.status:<10}{checked.name:<14}{text}"
    return f"{line}  ({report.hint})" if report.hint else line
