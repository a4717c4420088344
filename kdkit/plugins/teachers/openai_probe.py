"""What a server can do, found by asking once: whether it has the model, how it gives log-probabilities and how many.

The question is a text that tokenizers disagree about. A server whose tokens for it are not ours has another tokenizer,
and would take our token ids for other words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

from kdkit.api.errors import ModelError, StageError
from kdkit.plugins.teachers.openai_http import RefusedRequest, Server
from kdkit.plugins.teachers.openai_logprobs import FORMS, Entry, Form, FormMissing, Given, completion, top_table

if TYPE_CHECKING:
    from kdkit.models.load import Vocabulary

__all__ = ["PROBE", "Ability", "answer_bytes", "check_model", "maker", "probe", "scoring"]

PROBE: Final = "The quick brown fox jumps over 1024 lazy dogs; Größe, naïve, 東京.\n\tdef f(x): return x**2 != -1"
_RUNGS: Final = (512, 256, 128, 64, 32, 20, 16, 10, 8, 5, 4, 3, 2, 1)
_MODELS_BYTES: Final = 4 * 2**20
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Ability:
    """How to ask a server: the form it knows and how many log-probabilities it gives per token; and who answered."""

    form: Form
    top_k: int
    maker: str


def maker(answer: Mapping[str, Any]) -> str:
    """Who made an answer, as it says: the model's name, and the fingerprint that the protocol has for its set-up."""
    told = (answer.get("model"), answer.get("system_fingerprint"))
    return " ".join(part for part in told if isinstance(part, str)) or "no name"


def scoring(model: str, prompt: str | Sequence[int], form: Form, k: int) -> dict[str, Any]:
    """The body of a request for log-probabilities; at temperature 1 for servers that would apply another one."""
    return {"model": model, "prompt": prompt, "max_tokens": 0, "echo": True, "temperature": 1, **form.fields(k)}


def answer_bytes(tokens: int, k: int) -> int:
    """Bytes that an answer with k log-probabilities for each of so many tokens may have, with room for prose."""
    return 2**20 + tokens * (k + 1) * 400


def check_model(server: Server, model: str, vocabulary: Vocabulary | None) -> str | None:
    """Check that the server has ``model`` and, where it says so, that its vocabulary is ours.

    A server without a list of models is taken at its word.

    Returns:
        What the list says about the weights behind the name: ``fingerprint`` (kdkit serve-teacher), ``root`` (vLLM: the
        model's directory or id); None when it says neither.

    Raises:
        ModelError: It has other models, or another vocabulary.
        EnvironmentUnmet: It cannot be reached, or refuses the key.
    """
    where = f"{server.base_url}/models"
    try:
        listed = server.get("/models", limit=_MODELS_BYTES).get("data")
    except RefusedRequest:
        return None
    if not isinstance(listed, list):
        return None
    entries = {item["id"]: item for item in listed if isinstance(item, dict) and isinstance(item.get("id"), str)}
    if model not in entries:
        names = ", ".join(map(server.quoted, list(entries)[:_SHOWN])) or "none"
        more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
        raise ModelError(f"the server has no model {model!r}", where=where, allowed=names + more)
    theirs = entries[model].get("vocabulary")
    given = theirs.get("fingerprint") if isinstance(theirs, dict) else None
    if vocabulary is not None and isinstance(given, str) and given != vocabulary.fingerprint:
        _other_tokenizer(where)
    told = [(name, entries[model].get(name)) for name in ("fingerprint", "root")]
    return ", ".join(f"{name} {server.quoted(value)}" for name, value in told if isinstance(value, str)) or None


def probe(server: Server, model: str, ids: list[int], size: int, asked: int, *, exact: bool) -> Ability:
    """Ask for the log-probabilities of the text :data:`PROBE`.

    Args:
        server: Whom to ask.
        model: Its name there.
        ids: The text as our tokenizer reads it.
        size: Entries of the vocabulary.
        asked: Log-probabilities per token that are wanted.
        exact: Fewer will not do.

    Raises:
        ModelError: The server has another tokenizer.
        StageError: It gives none, or fewer than are wanted.
    """
    where = f"{server.base_url}/completions"
    reasons = []
    for form in FORMS:
        try:
            found = _climb(server, model, form, ids, size, asked)
        except FormMissing as error:
            reasons.append(f"with {form.name}: {error}")
            continue
        if exact and found.top_k < asked:
            hint = f"set top_k: {found.top_k} or top_k: auto, or raise the server's limit (vLLM: --max-logprobs)"
            what = f"the server gives at most {found.top_k} log-probabilities per token, top_k asks for {asked}"
            raise StageError(what, where=where, hint=hint)
        return found
    hint = "use vLLM or kdkit serve-teacher, or only the text of this teacher"
    raise StageError(f"gives no log-probabilities of a prompt ({'; '.join(reasons)})", where=where, hint=hint)


def _climb(server: Server, model: str, form: Form, ids: list[int], size: int, asked: int) -> Ability:
    """The most that the server gives: servers cut a number that is too large, or refuse it."""
    why = ""
    for k in (asked, *(rung for rung in _RUNGS if rung < asked)):
        try:
            answer = server.post("/completions", scoring(model, PROBE, form, k), limit=answer_bytes(4 * len(PROBE), k))
        except RefusedRequest as error:
            # The first refusal is about what was asked for; later ones may be about less.
            why = why or error.why
            if error.status in {404, 405, 501}:
                break
            continue
        return Ability(form, _count(answer, form, ids, size, k, f"{server.base_url}/completions"), maker(answer))
    raise FormMissing(why)


def _count(answer: dict[str, Any], form: Form, ids: list[int], size: int, asked: int, where: str) -> int:
    """Log-probabilities per position of the answer, at most ``asked``, after checking that its tokens are ours."""
    given = form.given(completion(answer, where), where)
    rows = [given.about(token, place) for place, token in enumerate(ids[: len(given.entries)])][1:]
    found = [row for row in rows if row is not None]
    # A server may close the text with its end token.
    if len(given.entries) - len(ids) not in {0, 1} or len(found) < len(rows):
        _other_tokenizer(where)
    fewest = min(map(len, found))
    if all(len(row) == fewest and _is_last(row, token) for row, token in zip(found, ids[1:], strict=True)):
        # The sent token stands at the end of each position: the server adds it to its top.
        fewest -= 1
    count = min(asked, fewest)
    if count < 1:
        raise FormMissing("has the log-probability of the sent token alone")
    whole = Given(given.entries[: len(ids)], given.named and given.named[: len(ids)])
    top_table(whole, ids, range(1, len(ids)), count, size, where)
    return count


def _is_last(entry: Entry, token: int) -> bool:
    return entry[token] <= min(entry.values())


def _other_tokenizer(where: str) -> NoReturn:
    raise ModelError(
        "the server's model has another tokenizer than 'tokenizer' of this teacher",
        where=where,
        hint="give the teacher's own tokenizer; token losses need a student that shares it",
    )
