"""From examples to token ids, with a mask that says which tokens are learned.

Prompt and answer are tokenised apart and joined: the model is trained on exactly the prompt ids that it sees when it
generates, and no merge across the boundary can move the first response token. A tokenizer that puts a space before
every text (sentencepiece's dummy prefix) would put one before the answer, too: there the answer is tokenised as the
continuation it is.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kdkit.api.data import Example, Message
from kdkit.api.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatEncoder", "Encoded"]

_MARKER: Final = "{% generation"


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example. ``learned[t]`` is True where token t is a training target; never at t = 0."""

    id: str
    ids: tuple[int, ...]
    learned: tuple[bool, ...]

    @property
    def targets(self) -> int:
        """How many tokens are learned."""
        return sum(self.learned)

    def cut(self, length: int) -> Encoded:
        """The first ``length`` tokens."""
        return Encoded(self.id, self.ids[:length], self.learned[:length])


class ChatEncoder:
    """Renders examples with a tokenizer's chat template; raw-text prompts bypass it.

    Args:
        tokenizer: A fast tokenizer; it needs a chat template only for prompts made of messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._adds_prefix = self._ids("a") != self._after_newline("a")

    def prompt_text(self, example: Example) -> str:
        """The prompt as the model sees it, up to where its answer starts."""
        if isinstance(example.prompt, str):
            return example.prompt
        return self._render(example.prompt, answer_follows=True)

    def prompt(self, example: Example) -> list[int]:
        """Token ids of the prompt. Raises ``DataError`` for an empty prompt."""
        ids = self._ids(self.prompt_text(example), special=isinstance(example.prompt, str))
        # A tokenizer that closes every text would end the prompt before the answer.
        if isinstance(example.prompt, str) and ids and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        if not ids:
            raise DataError("the prompt has no tokens", where=f"example {example.id}")
        return ids

    def training(self, example: Example) -> Encoded:
        """Token ids of prompt and answer; the answer's tokens and the closing end token are learned.

        Raises:
            DataError: The example has no completion.
            ModelError: The chat template cannot mark the assistant's tokens.
        """
        if example.completion is None:
            raise DataError("the example has no completion to learn", where=f"example {example.id}")
        if isinstance(example.prompt, str):
            answer = [*self._continued(example.completion), self._end_id()]
            return self._join(example.id, [(self.prompt(example), False), (answer, True)])
        messages = (*example.prompt, Message("assistant", example.completion))
        turns = [i for i, m in enumerate(messages) if m.role == "assistant"] if example.every_turn else []
        return self._chat(example.id, messages, turns or [len(messages) - 1])

    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the tokenizer's end token and what the chat template closes a turn with."""
        ids = [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        if self.tokenizer.chat_template:
            # A template that cannot be probed still serves raw-text prompts, which end with the tokenizer's end token.
            with contextlib.suppress(ModelError):
                probe = self._chat("probe", (Message("user", "a"), Message("assistant", "a")), [1])
                ids += [probe.ids[-1]] if probe.ids[-1] in special else []
        return tuple(dict.fromkeys(ids))

    def _chat(self, example_id: str, messages: tuple[Message, ...], turns: list[int]) -> Encoded:
        pieces = self._pieces(messages, turns)
        if pieces is not None:
            (first, _), *rest = pieces
            tokens = [(self._ids(first), False), *((self._continued(text), learned) for text, learned in rest)]
            return self._join(example_id, tokens)
        template = self.tokenizer.chat_template or ""
        if len(turns) == sum(m.role == "assistant" for m in messages) and _MARKER in str(template):
            return self._marked(example_id, messages)
        raise ModelError(
            "the chat template cannot mark the assistant's tokens: it rewrites earlier turns, or starts an answer "
            "without add_generation_prompt",
            where=self._name(),
            hint="use a template with {% generation %} around assistant turns, or train on the last turn only",
        )

    def _pieces(self, messages: tuple[Message, ...], turns: list[int]) -> list[tuple[str, bool]] | None:
        """Text pieces with whether they are learned; None when a rendering is no prefix of the next one."""
        pieces: list[tuple[str, bool]] = []
        done = ""
        for turn in turns:
            before = self._render(messages[:turn], answer_follows=True)
            after = self._render(messages[: turn + 1], answer_follows=False)
            if not (before.startswith(done) and after.startswith(before)):
                return None
            answer = after[len(before) :]
            content = messages[turn].content.strip()
            # A template that ignores add_generation_prompt would put the role header into the answer.
            headless = before == self._render(messages[:turn], answer_follows=False)
            if headless and not answer.lstrip().startswith(content):
                return None
            core = self._without_tail(answer, messages[turn].content)
            pieces += [(before[len(done) :], False), (core, True)]
            done = before + core
        return pieces

    def _without_tail(self, answer: str, content: str) -> str:
        """The answer up to its end marker: white space that the template puts after the marker is not learned."""
        if answer.rstrip().endswith(content.strip()):
            end = self.tokenizer.eos_token
            if not end:
                raise ModelError("neither template nor tokenizer has an end token", where=self._name())
            return (content if answer.startswith(content) else answer.rstrip()) + str(end)
        return answer.rstrip()

    def _marked(self, example_id: str, messages: tuple[Message, ...]) -> Encoded:
        out = self.tokenizer.apply_chat_template(
            _plain(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = tuple(int(i) for i in out["input_ids"])
        return Encoded(example_id, ids, (False, *(bool(m) for m in out["assistant_masks"][1:])))

    def _render(self, messages: tuple[Message, ...], *, answer_follows: bool) -> str:
        if not self.tokenizer.chat_template:
            raise ModelError(
                "the tokenizer has no chat template", where=self._name(), hint="use a raw-text prompt style (alpaca)"
            )
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                _plain(messages), tokenize=False, add_generation_prompt=answer_follows
            )
        except TemplateError as error:
            raise ModelError(f"the chat template refused the messages: {error}", where=self._name()) from error
        return str(text)

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        return [int(i) for i in self.tokenizer(text, add_special_tokens=special)["input_ids"]]

    def _continued(self, text: str) -> list[int]:
        """Ids of a text that follows other text."""
        return self._after_newline(text) if self._adds_prefix else self._ids(text)

    def _after_newline(self, text: str) -> list[int]:
        before, whole = self._ids("\n"), self._ids("\n" + text)
        if whole[: len(before)] != before or self._swallows(text, len(before)):
            return self._ids(text)
        return whole[len(before) :]

    def _swallows(self, text: str, count: int) -> bool:
        """Whether the first ``count`` tokens of a newline and the text, equal to those of a newline, cover more.

        A tokenizer that lacks both characters may make one unknown token of them.
        """
        if not (count and text and self.tokenizer.is_fast):
            return False
        out = self.tokenizer("\n" + text, add_special_tokens=False, return_offsets_mapping=True)
        return bool(out["offset_mapping"][count - 1][1] > 1)

    def _end_id(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end token", where=self._name())
        return int(self.tokenizer.eos_token_id)

    def _join(self, example_id: str, pieces: list[tuple[list[int], bool]]) -> Encoded:
        ids = tuple(i for piece, _ in pieces for i in piece)
        learned = tuple(flag for piece, flag in pieces for _ in piece)
        return Encoded(example_id, ids, (False, *learned[1:]))

    def _name(self) -> str:
        return str(self.tokenizer.name_or_path or "tokenizer")


def _plain(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]
