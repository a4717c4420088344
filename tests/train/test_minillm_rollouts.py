"""Rollouts of MiniLLM against a plain computation: one row at a time, whole logits, loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest_train import FakeContext
from test_loop import flat, params, record

from kdkit.api import Sampling, StageError
from kdkit.api.data import Dense, TopK
from kdkit.models.heads import split
from kdkit.plugins.losses.policy import MiniLLM
from kdkit.plugins.losses.token import ReverseKL
from kdkit.testing.tiny import tiny_model
from kdkit.train.batching import DataOrder
from kdkit.train.loop import Task, train
from kdkit.train.objective import LossTerm, valid_hidden
from kdkit.train.optim import adamw
from kdkit.train.packing import unpack
from kdkit.train.policy.returns import Estimator
from kdkit.train.policy.rollouts import MiniLLMRollouts, Prompt
from kdkit.train.policy.rows import PolicyRow
from kdkit.train.policy.scoring import Scorer
from kdkit.train.rollout import Mixture, decode
from kdkit.train.streams import Stream

END, WIDTH, LONGEST = 258, 250, 9
STOPS = (*range(40), END)
"""Enough ids that random models end answers; the last one stands within prompts, too, and pads rows."""
PROMPTS = [[5], [END, 7, END], [1, 2, 3, 4, 5, 6, 7, 8, 9], [30, END], [77], [8, 8, 8, 8], [END], [11, 12, 13]]
PLAIN, CUT = Sampling(do_sample=True, max_new_tokens=LONGEST), Sampling(
    do_sample=True, temperature=1.7, top_k=60, top_p=0.95, max_new_tokens=LONGEST
)  # fmt: skip


class Signals:
    """A teacher with a wider head, or with ``width`` entries of it; optionally only its top k."""

    def __init__(self, model, k=None, *, taken=True, width=None):
        self.model, self.k, self.taken, self.width = model, k, taken, width

    def __call__(self, batch):
        batch = unpack(batch)
        with torch.no_grad():
            logits = split(self.model).project(valid_hidden(split(self.model).trunk, batch))[:, : self.width]
        labels = batch.input_ids[:, 1:][batch.labels_mask[:, 1:]]
        return _Blocks(logits, labels, self.k, taken=self.taken)


class _Blocks:
    def __init__(self, logits, labels, k, *, taken):
        self.logits, self.labels, self.k, self.taken = logits, labels, k, taken

    def block(self, start, stop):
        logits, labels = self.logits[start:stop], self.labels[start:stop]
        if self.k is None:
            return Dense(logits)
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(self.k)
        taken = logprobs.gather(1, labels[:, None])[:, 0] if self.taken else None
        return TopK(top.indices, top.values, taken=taken)


def models(dtype=torch.float64):
    return tiny_model().to(dtype), tiny_model(seed=1, hidden=48, vocab=280).to(dtype)


def rollouts(sampling=PLAIN, *, dtype=torch.float64, alpha=0.2, signals=None, batch_size=3, padding_free=True, **how):
    model, teacher = models(dtype)
    estimator = Estimator(alpha=alpha, width=LONGEST, **how)
    scorer = Scorer(
        model, signals or Signals(teacher), "local", sampling.temperature, WIDTH, dtype, batch_size, padding_free
    )

    def answers(prompts, seeds, limits):
        return decode(
            model, prompts, sampling, seeds, stop_ids=STOPS, batch_size=4, limits=limits, vocabulary=WIDTH,
            mixture=Mixture(teacher, alpha) if alpha else None, logprobs=True, support=True,
        )  # fmt: skip

    prompts = [Prompt(f"row-{i}", tuple(ids), LONGEST - i % 3) for i, ids in enumerate(PROMPTS)]
    lines: list[str] = []
    order = DataOrder([len(prompts)], [1.0], 3)
    return MiniLLMRollouts(model, [prompts], order, 8, 5, answers, STOPS, scorer, estimator, lines.append)


def logprobs(model, row, sampling, place, number):
    """Of all ids at a token, as the tokens were sampled."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids])).logits[0, place - 1, :WIDTH].double() / sampling.temperature
    if row.support is not None:
        outside = torch.ones(WIDTH, dtype=torch.bool)
        outside[row.support[number].tolist()] = False
        logits[outside] = -torch.inf
    return logits.log_softmax(-1)


def places(row):
    return [t for t, learned in enumerate(row.learned) if learned]


def taken(model, row, sampling):
    return [float(logprobs(model, row, sampling, t, n)[row.ids[t]]) for n, t in enumerate(places(row))]


def by_hand(rows, model, teacher, sampling, *, alpha, gamma, later, per_decision, normalize, weighted):
    """Advantages before whitening, importance weights and factors of the single-step term, token by token."""
    every = []
    for row in rows:
        q, p = taken(model, row, sampling), taken(teacher, row, sampling)
        w = [math.exp(a) / ((1 - alpha) * math.exp(a) + alpha * math.exp(b)) for a, b in zip(q, p, strict=True)]
        own = []
        for t in range(len(q)):
            first, total = t + later, 0.0
            for k in range(first, len(q)):
                weight = math.prod(w[: k + 1]) if per_decision else 1.0
                total += gamma ** (k - first) * weight * (p[k] - q[k])
            own.append(total / max(len(q) - first, 1) if normalize else total)
        before = [math.prod(w[:t]) for t in range(len(q))]
        every.append((q, p, own, None if per_decision else w, before if per_decision else w if weighted else None))
    return every


