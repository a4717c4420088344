"""Does a rollout engine write what the model would, each answer from its own seed, and stop where it must?

Subclass :class:`RolloutConformance` in a test file and run pytest:

    class TestMine(RolloutConformance):
        def build(self, model):
            return build_mine(MineParams(), FakeBuildContext(), model)

The model is a tiny random Llama in float32; answers are compared with a forward pass for every token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import pytest
import torch

from kdkit.api.data import Completion
from kdkit.api.params import Sampling
from kdkit.api.protocols import RolloutEngine, RolloutModel
from kdkit.testing.tiny import save_tiny_model, tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM

__all__ = ["RolloutConformance"]

_PROMPTS: Final = tuple(
    tuple(text.encode()) for text in ("What is 2 + 2?", "a", "Repeat after me: one two three.", "??", "Name a bird")
)
_SEEDS: Final = (11, 22, 33, 44, 55)
_STOP: Final = 258
_GREEDY: Final = Sampling(max_new_tokens=8)
_SAMPLED: Final = Sampling(do_sample=True, max_new_tokens=8)


class RolloutConformance:
    """What every rollout engine must fulfil.

    Attributes:
        mixes: What the spec declares; then log-probabilities of ``decode`` are compared, too.
    """

    mixes: ClassVar[bool] = False

    def build(self, model: RolloutModel) -> RolloutEngine:
        """The engine for a model, in float32; use ``model.live`` when there is one, else load ``model.path``."""
        raise NotImplementedError

    # -- helpers

    def _model(self, directory: Path) -> RolloutModel:
        """The tiny model in memory, and on disk."""
        return replace(self._on_disk(directory), live=tiny_model())

    def _on_disk(self, directory: Path) -> RolloutModel:
        return RolloutModel(path=save_tiny_model(directory / "model"), tokenizer=tiny_tokenizer())

    def _right(self, model: LlamaForCausalLM, found: Sequence[Completion], limit: int, what: str) -> None:
        assert len(found) == len(_PROMPTS), f"{what}: {len(found)} completions for {len(_PROMPTS)} prompts"
        for index, (prompt, completion) in enumerate(zip(_PROMPTS, found, strict=True)):
            wanted = _greedy(model, prompt, limit)
            got = _without_stop(completion.token_ids)
            assert got == wanted, f"{what}: completion {index} is {got}, the model's own is {wanted}"

    # -- the contract

    def test_greedy_answers_are_the_models_own_in_order(self, tmp_path: Path) -> None:
        """One completion per prompt, at its place, each what a forward pass for every token gives."""
        model = self._model(tmp_path)
        engine = self.build(model)
        self._right(model.live, engine.generate(_PROMPTS, _GREEDY, _SEEDS), 8, "greedy")
        assert list(engine.generate([], _GREEDY, [])) == [], "no prompts have completions"

    def test_a_model_on_disk_is_loaded(self, tmp_path: Path) -> None:
        engine = self.build(self._on_disk(tmp_path))
        self._right(tiny_model(), engine.generate(_PROMPTS, _GREEDY, _SEEDS), 8, "from disk")

    def test_a_completion_is_whole(self, tmp_path: Path) -> None:
        """Token ids of the vocabulary, and the text they stand for without special tokens."""
        model = self._model(tmp_path)
        for completion in self.build(model).generate(_PROMPTS, _SAMPLED, _SEEDS):
            assert isinstance(completion, Completion), f"{type(completion).__name__} is no Completion"
            assert isinstance(completion.token_ids, tuple), "token_ids is no tuple"
            assert all(type(token) is int and 0 <= token < 259 for token in completion.token_ids), (
                f"token ids that are none: {completion.token_ids}"
            )
            text = model.tokenizer.decode(list(completion.token_ids), skip_special_tokens=True)
            assert completion.text == text, f"the text is {completion.text!r}, its tokens say {text!r}"

    def test_a_seed_gives_the_same_answer_whatever_is_beside_it(self, tmp_path: Path) -> None:
        """Each answer depends on its prompt and its own seed: not on its place, its neighbours or earlier calls."""
        model = self._model(tmp_path)
        engine = self.build(model)
        first = _ids(engine.generate(_PROMPTS, _SAMPLED, _SEEDS))
        assert _ids(engine.generate(_PROMPTS, _SAMPLED, _SEEDS)) == first, "the same seeds give other answers"
        turned = _ids(engine.generate(_PROMPTS[::-1], _SAMPLED, _SEEDS[::-1]))
        assert turned == first[::-1], "in another order, the same seeds give other answers"
        for index, (prompt, seed) in enumerate(zip(_PROMPTS, _SEEDS, strict=True)):
            alone = _ids(engine.generate([prompt], _SAMPLED, [seed]))
            assert alone == [first[index]], f"answer {index} is another one when it is sampled alone"

    def test_another_seed_gives_another_answer(self, tmp_path: Path) -> None:
        """Also for the same prompt several times in one call, as groups of GRPO are."""
        model = self._model(tmp_path)
        same = [_PROMPTS[0]] * 5
        assert len(set(_ids(self.build(model).generate(same, _SAMPLED, _SEEDS)))) > 1, "all seeds give the same answer"

    def test_the_global_generator_is_left_alone(self, tmp_path: Path) -> None:
        model = self._model(tmp_path)
        engine = self.build(model)
        torch.manual_seed(1)
        before = torch.get_rng_state()
        engine.generate(_PROMPTS, _SAMPLED, _SEEDS)
        assert torch.equal(before, torch.get_rng_state()), "sampling uses torch's global generator"

    def test_the_limit_holds_and_is_told(self, tmp_path: Path) -> None:
        """No more than ``max_new_tokens``; truncated is what has as many and did not end."""
        model = self._model(tmp_path)
        engine = self.build(model)
        for limit in (1, 5, 16):
            found = engine.generate(_PROMPTS, Sampling(max_new_tokens=limit), _SEEDS)
            for completion in found:
                count = len(completion.token_ids)
                assert count <= limit, f"{count} tokens, with max_new_tokens: {limit}"
                ended = _STOP in completion.token_ids or count < limit
                assert completion.truncated != ended, f"{count} of {limit} tokens, truncated: {completion.truncated}"

    def test_it_stops_at_the_end_token(self, tmp_path: Path) -> None:
        """Nothing comes after it, it is not in the text, and the answer is not truncated."""
        model = self._model(tmp_path)
        count, limit = 48, 48
        sampling = Sampling(do_sample=True, max_new_tokens=limit)
        found = self.build(model).generate([_PROMPTS[0]] * count, sampling, range(count))
        ended = [completion for completion in found if not completion.truncated]
        assert ended, f"none of {count} answers of a random model ended within {limit} tokens"
        for completion in found:
            assert _STOP not in completion.token_ids[:-1], f"it goes on after the end token: {completion.token_ids}"
            assert "<|im_end|>" not in completion.text, "the end token is in the text"

    def test_sampling_follows_the_distribution(self, tmp_path: Path) -> None:
        """The mean log-probability of 400 first tokens is that of the model at this temperature."""
        model = self._model(tmp_path)
        count, prompt = 400, _PROMPTS[2]
        for temperature in (0.5, 1.5):
            sampling = Sampling(do_sample=True, temperature=temperature, max_new_tokens=1)
            found = self.build(model).generate([prompt] * count, sampling, range(count))
            logprobs = torch.log_softmax(_logits(model.live, prompt) / temperature, -1)
            probabilities = logprobs.exp()
            mean = float((probabilities * logprobs).sum())
            spread = math.sqrt(float((probabilities * (logprobs - mean) ** 2).sum()) / count)
            # An engine that leaves the end token out gives no token where it is drawn first.
            drawn = [completion.token_ids[0] if completion.token_ids else _STOP for completion in found]
            got = float(logprobs[torch.tensor(drawn)].mean())
            assert abs(got - mean) <= 5 * spread, (
                f"at temperature {temperature} tokens have a mean log-probability of {got:.3f}, not {mean:.3f}"
            )

    def test_what_leaves_one_token_is_greedy(self, tmp_path: Path) -> None:
        """``top_k: 1``, a small ``top_p`` and a small temperature keep the most probable token only."""
        model = self._model(tmp_path)
        engine = self.build(model)
        for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
            sampling = Sampling(do_sample=True, max_new_tokens=8, **options)
            self._right(model.live, engine.generate(_PROMPTS, sampling, _SEEDS), 8, str(options))

    def test_it_follows_the_live_model(self, tmp_path: Path) -> None:
        """Weights that were trained on meanwhile are used, and nothing is remembered of the old ones."""
        model = self._model(tmp_path)
        live: Any = model.live
        engine = self.build(model)
        engine.generate(_PROMPTS, _GREEDY, _SEEDS)
        live.load_state_dict(tiny_model(seed=5).state_dict())
        self._right(live, engine.generate(_PROMPTS, _GREEDY, _SEEDS), 8, "after an update of the weights")

    def test_the_live_model_stays_as_it_is(self, tmp_path: Path) -> None:
        """Dropout is off while it answers; afterwards the model is in training as before, with no gradient."""
        model = self._model(tmp_path)
        live: Any = model.live
        for layer in live.model.layers:
            layer.self_attn.attention_dropout = 0.5
        before = {name: value.clone() for name, value in live.state_dict().items()}
        live.train()
        found = self.build(model).generate(_PROMPTS, _GREEDY, _SEEDS)
        assert live.training, "the model was left in evaluation mode"
        assert all(torch.equal(value, before[name]) for name, value in live.state_dict().items()), "weights changed"
        assert all(p.requires_grad and p.grad is None for p in live.parameters()), "gradients of the model changed"
        self._right(live.eval(), found, 8, "of a model in training")

    def test_logprobs_are_those_of_the_model(self, tmp_path: Path) -> None:
        model = self._model(tmp_path)
        if not self.mixes:
            pytest.skip("it gives none")
        engine: Any = self.build(model)
        options = {"limits": [8] * len(_PROMPTS), "vocabulary": 259, "compute": torch.float32, "mixture": None}
        for prompt, row in zip(_PROMPTS, engine.decode(_PROMPTS, _SAMPLED, _SEEDS, **options), strict=True):
            for place, (token, logprob) in enumerate(zip(row.ids, row.logprobs, strict=True)):
                wanted = float(torch.log_softmax(_logits(model.live, (*prompt, *row.ids[:place])), -1)[token])
                assert abs(logprob - wanted) < 1e-3, f"token {place} has log-probability {logprob}, not {wanted}"


def _logits(model: LlamaForCausalLM, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)])).logits[0, -1].double()


def _greedy(model: LlamaForCausalLM, prompt: Sequence[int], limit: int) -> list[int]:
    """The most probable tokens, up to the end token or the limit."""
    ids = list(prompt)
    training = model.training
    model.eval()
    for _ in range(limit):
        token = int(_logits(model, ids).argmax())
        if token == _STOP:
            break
        ids.append(token)
    model.train(training)
    return ids[len(prompt) :]


def _without_stop(ids: Sequence[int]) -> list[int]:
    """An engine may give the end token with the answer or leave it out."""
    return list(ids[:-1]) if ids and ids[-1] == _STOP else list(ids)


def _ids(found: Sequence[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in found]
