"""Every answer is that of its prompt decoded alone, whatever runs beside it."""

from __future__ import annotations

import pytest
import torch
import transformers

from kdkit.api import Sampling
from kdkit.train.rollout import Mixture, attention, cache, decode
from kdkit.train.rollout.cache import PaddedRows, RaggedRows, ragged
from kdkit.train.rollout.spans import spans

STOP = 258
COMMON = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "pad_token_id": STOP,
    "bos_token_id": 256,
    "eos_token_id": STOP,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    # Every second layer sees a window, under eager attention with a soft cap.
    "Gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GROUPED, "sliding_window": 4}),
    "Gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**GROUPED, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    # All layers see a window.
    "Mistral": ("MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": 4}),
    "GPT2": ("GPT2Config", "GPT2LMHeadModel", {}),
    # Its positions come from the mask: rows do not join.
    "Bloom": ("BloomConfig", "BloomForCausalLM", {}),
}
PROMPTS = [[(7 * i + 3 * j) % 250 for j in range(length)] for i, length in enumerate((1, 9, 2, 7, 3, 12, 5, 4, 2, 6))]
LIMITS = [9, 2, 5, 1, 12, 3, 7, 4, 10, 6]
SEEDS = list(range(40, 50))


def model_of(name, seed=0):
    config, model, more = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, model)(getattr(transformers, config)(**COMMON, **more)).eval()


def run(model, *, places, rows=range(10), mixture=None, **sampling):
    how = Sampling(max_new_tokens=16, **sampling)
    parts = [[values[i] for i in rows] for values in (PROMPTS, SEEDS, LIMITS)]
    prompts, seeds, limits = parts
    done = decode(model, prompts, how, seeds, stop_ids=(STOP,), batch_size=places, limits=limits, mixture=mixture)
    return [row.ids for row in done]


def naive(model, prompt, limit):
    ids = list(prompt)
    while len(ids) < len(prompt) + limit and (len(ids) == len(prompt) or ids[-1] != STOP):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("slack", [None, 0, 5])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_that_join_and_leave_do_not_change_their_neighbours(name, slack, monkeypatch):
    if slack is not None:
        monkeypatch.setattr(attention, "_SLACK", slack)
        monkeypatch.setattr(cache, "_FILLING", slack)
    model = model_of(name)
    assert ragged(model.base_model) == (name != "Bloom")
    expected = [naive(model, *row) for row in zip(PROMPTS, LIMITS, strict=True)]
    sampled = [run(model, places=1, rows=[i], do_sample=True, temperature=0.7)[0] for i in range(10)]
    assert sampled != expected
    for places in (1, 3, 10):
        assert run(model, places=places) == expected
        assert run(model, places=places, do_sample=True, temperature=0.7) == sampled


def test_a_mixture_refills_as_well():
    model, teacher = model_of("Llama"), model_of("Gemma3", seed=1)
    mixture = Mixture(teacher, 0.5)
    alone = [run(model, places=1, rows=[i], mixture=mixture, do_sample=True)[0] for i in range(10)]
    assert run(model, places=3, mixture=mixture, do_sample=True) == alone
    assert alone != [run(model, places=1, rows=[i], do_sample=True)[0] for i in range(10)]
    # One of the two does not let rows join, so neither may.
    slow = Mixture(model_of("Bloom", seed=1), 0.5)
    alone = [run(model, places=1, rows=[i], mixture=slow, do_sample=True)[0] for i in range(10)]
    assert run(model, places=3, mixture=slow, do_sample=True) == alone


@pytest.mark.parametrize("name", ["Llama", "Bloom"])
def test_places_of_ended_rows_are_taken_at_once_where_rows_can_join(name, monkeypatch):
    """Rows that run at every step, of ten prompts in four places."""
    model, sizes = model_of(name), []
    kind = RaggedRows if name == "Llama" else PaddedRows
    step = kind.step
    monkeypatch.setattr(kind, "step", lambda self, tokens: sizes.append(len(tokens)) or step(self, tokens))
    assert ragged(model.base_model) == (name == "Llama")
    sizes.clear()
    how = Sampling(max_new_tokens=16)
    done = decode(model, PROMPTS, how, SEEDS, stop_ids=(), batch_size=4, limits=LIMITS)
    assert [len(row.ids) for row in done] == LIMITS
    # The first token of a row comes from its prompt.
    assert sum(sizes) == sum(LIMITS) - 10
    # The longest answers of the batches that start together: 6, 12 and 10 tokens.
    assert len(sizes) < 20 if name == "Llama" else len(sizes) == 25


