"""The rollout engine: batched decoding that refills finished rows, and log-probabilities of what was decoded.

Evaluation, local teachers, on-policy distillation and policy gradients all decode here. An answer is a function of its
prompt and its own seed: neither the other prompts nor the number of rows decoded together choose its tokens. That holds
in float32, but for near-ties of two logits; in bf16 the rounding depends on the shapes that are multiplied.
"""

from __future__ import annotations

from kdkit.train.rollout.decode import Decoded, completion, decode, generate, generate_ids, stop_ids
from kdkit.train.rollout.logprobs import Mismatch, TokenLogprobs, mismatch, token_logprobs
from kdkit.train.rollout.sampling import Mixture, cuts, warp
from kdkit.train.rollout.seeds import stream_number, stream_seed

__all__ = [
    "Decoded",
    "Mismatch",
    "Mixture",
    "TokenLogprobs",
    "completion",
    "cuts",
    "decode",
    "generate",
    "generate_ids",
    "mismatch",
    "stop_ids",
    "stream_number",
    "stream_seed",
    "token_logprobs",
    "warp",
]