@pytest.mark.parametrize("sampling", [PLAIN, CUT], ids=["plain", "cut"])
@pytest.mark.parametrize(
    ("how", "later", "weighted"),
    [
        ({}, 1, True),
        ({"parity": "code", "gamma": 0.7}, 0, False),
        ({"importance": "per-decision", "gamma": 1.0, "length_normalization": False}, 1, True),
        ({"single_step_decomposition": False}, 0, False),
    ],
)
def test_every_number_of_a_rollout_is_that_of_a_plain_computation(sampling, how, later, weighted):
    made = rollouts(sampling, whiten="none", **how)
    rows = made.make(0)
    model, teacher = models()
    wanted = by_hand(
        rows, model, teacher, sampling, alpha=0.2, gamma=how.get("gamma", 0.95), later=later, weighted=weighted,
        per_decision="importance" in how, normalize=how.get("length_normalization", True),
    )  # fmt: skip
    assert sorted(row.id for row in rows) == [f"row-{i}" for i in range(8)]
    ended = 0
    for row, (q, p, advantages, weights, factors) in zip(rows, wanted, strict=True):
        prompt = PROMPTS[int(row.id[4:])]
        answer = list(row.ids[len(prompt) :])
        assert list(row.ids[: len(prompt)]) == prompt
        assert places(row) == list(range(len(prompt), len(row.ids)))
        # The end token is learned, and nothing after it; a truncated answer has none.
        assert not set(answer[:-1]) & set(STOPS)
        ended += answer[-1] in STOPS
        assert answer[-1] in STOPS or len(answer) == LONGEST - int(row.id[4:]) % 3
        assert row.old_logprobs == pytest.approx(q, abs=1e-10)
        assert row.teacher_logprobs == pytest.approx(p, abs=1e-10)
        assert row.advantages == pytest.approx(advantages, abs=1e-10)
        assert row.importance_weights == (None if weights is None else pytest.approx(weights, abs=1e-10))
        assert row.token_weights == (None if factors is None else pytest.approx(factors, abs=1e-10))
        assert (row.support is None) == (sampling is PLAIN)
    assert 0 < ended < 8
    facts = made.facts()
    assert facts["truncated_share"] == 1 - ended / 8
    tokens = [(w, a, b) for q, p, _, _, _ in wanted for a, b in zip(q, p, strict=True)
              for w in [math.exp(a) / (0.8 * math.exp(a) + 0.2 * math.exp(b))]]  # fmt: skip
    assert facts["answer_tokens"] == len(tokens) / 8
    assert facts["reverse_kl_estimate"] == pytest.approx(sum(w * (a - b) for w, a, b in tokens) / len(tokens))
    assert facts["reward"] == pytest.approx(sum(b - a for _, a, b in tokens) / len(tokens))
    assert facts["mismatch_max"] < 1e-9
    ends = [row.advantages[-1] for row in rows if row.ids[-1] in STOPS]
    assert facts["end_advantage"] == pytest.approx(sum(ends) / len(ends), abs=1e-10)
    assert made.facts() == {}


def test_whitening_is_over_the_tokens_of_an_iteration():
    raw, white = (rollouts(whiten=mode).make(0) for mode in ("none", "valid"))
    values = torch.tensor([value for row in raw for value in row.advantages], dtype=torch.float64)
    wanted = (values - values.mean()) / math.sqrt(float(values.var(correction=0)) + 1e-8)
    assert [value for row in white for value in row.advantages] == pytest.approx(wanted.tolist(), abs=1e-9)


def test_iterations_differ_and_repeat_whatever_was_drawn_before():
    made = rollouts()
    first, second = made.make(0), made.make(1)
    torch.rand(7)
    assert rollouts().make(1) == second
    assert [row.ids for row in first] != [row.ids for row in second]
    state = torch.get_rng_state()
    made.model.train()
    assert made.make(0) == first
    assert made.model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("sampling", [PLAIN, CUT], ids=["plain", "cut"])
def test_padding_and_packing_and_neighbours_change_nothing(sampling, dtype, tolerance):
    wanted = rollouts(sampling, dtype=dtype, whiten="none").make(0)
    for size, padding_free in ((1, True), (8, True), (1, False), (3, False), (8, False)):
        got = rollouts(sampling, dtype=dtype, whiten="none", batch_size=size, padding_free=padding_free).make(0)
        for row, other in zip(got, wanted, strict=True):
            assert row.ids == other.ids
            for name in ("old_logprobs", "teacher_logprobs", "advantages", "importance_weights", "token_weights"):
                assert getattr(row, name) == pytest.approx(getattr(other, name), abs=tolerance)


