"""The README.md of a distilled model, with the front matter that the Hub reads. Light."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from kdkit.models.catalogue import KNOWN

__all__ = ["ModelCard", "render_card"]

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_USE: Final = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
```
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What a model card says.

    Attributes:
        name: Title.
        summary: One paragraph: what was done to get this model.
        base_model: How the recipe named the model this one was made from: a Hub id, a known name or a path.
        teacher: How the recipe named the teacher; None without one.
        licence: SPDX identifier of the base model; None when unknown.
        facts: Rows of the table: parameters, trained tokens, objective, data, seed, ...
    """

    name: str
    summary: str
    base_model: str
    teacher: str | None = None
    licence: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def render_card(card: ModelCard) -> str:
    """README.md: YAML front matter, summary, facts and how to load the model."""
    parts = [f"---\n{_front_matter(card)}---\n", f"# {card.name}\n", f"{card.summary}\n"]
    rows = {"base model": card.base_model} | ({"teacher": card.teacher} if card.teacher else {}) | dict(card.facts)
    table = "".join(f"| {_cell(name)} | {_cell(value)} |\n" for name, value in rows.items())
    parts.append(f"| | |\n|---|---|\n{table}")
    if card.licence is None:
        parts.append("The licence of the base model is not known to kdkit: check it before you share this model.\n")
    parts.append(f"## Use\n\nIt loads with plain transformers.\n\n{_USE}")
    return "\n".join(parts)


def _front_matter(card: ModelCard) -> str:
    known = KNOWN.get(card.base_model)
    base = known.hub_id if known else card.base_model
    licence = card.licence or (known.licence if known else None)
    data: dict[str, Any] = {}
    if _HUB_ID.fullmatch(base):  # the Hub refuses a local path here
        data["base_model"] = base
    data |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["kdkit", "distillation"]}
    if licence:
        data["license"] = licence.lower()  # the Hub lists SPDX identifiers in lower case
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def _cell(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
