"""Rollouts of GRPO against a plain computation: one row at a time, whole logits, loops, float64."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch
from conftest_train import FakeContext
from test_loop import flat, params, record

from kdkit.api import Example, RewardScore, Sampling
from kdkit.api.errors import DataError, EnvironmentUnmet
from kdkit.plugins.losses.grpo import GRPO
from kdkit.testing.tiny import tiny_model, tiny_tokenizer
from kdkit.train.batching import DataOrder
from kdkit.train.loop import Task, train
from kdkit.train.objective import LossTerm
from kdkit.train.optim import adamw
from kdkit.train.policy.grpo import GroupRollouts
from kdkit.train.policy.records import read_records, write_records
from kdkit.train.policy.rollouts import Prompt
from kdkit.train.policy.scoring import Scorer
from kdkit.train.rewards import RewardSet, RewardTerm
from kdkit.train.rollout import decode
from kdkit.train.streams import Stream

END, LONGEST, GROUPS, SIZE = 258, 9, 4, 4
STOPS = (*range(60), END)
"""Enough ids that random models end completions."""
PROMPTS = [[65], [66, 67, 68], [END, 70], [71, 72, 73, 74, 75, 76], [77], [78, END, 79]]
PLAIN = Sampling(do_sample=True, max_new_tokens=LONGEST)
CUT = Sampling(do_sample=True, temperature=1.6, top_k=70, top_p=0.9, max_new_tokens=LONGEST)


def high_ids(rollouts):
    """A toy reward: the share of ids over 128, and nothing but trouble for some completions."""
    return [RewardScore.of(sum(i > 128 for i in r.token_ids) / LONGEST) for r in rollouts]


def short(rollouts):
    return [RewardScore.of(-len(r.token_ids) / 10) for r in rollouts]


TERMS = (RewardTerm(name="high", reward=high_ids, weight=1.0), RewardTerm(name="short", reward=short, weight=0.5))


def rollouts(
    sampling=PLAIN, *, terms=TERMS, tries=0, scale="group", masked=False, reference=False, dtype=torch.float64,
    batch_size=3, padding_free=True, prompts=PROMPTS, model=None, steps=2,
):  # fmt: skip
    model = model or tiny_model().to(dtype)
    frozen = tiny_model(seed=5).to(dtype) if reference else None
    scorer = Scorer(
        model, None, "", sampling.temperature, 259, dtype, batch_size=batch_size, padding_free=padding_free,
        reference=frozen,
    )  # fmt: skip

    def answers(asked, seeds, limits):
        return decode(
            model, asked, sampling, seeds, stop_ids=STOPS, batch_size=5, limits=limits, logprobs=True, support=True
        )

    data = [
        Prompt(f"row-{i}", tuple(ids), LONGEST - i % 3, Example(id=f"row-{i}", prompt="?"), f"text {i}")
        for i, ids in enumerate(prompts)
    ]
    lines, kept = [], []
    order, spare = DataOrder([len(data)], [1.0], 3), DataOrder([len(data)], [1.0], 4)
    made = GroupRollouts(
        model, tiny_tokenizer(), [data], order, spare, GROUPS, SIZE, 5, answers, STOPS, scorer, RewardSet(terms),
        scale, masked, tries, lambda iteration: iteration * steps, kept.extend, lines.append,
    )  # fmt: skip
    return made, kept, lines


def places(row):
    return [t for t, learned in enumerate(row.learned) if learned]


def log_q(logits, row, number, place, sampling):
    allowed = list(range(259)) if row.support is None else list(row.support[number])
    return (logits[place - 1, allowed].double() / sampling.temperature).log_softmax(-1), allowed.index(row.ids[place])


def taken(model, row, sampling):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids])).logits[0]
    found = [log_q(logits, row, n, t, sampling) for n, t in enumerate(places(row))]
    return [float(q[at]) for q, at in found], [float(-(q.exp() * q).sum()) for q, _ in found]


def by_hand(rows, scale):
    """Totals and advantages, group by group."""
    answers = [[row.ids[t] for t in places(row)] for row in rows]
    texts = [answer[:-1] if answer[-1] in STOPS else answer for answer in answers]
    totals = [sum(i > 128 for i in ids) / LONGEST - 0.05 * len(ids) for ids in texts]
    values = []
    for start in range(0, len(rows), SIZE):
        group = totals[start : start + SIZE]
        over = {"group": group, "batch": totals}.get(scale)
        divisor = statistics.stdev(over) + 1e-4 if over else 1.0
        values += [(value - sum(group) / SIZE) / divisor for value in group]
    return totals, values


@pytest.mark.parametrize("sampling", [PLAIN, CUT], ids=["plain", "cut"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_every_number_of_a_rollout_is_that_of_a_plain_computation(sampling, scale):
    made, kept, _ = rollouts(sampling, scale=scale, reference=True)
    rows = made.make(0)
    facts = made.facts()
    totals, advantages = by_hand(rows, scale)
    model, reference = tiny_model().double(), tiny_model(seed=5).double()
    entropies = []
    for place, (row, advantage) in enumerate(zip(rows, advantages, strict=True)):
        index, answer = int(row.id[4:]), [row.ids[t] for t in places(row)]
        assert list(row.ids[: len(PROMPTS[index])]) == PROMPTS[index]
        assert not set(answer[:-1]) & set(STOPS)
        assert answer[-1] in STOPS or len(answer) == LONGEST - index % 3
        assert row.group == place // SIZE
        old, entropy = taken(model, row, sampling)
        entropies += entropy
        assert row.old_logprobs == pytest.approx(old, abs=1e-10)
        assert row.ref_logprobs == pytest.approx(taken(reference, row, sampling)[0], abs=1e-10)
        assert row.teacher_logprobs is None
        assert row.advantages == pytest.approx([advantage] * len(answer), abs=1e-10)
        assert row.counts
        assert (row.support is None) == (sampling is PLAIN)
    assert [len({row.id for row in rows[i : i + SIZE]}) for i in range(0, 16, SIZE)] == [1] * GROUPS
    assert facts["entropy"] == pytest.approx(statistics.fmean(entropies))
    assert facts["reward/total/mean"] == pytest.approx(statistics.fmean(totals))
    assert facts["reward/total/std"] == pytest.approx(statistics.pstdev(totals))
    assert facts["answer_tokens"] == sum(row.targets for row in rows) / 16
    ended = sum(row.ids[-1] in STOPS for row in rows)
    assert 0 < ended < 16
    assert facts["truncated_share"] == 1 - ended / 16
    assert facts["mismatch_max"] < 1e-9
    assert (facts["masked_share"], facts["replaced_groups"], facts["zero_variance_groups"]) == (0, 0, 0)
    assert made.facts() == {}
    assert [item.total for item in kept] == pytest.approx(totals)


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

    def restore(self, state, step, share):
        pass


def step(root, rows, sampling, loss, monkeypatch, *, size, accumulation, padding_free=True):
    model = tiny_model(seed=2).double()
    seen, ctx = record(monkeypatch), FakeContext(root)
    stream = Stream([LossTerm("grpo", 0.7, loss, kind="policy")], Given(rows), temperature=sampling.temperature)
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    options |= {"max_steps": 1, "max_grad_norm": 1e9, "padding_free": padding_free}
    train(Task(model.train(), [stream]), params(**options), ctx, compute=torch.float64)
    return flat(seen[0]["grads"]), {name: value for _, logged in ctx.values for name, value in logged.items()}


def naive(rows, sampling, loss_type):
    """Value and gradient from the whole logits of one row at a time; the student is not the one that sampled."""
    model = tiny_model(seed=2).double()
    counted = [row for row in rows if row.counts]
    tokens, total = sum(row.targets for row in counted), torch.zeros((), dtype=torch.float64)
    divisors = {"dapo": lambda row: tokens, "grpo": lambda row: row.targets * len(counted),
                "dr_grpo": lambda row: 12 * len(counted)}  # fmt: skip
    for row in counted:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0]
        for number, place in enumerate(places(row)):
            q, at = log_q(logits, row, number, place, sampling)
            ratio, a = (q[at] - row.old_logprobs[number]).exp(), row.advantages[number]
            value = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)
            gap = row.ref_logprobs[number] - q[at]
            total = total + 0.7 * (value + 0.1 * (gap.exp() - 1 - gap)) / divisors[loss_type](row)
    total.backward()
    groups = adamw(model, params()).param_groups
    return float(total.detach()), flat([p.grad for group in groups for p in group["params"]])


@pytest.mark.parametrize(
    ("sampling", "loss_type"), [(PLAIN, "dapo"), (CUT, "dapo"), (PLAIN, "grpo"), (PLAIN, "dr_grpo")]
)
def test_a_step_has_the_gradient_of_the_formula_however_it_is_cut(tmp_path, monkeypatch, sampling, loss_type):
    made, _, _ = rollouts(sampling, reference=True, masked=True)
    rows = made.make(0)
    assert 0 < sum(not row.counts for row in rows) < 16
    constant = 12 if loss_type == "dr_grpo" else None
    loss = GRPO(loss_type=loss_type, epsilon_high=0.28, beta=0.1, constant_length=constant)
    value, wanted = naive(rows, sampling, loss_type)
    for size, accumulation, padding_free in ((16, 1, True), (4, 4, True), (1, 16, False)):
        got, logged = step(tmp_path / f"{size}", rows, sampling, loss, monkeypatch, size=size,
                           accumulation=accumulation, padding_free=padding_free)  # fmt: skip
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
        assert logged["train/loss"] == pytest.approx(value, rel=1e-5)
        assert logged["train/learned_tokens"] == sum(row.targets for row in rows if row.counts)
        assert 0 < logged["train/grpo/clip_low"] + logged["train/grpo/clip_high"] < 1


def test_masked_truncated_completions_stay_in_the_baseline():
    (masked, _, _), (plain, _, _) = rollouts(masked=True), rollouts()
    rows, others = masked.make(0), plain.make(0)
    assert [row.advantages for row in rows] == [row.advantages for row in others]
    assert [row.counts for row in rows] == [row.ids[-1] in STOPS for row in rows]
    assert masked.facts()["masked_share"] == plain.facts()["truncated_share"]


def test_iterations_differ_and_repeat_whatever_was_drawn_before():
    made, _, _ = rollouts()
    first, second = made.make(0), made.make(1)
    torch.rand(7)
    assert rollouts()[0].make(1) == second
    assert [row.ids for row in first] != [row.ids for row in second]
    state = torch.get_rng_state()
    made.model.train()
    assert made.make(0) == first
    assert made.model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert len({row.ids for row in first}) > 12, "completions of a prompt are drawn apart"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_padding_packing_and_neighbours_change_nothing(dtype, tolerance):
    wanted = rollouts(dtype=dtype, reference=True)[0].make(0)
    for size, padding_free in ((1, True), (16, True), (3, False)):
        how = {"dtype": dtype, "reference": True, "batch_size": size, "padding_free": padding_free}
        got = rollouts(**how)[0].make(0)
        assert [row.ids for row in got] == [row.ids for row in wanted]
        for a, b in zip(got, wanted, strict=True):
            assert a.old_logprobs == pytest.approx(b.old_logprobs, abs=tolerance)
            assert a.ref_logprobs == pytest.approx(b.ref_logprobs, abs=tolerance)


# --- rewards ----------------------------------------------------------------------------------------------------------


def test_what_could_not_be_judged_is_masked_and_leaves_the_baseline():
    calls = []

    def troubled(given):
        calls.append(len(given))
        scores = high_ids(given)
        scores[1], scores[6] = RewardScore.infra_error("the judge fell over"), RewardScore.unscorable("no tests")
        return scores

    made, kept, _ = rollouts(terms=[RewardTerm(name="troubled", reward=troubled)])
    rows, facts = made.make(0), made.facts()
    assert calls == [16], "all completions of a prompt are judged together"
    assert [place for place, row in enumerate(rows) if not row.counts] == [1, 6]
    assert set(rows[1].advantages) == set(rows[6].advantages) == {0.0}
    left = [kept[i].total for i in (0, 2, 3)]
    wanted = [(value - sum(left) / 3) / (statistics.stdev(left) + 1e-4) for value in left]
    assert [rows[i].advantages[0] for i in (0, 2, 3)] == pytest.approx(wanted, abs=1e-10)
    assert facts["reward/troubled/infra-error"] == facts["reward/troubled/unscorable"] == 1 / 16
    assert facts["masked_share"] == 2 / 16
    assert (kept[1].status, kept[1].total, kept[1].notes) == ("infra-error", None, {"troubled": "the judge fell over"})
    assert kept[6].reason == "troubled: no tests"


def test_a_reward_joins_at_its_step():
    late = RewardTerm(name="late", reward=short, from_step=3)
    made, kept, _ = rollouts(terms=[TERMS[0], late], steps=3)
    made.make(0)
    assert set(kept[0].rewards) == {"high"}
    made.make(1)
    facts = made.facts()
    assert [(item.step, set(item.rewards)) for item in (kept[0], kept[-1])] == [(0, {"high"}), (3, {"high", "late"})]
    assert facts["reward/late/mean"] == statistics.fmean(item.rewards["late"] for item in kept[16:])


def test_a_share_counts_iterations_without_any():
    troubled = iter([RewardScore.infra_error("gone"), *[RewardScore.of(0.1)] * 99])

    def once(given):
        return [next(troubled)] + [RewardScore.of(i / 16) for i in range(1, len(given))]

    made, _, _ = rollouts(terms=[RewardTerm(name="once", reward=once)])
    made.make(0)
    made.make(1)
    assert made.facts()["reward/once/infra-error"] == 1 / 32


def flat_rows(given):
    """Completions of half of the prompts are all alike."""
    return [RewardScore.of(sum(r.token_ids) % 7 if int(r.example.id[4:]) % 2 else 1.0) for r in given]


def test_groups_that_are_all_alike_are_counted_and_teach_nothing():
    made, _, lines = rollouts(terms=[RewardTerm(name="flat", reward=flat_rows)])
    rows = made.make(0)
    share = sum(int(row.id[4:]) % 2 == 0 for row in rows) / 16
    assert 0 < share < 1
    assert made.facts()["zero_variance_groups"] == share
    assert f"{share:.0%} of the groups all alike" in lines[0]
    for row in rows:
        assert int(row.id[4:]) % 2 or not any(row.advantages)
        assert row.counts


def test_dynamic_sampling_replaces_them_by_other_prompts_as_often_as_it_may():
    asked = []

    def counted(given):
        asked.append(len(given))
        return flat_rows(given)

    terms = [RewardTerm(name="flat", reward=counted)]
    plain, _, _ = rollouts(terms=terms)
    before = plain.make(0)
    flat_groups = {row.group for row in before if int(row.id[4:]) % 2 == 0}
    asked.clear()
    made, kept, _ = rollouts(terms=terms, tries=8)
    rows, facts = made.make(0), made.facts()
    assert asked[0] == 16
    assert asked[1] == 4 * len(flat_groups)
    assert len(asked) <= 9
    assert asked[1:] == sorted(asked[1:], reverse=True)
    assert {row.group for row in rows if int(row.id[4:]) % 2 == 0} == set()
    assert facts["replaced_groups"] == len(flat_groups) / 4
    assert facts["zero_variance_groups"] == 0
    # Groups that teach stay as they were, and so do the places of the others.
    for row, other in zip(rows, before, strict=True):
        assert row.group == other.group
        assert row.group in flat_groups or row == other
    assert len(kept) == sum(asked)
    assert sum(item.counts for item in kept) == 16
    for item in kept:
        assert (item.advantage is None) == (not item.counts)
        assert not item.counts or int(item.id[4:]) % 2 == 1
    assert rollouts(terms=terms, tries=8)[0].make(0) == rows


def test_dynamic_sampling_replaces_groups_that_are_masked_as_a_whole():
    """They differ in reward, and still teach nothing: all of them were cut off."""

    def cut_short(**given):
        made, kept, _ = rollouts(masked=True, **given)
        made.prompts = [[replace(prompt, limit=2) for prompt in made.prompts[0]]]
        return made, kept, made.make(0)

    whole = {row.group for row in cut_short()[2] if row.counts}
    assert 0 < len(whole) < GROUPS
    made, kept, rows = cut_short(tries=12)
    assert {row.group for row in rows if row.counts} == set(range(GROUPS))
    assert made.facts()["replaced_groups"] == 1 - len(whole) / GROUPS
    assert {item.attempt for item in kept} > {0}


def test_where_nothing_teaches_the_tries_end():
    calls = []

    def same(given):
        calls.append(len(given))
        return [RewardScore.of(1.0)] * len(given)

    made, kept, _ = rollouts(terms=[RewardTerm(name="same", reward=same)], tries=3)
    rows, facts = made.make(0), made.facts()
    assert calls == [16] * 4
    assert {value for row in rows for value in row.advantages} == {0.0}
    assert (facts["zero_variance_groups"], facts["replaced_groups"]) == (1, 0)
    assert [item.attempt for item in kept if item.counts] == [0] * 16


# --- what a person can read -------------------------------------------------------------------------------------------


def test_records_come_back_from_parquet_as_they_were(tmp_path):
    made, kept, _ = rollouts(masked=True)
    rows = made.make(0)
    kept[0] = replace(kept[0], id="\ud800 half", reason="because")
    file = write_records(tmp_path / "rollouts", kept)
    assert file.name == "iteration-000001.parquet"
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    back = list(read_records(tmp_path / "rollouts"))
    assert back[0].id == "? half"
    assert back[1:] == kept[1:]
    for item, row in zip(back[1:], rows[1:], strict=True):
        assert (item.group, item.sample) == (row.group, back.index(item) % SIZE)
        assert item.tokens == row.targets
        assert item.truncated == (row.ids[-1] not in STOPS)
        assert item.counts == row.counts == (not item.truncated)
        assert item.advantage == row.advantages[0]
        assert item.prompt == f"text {row.id[4:]}"
        ids = [row.ids[t] for t in places(row)]
        assert item.text == tiny_tokenizer().decode([i for i in ids if i not in STOPS], skip_special_tokens=True)
        assert item.total == pytest.approx(item.rewards["high"] + 0.5 * item.rewards["short"])
    first = file.read_bytes()
    write_records(tmp_path / "rollouts", kept)
    assert file.read_bytes() == first


def test_files_that_are_no_rollouts(tmp_path):
    (tmp_path / "iteration-000001.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="cannot be read as rollouts"):
        list(read_records(tmp_path))
    (tmp_path / "file").write_text("")
    _, kept, _ = rollouts()
    made, kept, _ = rollouts()
    made.make(0)
    with pytest.raises(EnvironmentUnmet, match="rollouts cannot be written"):
        write_records(tmp_path / "file", kept)


def test_rewards_see_the_text_and_what_belongs_to_the_prompt():
    seen = []

    def look(given):
        seen.extend(given)
        return high_ids(given)

    made, _, _ = rollouts(terms=[RewardTerm(name="look", reward=look)])
    rows = made.make(0)
    for rollout, row in zip(seen, rows, strict=True):
        answer = [row.ids[t] for t in places(row)]
        assert rollout.truncated == (answer[-1] not in STOPS)
        assert list(rollout.token_ids) == (answer if rollout.truncated else answer[:-1])
        assert rollout.example.id == row.id
        assert rollout.prompt == f"text {row.id[4:]}"
    assert all(math.isfinite(value) for row in rows for value in row.advantages)
