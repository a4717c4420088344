"""The decoding loop: rows that end give their places to prompts that wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import nn
from torch.func import functional_call

from kdkit.api.data import Completion
from kdkit.api.errors import ModelError
from kdkit.models.heads import split
from kdkit.models.positions import learned_positions
from kdkit.train.rollout.cache import PaddedRows, RaggedRows, Rows, ragged
from kdkit.train.rollout.sampling import Mixture, cuts, next_tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kdkit.api import Sampling
    from kdkit.models.chat import ChatEncoder

__all__ = ["Decoded", "completion", "decode", "generate", "generate_ids", "stop_ids"]

_SHARE: Final = 8
"""Finished rows are replaced when they are one in so many: reading prompts one by one costs a step each."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """What was decoded for one prompt.

    Attributes:
        ids: New token ids, with the stop id that ended them.
        logprobs: Of these tokens in nats under the model, warped as it was sampled; empty unless asked for.
        drawn: Log-probabilities under the distribution that was sampled from, which differ with a mixture only.
        support: Ids (int32) that top-k and top-p of the model kept at every token, ascending; None unless asked for, or
            when they keep all.
    """

    ids: list[int]
    logprobs: list[float]
    drawn: list[float]
    support: list[NDArray[np.int32]] | None = None


def stop_ids(model: PreTrainedModel, encoder: ChatEncoder) -> tuple[int, ...]:
    """Ids that end an answer: those of tokenizer and chat template, and those the model itself names."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    own = named if isinstance(named, list) else [] if named is None else [named]
    return tuple(dict.fromkeys([*encoder.stop_ids(), *own]))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    *,
    stop_ids: Sequence[int],
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[Completion]:
    """One completion per prompt, in the order of ``prompts``.

    Args:
        model: In evaluation mode (dropout must be off).
        tokenizer: For decoding; special tokens are left out of the text.
        prompts: Token ids.
        sampling: Decoding parameters; the model's own defaults do not leak in.
        seeds: One per prompt; unused when decoding greedily.
        stop_ids: Ids that end a completion; they are not part of its text.
        batch_size: Prompts decoded together; a row that ends is replaced by a prompt that waits, the longest first.
        on_batch: Called with the number of finished prompts when there are more.
    """
    answers = generate_ids(model, prompts, sampling, seeds, stop_ids=stop_ids, batch_size=batch_size, on_batch=on_batch)
    return [completion(row, tokenizer, stop_ids) for row in answers]


