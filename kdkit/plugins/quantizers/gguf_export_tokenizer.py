"""A tokenizer as GGUF metadata, so that llama.cpp makes the very tokens that the model was trained on.

Two kinds exist there: byte-level BPE (``gpt2``), with merges and the name of a splitting rule, and SentencePiece's BPE
(``llama``), which has scores in place of merges: any two neighbours whose join is a token may be joined, the best score
first. Whatever neither kind can say is refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby
from typing import TYPE_CHECKING, Any, Final, Literal

from transformers import PreTrainedTokenizerBase

from kdkit.api.errors import ModelError
from kdkit.plugins.quantizers.gguf_export_splits import split_rule

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["Vocabulary", "chat_template", "read_vocabulary", "write_vocabulary"]

_SPACE: Final = "\u2581"
_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")
_GENERATION: Final = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE_TOKEN = range(1, 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What GGUF keeps of a tokenizer.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece).
        pre: Name of the splitting rule; ``default`` for SentencePiece, which has none.
        tokens: One text per row of the token table.
        types: GGUF's kind of each token (``gguf.TokenType``).
        merges: ``left right`` from the first merge on, for ``gpt2``.
        scores: One per token for ``llama``; higher is joined first.
        ids: Special tokens by GGUF's names: bos, eos, unk, pad, eot, eom.
        add_bos: Text starts with bos.
        add_eos: Text ends with eos.
        add_space_prefix: Text starts with a space, for ``llama``.
        template: The chat template.
        notes: How llama.cpp will differ from this tokenizer all the same, one line each.
    """

    model: Literal["gpt2", "llama"]
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    ids: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool | None = None
    template: str | None = None
    notes: Sequence[str] = ()


def read_vocabulary(
    tokenizer: PreTrainedTokenizerBase, *, rows: int, ends: Iterable[int], bos: int | None, where: str
) -> Vocabulary:
    """The vocabulary of ``tokenizer`` for a model with ``rows`` rows in its token table.

    Args:
        tokenizer: Backed by the tokenizers library.
        rows: Rows without a token are filled with unused ones.
        ends: Tokens that end an answer besides the tokenizer's own end token.
        bos: Start token for a tokenizer that names none.
        where: The model, for errors.

    Raises:
        ModelError: llama.cpp has nothing like it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("its tokenizer is not backed by tokenizer.json", where=where)
    state = json.loads(backend.to_str())
    model, kind = state["model"], state["model"].get("type")
    if kind != "BPE" or any(model[key] for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        name = "BPE with dropout, prefixes or suffixes" if kind == "BPE" else kind
        raise ModelError(f"its tokenizer ({name}) cannot be exported to GGUF", where=where, allowed="plain BPE")
    add_bos, add_eos = _added(tokenizer, where)
    common: dict[str, Any] = {
        "ids": _special_ids(tokenizer, rows, ends, bos, where),
        "add_bos": add_bos,
        "add_eos": add_eos,
        "template": chat_template(tokenizer),
    }
    make = _sentencepiece if model["byte_fallback"] or _replaces_spaces(state["normalizer"]) else _byte_level
    return make(state, rows, common, where)


def _byte_level(state: Mapping[str, Any], rows: int, common: Mapping[str, Any], where: str) -> Vocabulary:
    model, notes = state["model"], _added_token_notes(state)
    pre = split_rule(state["pre_tokenizer"], ignore_merges=model["ignore_merges"], where=where)
    normalizer = (state["normalizer"] or {}).get("type")
    if normalizer == "NFC":
        notes.append("llama.cpp does not compose accents (NFC): text with combining ones makes other tokens there")
    elif normalizer is not None:
        raise ModelError(f"its tokenizer normalizes text ({normalizer})", where=where, allowed="NFC, or nothing")
    merges = [_pair(merge) for merge in model["merges"]]
    if not merges:
        raise ModelError("its byte-level tokenizer has no merges, and GGUF cannot hold none", where=where)
    if any(" " in part for pair in merges for part in pair):
        raise ModelError("a merge of its byte-level tokenizer holds a space", where=where)
    tokens, types = _tokens(state, rows, where)
    text = [" ".join(pair) for pair in merges]
    return Vocabulary(model="gpt2", pre=pre, tokens=tokens, types=types, merges=text, notes=notes, **common)


def _sentencepiece(state: Mapping[str, Any], rows: int, common: Mapping[str, Any], where: str) -> Vocabulary:
    prefix, notes = _prefix(state, where)
    if prefix and not notes and any(token["normalized"] for token in state["added_tokens"]):
        notes = [_AFTER_SPECIAL]
    tokens, types = _tokens(state, rows, where, pieces=True)
    if types.count(_BYTE_TOKEN) != 256:
        what = "its tokenizer lacks a token for every byte, without which llama.cpp ends at the first unknown character"
        raise ModelError(what, where=where)
    ranks = _ranks(state, where)
    last = -float(len(ranks) + 1)
    scores = [-float(ranks[token]) if token in ranks else last for token in tokens]
    notes = [*notes, *_added_token_notes(state)]
    kept: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "scores": scores,
        "add_space_prefix": prefix,
        "notes": notes,
    }
    return Vocabulary(model="llama", pre="default", **kept, **common)


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _tokens(state: Mapping[str, Any], rows: int, where: str, *, pieces: bool = False) -> tuple[list[str], list[int]]:
    """Text and type of every row, with ``[PADn]`` in rows that have no token."""
    texts = {index: token for token, index in state["model"]["vocab"].items()}
    types = dict.fromkeys(texts, _NORMAL)
    if pieces:
        types |= {index: _BYTE_TOKEN for index, token in texts.items() if _BYTE.fullmatch(token)}
    for added in state["added_tokens"]:
        index, text = added["id"], added["content"]
        if pieces and not added["special"]:
            text = text.replace(_SPACE, " ")  # looked for in the text as it is written
        unknown = pieces and text == state["model"]["unk_token"]
        texts[index] = text
        types[index] = _UNKNOWN if unknown else _CONTROL if added["special"] else _USER_DEFINED
    if texts and max(texts) >= rows:
        raise ModelError(f"its tokenizer has a token {max(texts)}, its token table {rows} rows", where=where)
    taken = set(texts.values())
    if len(taken) < len(texts) or any("\0" in text or not text for text in taken):
        raise ModelError("two of its tokens have one text, or one is empty or holds a null character", where=where)
    spare = (name for name in map("[PAD{}]".format, count(len(texts))) if name not in taken)
    tokens = [texts[index] if index in texts else next(spare) for index in range(rows)]
    return tokens, [types.get(index, _UNUSED) for index in range(rows)]


def _ranks(state: Mapping[str, Any], where: str) -> dict[str, int]:
    """Order in which SentencePiece would join tokens, from merges that must be all those that it would make."""
    added = {token["content"] for token in state["added_tokens"]}
    vocab = state["model"]["vocab"].keys() - added
    merges = [_pair(merge) for merge in state["model"]["merges"]]
    made = [left + right for left, right in merges]
    order = [token for token, _ in groupby(token for token in made if token not in added)]
    ranks = {token: rank for rank, token in enumerate(order)}
    if len(ranks) < len(order):
        token = Counter(order).most_common(1)[0][0]
        raise ModelError(f"its tokenizer prefers one way of making {token!r} to another", where=where, hint=_HINT)
    known = set(merges)
    for token in vocab:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab and (left, right) not in known:
                what = f"its tokenizer never makes {token!r} from {left!r} and {right!r}"
                raise ModelError(what, where=where, hint=_HINT)
    return ranks


_AFTER_SPECIAL: Final = "llama.cpp puts a space after added tokens, too, which this tokenizer does not"
_HINT: Final = "llama.cpp joins by token, as SentencePiece does, and would split text otherwise"


def _replaces_spaces(normalizer: Mapping[str, Any] | None) -> bool:
    return any(part.get("type") == "Replace" and part.get("content") == _SPACE for part in _parts(normalizer))


def _parts(normalizer: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    if normalizer is None:
        return ()
    return normalizer["normalizers"] if normalizer.get("type") == "Sequence" else (normalizer,)


def _prefix(state: Mapping[str, Any], where: str) -> tuple[bool, list[str]]:
    """Whether text is given a leading space, and how llama.cpp differs about it."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    parts, before = list(_parts(state["normalizer"])), state["pre_tokenizer"] or {"type": None}
    at_spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if parts in ([prepend, spaces], [spaces]) and before in ({"type": None}, at_spaces):
        return parts[0] == prepend, []
    if not parts and before["type"] == "Metaspace" and before["replacement"] == _SPACE and not before["split"]:
        scheme = before["prepend_scheme"]
        if scheme == "never":
            return False, []
        notes = ["llama.cpp puts a space before text that starts with one, too, which this tokenizer does not"]
        if scheme == "first":
            notes.append(_AFTER_SPECIAL)
        return True, notes
    kinds = ", ".join(str(part.get("type")) for part in (*parts, before) if part.get("type"))
    what = f"its tokenizer prepares text in a way that GGUF has no name for ({kinds or 'nothing'})"
    raise ModelError(what, where=where, allowed="SentencePiece's: spaces become \u2581, with or without a leading one")


