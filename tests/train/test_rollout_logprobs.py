from __future__ import annotations

import pytest
import torch

from kdkit.api import Sampling
from kdkit.models import heads
from kdkit.testing.tiny import tiny_model
from kdkit.train.policy.terms import taken_logprobs
from kdkit.train.rollout import decode, mismatch, token_logprobs, warp
from kdkit.train.rollout import logprobs as module

PROMPTS = [[1, 2, 3], [9], [4, 5, 6, 7, 8, 9], [30, 20], [77, 1]]
WARPS = [
    None,
    Sampling(do_sample=True, max_new_tokens=12),
    Sampling(do_sample=True, max_new_tokens=12, temperature=2.0, top_k=9),
    Sampling(do_sample=True, max_new_tokens=12, temperature=1.5, top_p=0.8),
]


def sampled(how, **options):
    how = how or Sampling(do_sample=True, max_new_tokens=12)
    return decode(tiny_model(), PROMPTS, how, range(5), stop_ids=(258,), batch_size=2, logprobs=True, **options)


def reference(model, prompt, completion, how, width=None):
    """One row at a time: log-probabilities and entropies of warped logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1, :width]
    p = (logits if how is None else warp(logits, how)).double().softmax(-1)
    return p.log().gather(1, torch.tensor(completion)[:, None])[:, 0], -torch.special.xlogy(p, p).sum(-1)


@pytest.mark.parametrize("how", WARPS)
@pytest.mark.parametrize("packed", [None, True, False])
def test_they_are_those_of_one_row_at_a_time(how, packed):
    completions = [row.ids for row in sampled(how)]
    model = tiny_model().double()
    # Blocks and batches smaller than the rows together.
    got = token_logprobs(model, PROMPTS, completions, how, entropy=True, packed=packed, batch_tokens=24)
    for index, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        logprobs, entropy = reference(model, prompt, completion, how)
        torch.testing.assert_close(got.logprobs[index], logprobs, atol=1e-10, rtol=0)
        torch.testing.assert_close(got.entropy[index], entropy, atol=1e-10, rtol=0)


@pytest.mark.parametrize("how", WARPS[1:])
def test_decoding_in_float32_samples_with_the_same_numbers(how):
    rows = sampled(how, vocabulary=200)
    assert [row.drawn for row in rows] == [row.logprobs for row in rows]
    again = token_logprobs(tiny_model(), PROMPTS, [row.ids for row in rows], how, vocabulary=200)
    gap = mismatch([row.logprobs for row in rows], again.logprobs)
    assert 0 <= gap.mean <= gap.max < 1e-4
    assert gap.far == 0
    assert again.entropy is None
    whole = token_logprobs(tiny_model(), PROMPTS, [row.ids for row in rows], how)
    assert mismatch([row.logprobs for row in rows], whole.logprobs).max > 1e-3


def test_half_precision_is_that_of_training():
    completions = [row.ids for row in sampled(None)]
    exact = token_logprobs(tiny_model(), PROMPTS, completions)
    half = token_logprobs(tiny_model(), PROMPTS, completions, compute=torch.bfloat16)
    gap = mismatch([row.tolist() for row in exact.logprobs], half.logprobs)
    assert 1e-4 < gap.mean < 0.2
    assert all(row.dtype == torch.float32 for row in half.logprobs)


def test_blocks_change_nothing(monkeypatch):
    completions = [row.ids for row in sampled(None)]
    whole = token_logprobs(tiny_model().double(), PROMPTS, completions, entropy=True)
    monkeypatch.setattr(module, "block_tokens", lambda vocabulary: 3)
    blocks = token_logprobs(tiny_model().double(), PROMPTS, completions, entropy=True)
    for a, b in zip((*whole.logprobs, *whole.entropy), (*blocks.logprobs, *blocks.entropy), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_empty_completions_have_no_log_probabilities():
    got = token_logprobs(tiny_model(), PROMPTS[:2], [[], [5]], entropy=True)
    assert [len(row) for row in (*got.logprobs, *got.entropy)] == [0, 1, 0, 1]
    assert token_logprobs(tiny_model(), [], []).logprobs == ()


@pytest.mark.parametrize("how", WARPS)
def test_gradients_of_log_probability_and_entropy_exist_where_tokens_are_cut(how):
    logits = torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = logits.argmax(-1)

    def both(x):
        taken = taken_logprobs(x if how is None else warp(x, how), labels, entropy=True)
        return taken.logprobs, taken.entropy

    assert torch.autograd.gradcheck(both, (logits,))


def test_mismatch_by_hand():
    minus = -torch.inf
    recomputed = [torch.tensor([-1.0, -2.0, minus]), torch.tensor([minus, -0.5])]
    gap = mismatch([[-1.5, -2.05, -1.0], [minus, -0.5]], recomputed)
    # Both call the fourth token impossible: no difference. The third one only decoding could take.
    assert gap.metrics() == {
        "mismatch_mean": pytest.approx(0.55 / 3),
        "mismatch_max": pytest.approx(0.5),
        "mismatch_far": pytest.approx(2 / 5),
    }
    assert mismatch([], []).metrics() == {"mismatch_mean": 0, "mismatch_max": 0, "mismatch_far": 0}
    assert mismatch([[minus]], [torch.tensor([-1.0])]).far == 1


def test_what_the_architecture_does_to_logits_is_done_in_float32(monkeypatch):
    """As the losses of training do it: a soft cap in bf16 would move ratios before anything was learned."""
    seen, completions = [], [row.ids for row in sampled(None)]
    monkeypatch.setattr(heads, "_transform", lambda config: lambda logits: seen.append(logits.dtype) or logits)
    token_logprobs(tiny_model(), PROMPTS, completions, compute=torch.bfloat16)
    assert set(seen) == {torch.float32}