def generate_ids(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    *,
    stop_ids: Sequence[int],
    batch_size: int,
    max_length: int | None = None,
    vocabulary: int | None = None,
    compute: torch.dtype | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The ``ids`` of :func:`decode`, which takes the same arguments."""
    limits = None if max_length is None else [max_length - len(prompt) for prompt in prompts]
    decoded = decode(
        model,
        prompts,
        sampling,
        seeds,
        stop_ids=stop_ids,
        batch_size=batch_size,
        limits=limits,
        vocabulary=vocabulary,
        compute=compute,
        on_batch=on_batch,
    )
    return [row.ids for row in decoded]


def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    *,
    stop_ids: Sequence[int],
    batch_size: int,
    limits: Sequence[int] | None = None,
    vocabulary: int | None = None,
    compute: torch.dtype | None = None,
    mixture: Mixture | None = None,
    logprobs: bool = False,
    support: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> list[Decoded]:
    """Answers to the prompts, in their order.

    Args:
        model: In evaluation mode (dropout must be off).
        prompts: Token ids, at least one each.
        sampling: Decoding parameters; the model's own defaults do not leak in.
        seeds: One per prompt; unused when decoding greedily.
        stop_ids: Ids that end an answer.
        batch_size: Prompts decoded together; a row that ends is replaced by a prompt that waits, the longest first.
            With an architecture that :func:`kdkit.train.rollout.cache.ragged` refuses, all rows end first.
        limits: Tokens that each answer may have, at least one; ``sampling.max_new_tokens`` bounds them as well.
        vocabulary: Choose among this many leading ids only; with a mixture, at most those that both models have.
        compute: Precision of the weights while decoding; the parameters themselves stay as they are.
        mixture: A second model that takes part in every draw; it computes in its own precision.
        logprobs: Whether to return log-probabilities.
        support: Whether to return the ids that top-k and top-p kept.
        on_batch: Called with the number of finished prompts when there are more.

    Raises:
        ModelError: A model with learned position embeddings cannot read a prompt and an answer; it cuts longer answers.
    """
    longest = sampling.max_new_tokens
    bounds = [longest] * len(prompts) if limits is None else [min(longest, limit) for limit in limits]
    for reader in (model, *([mixture.model] if mixture else [])):
        bounds = _within_positions(reader, prompts, bounds)
    jobs = [_Job(*parts) for parts in zip(prompts, seeds, bounds, strict=True)]
    support = support and cuts(sampling)
    settings = _Settings(sampling, frozenset(stop_ids), batch_size, vocabulary, mixture, logprobs, support)
    decoder = _Decoder(model, settings)
    functional_call(decoder, _cast(decoder, compute), (jobs, on_batch))
    return [Decoded(job.ids, job.logprobs, job.drawn, job.support if support else None) for job in jobs]


def _within_positions(model: PreTrainedModel, prompts: Sequence[Sequence[int]], bounds: list[int]) -> list[int]:
    """The bounds, as far as the model can read: beyond the table of its positions is nothing to look up."""
    limit = learned_positions(model)
    if limit is None:
        return bounds
    longest = max(map(len, prompts), default=0)
    if longest >= limit:
        what = f"a prompt of {longest} tokens leaves no room for an answer in the {limit} positions of"
        raise ModelError(f"{what} {type(model).__name__}", hint="leave out long prompts")
    return [min(bound, limit - len(prompt)) for bound, prompt in zip(bounds, prompts, strict=True)]


@torch.no_grad()
def _cast(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Copies in ``dtype`` of the parameters that have another floating type; a tied one is copied once.

    Autocast would copy them as well, and leave half of the cache in float32.
    """
    return {
        name: parameter.to(dtype)
        for name, parameter in module.named_parameters()
        if dtype is not None and parameter.is_floating_point() and parameter.dtype != dtype
    }


class _Job:
    """One prompt and its answer so far."""

    __slots__ = ("drawn", "generator", "ids", "limit", "logprobs", "prompt", "seed", "support")

    def __init__(self, prompt: Sequence[int], seed: int, limit: int) -> None:
        self.prompt, self.seed, self.limit = prompt, seed, limit
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.drawn: list[float] = []
        self.support: list[NDArray[np.int32]] = []
        self.generator: torch.Generator

    def start(self) -> None:
        """A generator holds 5 kB, so it is made when it is needed."""
        self.generator = torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True, slots=True)
class _Settings:
    sampling: Sampling
    stop_ids: frozenset[int]
    batch_size: int
    vocabulary: int | None
    mixture: Mixture | None
    logprobs: bool
    support: bool


