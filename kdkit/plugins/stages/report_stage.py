"""The report stage: one honest table from the scores of all models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdkit.api.artifacts import ReportFiles
from kdkit.report.collect import collect, write_report

if TYPE_CHECKING:
    from kdkit.api import StageContext
    from kdkit.api.protocols import StageOutputs
    from kdkit.plugins.stages.plugin import ReportParams

__all__ = ["run"]


def run(params: ReportParams, ctx: StageContext) -> StageOutputs:
    """Write ``report/report.json``, ``report/report.md`` and ``report/report.html``.

    Raises:
        DataError: Scores are malformed or contradict each other, or a role names no evaluated model.
    """
    scores = [ctx.resolve(ref).path for ref in params.scores]
    report = collect(
        scores,
        recipe=ctx.recipe,
        seed=ctx.seed,
        bootstrap_seed=ctx.seed_for("report"),
        teacher=params.teacher,
        baseline=params.baseline,
        reference=params.reference,
    )
    out = ctx.out / "report"
    write_report(report, out, scores)
    if notes := len(report["notes"]):
        # They stand below the tables, which are printed when the run ends.
        ctx.log(f"{notes} note{'s'[: notes > 1]} on these numbers")
    return {"report": ReportFiles(path=out, info={"models": list(report["models"])})}
