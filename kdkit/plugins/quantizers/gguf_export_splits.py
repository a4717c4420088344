"""llama.cpp's names for the rules by which byte-level tokenizers split text before they merge.

A GGUF file holds no rule, only a name of one that llama.cpp has built in. A wrong name changes tokens at digits, white
space and contractions, and with them what the model reads, without any error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kdkit.api.errors import ModelError

__all__ = ["split_rule"]

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str) -> str:
    """The rule of GPT-4's first tokenizer with another grouping of digits."""
    letters = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
    return rf"{letters}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased(contractions: str, digits: str) -> str:
    """The rule that also splits inside words, where small letters turn into capitals."""
    start = r"[^\r\n\p{L}\p{N}]?"
    lower = rf"{start}{_UPPER}*{_LOWER}+{contractions}"
    upper = rf"{start}{_UPPER}+{_LOWER}*{contractions}"
    return rf"{lower}|{upper}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_BYTES: Final = "bytes"
_GPT2: Final = "gpt-2"
_DIGITS: Final = "each digit"
_RULES: Final[Mapping[tuple[tuple[str, ...], bool], str]] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_words(r"\p{N}"), _BYTES), False): "qwen2",
    ((_words(r"\p{N}{1,3}"), _BYTES), False): "smaug-bpe",
    ((_words(r"\p{N}{1,3}"), _BYTES), True): "llama-bpe",
    ((_cased("", r"\p{N}"), _BYTES), True): "tekken",
    ((_cased(rf"{_CONTRACTIONS}?", r"\p{N}{1,3}"), _BYTES), False): "gpt-4o",
}
"""Steps of the rule, and whether words that are tokens skip the merges, to llama.cpp's name."""


def split_rule(pre_tokenizer: Mapping[str, Any] | None, *, ignore_merges: bool, where: str) -> str:
    """llama.cpp's name of the rule ``pre_tokenizer`` of a tokenizer.json (``tokenizer.ggml.pre``).

    Raises:
        ModelError: llama.cpp has no such rule, or this module does not know its name.
    """
    steps = _steps(pre_tokenizer or {})
    name = _RULES.get((steps, ignore_merges))
    if name is None:
        known = ", ".join(sorted(_RULES.values()))
        kind = " + ".join(steps) or "none"
        what = f"its tokenizer splits text by a rule that has no known name in GGUF ({kind[:200]})"
        raise ModelError(what, where=where, allowed=f"the rules called {known}")
    return name


def _steps(step: Mapping[str, Any]) -> tuple[str, ...]:
    """The steps of a pre-tokenizer in order, each as one word or its regular expression."""
    kind = str(step.get("type"))
    if kind == "Sequence":
        return tuple(name for part in step["pretokenizers"] for name in _steps(part))
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return (_GPT2 if step["use_regex"] else _BYTES,)
    if kind == "Digits" and step["individual_digits"]:
        return (_DIGITS,)
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        pattern = step["pattern"]
        return (str(pattern.get("Regex", pattern)),)
    return (f"{kind} with other settings" if kind in {"ByteLevel", "Digits", "Split"} else kind,)