class _Decoder(nn.Module):
    """The decoding loop as a module, so that it can run once with other weights than the model's own."""

    def __init__(self, model: PreTrainedModel, settings: _Settings) -> None:
        super().__init__()
        # The mixture's model stays within the settings: as a submodule it would be cast with this one.
        self.model = model
        self._settings = settings

    @torch.no_grad()
    def forward(self, jobs: Sequence[_Job], on_batch: Callable[[int], None] | None) -> None:
        """Fill in the answers. Rows that end leave, and others join when enough have left."""
        waiting = deque(sorted(jobs, key=lambda job: -len(job.prompt)))
        lanes = self._lanes(min(self._settings.batch_size, len(jobs)))
        running: list[_Job] = []
        while waiting or running:
            fresh = self._fresh(waiting, running, joins=all(lane.rows.joins for lane in lanes))
            for lane in lanes:
                lane.join([job.prompt for job in fresh])
            running += fresh
            tokens = self._choose(lanes, running)
            order = _without_ended([self._goes_on(job) for job in running])
            ended = len(running) - len(order)
            running = [running[place] for place in order]
            if ended:
                for lane in lanes:
                    lane.rows.keep(order)
                tokens = tokens[torch.tensor(order, dtype=torch.long, device=tokens.device)]
            for lane in lanes:
                lane.read(tokens)
            if ended and on_batch:
                on_batch(len(jobs) - len(waiting) - len(running))

    def _lanes(self, places: int) -> list[_Lane]:
        mixture = self._settings.mixture
        return [_Lane(model, places) for model in (self.model, *([mixture.model] if mixture else []))]

    def _fresh(self, waiting: deque[_Job], running: Sequence[_Job], *, joins: bool) -> list[_Job]:
        """The jobs that start now."""
        places = min(self._settings.batch_size - len(running), len(waiting))
        if running and (not joins or places < min(len(waiting), max(1, self._settings.batch_size // _SHARE))):
            return []
        chosen = [waiting.popleft() for _ in range(places)]
        for job in chosen:
            job.start()
        return chosen

    def _choose(self, lanes: Sequence[_Lane], running: Sequence[_Job]) -> Tensor:
        """The next token of every row, written down."""
        how = self._settings
        logits = [lane.logits() for lane in lanes]
        width = min(how.vocabulary or logits[0].shape[1], *(rows.shape[1] for rows in logits))
        own, *others = (rows[:, :width] for rows in logits)
        other = (others[0].to(own.device), how.mixture.alpha) if how.mixture else None
        generators = [job.generator for job in running]
        found = next_tokens(own, how.sampling, generators, other=other, logprobs=how.logprobs, support=how.support)
        for job, token in zip(running, found.tokens.tolist(), strict=True):
            job.ids.append(token)
        if found.logprobs is not None:
            for job, model, drawn in zip(running, *found.logprobs.tolist(), strict=True):
                job.logprobs.append(model)
                job.drawn.append(drawn)
        if found.kept is not None:
            for job, kept in zip(running, found.kept.cpu(), strict=True):
                job.support.append(kept.nonzero()[:, 0].to(torch.int32).numpy())
        return found.tokens

    def _goes_on(self, job: _Job) -> bool:
        return len(job.ids) < job.limit and job.ids[-1] not in self._settings.stop_ids


class _Lane:
    """One model that decodes: its rows and the hidden states that their next tokens follow from."""

    def __init__(self, model: PreTrainedModel, places: int) -> None:
        self._parts = split(model)
        trunk = self._parts.trunk
        self.rows: Rows = RaggedRows(trunk, places) if ragged(trunk) else PaddedRows(trunk)
        self._hidden: list[Tensor] = []

    def join(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read prompts; their rows are the last ones."""
        if prompts:
            self._hidden.append(self.rows.add(prompts))

    def read(self, tokens: Tensor) -> None:
        """Read the token of every row, if there are any."""
        self._hidden = [self.rows.step(tokens.to(self._parts.head.weight.device))] if len(tokens) else []

    def logits(self) -> Tensor:
        """[B, V]. Only last positions are projected, as a matrix: a [B, 1, D] slice would copy the head once a row."""
        return self._parts.project(torch.cat(self._hidden))


def _without_ended(goes_on: Sequence[bool]) -> list[int]:
    """Old places of the rows that go on, in their new order: the last ones move into the gaps, the others stay."""
    left = sum(goes_on)
    movers = [place for place in range(left, len(goes_on)) if goes_on[place]]
    return [place if goes_on[place] else movers.pop() for place in range(left)]


def completion(row: Sequence[int], tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> Completion:
    """Token ids as a completion: cut at the first stop id; without one it hit the token limit."""
    end = next((i for i, token in enumerate(row) if token in stop_ids), None)
    kept = row if end is None else row[:end]
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Completion(str(text), tuple(kept), truncated=end is None)
