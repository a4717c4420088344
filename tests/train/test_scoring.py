from __future__ import annotations

import math

import pytest
import torch
from test_objective import Teacher

from kdkit.testing.tiny import tiny_model
from kdkit.train.scoring import score_examples, token_kl


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_scores_equal_one_row_at_a_time(rows, batch_size):
    model, teacher = tiny_model().double(), tiny_model(seed=1).double()
    got = score_examples(model, rows, batch_size=batch_size, signals=Teacher(teacher))
    for row, score in zip(rows, got, strict=True):
        ids, keep = torch.tensor([row.ids]), torch.tensor(row.learned)[1:]
        with torch.no_grad():
            q, p = (torch.log_softmax(m(input_ids=ids).logits[0, :-1][keep], -1) for m in (model, teacher))
        labels = ids[0, 1:][keep]
        assert score.nll == pytest.approx(-float(q.gather(-1, labels[:, None]).sum()), rel=1e-10)
        assert score.teacher_kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-9)
        assert score.tokens == row.targets


def test_without_a_teacher_there_is_no_divergence(rows):
    assert score_examples(tiny_model(), rows, batch_size=8)[0].teacher_kl is None


def test_a_model_has_no_divergence_from_itself(rows):
    model = tiny_model()
    scores = score_examples(model, rows, batch_size=4, signals=Teacher(model))
    assert max(abs(s.teacher_kl) for s in scores) < 1e-5


def test_other_padded_vocabularies_share_their_prefix(rows):
    student, teacher = tiny_model(vocab=270), tiny_model(seed=1)
    got = score_examples(student, rows, batch_size=8, signals=Teacher(teacher), vocabulary=259)
    for row, score in zip(rows, got, strict=True):
        ids, keep = torch.tensor([row.ids]), torch.tensor(row.learned)[1:]
        with torch.no_grad():
            q, p = (torch.log_softmax(m(input_ids=ids).logits[0, :-1, :259][keep], -1) for m in (student, teacher))
        assert score.teacher_kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_divergences_per_token_add_up_to_those_per_example(rows, batch_size):
    student, teacher = tiny_model(vocab=270).double(), tiny_model(seed=1).double()
    options = {"batch_size": batch_size, "signals": Teacher(teacher), "vocabulary": 259}
    traces = token_kl(student, rows, **options)
    assert [len(trace) for trace in traces] == [row.targets for row in rows]
    sums = [score.teacher_kl for score in score_examples(student, rows, **options)]
    assert [math.fsum(trace) for trace in traces] == pytest.approx(sums, rel=1e-12)


def test_the_reverse_divergence_sums_over_the_model(rows):
    student, teacher = tiny_model().double(), tiny_model(seed=1).double()
    traces = token_kl(student, rows, batch_size=3, signals=Teacher(teacher), reverse=True)
    for row, trace in zip(rows, traces, strict=True):
        ids, keep = torch.tensor([row.ids]), torch.tensor(row.learned)[1:]
        with torch.no_grad():
            q, p = (torch.log_softmax(m(input_ids=ids).logits[0, :-1][keep], -1) for m in (student, teacher))
        assert trace == pytest.approx((q.exp() * (q - p)).sum(-1).tolist(), rel=1e-9)


class Nearly(Teacher):
    """Differs from its model by rounding."""

    def __call__(self, batch):
        from kdkit.api import Dense

        exact = Teacher.__call__(self, batch)

        class Blocks:
            def block(self, start, stop):
                logits = exact.block(start, stop).logits
                noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
                return Dense(logits.detach() + 1e-6 * noise)

        return Blocks()


def test_a_divergence_per_token_is_never_negative(rows):
    model = tiny_model()
    traces = token_kl(model, rows, batch_size=8, signals=Nearly(model))
    assert min(min(trace) for trace in traces if trace) >= 0.0


def test_a_teacher_that_gives_its_best_tokens_only_has_no_full_divergence(rows):
    from kdkit.api import ConformanceError, TopK

    class Best:
        def block(self, start, stop):
            n = stop - start
            return TopK(torch.zeros(n, 1, dtype=torch.long), torch.full((n, 1), -1.0))

    for measure in (score_examples, token_kl):
        with pytest.raises(ConformanceError, match="needs the teacher's logits, which gave TopK"):
            measure(tiny_model(), rows, batch_size=8, signals=lambda batch: Best())
