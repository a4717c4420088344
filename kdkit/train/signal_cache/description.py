"""What a cache says about itself: whose it is, how it was taken, and which files belong to it.

``cache.json`` may come from a stranger: its size is bounded, its types are checked once, and nothing else is looked up
in it afterwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdkit.api.errors import DataError
from kdkit.train.signal_cache.files import read_file

__all__ = [
    "DESCRIPTION",
    "FORMAT",
    "MOST_VOCABULARY",
    "Description",
    "Identity",
    "RuleFacts",
    "Start",
    "TeacherFacts",
    "Totals",
    "VocabularyFacts",
    "difference",
    "read_description",
    "self_hash",
]

FORMAT: Final = 2
"""Raise it when bytes mean something else; a cache of another format is refused."""
DESCRIPTION: Final = "cache.json"
MOST_VOCABULARY: Final = 2**21
"""Widest vocabulary of a cache, eight times that of today's widest models."""
_MOST_BYTES: Final = 2**24

_Text = Annotated[str, Field(max_length=256)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_ShardName = Annotated[str, Field(pattern=r"^shard-[0-9]{5}\.kdsc$")]
_Width = Annotated[int, Field(ge=1, le=MOST_VOCABULARY)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TeacherFacts(_Facts):
    """Which teacher was asked: ``name`` is for people, the rest tells two teachers apart.

    Attributes:
        name: Its component, and its models as the recipe wrote them.
        use: Its component.
        models: Content of the models that its parameters refer to, by parameter.
        settings: Hash of its other parameters, its precision among them.
    """

    name: _Text
    use: _Text
    models: dict[_Text, _Text]
    settings: _Digest


class VocabularyFacts(_Facts):
    """The student's tokens, and how many leading entries of its vocabulary the cache is about."""

    width: _Width
    tokens: _Count
    fingerprint: _Digest


class RuleFacts(_Facts):
    """What was kept; see :class:`kdkit.train.signal_cache.select.Rule`."""

    mass: Annotated[float, Field(gt=0, le=1)]
    min_probability: Annotated[float, Field(ge=0, lt=1)]
    max_k: Annotated[int, Field(ge=1, lt=2**63)]
    temperature: Annotated[float, Field(gt=0)]
    bits: Annotated[int, Field(ge=6, le=16)]


class Identity(_Facts):
    """What makes the rows of two caches alike; ``template`` is a hash of the chat template."""

    teacher: TeacherFacts
    vocabulary: VocabularyFacts
    template: _Digest
    rule: RuleFacts

    @property
    def digest(self) -> str:
        """sha256 (hex) of all that tells caches apart, which names do not."""
        data = Identity.model_dump(self, include=set(Identity.model_fields))
        data["teacher"].pop("name")
        return hashlib.sha256(_canonical(data)).hexdigest()


class Totals(_Facts):
    """Of the whole cache; ``bytes`` are those of all its files."""

    rows: _Count
    tokens: _Count
    bytes: _Count


class Start(Identity):
    """What is known before the first shard: ``code`` is the digest of the id code, ``measured`` what is lost."""

    code: _Digest
    measured: dict[_Text, float]


class Description(Start):
    """The content of ``cache.json``; ``shards`` has the sha256 of every shard's index, by file name."""

    format: int
    shards: dict[_ShardName, _Digest]
    totals: Totals


def difference(one: Identity, other: Identity) -> str | None:
    """In what two identities differ, in words; None when they do not."""
    mine, theirs = one.teacher, other.teacher
    if (mine.use, mine.models) != (theirs.use, theirs.models):
        return f"another teacher ({mine.name!r} and {theirs.name!r}, told apart by their weights)"
    if mine.settings != theirs.settings:
        return "other settings of the teacher, such as its precision"
    if one.vocabulary.fingerprint != other.vocabulary.fingerprint:
        return "another tokenizer"
    if one.vocabulary != other.vocabulary:
        return f"another vocabulary ({one.vocabulary.width:,} and {other.vocabulary.width:,} entries)"
    if one.template != other.template:
        return "another chat template"
    pairs = zip(one.rule, other.rule, strict=True)
    return next((f"another {name} ({a:g} and {b:g})" for (name, a), (_, b) in pairs if a != b), None)


def read_description(directory: Path) -> Description:
    """The description of a finished cache.

    Raises:
        DataError: There is none, or it is not one: one line with the first problem.
    """
    path = directory / DESCRIPTION
    if not path.exists():
        raise DataError("is no finished teacher cache: it has no cache.json", where=str(directory))
    data = _parsed(path)
    if data.get("format") != FORMAT:
        hint = "make the cache again"
        raise DataError(f"has format {data.get('format')!r:.40}", where=str(path), allowed=str(FORMAT), hint=hint)
    claimed = data.pop("sha256", None)
    if claimed != self_hash(data):
        raise DataError("was changed after it was written", where=str(path), hint="make the cache again")
    try:
        return Description.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{place[:80]}: {first['msg']}", where=str(path), hint="make the cache again") from None


def self_hash(data: Mapping[str, Any]) -> str:
    """sha256 (hex) of JSON, whatever the order of its keys."""
    return hashlib.sha256(_canonical(data)).hexdigest()


def _parsed(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(read_file(path, _MOST_BYTES).decode("utf-8"), parse_constant=_no_number)
    except RecursionError:
        raise DataError("is nested too deeply", where=str(path)) from None
    except ValueError as error:
        raise DataError(f"is no JSON: {error}", where=str(path)) from None
    if not isinstance(data, dict):
        raise DataError("is no JSON object", where=str(path))
    return data


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _canonical(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
