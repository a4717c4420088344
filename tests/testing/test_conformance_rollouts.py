"""The built-in rollout engine keeps the contract, and the suite catches engines that do not."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from suites import check, checks_of, variant

from kdkit.api import Sampling
from kdkit.api.data import Completion
from kdkit.plugins.rollouts import plugin
from kdkit.testing.conformance import RolloutConformance
from kdkit.testing.fakes import FakeBuildContext
from kdkit.testing.tiny import tiny_model

(SPEC,) = plugin.kdkit_rollouts()


def transformers_engine(model):
    return SPEC.build(SPEC.params(), FakeBuildContext(), model)


class TestTransformers(RolloutConformance):
    mixes = SPEC.mixes

    def build(self, model):
        return transformers_engine(model)


# -- wrong engines


class Wrong:
    """The right one, for others to spoil."""

    def __init__(self, model):
        self.model, self.right = model, transformers_engine(model)

    def generate(self, prompts, sampling, seeds):
        return self.right.generate(prompts, sampling, seeds)

    def decode(self, *args, **options):
        return self.right.decode(*args, **options)


class SortedByLength(Wrong):
    """Answers come in the order in which prompts were decoded."""

    def generate(self, prompts, sampling, seeds):
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        return super().generate([prompts[i] for i in order], sampling, [seeds[i] for i in order])


class DropsOne(Wrong):
    def generate(self, prompts, sampling, seeds):
        return super().generate(prompts, sampling, seeds)[1:]


class NeedsPrompts(Wrong):
    def generate(self, prompts, sampling, seeds):
        assert prompts, "nothing to do"
        return super().generate(prompts, sampling, seeds)


class PromptsTwice(Wrong):
    """The prompt is shown to the model twice, as a wrong cache does."""

    def generate(self, prompts, sampling, seeds):
        return super().generate([[*prompt, *prompt] for prompt in prompts], sampling, seeds)


class LiveOnly(Wrong):
    def generate(self, prompts, sampling, seeds):
        assert self.model.live is not None, "no model"
        return super().generate(prompts, sampling, seeds)


class WithSpecialTokens(Wrong):
    def generate(self, prompts, sampling, seeds):
        found = super().generate(prompts, sampling, seeds)
        return [replace(one, text=one.text + "<|im_end|>") for one in found]


class Tensors(Wrong):
    def generate(self, prompts, sampling, seeds):
        found = super().generate(prompts, sampling, seeds)
        return [Completion(one.text, torch.tensor(one.token_ids), one.truncated) for one in found]


class OneSeed(Wrong):
    """Seeds once for the whole batch."""

    def generate(self, prompts, sampling, seeds):
        return super().generate(prompts, sampling, [(sum(seeds) + i) % 2**31 for i in range(len(seeds))])


class NoSeed(Wrong):
    def generate(self, prompts, sampling, seeds):
        return super().generate(prompts, sampling, [0] * len(seeds))


class GlobalGenerator(Wrong):
    def generate(self, prompts, sampling, seeds):
        if seeds:
            torch.manual_seed(seeds[0])
        return super().generate(prompts, sampling, seeds)


class OneTooMany(Wrong):
    def generate(self, prompts, sampling, seeds):
        return super().generate(
            prompts, sampling.model_copy(update={"max_new_tokens": sampling.max_new_tokens + 1}), seeds
        )


class NeverTruncated(Wrong):
    def generate(self, prompts, sampling, seeds):
        return [replace(one, truncated=False) for one in super().generate(prompts, sampling, seeds)]


class WithAWordMore(Wrong):
    """What comes after the end token is given, too."""

    def generate(self, prompts, sampling, seeds):
        found = super().generate(prompts, sampling, seeds)
        return [one if one.truncated else replace(one, token_ids=(*one.token_ids[:-1], 258, 5)) for one in found]


class CountsCalls(Wrong):
    calls = 0

    def generate(self, prompts, sampling, seeds):
        self.calls += 1
        return super().generate(prompts, sampling, [seed + self.calls for seed in seeds])


class SeedsOfTheBatch(Wrong):
    def generate(self, prompts, sampling, seeds):
        return super().generate(prompts, sampling, [seed + len(prompts) for seed in seeds])


class Texts(Wrong):
    def generate(self, prompts, sampling, seeds):
        return [one.text for one in super().generate(prompts, sampling, seeds)]


class Floats(Wrong):
    def generate(self, prompts, sampling, seeds):
        found = super().generate(prompts, sampling, seeds)
        return [replace(one, token_ids=tuple(map(float, one.token_ids))) for one in found]


class LeavesGradients(Wrong):
    def generate(self, prompts, sampling, seeds):
        found = super().generate(prompts, sampling, seeds)
        weight = self.model.live.model.norm.weight
        weight.grad = torch.zeros_like(weight)
        return found


class GoesOn(Wrong):
    """Knows no end token: what comes after it is part of the answer."""

    def __init__(self, model):
        super().__init__(model)
        self.right._stop_ids = ()


class IgnoresTemperature(Wrong):
    def generate(self, prompts, sampling, seeds):
        return super().generate(prompts, sampling.model_copy(update={"temperature": 1.0}), seeds)


class IgnoresTopK(Wrong):
    def generate(self, prompts, sampling, seeds):
        return super().generate(prompts, sampling.model_copy(update={"top_k": 0}), seeds)


class IgnoresTopP(Wrong):
    def generate(self, prompts, sampling, seeds):
        return super().generate(prompts, sampling.model_copy(update={"top_p": 1.0}), seeds)


class CopiesTheWeights(Wrong):
    def __init__(self, model):
        super().__init__(model)
        if model.live is not None:
            copy = tiny_model()
            copy.load_state_dict(model.live.state_dict())
            self.right = transformers_engine(replace(model, live=copy))


class LeavesEvaluation(Wrong):
    def generate(self, prompts, sampling, seeds):
        self.model.live.eval()
        return super().generate(prompts, sampling, seeds)


class WithDropout(Wrong):
    def generate(self, prompts, sampling, seeds):
        live = self.model.live
        if live.training:
            live.eval = lambda: live
        try:
            return super().generate(prompts, sampling, seeds)
        finally:
            live.__dict__.pop("eval", None)


class WritesWeights(Wrong):
    def generate(self, prompts, sampling, seeds):
        found = super().generate(prompts, sampling, seeds)
        with torch.no_grad():
            self.model.live.model.norm.weight.mul_(1.5)
        return found


class LogprobsOfTheNext(Wrong):
    def decode(self, *args, **options):
        found = super().decode(*args, **options)
        return [replace(row, logprobs=[*row.logprobs[1:], 0.0]) for row in found]


ORDER, DISK = "test_greedy_answers_are_the_models_own_in_order", "test_a_model_on_disk_is_loaded"
WHOLE, SEED = "test_a_completion_is_whole", "test_a_seed_gives_the_same_answer_whatever_is_beside_it"
OTHER, GLOBAL = "test_another_seed_gives_another_answer", "test_the_global_generator_is_left_alone"
LIMIT, STOPS = "test_the_limit_holds_and_is_told", "test_it_stops_at_the_end_token"
FOLLOWS, ONE = "test_sampling_follows_the_distribution", "test_what_leaves_one_token_is_greedy"
LIVE, STAYS = "test_it_follows_the_live_model", "test_the_live_model_stays_as_it_is"
LOGPROBS = "test_logprobs_are_those_of_the_model"
WRONG = [
    (SortedByLength, ORDER, "completion 0 is"),
    (DropsOne, ORDER, "4 completions for 5 prompts"),
    (NeedsPrompts, ORDER, "nothing to do"),
    (PromptsTwice, ORDER, "the model's own is"),
    (LiveOnly, DISK, "no model"),
    (WithSpecialTokens, WHOLE, "the text is"),
    (Tensors, WHOLE, "token_ids is no tuple"),
    (Texts, WHOLE, "str is no Completion"),
    (Floats, WHOLE, "token ids that are none"),
    (CountsCalls, SEED, "the same seeds give other answers"),
    (SeedsOfTheBatch, SEED, "answer 0 is another one when it is sampled alone"),
    (OneSeed, SEED, "in another order|sampled alone"),
    (NoSeed, OTHER, "all seeds give the same answer"),
    (GlobalGenerator, GLOBAL, "torch's global generator"),
    (OneTooMany, LIMIT, "2 tokens, with max_new_tokens: 1"),
    (NeverTruncated, LIMIT, "truncated: False"),
    (GoesOn, STOPS, "none of 48 answers|goes on after"),
    (WithSpecialTokens, STOPS, "the end token is in the text"),
    (WithAWordMore, STOPS, "it goes on after the end token"),
    (IgnoresTemperature, FOLLOWS, "at temperature 0.5"),
    (IgnoresTopK, ONE, "'top_k': 1"),
    (IgnoresTopP, ONE, "'top_p': 1e-06"),
    (IgnoresTemperature, ONE, "'temperature': 0.0001"),
    (CopiesTheWeights, LIVE, "after an update of the weights"),
    (LeavesEvaluation, STAYS, "left in evaluation mode"),
    (WithDropout, STAYS, "of a model in training"),
    (WritesWeights, STAYS, "weights changed"),
    (LeavesGradients, STAYS, "gradients of the model changed"),
    (LogprobsOfTheNext, LOGPROBS, "has log-probability"),
]


@pytest.mark.parametrize(("engine", "test", "reason"), WRONG)
def test_a_wrong_engine_fails(engine, test, reason, tmp_path):
    with pytest.raises(AssertionError, match=reason):
        check(variant(RolloutConformance, build=engine, mixes=True), test, tmp_path)


@pytest.mark.parametrize("test", checks_of(RolloutConformance))
def test_a_right_engine_passes_and_no_test_is_idle(test, tmp_path):
    assert test in {caught for _, caught, _ in WRONG}
    check(variant(RolloutConformance, build=Wrong, mixes=True), test, tmp_path)


def test_sampling_options_are_those_of_the_suite():
    """The suite knows every option of ``Sampling``."""
    assert set(Sampling.model_fields) == {"do_sample", "temperature", "top_p", "top_k", "max_new_tokens"}
