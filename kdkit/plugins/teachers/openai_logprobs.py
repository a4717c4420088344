"""Top-k log-probabilities out of a server's answer, in the two forms that servers have for those of a prompt.

Nothing in an answer is believed: every position must name the token that was sent, every number must be a
log-probability, and no position may have more probability than there is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from kdkit.api.errors import StageError

__all__ = ["FORMS", "Entry", "Form", "FormMissing", "Given", "Table", "completion", "top_table"]

_POSITIVE: Final = 1e-4
"""A log-probability may round to this much above zero."""
_EXCESS: Final = 1e-3
"""Probability that the entries of a position may have beyond one, from rounding."""
_SHORT: Final = 1e-2
"""Probability that may be missing, from rounding."""
_WIDER: Final = 2
"""A server's head may have more rows than ours, though never so many."""
_TOKEN: Final = re.compile(r"token_id:(0|[1-9][0-9]{0,9})")
_ID: Final = re.compile(r"0|[1-9][0-9]{0,9}")

Entry: TypeAlias = Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Given:
    """What an answer says about a prompt.

    Attributes:
        entries: Log-probabilities by token id for every position; None where there are none, as at the first.
        named: The tokens that the server took for the prompt, where the form has them.
    """

    entries: Sequence[Entry | None]
    named: Sequence[int] | None = None

    def about(self, token: int, position: int) -> Entry | None:
        """The entry at ``position``; None when it is not about ``token``."""
        entry = self.entries[position]
        right = entry is not None and token in entry and (self.named is None or self.named[position] == token)
        return entry if right else None


class FormMissing(LookupError):
    """The answer has no log-probabilities in this form; the text says what it has instead."""


@dataclass(frozen=True, slots=True)
class Form:
    """A way to ask for the log-probabilities of a prompt.

    Attributes:
        name: The field that asks for them.
        fields: What a request has, given k.
        given: What the choice of an answer says; ``FormMissing`` when it says nothing in this form.
    """

    name: str
    fields: Callable[[int], dict[str, Any]]
    given: Callable[[Mapping[str, Any], str], Given]


@dataclass(frozen=True, slots=True)
class Table:
    """The k most probable tokens of N positions, most probable first: ids [N, k] int64, logprobs [N, k] float32.

    ``taken``: log-probabilities [N] float32 of the tokens that were sent, which may be none of these.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    taken: np.ndarray


def completion(answer: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The one choice of an answer.

    Raises:
        StageError: There is none, or there are several.
    """
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        count = f"{len(choices)} choices" if isinstance(choices, list) else "no choices"
        raise StageError(f"the answer has {count}", where=where, allowed="the one that was asked for")
    index = choices[0].get("index", 0)
    if type(index) is not int or index != 0:
        raise StageError("the answer belongs to another prompt than was sent", where=where)
    return choices[0]


def top_table(given: Given, sent: Sequence[int], positions: Sequence[int], k: int, size: int, where: str) -> Table:
    """The k most probable tokens at ``positions``, checked.

    Args:
        given: What the server says.
        sent: The prompt's token ids.
        positions: Those that are wanted, each from 1 to ``len(sent) - 1``.
        k: How many; a position may have one more, the sent token where it is less probable.
        size: Ids must be below this.
        where: The server, for errors.

    Raises:
        StageError: The answer is about other tokens, has fewer than k, or numbers that are no log-probabilities.
    """
    _check_document(given, sent, where)
    ids, values = np.zeros((len(positions), k), np.int64), np.zeros((len(positions), k), np.float64)
    taken = np.zeros(len(positions), np.float64)
    for row, position in enumerate(positions):
        entry = given.entries[position] or {}
        taken[row] = entry[sent[position]]
        if len(entry) < k:
            raise _wrong(f"has {len(entry)} log-probabilities at position {position}, {k} were asked for", where)
        _fill(ids[row], values[row], entry, k, where)
        # Nothing that was left out is more probable than the last entry, so these bound what can be missing.
        most = float(np.exp(values[row]).sum() + _WIDER * (size - k) * np.exp(values[row, -1]))
        if most < 1 - _SHORT:
            raise _wrong(f"has probabilities at position {position} that are too small for the {k} largest", where)
    if ids.size and ids.max() >= size:
        raise _wrong(f"names token {ids.max()}, the tokenizer's model has {size:,}", where)
    return Table(ids, np.minimum(values, 0).astype(np.float32), np.minimum(taken, 0).astype(np.float32))


