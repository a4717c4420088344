"""Does a teacher say the same of every token, whatever is beside it, and as a distribution?

Subclass :class:`TeacherConformance` in a test file and run pytest:

    class TestMine(TeacherConformance):
        gives = frozenset({"topk", "text"})

        def build(self):
            return build_mine(MineParams(model=...), FakeBuildContext())
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Final

import pytest
import torch

from kdkit.api.data import Completion, Dense, Example, Message, TokenBatch, TopK
from kdkit.api.params import Sampling
from kdkit.api.protocols import Teacher
from kdkit.models.chat import Encoded
from kdkit.models.load import Vocabulary
from kdkit.testing.conformance.checks import refused
from kdkit.testing.tiny import tiny_tokenizer
from kdkit.train.batching import collate
from kdkit.train.packing import pack

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TeacherConformance"]

_SHAPES: Final = ((4, 1), (15, 3), (9, 2), (5, 4), (12, 1), (7, 2))
"""Tokens of a row, and how many of them are the prompt."""
_PROMPTS: Final = (
    Example(id="a", prompt="What is 2 + 2?"),
    Example(id="b", prompt=(Message("system", "Be short."), Message("user", "Name a bird."))),
    Example(id="c", prompt="Repeat: naïve café"),
)


class TeacherConformance:
    """What every teacher must fulfil.

    Attributes:
        gives: What the spec declares.
        fixed_rows: What the spec declares; ``rows`` then gives rows that it knows.
        tolerance: Largest difference of a log-probability between two ways to lay out the same rows.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"logits"})
    fixed_rows: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1e-4

    def build(self) -> Teacher:
        """The teacher, in float32 where it computes."""
        raise NotImplementedError

    def rows(self) -> Sequence[Encoded]:
        """Three or more rows of unequal length to ask it about; random tokens of its vocabulary by default."""
        tokens = self._built().vocabulary.tokens
        source = random.Random(17)  # noqa: S311 - tokens for tests
        return [
            Encoded(f"row-{n}", tuple(source.randrange(tokens) for _ in range(size)), (False,) * cut + (True,) * rest)
            for n, (size, cut, rest) in enumerate((size, cut, size - cut) for size, cut in _SHAPES)
        ]

    def reference(self, ids: Sequence[int]) -> Tensor | None:
        """Its logits [T, V] for one text, known from elsewhere: row t is about the token t + 1."""
        del ids
        return None

    # -- helpers

    @pytest.fixture(autouse=True)
    def _closes(self) -> Iterator[None]:
        """What a check builds is closed after it: a teacher may hold a connection or a process."""
        yield
        for teacher in self.__dict__.pop("_teachers", []):
            teacher.close()

    def _built(self) -> Teacher:
        teacher = self.build()
        self.__dict__.setdefault("_teachers", []).append(teacher)
        return teacher

    def _needs(self, *kinds: str) -> None:
        if not self.gives & set(kinds):
            pytest.skip(f"it gives no {' or '.join(kinds)}")

    def _whole(self, batch: TokenBatch, teacher: Teacher | None = None) -> Dense | TopK:
        signals = (teacher or self._built()).signals(batch)
        return signals.block(0, int(batch.labels_mask.sum()))

    def _same(self, got: Dense | TopK, wanted: Dense | TopK, what: str) -> None:
        mine, its = (_table(signal, self._width()) for signal in (got, wanted))
        assert mine.shape == its.shape, f"{what}: signals for {len(mine)} tokens, not {len(its)}"
        assert torch.equal(mine.isfinite(), its.isfinite()), f"{what}: other tokens are kept"
        gap = float((mine - its).nan_to_num(0.0).abs().max())
        assert gap <= self.tolerance, f"{what}: log-probabilities differ by up to {gap:.2e}"

    def _width(self) -> int:
        return int(self._built().vocabulary.size)

    # -- the contract

    def test_its_vocabulary_says_which_tokens_it_is_about(self) -> None:
        """A student with other tokens is refused by it; every instance says the same."""
        found = self._built().vocabulary
        assert isinstance(found, Vocabulary), f"vocabulary is a {type(found).__name__}, not a Vocabulary"
        assert found.fingerprint, "the vocabulary has no fingerprint"
        assert found.size >= 1, f"the vocabulary has a size of {found.size}"
        assert found.tokens >= 1, f"the vocabulary has {found.tokens} tokens"
        assert self._built().vocabulary == found, "another instance has another vocabulary"

    def test_signals_fit_the_tokens(self) -> None:
        """One row of finite numbers per valid token, of the kind that the spec declares."""
        self._needs("logits", "topk")
        batch = collate(self.rows())
        count = int(batch.labels_mask.sum())
        signal = self._whole(batch)
        if isinstance(signal, Dense):
            assert "logits" in self.gives, "it gives logits, which its spec does not declare"
            shape, wanted = tuple(signal.logits.shape), (count, self._width())
            assert shape == wanted, f"logits are {shape}, of {count} tokens and a vocabulary of {wanted[1]}"
            assert signal.logits.is_floating_point(), f"logits are {signal.logits.dtype}"
            assert bool(signal.logits.isfinite().all()), "logits are not finite"
            return
        assert isinstance(signal, TopK), f"{type(signal).__name__} is no signal"
        assert "topk" in self.gives, "it gives a top-k signal, which its spec does not declare"
        assert signal.ids.shape == signal.logprobs.shape, "ids and logprobs have different shapes"
        assert signal.ids.dim() == 2, f"ids are {tuple(signal.ids.shape)}, not [N, K]"
        assert len(signal.ids) == count, f"{len(signal.ids)} rows for {count} tokens"
        assert signal.ids.dtype == torch.int64, f"ids are {signal.ids.dtype}"
        assert signal.temperature > 0, f"the temperature is {signal.temperature}"

    def test_top_k_is_a_part_of_a_distribution(self) -> None:
        """Distinct tokens of the vocabulary, mass of at most one, and a tail that is what they leave."""
        self._needs("topk")
        batch = collate(self.rows())
        signal = self._whole(batch)
        if not isinstance(signal, TopK):
            pytest.skip("it gave logits")
        kept = signal.logprobs > -torch.inf
        assert not bool(signal.logprobs.isnan().any()), "a log-probability is NaN"
        assert bool((signal.logprobs <= 1e-6).all()), "a log-probability is above 0"
        assert bool(kept.any(1).all()), "a token has no log-probability at all"
        assert bool(((signal.ids >= 0) & (signal.ids < self._width()))[kept].all()), "an id is not in the vocabulary"
        for ids, there in zip(signal.ids, kept, strict=True):
            assert len(ids[there].unique()) == int(there.sum()), f"an id stands twice among {ids.tolist()}"
        mass = signal.logprobs.double().exp().sum(1)
        assert float(mass.max()) <= 1 + 1e-4, f"the kept tokens have a mass of {float(mass.max()):.4f}"
        if signal.tail_mass is not None:
            assert signal.tail_mass.shape == mass.shape, f"tail_mass is {tuple(signal.tail_mass.shape)}"
            whole = mass + signal.tail_mass.double()
            assert float(signal.tail_mass.min()) >= 0, "a tail is negative"
            assert float((whole - 1).abs().max()) <= 1e-3, "kept tokens and tail are not one together"
        self._taken(signal, batch.input_ids[batch.labels_mask])

    def _taken(self, signal: TopK, labels: Tensor) -> None:
        if signal.taken is None:
            return
        assert signal.taken.shape == labels.shape, f"taken is {tuple(signal.taken.shape)} for {len(labels)} tokens"
        assert bool((signal.taken <= 1e-6).all()), "a log-probability of a taken token is above 0"
        found = (signal.ids == labels[:, None]) & (signal.logprobs > -torch.inf)
        among = signal.logprobs.masked_fill(~found, -torch.inf).amax(1)
        gap = (among - signal.taken)[found.any(1)].abs()
        assert not len(gap) or float(gap.max()) <= self.tolerance, "a taken token has two log-probabilities"

    def test_it_says_what_it_is_known_to_say(self) -> None:
        """Every token's row is about that token: signals that are shifted by one look just as good."""
        self._needs("logits", "topk")
        rows = self.rows()
        if self.reference(rows[0].ids) is None:
            pytest.skip("no reference is given")
        signal = self._whole(collate(rows))
        known = [self.reference(row.ids)[:-1][torch.tensor(row.learned)[1:]] for row in rows]  # type: ignore[index]
        wanted = torch.cat(known).double()
        if isinstance(signal, Dense):
            self._same(signal, Dense(wanted), "compared with the reference")
            return
        exact = torch.log_softmax(wanted / signal.temperature, -1).gather(1, signal.ids)
        gap = (signal.logprobs.double() - exact)[signal.logprobs > -torch.inf].abs()
        assert float(gap.max()) <= self.tolerance, f"log-probabilities are off by up to {float(gap.max()):.2e}"
        if signal.tail_mass is not None:
            rest = 1 - exact.masked_fill(signal.logprobs == -torch.inf, -torch.inf).exp().sum(1)
            assert float((rest - signal.tail_mass).abs().max()) <= 1e-3, "the tail is not what the other tokens have"

    def test_no_gradient_reaches_it(self) -> None:
        self._needs("logits", "topk")
        with torch.enable_grad():
            signal = self._whole(collate(self.rows()))
        for field in fields(signal):
            value = getattr(signal, field.name)
            assert not (isinstance(value, torch.Tensor) and value.requires_grad), f"{field.name} has a gradient"

    def test_blocks_are_parts_of_the_whole(self) -> None:
        """Whatever their size, in any order, and asked for twice."""
        self._needs("logits", "topk")
        batch = collate(self.rows())
        count = int(batch.labels_mask.sum())
        signals, width = self._built().signals(batch), self._width()
        whole = _table(signals.block(0, count), width)
        for start, stop in ((count - 1, count), (0, 1), (count // 3, count // 2 + 1), (0, count), (0, 1)):
            part = _table(signals.block(start, stop), width)
            wanted = whole[start:stop]
            assert part.shape == wanted.shape, f"the block {start} to {stop} has {len(part)} rows"
            gap = (part - wanted).nan_to_num(0.0).abs()
            assert float(gap.max()) <= self.tolerance, f"the block {start} to {stop} is not that part of the whole"

    def test_neighbours_and_padding_do_not_matter(self) -> None:
        """Rows alone, padded left or right by any token, or laid end to end: the same of every token."""
        self._needs("logits", "topk")
        rows, teacher = self.rows(), self._built()
        alone = [self._whole(collate([row]), teacher) for row in rows]
        layouts = {side: _padded(rows, side) for side in ("left", "right")} | {"packed": pack(rows)}
        for layout, batch in layouts.items():
            found, width = _table(self._whole(batch, teacher), self._width()), self._width()
            order = [[row.id for row in rows].index(name) for name in batch.example_ids]
            wanted = torch.cat([_table(alone[place], width) for place in order])
            assert found.shape == wanted.shape, f"{layout}: signals for {len(found)} tokens, not {len(wanted)}"
            gap = float((found - wanted).nan_to_num(0.0).abs().max())
            assert gap <= self.tolerance, f"{layout}: log-probabilities differ by up to {gap:.2e} from those alone"

    def test_the_same_twice_and_from_another_instance(self) -> None:
        """Nothing is drawn: dropout is off."""
        self._needs("logits", "topk")
        batch, teacher = collate(self.rows()), self._built()
        torch.manual_seed(2)
        first = self._whole(batch, teacher)
        torch.manual_seed(3)
        self._same(self._whole(batch, teacher), first, "a second time")
        self._same(self._whole(batch), first, "from another instance")

    def test_the_batch_stays_as_it_is(self) -> None:
        self._needs("logits", "topk")
        batch = collate(self.rows())
        kept = copy.deepcopy(batch)
        self._whole(batch)
        for field in fields(batch):
            now, before = getattr(batch, field.name), getattr(kept, field.name)
            same = torch.equal(now, before) if isinstance(now, torch.Tensor) else now == before
            assert same, f"{field.name} of the batch was changed"

    def test_hidden_states_are_those_asked_for(self) -> None:
        self._needs("hidden")
        teacher: Any = self._built()
        batch = collate(self.rows())
        count, last = int(batch.labels_mask.sum()), len(teacher.hidden_sizes) - 1
        signals = teacher.signals(batch, layers=(0, last))
        states = signals.hidden((0, last))
        for layer, state in zip((0, last), states, strict=True):
            shape, wanted = tuple(state.shape), (count, teacher.hidden_sizes[layer])
            assert shape == wanted, f"hidden state {layer} is {shape}, not {wanted}"
            assert bool(state.isfinite().all()), f"hidden state {layer} is not finite"
            assert not state.requires_grad, f"hidden state {layer} has a gradient"
        (again,) = signals.hidden((last,))
        assert torch.equal(again, states[1]), "hidden states come in another order than asked for"

    def test_it_answers_every_prompt_in_order(self) -> None:
        """One completion per prompt, the same for the same seed, none longer than the limit."""
        self._needs("text")
        teacher, sampling = self._built(), Sampling(max_new_tokens=6)
        found = list(teacher.generate(_PROMPTS, sampling, 5))
        assert len(found) == len(_PROMPTS), f"{len(found)} completions for {len(_PROMPTS)} prompts"
        for completion in found:
            assert isinstance(completion, Completion), f"{type(completion).__name__} is no Completion"
            assert len(completion.token_ids) <= 6, f"{len(completion.token_ids)} tokens, with max_new_tokens: 6"
        again = [c.text for c in teacher.generate(_PROMPTS[::-1], sampling, 5)]
        assert again == [c.text for c in found[::-1]], "greedy answers depend on the order of the prompts"
        drawn = Sampling(do_sample=True, max_new_tokens=6)
        first, second = (list(teacher.generate(_PROMPTS, drawn, 5)) for _ in range(2))
        assert first == second, "the same seed gives other answers"
        assert list(teacher.generate([], sampling, 5)) == [], "no prompts have answers"

    def test_it_may_be_closed_twice(self) -> None:
        teacher = self._built()
        teacher.close()
        teacher.close()

    def test_rows_it_does_not_know_are_refused(self) -> None:
        """Before training starts, as is a student whose tokens are others."""
        if not self.fixed_rows:
            pytest.skip("it knows every row")
        teacher: Any = self._built()
        assert teacher.temperature > 0, f"the temperature is {teacher.temperature}"
        rows = list(self.rows())
        teacher.check_rows(rows)
        first = rows[0]
        other = Encoded(first.id, (*first.ids[:-1], (first.ids[-1] + 1) % self._width()), first.learned)
        with refused("a row that it does not know"):
            teacher.check_rows([*rows, other])
        stranger = Vocabulary(size=7, tokens=7, fingerprint="0" * 64)
        with refused("a student with other tokens"):
            teacher.check_student(stranger, tiny_tokenizer())


def _table(signal: Dense | TopK, width: int) -> Tensor:
    """Log-probabilities [N, V] in float64; tokens that a top-k signal does not have are -inf."""
    if isinstance(signal, Dense):
        return torch.log_softmax(signal.logits.double(), -1)
    empty = torch.full((len(signal.ids), width + 1), -torch.inf, dtype=torch.float64)
    # Empty slots may have any id: they go where no token is.
    ids = torch.where(signal.logprobs > -torch.inf, signal.ids, width)
    return empty.scatter(1, ids, signal.logprobs.double())[:, :width]


def _padded(rows: Sequence[Encoded], side: Any) -> TokenBatch:
    batch = collate(rows, side=side)
    assert batch.attention_mask is not None
    # Whatever fills the rows must not matter.
    batch.input_ids[batch.attention_mask == 0] = 1
    return batch
