"""Hook of the site: formulas become MathML when it is built, so that a reader's browser needs no program for them."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_FUNCTION = re.compile(r"(\\log|\\min|\\max)(?! *(\\left|\\frac|\())")
"""Functions whose argument stands beside them: browsers leave no space there."""
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<code)")
"""What docstrings call a cross reference; the name behind it is shown as code."""


def on_page_content(text: str, **_: Any) -> str:
    """Replace what arithmatex marked as formulas."""
    text = _BLOCK.sub(lambda found: f'<div class="formula">{_mathml(found[1], "block")}</div>', text)
    text = _INLINE.sub(lambda found: _mathml(found[1], "inline"), text)
    return _ROLE.sub("", text)


def _mathml(formula: str, display: str) -> str:
    source = " ".join(html.unescape(formula).split())
    source = _FUNCTION.sub(r"\1\\,", source)
    return str(convert(source, display=display))
