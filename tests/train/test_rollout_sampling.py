from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kdkit.api import Sampling
from kdkit.testing.tiny import tiny_model
from kdkit.train.rollout import Mixture, decode, stream_number, stream_seed, warp
from kdkit.train.rollout.sampling import draw

PROMPT, N = [5, 6, 7], 6000
WARPS = [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 12}, {"temperature": 2.0, "top_p": 0.7}]


def logits_of(model, prompt):
    with torch.no_grad():
        logits = model.double()(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
    model.float()
    return logits


def within(model, prompt, how, q):
    """Probabilities of a second model in float64: at the temperature, over what the first one's ``q`` keeps."""
    p = (logits_of(model, prompt) / how.temperature).softmax(-1) * (q > 0)
    return p / p.sum()


def exact(model, prompt, how):
    """Probabilities in float64, warped with plain sorting: rank below top-k, probability before it below top-p."""
    logits = logits_of(model, prompt)
    values, order = (logits / how.temperature).sort(descending=True)
    if how.top_k:
        values[how.top_k :] = -torch.inf
    p = values.softmax(-1)
    p[p.cumsum(-1) - p >= how.top_p] = 0
    return torch.zeros_like(p).scatter(0, order, p / p.sum())


def excess(tokens, p):
    """Pearson's chi-square over bins of at least 10 expected tokens, in standard deviations above its mean."""
    counts = torch.bincount(tokens, minlength=len(p)).double()
    assert not counts[p == 0].any()
    order = p.argsort(descending=True)
    expected, counts = p[order] * len(tokens), counts[order]
    big = int((expected >= 10).sum())
    observed = torch.cat([counts[:big], counts[big:].sum()[None]])
    wanted = torch.cat([expected[:big], expected[big:].sum()[None]])
    kept = wanted > 1
    statistic = float(((observed - wanted) ** 2 / wanted)[kept].sum())
    freedom = int(kept.sum()) - 1
    assert freedom >= 3
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("options", WARPS)
def test_tokens_of_a_mixture_follow_it(options):
    model, teacher = tiny_model(), tiny_model(seed=1, hidden=48, vocab=280)
    how = Sampling(do_sample=True, max_new_tokens=1, **options)
    mixture = Mixture(teacher, 0.2)
    done = decode(
        model, [PROMPT] * N, how, list(range(N)), stop_ids=(), batch_size=512, mixture=mixture, vocabulary=250
    )
    tokens = torch.tensor([row.ids[0] for row in done])
    # The shared vocabulary is cut before both are warped.
    q = exact(_Cut(model, 250), PROMPT, how)
    p = within(_Cut(teacher, 250), PROMPT, how, q)
    assert excess(tokens, 0.8 * q + 0.2 * p) < 4
    for wrong in (0.0, 0.5, 0.8):
        assert excess(tokens, (1 - wrong) * q + wrong * p) > 6, wrong
    cut_by_itself = exact(_Cut(teacher, 250), PROMPT, how)
    if bool(((cut_by_itself > 0) != (q > 0)).any()):
        assert excess(tokens, 0.8 * q + 0.2 * cut_by_itself) > 6


class _Cut:
    def __init__(self, model, width):
        self.model, self.width = model, width

    def double(self):
        self.model.double()
        return self

    def float(self):
        self.model.float()

    def __call__(self, **options):
        out = self.model(**options)
        out.logits = out.logits[..., : self.width]
        return out


@pytest.mark.parametrize("options", WARPS)
def test_log_probabilities_of_every_step_are_those_of_both_models_without_a_cache(options):
    """Five prompts in two places: both caches are refilled together."""
    model, teacher = tiny_model(), tiny_model(seed=1, hidden=48)
    how = Sampling(do_sample=True, max_new_tokens=5, **options)
    prompts = [[1, 2, 3], [9], [4, 5, 6, 7, 8, 9], [30, 20], [77, 1]]
    options = {"mixture": Mixture(teacher, 0.3), "logprobs": True, "support": True}
    done = decode(model, prompts, how, range(5), stop_ids=(), batch_size=2, limits=[5, 2, 4, 1, 5], **options)
    for prompt, row in zip(prompts, done, strict=True):
        for step, token in enumerate(row.ids):
            so_far = [*prompt, *row.ids[:step]]
            q = exact(model, so_far, how)
            p = within(teacher, so_far, how, q)
            assert row.drawn[step] == pytest.approx(float(torch.log(0.7 * q + 0.3 * p)[token]), abs=2e-5)
            assert row.logprobs[step] == pytest.approx(float(q[token].log()), abs=2e-5)
            if row.support is not None:
                assert row.support[step].tolist() == q.nonzero()[:, 0].tolist()
                assert row.support[step].dtype == np.int32
                assert token in row.support[step]
        assert (row.support is None) == (not how.top_k and how.top_p == 1.0)


def test_a_greedy_mixture_takes_its_most_probable_token():
    model, teacher = tiny_model(), tiny_model(seed=1)
    how = Sampling(max_new_tokens=1)
    for alpha, prompt in itertools.product((0.0, 0.5, 1.0), ([1], [2, 3], [50, 60, 70])):
        (row,) = decode(model, [prompt], how, [0], stop_ids=(), batch_size=1, mixture=Mixture(teacher, alpha))
        q, p = (exact(m, prompt, how) for m in (model, teacher))
        assert row.ids == [int(((1 - alpha) * q + alpha * p).argmax())]


def test_a_share_is_from_0_to_1():
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share from 0 to 1"):
            Mixture(tiny_model(), alpha)


@pytest.mark.parametrize("size", [30, 3000])
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_warping_keeps_the_tokens_that_transformers_keeps(size, spread):
    logits = torch.randn(6, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * spread
    for temperature, top_k, top_p in itertools.product((0.5, 1.0), (0, 1, 7, 5000), (0.05, 0.5, 0.95, 1.0)):
        how = Sampling(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
        expected = TemperatureLogitsWarper(temperature)(None, logits.clone())
        expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
        expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
        assert torch.equal(warp(logits, how), expected)


def test_ties_with_the_last_token_kept_are_kept():
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    assert warp(logits, Sampling(do_sample=True, top_k=2)).isfinite().tolist() == [[True, True, True, False]]
    assert warp(logits, Sampling(do_sample=True, top_p=0.6)).isfinite().tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("size", [5, 256, 257, 5000])
def test_a_draw_inverts_the_cumulative_distribution(size):
    source = torch.Generator().manual_seed(size)
    weights = torch.rand(400, size, generator=source) * (torch.rand(400, size, generator=source) < 0.3)
    weights[:, 1] += 1e-3
    uniform = torch.rand(400, generator=source, dtype=torch.float64)
    uniform[:3] = torch.tensor([0.0, 1 - 2**-53, 0.5])
    cumulative = weights.double().cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    expected = (cumulative <= target).sum(-1).clamp(max=size - 1)
    drawn = draw(weights, uniform)
    assert (weights.gather(1, drawn[:, None]) > 0).all()
    # The very last number below 1 may round to the end of the sum.
    assert torch.equal(drawn[2:], expected[2:])
    assert drawn[0] == expected[0]


def test_seeds_of_streams_differ_in_every_part_and_fit_a_generator():
    every = [stream_seed(*parts) for parts in itertools.product((0, 1, 12), (0, 1, 2), (0, 1, 12, "x"), (0, 1, 23))]
    assert len(set(every)) == len(every)
    assert all(0 <= number < 2**63 for number in every)
    digest = hashlib.sha256(b"17/row/3/5").digest()
    assert stream_number(17, "row", 3, 5) == int.from_bytes(digest[:8], "big") >> 1
