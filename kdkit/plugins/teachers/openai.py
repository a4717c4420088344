"""A teacher behind a server with the OpenAI protocol: answers as text, and the top-k log-probabilities of prompts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import torch

from kdkit.api.data import Completion, TopK
from kdkit.api.errors import EnvironmentUnmet, ModelError, StageError
from kdkit.models.load import Vocabulary, load_tokenizer, vocabulary
from kdkit.models.pretrained import read_config
from kdkit.plugins.teachers.openai_http import Server
from kdkit.plugins.teachers.openai_logprobs import FormMissing, Table, completion, top_table
from kdkit.plugins.teachers.openai_probe import PROBE, Ability, answer_bytes, check_model, maker, probe, scoring
from kdkit.train.packing import unpack

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from kdkit.api import BuildContext, Example, Sampling, TokenBatch
    from kdkit.plugins.teachers.plugin import OpenAITeacherParams

__all__ = ["OpenAITeacher"]

_AUTO: Final = 128
"""Log-probabilities per token that ``auto`` asks for; JSON has about 80 bytes for each."""
_CHARACTERS: Final = 512
"""Bytes that a token of an answer may have at most, escapes included."""
_KEY: Final = re.compile(r"[\x21-\x7e]+")
_WHOLE: Final = "stop"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _TopKSignals:
    """The k most probable tokens of all valid tokens, [N, k], and the tokens themselves, [N], at temperature 1."""

    ids: Tensor
    logprobs: Tensor
    taken: Tensor

    def block(self, start: int, stop: int, /) -> TopK:
        """Those of valid tokens ``start`` to ``stop``."""
        return TopK(self.ids[start:stop], self.logprobs[start:stop], taken=self.taken[start:stop])


@dataclass(frozen=True, slots=True)
class _Document:
    """Token ids up to the last learned one, and the places of the learned ones."""

    ids: list[int]
    learned: list[int]


class OpenAITeacher:
    """See :class:`kdkit.api.Teacher`. One request per document or prompt, several under way at a time.

    Raises:
        EnvironmentUnmet: The variable with the key is not set.
        ModelError: The tokenizer cannot be loaded.
    """

    def __init__(self, params: OpenAITeacherParams, ctx: BuildContext) -> None:
        self._params = params
        self._log = ctx.log
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._vocabulary: Vocabulary | None = None
        if params.tokenizer is not None:
            artifact = ctx.resolve(params.tokenizer)
            self._tokenizer = load_tokenizer(artifact)
            config = read_config(artifact.path, trust_remote_code=artifact.trust_remote_code)
            self._vocabulary = vocabulary(self._tokenizer, config)
        self._server = Server(
            params.base_url,
            key=_key(params.api_key_env),
            key_name=params.api_key_env,
            timeout=params.timeout,
            max_retries=params.max_retries,
        )
        if self._server.shows_key:
            ctx.log(f"{self._server.base_url} is no https address: others on the way can read the key")
        self._pool = ThreadPoolExecutor(params.concurrency, thread_name_prefix="openai-teacher")
        self._known = False
        self._identity: str | None = None
        self._ability: Ability | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        """That of ``tokenizer``, whose ids are sent. Raises ``ModelError`` when the recipe gives none."""
        if self._vocabulary is None:
            raise ModelError(
                "the openai teacher has no tokenizer, which log-probabilities need",
                where="teacher.tokenizer",
                hint="name a model with the teacher's tokenizer, such as the student",
            )
        return self._vocabulary

    def signals(self, batch: TokenBatch, /) -> _TopKSignals:
        """The server's log-probabilities for the learned tokens of the batch.

        Raises:
            EnvironmentUnmet: No answer after all attempts, or the key is refused.
            ModelError: The server has another model or tokenizer.
            StageError: An answer is not what was asked for.
        """
        ability = self._able()
        documents = _documents(batch)
        tables = self._all([partial(self._score, document, ability) for document in documents])
        device, k = batch.input_ids.device, ability.top_k
        ids = np.concatenate([np.zeros((0, k), np.int64), *(table.ids for table in tables)])
        logprobs = np.concatenate([np.zeros((0, k), np.float32), *(table.logprobs for table in tables)])
        taken = np.concatenate([np.zeros(0, np.float32), *(table.taken for table in tables)])
        return _TopKSignals(*(torch.from_numpy(array).to(device) for array in (ids, logprobs, taken)))

    def generate(self, prompts: Sequence[Example], sampling: Sampling, seed: int, /) -> Sequence[Completion]:
        """The server's answers: to messages with its own chat template, to raw text as it is.

        An answer that ended for another reason than the model's wish counts as truncated. Without ``tokenizer`` the
        completions have no token ids.

        Raises:
            EnvironmentUnmet: No answer after all attempts, or the key is refused.
            StageError: An answer is not what was asked for.
        """
        self._check()
        seeds = [(seed + index) % 2**63 for index in range(len(prompts))]
        pairs = zip(prompts, seeds, strict=True)
        return self._all([partial(self._answer, example, sampling, own) for example, own in pairs])

    def identity(self) -> str | None:
        """What the server says about the weights behind the model's name; None when it says nothing. Asks it once.

        Raises:
            EnvironmentUnmet: No answer after all attempts, or the key is refused.
            ModelError: The server has another model or tokenizer.
        """
        self._check()
        return self._identity

    def close(self) -> None:
        """Close the connections; requests under way are given up."""
        self._server.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _check(self) -> None:
        if not self._known:
            self._identity = check_model(self._server, self._params.model, self._vocabulary)
            self._known = True

    def _able(self) -> Ability:
        """What the server can do, asked before the first use."""
        if self._ability is None:
            self._check()
            size, wanted = self.vocabulary.size, self._params.top_k
            assert self._tokenizer is not None
            ids = [int(i) for i in self._tokenizer(PROBE)["input_ids"]]
            if wanted != "auto" and wanted > size:
                raise ModelError(f"top_k is {wanted}, the vocabulary has {size:,} entries", where="teacher.top_k")
            asked = min(_AUTO, size) if wanted == "auto" else wanted
            self._ability = probe(self._server, self._params.model, ids, size, asked, exact=wanted != "auto")
            self._log(f"{self._server.base_url}: {self._ability.top_k} log-probabilities per token")
        return self._ability

    def _all(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Results in order; the first error ends everything that is under way."""
        futures: list[Future[T]] = [self._pool.submit(task) for task in tasks]
        whole = False
        try:
            for done in as_completed(futures):
                done.result()
            whole = True
        finally:
            if not whole:
                self._server.stop()
                for future in futures:
                    future.cancel()
        return [future.result() for future in futures]

    def _score(self, document: _Document, ability: Ability) -> Table:
        where = f"{self._server.base_url}/completions"
        k, form = ability.top_k, ability.form
        body = scoring(self._params.model, document.ids, form, k)
        answer = self._server.post("/completions", body, limit=answer_bytes(len(document.ids), k))
        choice = completion(answer, where)
        if maker(answer) != ability.maker:
            now, before = self._server.quoted(maker(answer)), self._server.quoted(ability.maker)
            what = f"the answer is of {now}, earlier ones were of {before}"
            raise StageError(what, where=where, hint="nothing was trained on it; keep one model under one name")
        try:
            given = form.given(choice, where)
        except FormMissing as error:
            raise StageError(f"the answer {error}, which an earlier one had", where=where) from error
        return top_table(given, document.ids, document.learned, k, self.vocabulary.size, where)

    def _answer(self, example: Example, sampling: Sampling, seed: int) -> Completion:
        body: dict[str, Any] = {"model": self._params.model, "max_tokens": sampling.max_new_tokens}
        body |= _decoding(sampling, seed)
        if isinstance(example.prompt, str):
            path, body["prompt"] = "/completions", example.prompt
        else:
            path = "/chat/completions"
            body["messages"] = [{"role": m.role, "content": m.content} for m in example.prompt]
        where = f"{self._server.base_url}{path}"
        limit = 2**20 + _CHARACTERS * sampling.max_new_tokens
        choice = completion(self._server.post(path, body, limit=limit), where)
        holder = choice if path == "/completions" else choice.get("message")
        return self._completion(holder, choice.get("finish_reason"), where)

    def _completion(self, holder: Any, reason: Any, where: str) -> Completion:
        text = holder.get("text", holder.get("content")) if isinstance(holder, dict) else None
        if not isinstance(text, str) or not isinstance(reason, str):
            # Only an answer whose end is known may be learned from. Tool calls and filtered answers have no text.
            if isinstance(holder, dict) and text is None and isinstance(reason, str) and reason != _WHOLE:
                return Completion("", (), truncated=True)
            raise StageError("the answer has no text or no finish_reason", where=where)
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise StageError("the answer is not valid Unicode text", where=where)
        return Completion(text, self._ids(text), truncated=reason != _WHOLE)

    def _ids(self, text: str) -> tuple[int, ...]:
        if self._tokenizer is None:
            return ()
        return tuple(int(i) for i in self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _key(name: str | None) -> str | None:
    """The key in the environment variable ``name``. Raises ``EnvironmentUnmet`` when it cannot be one."""
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise EnvironmentUnmet(f"the environment variable {name} is not set", where="teacher.api_key_env")
    if not _KEY.fullmatch(key):
        # A header cannot have it, and the error of a library would show it.
        raise EnvironmentUnmet(f"what {name} holds is no key", where="teacher.api_key_env", allowed="printable ASCII")
    return key


def _documents(batch: TokenBatch) -> list[_Document]:
    """The batch's documents with a learned token, in the order of the learned tokens."""
    padded = unpack(batch)
    assert padded.attention_mask is not None
    documents = []
    for ids, real, learned in zip(
        padded.input_ids.cpu(), padded.attention_mask.cpu().bool(), padded.labels_mask.cpu(), strict=True
    ):
        places = learned[real].nonzero()[:, 0].tolist()
        if places:
            documents.append(_Document(ids[real].tolist()[: places[-1] + 1], places))
    return documents


def _decoding(sampling: Sampling, seed: int) -> dict[str, Any]:
    """The fields of a request; those that only some servers know are sent only where they say something."""
    if not sampling.do_sample:
        return {"temperature": 0}
    fields: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed}
    return fields | ({"top_k": sampling.top_k} if sampling.top_k else {})