def test_progress_counts_finished_prompts():
    seen = []
    decode(
        model_of("Llama"),
        PROMPTS,
        Sampling(),
        SEEDS,
        stop_ids=(),
        batch_size=4,
        limits=LIMITS,
        on_batch=seen.append,
    )
    assert seen == sorted(set(seen))
    assert seen[-1] == 10


def test_precision_and_vocabulary_reach_the_decoder():
    model = model_of("Llama")
    how = Sampling(max_new_tokens=6, do_sample=True, temperature=3.0)
    done = decode(
        model, PROMPTS, how, SEEDS, stop_ids=(), batch_size=4, vocabulary=20, compute=torch.bfloat16, logprobs=True
    )
    assert {token for row in done for token in row.ids} <= set(range(20))
    assert model.dtype == torch.float32
    exact = decode(model, PROMPTS, how, SEEDS, stop_ids=(), batch_size=4, vocabulary=20, logprobs=True)
    gap = abs(done[0].logprobs[0] - exact[0].logprobs[0])
    assert 0 < gap < 0.1


def test_no_prompts_give_no_answers():
    assert decode(model_of("Llama"), [], Sampling(), [], stop_ids=(), batch_size=4) == []


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Gemma2"])
def test_a_row_reads_no_more_slots_than_its_span_has(name, monkeypatch):
    """Prompts of 12, 2 and 1 tokens get a second token: 13, 3 and 2 slots."""
    model, seen = model_of(name), []
    assert ragged(model.base_model)
    sdpa = attention.sdpa_attention_forward

    def watched(module, query, key, *rest, **how):
        seen.append(tuple(key.shape[::2]))
        return sdpa(module, query, key, *rest, **how)

    monkeypatch.setattr(attention, "sdpa_attention_forward", watched)
    for slack, expected in ((0, [(1, 13), (1, 3), (1, 2)]), (1, [(1, 13), (2, 3)]), (99, [(3, 13)])):
        seen.clear()
        monkeypatch.setattr(attention, "_SLACK", slack)
        decode(model, [PROMPTS[i] for i in (5, 2, 0)], Sampling(), [0] * 3, stop_ids=(), batch_size=3, limits=[2] * 3)
        # Gemma 2 attends eagerly, which nothing stands in for.
        assert seen == ([] if name == "Gemma2" else expected * 2)
        assert model.config._attn_implementation == ("eager" if name == "Gemma2" else "sdpa")


def test_prompts_of_similar_length_are_read_together(monkeypatch):
    model, shapes = model_of("Llama"), []
    assert ragged(model.base_model)
    monkeypatch.setattr(cache, "_FILLING", 4)
    model.base_model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    decode(model, PROMPTS, Sampling(), SEEDS, stop_ids=(), batch_size=10, limits=[1] * 10)
    # Lengths 12, 9 | 7, 6, 5 | 4, 3, 2 | 2, 1: with 3, 3, 3 and 1 tokens of padding.
    assert shapes == [(2, 12), (3, 7), (3, 4), (2, 2)]


@pytest.mark.parametrize("failing", [False, True])
def test_a_model_attends_as_before_once_it_has_decoded(failing):
    model = model_of("Llama")
    try:
        with attention.reads_spans(model.config):
            assert model.config._attn_implementation != "sdpa"
            if failing:
                raise RuntimeError
    except RuntimeError:
        pass
    assert model.config._attn_implementation == "sdpa"


def test_steps_that_overlap_leave_a_model_as_it_was():
    config = model_of("Llama").config
    first, second = attention.reads_spans(config), attention.reads_spans(config)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert config._attn_implementation == "sdpa"


def test_spans_by_hand():
    assert spans([], 9) == []
    assert spans([5], 0) == [(0, 1, 5)]
    assert spans([5, 5, 4], 0) == [(0, 2, 5), (2, 3, 4)]
    assert spans([5, 5, 4], 1) == [(0, 3, 5)]
    # The longest may come last: then those before it are what is filled up.
    assert spans([1, 1, 4, 9], 6) == [(0, 3, 4), (3, 4, 9)]
    assert spans([1, 1, 4, 9], 5) == [(0, 2, 1), (2, 4, 9)]