def _added_token_notes(state: Mapping[str, Any]) -> list[str]:
    """Added tokens whose matching llama.cpp does not know."""
    kinds = ("lstrip", "rstrip", "single_word")
    odd = [token["content"] for token in state["added_tokens"] if any(token[kind] for kind in kinds)]
    if not odd:
        return []
    return [f"llama.cpp does not know that {len(odd)} added tokens, such as {odd[0]!r}, mind the text beside them"]


def _added(tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[bool, bool]:
    """Whether a start and an end token are put around text: tried, since tokenizers say it in many ways."""
    bare = list(tokenizer("a", add_special_tokens=False).input_ids)
    full = list(tokenizer("a").input_ids)
    for bos in (False, True):
        for eos in (False, True):
            start = [tokenizer.bos_token_id] if bos else []
            end = [tokenizer.eos_token_id] if eos else []
            if full == start + bare + end:
                return bos, eos
    what = "its tokenizer puts other tokens than one start and one end token around text"
    raise ModelError(what, where=where)


def _special_ids(
    tokenizer: PreTrainedTokenizerBase, rows: int, ends: Iterable[int], bos: int | None, where: str
) -> dict[str, int]:
    stops = list(dict.fromkeys(token for token in (tokenizer.eos_token_id, *ends) if token is not None))
    if not stops:
        raise ModelError("its tokenizer has no end token, and llama.cpp would take token 11 for it", where=where)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else bos
    found = {"bos": start, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    found |= dict(zip(("eos", "eot", "eom"), stops, strict=False))
    ids = {name: token for name, token in found.items() if token is not None}
    for name, token in ids.items():
        if not 0 <= token < rows:
            raise ModelError(f"its {name} token {token} is outside its token table of {rows} rows", where=where)
    return ids


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The (default) chat template, in words that llama.cpp knows.

    transformers marks the assistant's text with ``{% generation %}``, which means nothing for the text itself and is
    unknown to other template engines; an ``if`` that always holds stands in its place.
    """
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:
        return None
    return _GENERATION.sub(lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", template)


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Write all metadata of the tokenizer."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
    for name, token in vocabulary.ids.items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)