def _check_document(given: Given, sent: Sequence[int], where: str) -> None:
    """Refuse an answer about other tokens than ``sent``; also where nothing is learned, so that none is mixed up."""
    if len(given.entries) != len(sent):
        raise _wrong(f"has {len(given.entries)} positions for {len(sent)} tokens", where)
    if sent and given.entries[0]:
        raise _wrong("has log-probabilities of the first token, which nothing comes before", where)
    for position in range(1, len(sent)):
        if given.about(sent[position], position) is None:
            raise _wrong(f"is about another token at position {position} than the one that was sent", where)


def _fill(ids: np.ndarray, values: np.ndarray, entry: Entry, k: int, where: str) -> None:
    """Write the k largest values of ``entry`` and their ids, in order."""
    names = np.fromiter(entry.keys(), np.int64, len(entry))
    given = np.fromiter(entry.values(), np.float64, len(entry))
    if not np.isfinite(given).all():
        raise _wrong("has a log-probability that is not finite", where)
    if given.max() > _POSITIVE:
        raise _wrong(f"has the log-probability {given.max():g}, above zero", where)
    if (mass := float(np.exp(given).sum())) > 1 + _EXCESS:
        raise _wrong(f"has probabilities that sum to {mass:.4g}", where)
    order = np.argsort(-given, kind="stable")[:k]
    ids[:], values[:] = names[order], given[order]


def _wrong(what: str, where: str) -> StageError:
    return StageError(f"the answer {what}", where=where, hint="nothing was trained on it")


def _number(value: Any, where: str) -> float:
    if type(value) is not float and type(value) is not int:
        raise _wrong(f"has a {type(value).__name__} where a log-probability belongs", where)
    try:
        return float(value)
    except OverflowError:
        return float("inf")


# --- prompt_logprobs: vLLM ----------------------------------------------------------------------------------------


def _prompt_fields(k: int) -> dict[str, Any]:
    return {"prompt_logprobs": k}


def _prompt_given(choice: Mapping[str, Any], where: str) -> Given:
    given = choice.get("prompt_logprobs")
    if given is None:
        raise FormMissing("has no prompt_logprobs")
    if not isinstance(given, list):
        raise _wrong("has prompt_logprobs that are no list", where)
    return Given([None if item is None else _prompt_entry(item, where) for item in given])


def _prompt_entry(item: Any, where: str) -> Entry:
    if not isinstance(item, dict):
        raise _wrong("has prompt_logprobs whose positions are no mappings", where)
    entry = {}
    for name, value in item.items():
        if not _ID.fullmatch(name) or not isinstance(value, dict):
            raise _wrong("has prompt_logprobs whose entries are not by token id", where)
        entry[int(name)] = _number(value.get("logprob"), where)
    return entry


# --- echo and logprobs: the completions protocol ------------------------------------------------------------------


def _echo_fields(k: int) -> dict[str, Any]:
    return {"logprobs": k, "return_tokens_as_token_ids": True}


def _echo_given(choice: Mapping[str, Any], where: str) -> Given:
    given = choice.get("logprobs")
    if not isinstance(given, dict):
        raise FormMissing("has no logprobs")
    tokens, own, top = (given.get(name) for name in ("tokens", "token_logprobs", "top_logprobs"))
    if not (isinstance(tokens, list) and isinstance(own, list) and isinstance(top, list)):
        raise FormMissing("has logprobs without tokens, token_logprobs and top_logprobs")
    if not len(tokens) == len(own) == len(top):
        raise _wrong("has tokens, token_logprobs and top_logprobs of different lengths", where)
    named = [_token(token) for token in tokens]
    entries = [
        None if item is None else {**_echo_entry(item, where), token: _number(value, where)}
        for token, value, item in zip(named, own, top, strict=True)
    ]
    return Given(entries, named)


def _token(text: Any) -> int:
    found = _TOKEN.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        # Several ids can have one text (pieces of characters, a text with and without its space).
        raise FormMissing("names tokens by their text, which is ambiguous")
    return int(found[1])


def _echo_entry(item: Any, where: str) -> dict[int, float]:
    if not isinstance(item, dict):
        raise _wrong("has top_logprobs whose positions are no mappings", where)
    return {_token(name): _number(value, where) for name, value in item.items()}


FORMS: Final = (
    Form("prompt_logprobs", _prompt_fields, _prompt_given),
    Form("echo", _echo_fields, _echo_given),
)
