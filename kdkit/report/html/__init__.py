"""``report.html``: the report as one file that needs nothing else, for a browser, a mail or an issue."""

from __future__ import annotations

from kdkit.report.html.page import render_html

__all__ = ["render_html"]
