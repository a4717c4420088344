"""Content keys: the same key means the same result, so a finished stage is never computed twice.

A key covers the code (identity of the stage and of every nested component), all parameters that change the result
(defaults included), the content of every input, and the seed. It leaves out what only changes speed or chattiness.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from kdkit.api.errors import KdkitError, PluginError
from kdkit.api.params import ByHardware, is_runtime, iter_fields
from kdkit.api.slots import Component, Ref, StageOutput
from kdkit.engine.files import canonical_json
from kdkit.engine.hashing import HashMemo, hash_tree
from kdkit.engine.inputs import Inputs

__all__ = ["INPUT", "KEY_FORMAT", "KeyMaker", "StageKey", "differences"]

KEY_FORMAT: Final = 1
"""Raise it when the key itself is computed in another way."""
KEY_LENGTH: Final = 12
INPUT: Final = "input:"
"""Prefix of explained values that stand for content rather than for themselves."""
_ABSENT: Final = "(not set)"


@dataclass(frozen=True, slots=True)
class StageKey:
    """A stage's content key and what went into it, by parameter path, so that a change can be named."""

    key: str
    explained: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class KeyMaker:
    """Computes keys of one recipe's stages.

    Attributes:
        inputs: Finds literal inputs and hashes them.
        memo: Remembers hashes of files that parameters name.
        base_dir: What relative paths in parameters start from.
        precision: What ``auto`` means on this machine.
    """

    inputs: Inputs
    memo: HashMemo
    base_dir: Path
    precision: str

    def key(
        self,
        facts: Mapping[str, Any],
        params: BaseModel,
        upstream: Mapping[str, str],
        locate: Callable[[tuple[str | int, ...]], tuple[str, int, int]],
    ) -> StageKey:
        """The key of a stage.

        Args:
            facts: What decides the result besides parameters, by names with a blank, as no parameter has one.
            params: Its validated parameters.
            upstream: Keys of the stages it refers to, by stage name.
            locate: Maps a parameter path to file, line and column, for errors.

        Raises:
            KdkitError: An input is missing; the error says where the recipe names it.
        """
        tree = _Describer(self, upstream, locate).describe(params, ())
        explained = {**facts, **dict(_flat(tree))}
        data = {"format": KEY_FORMAT, "facts": facts, "params": tree}
        return StageKey(hashlib.sha256(canonical_json(data).encode()).hexdigest()[:KEY_LENGTH], explained)


@dataclass(frozen=True, slots=True)
class _Describer:
    """Turns validated parameters into JSON data in which components, references and files stand by identity."""

    maker: KeyMaker
    upstream: Mapping[str, str]
    locate: Callable[[tuple[str | int, ...]], tuple[str, int, int]]

    def describe(self, value: Any, loc: tuple[str | int, ...]) -> Any:
        if isinstance(value, Component):
            code = f"{value.kind} {value.found.qualified_name} {value.found.identity}"
            extra = {name: self.describe(item, (*loc, name)) for name, item in value.extra.items()}
            return {**self.describe(value.params, loc), **extra, "use": code}
        if isinstance(value, Ref):
            return self._ref(value, loc, None)
        if isinstance(value, BaseModel):
            return self._model(value, loc)
        if isinstance(value, Mapping):
            return {str(key): self.describe(item, (*loc, str(key))) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.describe(item, (*loc, index)) for index, item in enumerate(value)]
        if isinstance(value, set | frozenset):
            return sorted((self.describe(item, loc) for item in value), key=canonical_json)
        return self._leaf(value, loc)

    def _model(self, model: BaseModel, loc: tuple[str | int, ...]) -> dict[str, Any]:
        described = {}
        for name, value in iter_fields(model):
            if is_runtime(type(model), name):
                continue
            marks = type(model).model_fields[name].metadata
            if value == "auto" and any(isinstance(mark, ByHardware) for mark in marks):
                described[name] = self.maker.precision
            elif isinstance(value, Ref):
                described[name] = self._ref(value, (*loc, name), model)
            else:
                described[name] = self.describe(value, (*loc, name))
        return described

    def _ref(self, ref: Ref[Any], loc: tuple[str | int, ...], owner: BaseModel | None) -> Any:
        if isinstance(ref.source, StageOutput):
            content = f"{INPUT}{self.upstream[ref.source.stage]}/{ref.source.output}"
        else:
            content = INPUT + self._located(ref, loc, revision_of(owner))
        # The revision is not a value of its own: the content it leads to is hashed.
        options = {
            name: self.describe(value, loc)
            for name, value in iter_fields(ref.options)
            if name != "revision" and value != type(ref.options).model_fields[name].default
        }
        return {"from": content, **options} if options else content

    def _located(self, ref: Ref[Any], loc: tuple[str | int, ...], revision: str | None) -> str:
        try:
            return self.maker.inputs.locate(ref, revision).digest
        except KdkitError as error:
            file, line, column = self.locate(loc)
            place = f"{file}:{line}:{column}" if line else file
            where = ": ".join(filter(None, (place, ".".join(map(str, loc)), error.where)))
            raise type(error)(error.what, where=where, allowed=error.allowed, hint=error.hint) from error

    def _leaf(self, value: Any, loc: tuple[str | int, ...]) -> Any:
        if isinstance(value, Enum):
            return self._leaf(value.value, loc)
        if isinstance(value, Path):
            path = self.maker.base_dir / value.expanduser()
            return INPUT + hash_tree(path, self.maker.memo) if path.exists() else str(value)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise PluginError(
            f"parameter {'.'.join(map(str, loc))} is a {type(value).__name__}, which has no stable identity",
            allowed="JSON values, Path, Enum, Params, Component, Ref and collections of them",
        )


def revision_of(owner: BaseModel | None) -> str | None:
    """The ``revision`` that a component's parameters give for a dataset on the Hub."""
    revision = getattr(owner, "revision", None)
    return revision if isinstance(revision, str) else None


def _flat(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        return [pair for key, item in tree.items() for pair in _flat(item, f"{path}.{key}" if path else str(key))]
    if isinstance(tree, list) and tree:
        return [pair for index, item in enumerate(tree) for pair in _flat(item, f"{path}[{index}]")]
    return [(path, tree)]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two explanations, one phrase each: ``learning_rate 1e-05 -> 2e-05``."""
    changes = []
    for path in [*new, *(path for path in old if path not in new)]:
        before, after = old.get(path, _ABSENT), new.get(path, _ABSENT)
        if before == after:
            continue
        if str(before).startswith(INPUT) and str(after).startswith(INPUT):
            changes.append(f"input {path.removesuffix('.from')} changed")
        else:
            changes.append(f"{path} {_short(before)} -> {_short(after)}")
    return changes


def _short(value: Any) -> str:
    text = str(value)
    if text.startswith(INPUT):
        return "(another input)"
    return text if len(text) <= 60 else f"{text[:57]}..."
