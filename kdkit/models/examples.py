"""Examples as JSON: the lines of ``data.jsonl``, the dataset artifact that stages write and read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final, cast, get_args, get_type_hints

from kdkit.api.data import Example, Message
from kdkit.api.errors import DataError

__all__ = [
    "EXAMPLE_KEYS",
    "example_from_json",
    "example_to_json",
    "json_kind",
    "messages_from_json",
    "prompt_from_json",
]

EXAMPLE_KEYS: Final = frozenset(field.name for field in fields(Example))
"""The keys of every line: all fields of :class:`kdkit.api.Example`, also those with their default value."""

ROLES: Final[tuple[str, ...]] = get_args(get_type_hints(Message)["role"])


def example_to_json(example: Example) -> dict[str, Any]:
    """``example`` as plain JSON values; :func:`example_from_json` gives it back."""
    prompt = example.prompt
    return {
        "id": example.id,
        "prompt": prompt
        if isinstance(prompt, str)
        else [{"role": message.role, "content": message.content} for message in prompt],
        "completion": example.completion,
        "every_turn": example.every_turn,
        "references": list(example.references),
        "category": example.category,
        "echo": example.echo,
        "extra": dict(example.extra),
    }


def example_from_json(data: Mapping[str, Any]) -> Example:
    """The example that :func:`example_to_json` wrote.

    Raises:
        DataError: A key is missing, unknown or of the wrong type. It names the key, not the place.
    """
    if set(data) != EXAMPLE_KEYS:
        odd = sorted(EXAMPLE_KEYS ^ set(data))
        raise DataError(f"keys that are missing or unknown: {', '.join(odd)}", allowed=", ".join(sorted(EXAMPLE_KEYS)))
    references, extra = data["references"], data["extra"]
    if not isinstance(references, list) or not all(isinstance(item, str) for item in references):
        raise DataError("'references' is not a list of texts")
    if not isinstance(extra, dict):
        raise DataError(f"'extra' is {json_kind(extra)}, not an object")
    if not isinstance(data["every_turn"], bool):
        raise DataError(f"'every_turn' is {json_kind(data['every_turn'])}, not true or false")
    return Example(
        id=_text(data, "id"),
        prompt=prompt_from_json(data["prompt"]),
        completion=None if data["completion"] is None else _text(data, "completion"),
        every_turn=data["every_turn"],
        references=tuple(references),
        category=_text(data, "category"),
        echo=_text(data, "echo"),
        extra=extra,
    )


def prompt_from_json(value: Any, name: str = "prompt") -> str | tuple[Message, ...]:
    """A prompt: text as it is, or a list of messages.

    Raises:
        DataError: Neither; ``name`` is what the message calls it.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return messages_from_json(value, name)
    raise DataError(f"{name!r} is {json_kind(value)}", allowed="text or a list of {role, content}")


def messages_from_json(value: Any, name: str = "messages") -> tuple[Message, ...]:
    """A conversation from ``[{"role": ..., "content": ...}, ...]``.

    Raises:
        DataError: No list, empty, an unknown role, content that is not text, or keys that would be lost.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{name!r} is {json_kind(value)}", allowed="a list of {role, content}")
    return tuple(_message(item, f"{name}[{index}]") for index, item in enumerate(value))


def _message(item: Any, name: str) -> Message:
    if not isinstance(item, dict):
        raise DataError(f"{name} is {json_kind(item)}", allowed="{role, content}")
    # A key with null is how tables write an absent key. Anything else (tool calls, per-message weights) changes what
    # is learned, so it is refused rather than dropped.
    lost = sorted(str(key) for key, part in item.items() if part is not None and key not in {"role", "content"})
    if lost:
        raise DataError(f"{name} has {', '.join(lost)}", allowed="role and content")
    if item.get("role") not in ROLES:
        raise DataError(f"the role of {name} is {item.get('role')!r}", allowed=", ".join(ROLES))
    if not isinstance(item.get("content"), str):
        raise DataError(f"the content of {name} is {json_kind(item.get('content'))}, not text")
    return Message(cast("Any", item["role"]), item["content"])


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data[key]
    if not isinstance(value, str):
        raise DataError(f"{key!r} is {json_kind(value)}, not text")
    return value


def json_kind(value: Any) -> str:
    """What a JSON value is, for an error message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a text"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "an object"
