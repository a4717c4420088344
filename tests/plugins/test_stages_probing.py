"""Load time and tokens a second of a model that takes a known time, on a clock that only the model moves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kdkit.api import Model
from kdkit.plugins.stages import probing, subjects

READING, WRITING = 0.5, 0.125
"""Seconds for a prompt, its first token included, and for every token after it."""


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0, perf_counter=lambda: now.seconds)
    for module in (probing, subjects):
        monkeypatch.setattr(module, "time", now)
    return now


@pytest.fixture
def measured(clock, monkeypatch):
    """What is measured of a model with so many positions; ``delays`` are added to the passes one after another."""

    def measure(*, positions=None, delays=(), reading=READING, writing=WRITING, prompt=(7, 8, 9)):
        asked, left = [], list(delays)

        def generate(_model, prompts, sampling, *_more, stop_ids, **_options):
            assert not stop_ids, "an end token would cut the measurement short"
            asked.append((list(prompts[0]), sampling.max_new_tokens))
            clock.seconds += reading + writing * (sampling.max_new_tokens - 1) + (left.pop(0) if left else 0.0)

        config = SimpleNamespace(max_position_embeddings=positions)
        model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config), device=torch.device("cpu"))
        monkeypatch.setattr(probing, "generate_ids", generate)
        monkeypatch.setattr(probing, "prompt_ids", lambda *_given: [list(prompt)])
        subject = SimpleNamespace(model=model, encoder=None, load_seconds=3.0)
        return probing.probe(subject, {"data": [None]}, None), asked

    return measure


def test_tokens_a_second_are_those_of_reading_and_of_writing(measured):
    speed, asked = measured()
    assert speed == {"load_seconds": 3.0, "prefill_tokens_per_s": 256 / READING, "decode_tokens_per_s": 1 / WRITING}
    assert [tokens for _, tokens in asked] == [1, 1, 17, 17]
    assert all(prompt == ([7, 8, 9] * 86)[:256] for prompt, _ in asked)


def test_the_fastest_of_two_passes_counts(measured):
    calm, _ = measured()
    for delays in ((4, 0, 4, 0), (0, 4, 0, 4)):
        assert measured(delays=delays)[0] == calm


@pytest.mark.parametrize(("positions", "length"), [(40, 23), (273, 256), (272, 255), (8, 1)])
def test_the_prompt_leaves_room_for_what_is_written(measured, positions, length):
    speed, asked = measured(positions=positions)
    assert {len(prompt) for prompt, _ in asked} == {length}
    assert speed["prefill_tokens_per_s"] == length / READING


def test_what_the_clock_did_not_see_is_not_measured(measured):
    assert set(measured(reading=0.0, writing=0.0)[0].values()) == {3.0, None}
    assert measured(writing=0.0)[0]["decode_tokens_per_s"] is None


def test_load_time_is_that_of_the_weights(clock, monkeypatch, tmp_path):
    """Not of the tokenizer, which all formats share, and not of the check after it."""

    def taking(seconds, result):
        def work(*_given, **_options):
            clock.seconds += seconds
            return result

        return work

    monkeypatch.setattr(subjects, "load_tokenizer", taking(16.0, None))
    monkeypatch.setattr(subjects, "load_model", taking(2.0, SimpleNamespace(to=taking(1.0, "model"))))
    monkeypatch.setattr(subjects, "verify_split", taking(32.0, None))
    monkeypatch.setattr(subjects, "ChatEncoder", taking(64.0, None))
    ctx = SimpleNamespace(precision=lambda _asked: "fp32", device="cpu")
    subject = subjects.load_subject("a", Model(path=tmp_path), SimpleNamespace(precision="auto"), ctx)
    assert subject.load_seconds == 3.0
