"""What a cache belongs to, and whether that is what training uses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kdkit.api.artifacts import Model
from kdkit.api.errors import DataError
from kdkit.api.params import is_runtime, iter_fields
from kdkit.api.slots import Ref, walk
from kdkit.models.load import Vocabulary
from kdkit.models.locate import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdkit.api import BuildContext, Component, Teacher

__all__ = ["check_student", "check_weights", "model_identity", "teacher_identity", "template_hash"]


def model_identity(model: Model) -> str:
    """The content of a model, as content keys see it, and which of its layers are used."""
    layers = "" if model.keep_layers is None else f" layers {model.keep_layers}"
    return fingerprint(model.path) + layers


def teacher_identity(teacher: Component[Teacher], ctx: BuildContext) -> dict[str, Any]:
    """Which teacher it is: its component, the models its parameters refer to, and a hash of what else they say."""
    models = {
        ".".join(map(str, loc)): model_identity(ctx.resolve(slot))
        for loc, slot in walk(teacher.params)
        if isinstance(slot, Ref) and issubclass(slot.artifact, Model)
    }
    params: Any = teacher.params
    said = {name: str(value) for name, value in iter_fields(params) if not is_runtime(type(params), name)}
    for name in models:
        said.pop(name, None)
    if said.get("precision") == "auto":
        said["precision"] = ctx.precision("auto")
    settings = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return {"use": teacher.name, "models": models, "settings": settings}


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of the chat template; of nothing when there is none."""
    return hashlib.sha256(json.dumps(tokenizer.chat_template or "").encode()).hexdigest()


def check_student(
    description: Mapping[str, Any], vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, where: str
) -> None:
    """Refuse a student that the cache was not made for.

    Raises:
        DataError: Another tokenizer, fewer entries than the cache was taken over, or another chat template.
    """
    made = description["vocabulary"]
    hint = "make the cache with this student"
    if made["fingerprint"] != vocabulary.fingerprint:
        what = (
            f"the teacher cache has another vocabulary ({made['tokens']:,} tokens, the student {vocabulary.tokens:,})"
        )
        raise DataError(what, where=where, hint=hint)
    if vocabulary.size < made["width"]:
        what = f"the teacher cache is about {made['width']:,} entries, the student has {vocabulary.size:,}"
        raise DataError(what, where=where, hint=hint)
    if description["template"] != template_hash(tokenizer):
        raise DataError("the teacher cache was made with another chat template", where=where, hint=hint)


def check_weights(description: Mapping[str, Any], model: Model, where: str) -> None:
    """Refuse a cache of another teacher.

    Raises:
        DataError: None of the models that the cache was taken from is ``model``.
    """
    if model_identity(model) not in description["teacher"]["models"].values():
        raise DataError(
            f"the teacher cache was not taken from {model.name or model.path}",
            where=where,
            hint="make the cache with this teacher, or leave out the teacher's 'model'",
        )
