"""Numbers that follow from a seed and the name of what they are for, never from what was drawn before."""

from __future__ import annotations

import hashlib

__all__ = ["stream_number", "stream_seed"]


def stream_number(seed: int, *parts: object) -> int:
    """63 bits that follow from ``seed`` and ``parts``."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream_seed(seed: int, step: int, prompt: int | str, sample: int) -> int:
    """Seed of the random stream of one answer, 63 bits: a resumed or differently split run draws the same answer.

    Args:
        seed: Of the stage.
        step: Index of the optimiser step, from 0.
        prompt: Which prompt: its place in the step, or its id.
        sample: Which of the answers to this prompt.
    """
    return stream_number(seed, "rollout", step, prompt, sample)
