"""Keys and values of the rows that are being decoded.

:class:`RaggedRows` lays every row's tokens from slot 0 of a buffer that is written in place. A row that ends gives its
place to another one at any time, and there is no padding to carry along: what lies behind a row's last token is masked,
and so is what a sliding window has left behind. That takes an architecture whose layers keep plain keys and values and
that takes a finished attention mask; :func:`ragged` finds out. All others get :class:`PaddedRows`: the cache of
transformers with padding on the left, where rows can leave but none can join.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from kdkit.train.rollout.attention import plan, reads_spans, spanned
from kdkit.train.rollout.spans import spans

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kdkit.train.rollout.spans import Span

__all__ = ["PaddedRows", "RaggedRows", "Rows", "ragged"]

_SLOTS: Final = 64
"""Buffers grow by a half, to a multiple of this many slots."""
_FILLING: Final = 24
"""Padding tokens that cost about as much as one more pass over the weights; an estimate for a small model on a CPU."""
_GAP: Final = {torch.float64: 1e-6, torch.float32: 1e-3}
_GAP_HALF: Final = 0.1
"""Difference of hidden states relative to their size; about 1e-6 in float32 and 1e-2 in bf16 where all is well."""


class Rows(Protocol):
    """The rows of one model that are being decoded, in an order that the caller knows."""

    joins: bool
    """Whether rows can be added while others are running."""

    def add(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts, which become the last rows. Returns the hidden states after them, [n, D]."""

    def step(self, tokens: Tensor) -> Tensor:
        """Read the next token [B] of every row. Returns the hidden states after it, [B, D]."""

    def keep(self, order: Sequence[int]) -> None:
        """Row i becomes what was row ``order[i]``, the others are dropped; moved rows come from behind the new end."""


