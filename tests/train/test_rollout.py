from __future__ import annotations

import math

import pytest
import torch

from kdkit.api import Sampling
from kdkit.testing.tiny import tiny_model, tiny_tokenizer
from kdkit.train.rollout import generate
from kdkit.train.rollout.sampling import next_tokens

PROMPTS = [[1, 2, 3, 4, 5, 6], [7], [9, 8, 7], [20, 30]]


def run(prompts=PROMPTS, *, seeds=None, batch_size=4, stop_ids=(258,), **sampling):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    how = Sampling(max_new_tokens=8, **sampling)
    seeds = seeds if seeds is not None else range(len(prompts))
    return generate(model, tokenizer, prompts, how, list(seeds), stop_ids=stop_ids, batch_size=batch_size)


def greedy(prompt, steps=8):
    model, ids = tiny_model(), list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_greedy_equals_one_token_at_a_time_without_cache_or_padding(batch_size):
    for prompt, completion in zip(PROMPTS, run(batch_size=batch_size), strict=True):
        expected = greedy(prompt)
        cut = expected.index(258) if 258 in expected else len(expected)
        assert list(completion.token_ids) == expected[:cut]
        assert completion.truncated == (258 not in expected)


def test_a_completion_ends_before_its_stop_id():
    first = greedy(PROMPTS[0])
    (completion,) = run(PROMPTS[:1], stop_ids=(first[2],))
    assert list(completion.token_ids) == first[: first.index(first[2])]
    assert not completion.truncated


def test_sampling_depends_on_its_own_seed_only():
    together = run(seeds=[11, 12, 13, 14], do_sample=True)
    alone = [
        run([p], seeds=[s], do_sample=True, batch_size=1)[0] for p, s in zip(PROMPTS, [11, 12, 13, 14], strict=True)
    ]
    assert together == alone
    assert run(seeds=[21, 22, 23, 24], do_sample=True) != together


def test_sampling_follows_the_softmax():
    """Frequencies of the first token against its probability, at another temperature and with top-k."""
    prompt, n = [5, 6, 7], 4000
    with torch.no_grad():
        logits = tiny_model()(input_ids=torch.tensor([prompt])).logits[0, -1]
    values, ids = (logits / 2.0).topk(4)
    p = torch.softmax(values, -1)
    how = Sampling(do_sample=True, temperature=2.0, top_k=4, max_new_tokens=1)
    drawn = generate(tiny_model(), tiny_tokenizer(), [prompt] * n, how, list(range(n)), stop_ids=(), batch_size=500)
    first = torch.tensor([c.token_ids[0] for c in drawn])
    for token, probability in zip(ids.tolist(), p.tolist(), strict=True):
        share = float((first == token).float().mean())
        assert abs(share - probability) < 4 * (probability * (1 - probability) / n) ** 0.5
    assert set(first.tolist()) <= set(ids.tolist())


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 2), (1 - 2**-53, 4)])
def test_not_even_the_ends_of_a_draw_give_a_token_without_probability(uniform, token, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, uniform, dtype=torch.float64))
    logits = torch.tensor([[-math.inf, -math.inf, 1.0, 0.5, 2.0, -math.inf]])
    tokens = next_tokens(logits, Sampling(do_sample=True), [torch.Generator()]).tokens
    assert tokens.tolist() == [token]


def test_the_models_own_generation_defaults_do_not_leak_in():
    model = tiny_model()
    model.generation_config.do_sample = True
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_new_tokens = 2
    out = generate(model, tiny_tokenizer(), PROMPTS, Sampling(max_new_tokens=8), [0] * 4, stop_ids=(258,), batch_size=4)
    assert out == run()
