"""What a cache belongs to, and whether that is what training uses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdkit.api.artifacts import Model
from kdkit.api.errors import DataError
from kdkit.api.params import is_runtime, iter_fields
from kdkit.api.slots import Ref, walk
from kdkit.models.load import Vocabulary
from kdkit.models.locate import fingerprint
from kdkit.train.signal_cache.description import TeacherFacts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdkit.api import BuildContext, Component, Teacher
    from kdkit.train.signal_cache.description import Identity

__all__ = ["check_student", "check_weights", "model_identity", "teacher_identity", "template_hash"]


def model_identity(model: Model) -> str:
    """The content of a model, as content keys see it, and which of its layers are used."""
    layers = "" if model.keep_layers is None else f" layers {model.keep_layers}"
    return fingerprint(model.path) + layers


def teacher_identity(teacher: Component[Teacher], ctx: BuildContext) -> TeacherFacts:
    """Which teacher it is: its component, the models its parameters refer to, and a hash of what else they say."""
    models: dict[str, Model] = {
        ".".join(map(str, loc)): ctx.resolve(slot)
        for loc, slot in walk(teacher.params)
        if isinstance(slot, Ref) and issubclass(slot.artifact, Model)
    }
    params: Any = teacher.params
    said = {name: str(value) for name, value in iter_fields(params) if not is_runtime(type(params), name)}
    for name in models:
        said.pop(name, None)
    if said.get("precision") == "auto":
        said["precision"] = ctx.precision("auto")
    names = [teacher.name, *(_short(model.name or str(model.path)) for model in models.values())]
    return TeacherFacts(
        name=" ".join(names)[:256],
        use=teacher.name,
        models={name: model_identity(model) for name, model in models.items()},
        settings=hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest(),
    )


def _short(name: str) -> str:
    """A Hub id or a stage's output as it is, of a path the last part: a cache says nothing about the machine."""
    return Path(name).name if name.startswith((".", "/", "~")) else name


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of the chat template; of nothing when there is none."""
    return hashlib.sha256(json.dumps(tokenizer.chat_template or "").encode()).hexdigest()


def check_student(identity: Identity, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a student that the cache was not made for.

    Raises:
        DataError: Another tokenizer, fewer entries than the cache was taken over, or another chat template.
    """
    made = identity.vocabulary
    hint = "make the cache again with this student as 'student' of the cache-teacher stage"
    if made.fingerprint != vocabulary.fingerprint:
        what = (
            f"the teacher cache has another tokenizer ({made.tokens:,} tokens, map {made.fingerprint[:8]}) than the "
            f"student ({vocabulary.tokens:,} tokens, map {vocabulary.fingerprint[:8]})"
        )
        raise DataError(what, where=where, hint=hint)
    if vocabulary.size < made.width:
        what = f"the teacher cache is about {made.width:,} entries, the student has {vocabulary.size:,}"
        raise DataError(what, where=where, hint=hint)
    if identity.template != template_hash(tokenizer):
        raise DataError("the teacher cache was made with another chat template", where=where, hint=hint)


def check_weights(identity: Identity, model: Model, where: str) -> None:
    """Refuse a cache of another teacher.

    Raises:
        DataError: None of the models that the cache was taken from is ``model``; a model whose tokenizer alone was used
            is none of them.
    """
    teacher = identity.teacher
    known = [content for name, content in teacher.models.items() if name.rpartition(".")[2] != "tokenizer"]
    hint = "make the cache with this teacher, or leave out the teacher's 'model'"
    if not known:
        what = f"the teacher cache is of {teacher.name!r}, whose weights were not to be seen"
        raise DataError(what, where=where, hint="leave out the teacher's 'model'")
    if model_identity(model) not in known:
        what = f"the teacher cache was not taken from {model.name or model.path}, but from {teacher.name!r}"
        raise DataError(what, where=where, hint=hint)
