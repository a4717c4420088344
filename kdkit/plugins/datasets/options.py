"""Parameters that several datasets share. Light: no data library is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal, Self, TypeAlias, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from kdkit.api.artifacts import Dataset
from kdkit.api.params import Params
from kdkit.api.protocols import DatasetLoader
from kdkit.api.slots import Component, OneOrMore, Ref

__all__ = [
    "CATEGORIES",
    "Category",
    "Decontaminate",
    "Dedup",
    "PromptOptions",
    "SourceOptions",
    "SplitOptions",
    "StyleOptions",
    "is_hub_id",
]

Dedup: TypeAlias = Literal["none", "exact", "prompt"]

Category: TypeAlias = Literal[
    "open_qa",
    "general_qa",
    "classification",
    "closed_qa",
    "brainstorming",
    "information_extraction",
    "summarization",
    "creative_writing",
]
CATEGORIES: Final[tuple[str, ...]] = get_args(Category)
"""The eight kinds of task of Dolly."""


def is_hub_id(source: Any) -> bool:
    """Whether ``source`` has the form ``org/name``; local paths start with ``./ ../ / ~``."""
    if not isinstance(source, str) or source.startswith(("./", "../", "/", "~")):
        return False
    return source.count("/") == 1 and all(source.split("/"))


class Decontaminate(Params):
    """Remove rows that share text with evaluation sets."""

    against: OneOrMore[Component[DatasetLoader]]
    """The evaluation sets, such as ``{use: dolly, source: ./rows.jsonl, split: test}``. Exactly the rows that this
    entry gives are compared, so name the split that is evaluated."""
    ngram: int = Field(13, ge=3, le=64)
    """How many words in a row have to be the same. Words are runs of letters, digits and marks in any script, after
    Unicode normalisation (NFKC) and without regard to case; in scripts without spaces every character is a word. A
    row's prompt in its own words (without system message, headings and templates; of code datasets the code, the
    docstring or the problem's statement) and each of its answers are compared with the prompts and answers of the
    evaluation sets. A prompt with fewer words is compared as a whole with whole prompts (by its words, or by all its
    signs when it has no words); shorter answers alone remove nothing."""


class SplitOptions(Params):
    """Which rows of a dataset to take."""

    split: Literal["train", "validation", "test", "all"] = "train"
    """The part to take. A row's part follows from a hash of its prompt: it depends neither on the order of the rows nor
    on other rows, and rows with the same prompt are always in one part."""
    test_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the prompts in ``test``."""
    validation_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the prompts in ``validation``; ``train`` is what is left."""
    split_seed: int = 0
    """Changes which prompts are in which part, and the order of the rows. Give all stages of a recipe the same."""
    max_rows: int | None = Field(None, ge=1)
    """Take at most this many rows: the first ones in hash order, so that a smaller number takes a subset."""
    dedup: Dedup = "exact"
    """Duplicates: ``exact`` keeps one of the rows whose prompt and answers are the same but for case and white space,
    ``prompt`` one of the rows with the same prompt, ``none`` all. All parts of the source are looked at, so that no
    copy of a row is in two parts. The row that stays is the first in hash order, wherever it stands in the file. With
    ``exact`` and ``prompt`` also what is no copy but gives an answer away is in one part only, in ``test`` before
    ``validation`` before ``train``: accepted programs of ``bugnet``, functions of ``pytorrent``, and prompts of
    ``dolly`` whose words are the same although one has a context and the other has not. Rows that are left out for it
    are counted as ``shared-with-other-split``."""
    decontaminate: Decontaminate | None = None
    """Remove rows that share text with an evaluation set, such as
    ``{against: {use: dolly, split: test}, ngram: 13}``; how many is reported as ``contaminated``."""

    @field_validator("test_fraction", "validation_fraction")
    @classmethod
    def _part_exists(cls, value: float, info: ValidationInfo) -> float:
        part = str(info.field_name).removesuffix("_fraction")
        if value == 0 and info.data.get("split") == part:
            raise PydanticCustomError("fraction", "0 leaves split: {part} without rows", {"part": part})
        if part == "validation" and value + info.data.get("test_fraction", 0.0) >= 1:
            raise PydanticCustomError("fraction", "with test_fraction this leaves no rows for split: train")
        return value


class StyleOptions(Params):
    """How a row becomes a prompt; a dataset narrows ``prompt_style`` to the styles that it has."""

    prompt_style: str = "chat"
    """The form of the prompt."""
    template: Path | None = Field(None, validate_default=True)
    """A Jinja file for ``prompt_style: template``."""
    system: str | None = Field(None, min_length=1)
    """A system message before the user's, for ``prompt_style: chat``."""

    @field_validator("template")
    @classmethod
    def _template_fits(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        style = info.data.get("prompt_style")
        if style == "template" and value is None:
            raise PydanticCustomError("template", "prompt_style: template needs a Jinja file here")
        if value is not None and style not in {"template", None}:
            raise PydanticCustomError("template", "a template is used with prompt_style: template only")
        return value

    @field_validator("system")
    @classmethod
    def _system_fits(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("prompt_style") not in {"chat", None}:
            raise PydanticCustomError("system", "a system message is used with prompt_style: chat only")
        return value


class PromptOptions(StyleOptions):
    """How an instruction becomes a prompt."""

    prompt_style: Literal["chat", "alpaca", "template"] = "chat"
    """``chat`` makes one user message (the model's chat template renders it), ``alpaca`` the text with headings that
    the Alpaca and MiniLLM models were trained on, ``template`` text from your own ``template``."""
    template: Path | None = Field(None, validate_default=True)
    """A Jinja file for ``prompt_style: template``; it sees ``instruction``, ``context`` and ``category``."""
    categories: list[Category] | None = Field(None, min_length=1)
    """Take only rows of these categories."""


class SourceOptions(Params):
    """Where rows come from."""

    source: Ref[Dataset]
    """A file (.jsonl, .jsonl.gz, .json, .parquet) or a directory of them, a Hub id, or a stage's output."""
    config: str | None = None
    """Configuration of a Hub dataset; its default one when empty."""
    hub_split: str | None = None
    """Split of a Hub dataset to read before ``split`` divides it; ``train`` when empty."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a broken row does: ``fail`` stops with its file and line, ``skip`` counts it and goes on."""

    @model_validator(mode="after")
    def _hub_only(self) -> Self:
        given = [name for name in ("config", "hub_split", "revision") if getattr(self, name) is not None]
        if given and not is_hub_id(self.source.source):
            values = {"names": ", ".join(given), "source": str(self.source)}
            raise PydanticCustomError("hub", "{names}: for a Hub id only, and {source} is none", values)
        return self