# --- a teacher behind a server ----------------------------------------------------------------------------------------


def test_rewards_are_exact_when_a_server_tells_the_sampled_tokens():
    _, teacher = models()
    dense, server = (rollouts(alpha=0.0, signals=Signals(teacher, k, width=WIDTH)).make(0) for k in (None, 5))
    assert server == [replace(row, teacher_logprobs=other.teacher_logprobs, advantages=other.advantages)
                      for row, other in zip(dense, server, strict=True)]  # fmt: skip
    for row, other in zip(dense, server, strict=True):
        assert row.teacher_logprobs == pytest.approx(other.teacher_logprobs, abs=1e-12)


def test_a_server_that_does_not_tell_the_sampled_token_is_refused_by_name():
    with pytest.raises(StageError, match="the teacher 'local' does not give the log-probability of the sampled token"):
        rollouts(alpha=0.0, signals=Signals(models()[1], 5, taken=False)).make(0)
    with pytest.raises(StageError, match="the teacher 'local' gives log-probabilities of the whole vocabulary"):
        rollouts(CUT, alpha=0.0, signals=Signals(models()[1], 5)).make(0)


class RulesOut:
    """Gives everything but a few ids no probability."""

    def __init__(self, signals):
        self.signals = signals

    def __call__(self, batch):
        self.blocks = self.signals(batch)
        return self

    def block(self, start, stop):
        logits = self.blocks.block(start, stop).logits.clone()
        logits[:, 40:] = -torch.inf
        return Dense(logits)


def test_a_teacher_that_rules_a_token_out_is_refused_where_a_loss_reads_what_it_says():
    signals = RulesOut(Signals(models()[1]))
    made = rollouts(alpha=0.0, signals=signals, cliprange_reward=5.0)
    assert made.make(0), "cut to a bound, rewards are finite"
    made.reads_teacher = True
    with pytest.raises(StageError, match="the teacher rules out a token that was sampled"):
        made.make(0)


# --- a step -----------------------------------------------------------------------------------------------------------


class Given:
    """The same completions in every step."""

    def __init__(self, rows):
        self.given, self.size = rows, len(rows)

    def rows(self, step, share):
        return [self.given[place] for place in share.places]

    def metrics(self, all_ranks):
        return {}

    def state(self, step, share):
        return None


def step(root, rows, sampling, monkeypatch, *, size, accumulation, padding_free=True):
    terms = [
        LossTerm("minillm", 0.7, MiniLLM(cliprange=0.2), WIDTH, "policy"),
        LossTerm("single-step", 0.7, ReverseKL(), WIDTH, sampled=True),
    ]
    model, teacher = models()
    seen, ctx = record(monkeypatch), FakeContext(root)
    stream = Stream(terms, Given(rows), Signals(teacher), sampling.temperature)
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    options |= {"max_steps": 1, "max_grad_norm": 1e9, "padding_free": padding_free}
    train(Task(model.train(), [stream]), params(**options), ctx, compute=torch.float64)
    return flat(seen[0]["grads"]), {name: value for _, logged in ctx.values for name, value in logged.items()}


def naive(rows: list[PolicyRow], sampling):
    """Value and gradient of both terms, from the whole logits of one row at a time."""
    model, teacher = models()
    tokens, total = sum(row.targets for row in rows), torch.zeros((), dtype=torch.float64)
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0]
        for number, place in enumerate(places(row)):
            allowed = list(range(WIDTH)) if row.support is None else row.support[number].tolist()
            log_q = (logits[place - 1, allowed] / sampling.temperature).log_softmax(-1)
            log_p = logprobs(teacher, row, sampling, place, number)[allowed]
            ratio = (log_q[allowed.index(row.ids[place])] - row.old_logprobs[number]).exp()
            weighted, advantage = ratio * row.importance_weights[number], row.advantages[number]
            value = torch.maximum(-advantage * weighted, -advantage * weighted.clamp(0.8, 1.2))
            value = value + row.token_weights[number] * (log_q.exp() * (log_q - log_p)).sum()
            total = total + 0.7 * value / tokens
    total.backward()
    groups = adamw(model, params()).param_groups
    return float(total.detach()), flat([p.grad for group in groups for p in group["params"]])


@pytest.mark.parametrize("sampling", [PLAIN, CUT], ids=["plain", "cut"])
def test_a_step_has_the_gradient_of_the_formula_however_it_is_cut(tmp_path, monkeypatch, sampling):
    rows = rollouts(sampling).make(0)
    value, wanted = naive(rows, sampling)
    for size, accumulation, padding_free in ((8, 1, True), (2, 4, True), (1, 8, True), (8, 1, False), (3, 2, False)):
        given = rows if size * accumulation == 8 else rows[: size * accumulation]
        if len(given) < 8:
            value, wanted = naive(given, sampling)
        root = tmp_path / f"{size}-{padding_free}"
        got, logged = step(root, given, sampling, monkeypatch, size=size, accumulation=accumulation,
                           padding_free=padding_free)  # fmt: skip
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
        assert logged["train/loss"] == pytest.approx(value, rel=1e-5)