class _Layer(CacheLayerMixin):
    """Buffers [rows, heads, slots, head size] of one layer."""

    is_sliding = False

    def __init__(self, cache: _RaggedCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        cache = self._cache
        # Zeros: a masked slot weighs nothing, but nothing times NaN is NaN.
        self.keys, self.values = (
            states.new_zeros(cache.places, states.shape[1], cache.slots, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache, pairs = self._cache, ((self.keys, key_states), (self.values, value_states))
        if cache.joining is not None:
            for buffer, states in pairs:
                buffer[cache.joining, :, : states.shape[2]] = states
            return key_states, value_states
        where = cache.where(key_states.shape[1])
        for buffer, states in pairs:
            buffer.view(-1, buffer.shape[3]).index_copy_(0, where, states.reshape(-1, states.shape[3]))
        rows, width = key_states.shape[0], cache.width
        return spanned(self.keys[:rows, :, :width], cache.spans), self.values[:rows, :, :width]

    def get_seq_length(self) -> int:
        return 0 if self._cache.joining is not None else self._cache.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def resize(self, slots: int) -> None:
        """Buffers with more slots."""
        if self.is_initialized:
            grow = (0, 0, 0, slots - self.keys.shape[2])
            self.keys = torch.nn.functional.pad(self.keys, grow)
            self.values = torch.nn.functional.pad(self.values, grow)


class _RaggedCache(Cache):
    """What transformers' layers write to and read from.

    Attributes:
        places: Rows that there is room for.
        slots: Tokens a row has room for.
        joining: Places of the prompts that are being read; None while all rows read one token each.
        width: Slots in use while decoding, the token that is being read included.
        spans: Of the rows, by these slots; empty where attention reads all rows at once.
    """

    def __init__(self, layers: int, places: int) -> None:
        self.places, self.slots, self.width = places, 0, 0
        self.joining: slice | None = None
        self.spans: Sequence[Span] = ()
        self._at: Tensor | None = None
        self._where: dict[int, Tensor] = {}
        super().__init__(layers=[_Layer(self) for _ in range(layers)])

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any) -> Any:
        return self.layers[layer_idx].update(key_states, value_states)

    def reserve(self, slots: int) -> None:
        """Make room for rows of this many tokens."""
        if slots > self.slots:
            self.slots = -(-max(slots, self.slots * 3 // 2) // _SLOTS) * _SLOTS
            for layer in self.layers:
                layer.resize(self.slots)

    def read_at(self, positions: Tensor, lengths: Sequence[int]) -> None:
        """The next update writes one token per row, at ``positions`` [B], after which rows have these ``lengths``."""
        self.joining, self.width, self._at = None, max(lengths), positions
        self.spans = plan(lengths, positions.device)
        self._where.clear()

    def where(self, heads: int) -> Tensor:
        """Places of the tokens of a step in a buffer seen as [rows * heads * slots, head size]."""
        if heads not in self._where and self._at is not None:
            rows = torch.arange(len(self._at) * heads, device=self._at.device) * self.slots
            self._where[heads] = rows + self._at.repeat_interleave(heads)
        return self._where[heads]

    def move(self, source: int, target: int, length: int) -> None:
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]


class RaggedRows:
    """See :class:`Rows`; rows join and leave at any time.

    Args:
        trunk: In evaluation mode.
        places: Rows that there is room for.
    """

    joins = True

    def __init__(self, trunk: Any, places: int) -> None:
        self._trunk = trunk
        layers = _layers(trunk)
        self._windows = [layer.sliding_window if layer.is_sliding else None for layer in layers]
        self._cache = _RaggedCache(len(layers), places)
        self._lengths: list[int] = []
        weight = trunk.get_input_embeddings().weight
        self._device, self._dtype = weight.device, weight.dtype

    def add(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See :class:`Rows`. Prompts of similar length are read together."""
        found = spans([len(prompt) for prompt in prompts], _FILLING if self._device.type == "cpu" else math.inf)
        return torch.cat([self._read(prompts[span.start : span.stop], span.width) for span in found])

    def _read(self, prompts: Sequence[Sequence[int]], width: int) -> Tensor:
        """Prompts are padded on the right, where causal attention does not look."""
        first = len(self._lengths)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        for index, prompt in enumerate(prompts):
            ids[index, : len(prompt)] = torch.tensor(prompt)
        self._cache.reserve(width + 1)
        self._cache.joining = slice(first, first + len(prompts))
        self._lengths += map(len, prompts)
        positions = torch.arange(width, device=self._device).unsqueeze(0)
        hidden = self._forward(ids.to(self._device), None, positions)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self._device)
        return hidden[torch.arange(len(prompts), device=self._device), last]

    def step(self, tokens: Tensor) -> Tensor:
        """See :class:`Rows`."""
        width = max(self._lengths) + 1
        self._cache.reserve(width)
        positions = torch.tensor(self._lengths, device=self._device)
        self._lengths = [length + 1 for length in self._lengths]
        self._cache.read_at(positions, self._lengths)
        with reads_spans(self._trunk.config.get_text_config()):
            return self._forward(tokens.unsqueeze(1), self._masks(positions, width), positions.unsqueeze(1))[:, 0]

    def keep(self, order: Sequence[int]) -> None:
        """See :class:`Rows`."""
        for target, source in enumerate(order):
            if source != target:
                self._cache.move(source, target, self._lengths[source])
        self._lengths = [self._lengths[source] for source in order]

    def _forward(self, ids: Tensor, masks: Any, positions: Tensor) -> Tensor:
        out = self._trunk(
            input_ids=ids, attention_mask=masks, position_ids=positions, past_key_values=self._cache, use_cache=True
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _masks(self, positions: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        """What is added to the attention scores, [B, 1, 1, width]; by kind of layer where there are two."""
        slots, at = torch.arange(width, device=self._device), positions.unsqueeze(1)
        full = slots > at
        made = {
            window: torch.zeros(full.shape, device=self._device, dtype=self._dtype)
            .masked_fill_(full if window is None else full | (slots <= at - window), -torch.inf)
            .view(len(positions), 1, 1, width)
            for window in set(self._windows)
        }
        if len(made) == 1:
            return next(iter(made.values()))
        return {"full_attention" if window is None else "sliding_attention": mask for window, mask in made.items()}


class PaddedRows:
    """See :class:`Rows`; rows only join when there are none."""

    joins = False

    def __init__(self, trunk: Any) -> None:
        self._trunk = trunk
        self._cache, self._mask = DynamicCache(config=trunk.config), torch.zeros(0, 0)

    def add(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See :class:`Rows`."""
        device = self._trunk.get_input_embeddings().weight.device
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, prompt in enumerate(prompts):
            ids[index, width - len(prompt) :] = torch.tensor(prompt)
            mask[index, width - len(prompt) :] = 1
        self._cache, self._mask = DynamicCache(config=self._trunk.config), mask.to(device)
        return self._forward(ids.to(device))

    def step(self, tokens: Tensor) -> Tensor:
        """See :class:`Rows`."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        return self._forward(tokens.unsqueeze(1))

    def keep(self, order: Sequence[int]) -> None:
        """See :class:`Rows`."""
        if order and len(order) < len(self._mask):
            chosen = torch.tensor(order, device=self._mask.device)
            self._mask = self._mask[chosen]
            self._cache.batch_select_indices(chosen)

    def _forward(self, ids: Tensor) -> Tensor:
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self._trunk(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden[:, -1]


_verdicts: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@torch.no_grad()
def ragged(trunk: nn.Module) -> bool:
    """Whether rows of the trunk can be decoded raggedly, found out once per trunk.

    Every layer must keep all keys and values, or those of a sliding window, under attention that adds a mask (``sdpa``
    or ``eager``). What the configuration does not say (positions taken from the mask, masks that are not passed on) is
    measured: two short rows, of which one joins later, must give the hidden states of a pass without a cache.
    """
    if trunk not in _verdicts:
        _verdicts[trunk] = _plain(trunk) and _agrees(trunk)
    return _verdicts[trunk]


def _layers(trunk: Any) -> list[Any]:
    return list(DynamicCache(config=trunk.config).layers)


def _plain(trunk: Any) -> bool:
    config = trunk.config.get_text_config()
    layers = _layers(trunk)
    windows = {layer.sliding_window for layer in layers if layer.is_sliding}
    return (
        bool(layers)
        and all(type(layer) in {DynamicLayer, DynamicSlidingWindowLayer} for layer in layers)
        and len(windows) <= 1
        and len(layers) == config.num_hidden_layers
        and getattr(config, "_attn_implementation", None) in {"sdpa", "eager"}
    )


def _agrees(trunk: Any) -> bool:
    weight = trunk.get_input_embeddings().weight
    ids = (torch.arange(12, device=weight.device) * 7 % weight.shape[0]).tolist()
    first, second = ids[:5], ids[5:8]
    try:
        rows = RaggedRows(trunk, 2)
        got = [rows.add([first])[0]]
        got += rows.step(torch.tensor(ids[8:9], device=weight.device))
        got += rows.add([second])
        got += rows.step(torch.tensor(ids[9:11], device=weight.device))
        rows.keep([1])
        got += rows.step(torch.tensor(ids[11:], device=weight.device))
        whole = [[*first, ids[8], ids[9]], [*second, ids[10], ids[11]]]
        alone = [trunk(input_ids=torch.tensor([r], device=weight.device), use_cache=False) for r in whole]
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError):
        return False
    a, b = (out.last_hidden_state[0] for out in alone)
    gap, size = torch.stack(got).double(), torch.stack([a[4], a[5], b[2], a[6], b[3], b[4]]).double()
    return bool((gap - size).norm() < _GAP.get(weight.dtype, _GAP_HALF) * size.norm())
