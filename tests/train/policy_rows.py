"""Completions for tests, a policy loss, and what it comes to when it is computed the plain way."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, replace

import torch
from torch import nn

from kdkit.api import PolicyLossInputs, PolicyLossOutput
from kdkit.testing.tiny import tiny_model
from kdkit.train.policy.rows import KeptIds, PolicyRow

END = 258
"""The end token, which also is what rows are padded with."""


def make_completions(count: int = 8, *, seed: int = 0, support: bool = False, weighted: bool = True) -> list[PolicyRow]:
    """Completions of unequal length; every third one is truncated, and the end token also stands inside of texts."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        prompt, length = rng.randint(1, 5), rng.randint(1, 11)
        ids = [rng.choice([END, rng.randrange(259)]) for _ in range(prompt + length)]
        ids[-1] = 7 if index % 3 == 2 else END
        around = [tuple({i, *rng.sample(range(259), rng.randint(1, 30))}) for i in ids[prompt:]]
        rows.append(
            PolicyRow(
                # Completions of one prompt have its id.
                id=f"prompt-{index // 2}",
                ids=tuple(ids),
                learned=tuple(t >= prompt for t in range(len(ids))),
                old_logprobs=(0.0,) * length,
                advantages=tuple(rng.gauss(0, 1) for _ in range(length)),
                group=index // 2,
                ref_logprobs=tuple(rng.uniform(-7, -4) for _ in range(length)),
                importance_weights=tuple(rng.uniform(0.7, 1.2) for _ in range(length)),
                token_weights=tuple(rng.uniform(0, 2) for _ in range(length)) if weighted else None,
                support=KeptIds.of(around) if support else None,
            )
        )
    return [replace(row, old_logprobs=tuple(sampled(row, rng))) for row in rows]


def sampled(row: PolicyRow, rng: random.Random, model: nn.Module | None = None) -> list[float]:
    """What a policy near the model's says, so that some ratios are clipped and some are not."""
    model = tiny_model() if model is None else copy.deepcopy(model).eval()
    with torch.no_grad():
        logits = model.double()(input_ids=torch.tensor([row.ids])).logits[0]
    return [float(value) + rng.gauss(0, 0.2) for value, _ in plain_logprobs(logits, row, 0.8)]


def plain_logprobs(logits, row, temperature, vocabulary=None):
    """Log-probability and entropy at every token of a completion, one token at a time."""
    places = [t for t, learned in enumerate(row.learned) if learned]
    found = []
    for number, t in enumerate(places):
        allowed = list(range(logits.shape[-1]))[:vocabulary] if row.support is None else row.support[number].tolist()
        log_q = torch.log_softmax(logits[t - 1][allowed] / temperature, -1)
        found.append((log_q[allowed.index(row.ids[t])], -(log_q.exp() * log_q).sum()))
    return found


@dataclass
class Clip:
    """PPO's clipped objective with importance weights, a penalty for leaving the reference, an entropy bonus."""

    aggregation: str = "token-mean"
    constant_length: int | None = None
    wants_entropy: bool = False
    seen: list[PolicyLossInputs] | None = None

    def __call__(self, x: PolicyLossInputs) -> PolicyLossOutput:
        if self.seen is not None:
            self.seen.append(x)
        ratio = (x.logprobs - x.old_logprobs).exp() * x.importance_weights
        per_token = -torch.minimum(ratio * x.advantages, ratio.clamp(0.8, 1.2) * x.advantages)
        gap = x.ref_logprobs - x.logprobs
        per_token = per_token + 0.1 * (gap.exp() - 1 - gap)
        if x.entropy is not None:
            per_token = per_token - 0.3 * x.entropy
        outside = ((ratio < 0.8) | (ratio > 1.2)) & x.mask
        return PolicyLossOutput(
            per_token=per_token,
            aggregation=self.aggregation,
            constant_length=self.constant_length,
            metrics={"outside": outside.sum()},
        )


def plain(model, rows, loss: Clip, *, temperature=0.8, weights=(1.0, 0.0), vocabulary=None):
    """Value and gradient of ``weights[0]`` times the policy loss and ``weights[1]`` times the mean likelihood of the
    tokens: whole logits of one row at a time, loops, no padding, rows that count alone."""
    model.zero_grad()
    rows = [row for row in rows if row.counts]
    tokens = sum(row.targets for row in rows)
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0]
        places = [t for t, learned in enumerate(row.learned) if learned]
        values = []
        for number, (logprob, entropy) in enumerate(plain_logprobs(logits, row, temperature, vocabulary)):
            advantage, gap = row.advantages[number], row.ref_logprobs[number] - logprob
            ratio = torch.exp(logprob - row.old_logprobs[number]) * row.importance_weights[number]
            clipped = 0.8 if ratio < 0.8 else 1.2 if ratio > 1.2 else ratio
            value = -min(ratio * advantage, clipped * advantage) + 0.1 * (torch.exp(gap) - 1 - gap)
            values.append(value - 0.3 * entropy if loss.wants_entropy else value)
        divisor = {
            "token-mean": tokens,
            "sequence-mean": len(places) * len(rows),
            "constant-length": (loss.constant_length or 1) * len(rows),
        }
        total = total + weights[0] * sum(values) / divisor[loss.aggregation]
        for number, t in enumerate(places):
            factor = 1.0 if row.token_weights is None else row.token_weights[number]
            total = total - weights[1] * factor * torch.log_softmax(logits[t - 1], -1)[row.ids[t]] / tokens
    total.backward()
    return float(total.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}
