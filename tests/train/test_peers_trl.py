"""The same losses as TRL's distillation trainers on the same batch; where TRL differs, a test says how."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest_train import make_rows

from kdkit.api import Dense, Example, Message, TokenLossInputs
from kdkit.models.chat import ChatEncoder
from kdkit.models.heads import split
from kdkit.plugins.losses.token import JSD, ForwardKL, ReverseKL
from kdkit.testing.tiny import tiny_model, tiny_tokenizer
from kdkit.train.batching import collate
from kdkit.train.objective import CausalObjective, LossTerm, valid_hidden
from kdkit.train.packing import pack

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of TRL: that parts of it are experimental
    reason = "TRL is not installed: pip install -e '.[peers]'"
    gkd = pytest.importorskip("trl.experimental.gkd", reason=reason)
    from trl.experimental.utils import DataCollatorForChatML
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

CLOSE = 2e-5
"""Relative, in float32: both add up the same numbers in another order."""
SAME = [
    pytest.param(ForwardKL(), 0.0, id="forward-kl"),
    pytest.param(ReverseKL(), 1.0, id="reverse-kl"),
    pytest.param(JSD(0.1), 0.1, id="jsd-0.1"),
    pytest.param(JSD(0.5), 0.5, id="jsd-0.5"),
    pytest.param(JSD(0.9), 0.9, id="jsd-0.9"),
]


@pytest.fixture
def student():
    return tiny_model(seed=1)


@pytest.fixture(scope="module")
def teacher():
    return tiny_model(layers=3, seed=2)


def answered(count=6):
    """Rows of unequal length, each a prompt and its answer."""
    return make_rows(count, seed=3)


def of_kdkit(student, teacher, rows, loss, *, vocabulary=None):
    """Value and gradients from the engine: packed rows, valid tokens, blocks."""
    student.zero_grad()
    batch, parts = pack(rows), split(teacher)
    with torch.no_grad():
        hidden = valid_hidden(parts.trunk, batch)
    signals = SimpleNamespace(block=lambda start, stop: Dense(parts.project(hidden[start:stop]).detach()))
    objective = CausalObjective(student, [LossTerm("loss", 1.0, loss, vocabulary)], block=7)
    value = objective(batch, signals, 1 / sum(row.targets for row in rows)).loss
    value.backward()
    return value.item(), gradients(student)


def of_gkd(student, teacher, rows, beta, *, temperature=1.0, num_items=None):
    """Value and gradients from GKDTrainer's own collator and compute_loss."""
    student.zero_grad()
    trainer = SimpleNamespace(
        teacher_model=teacher,
        beta=beta,
        temperature=temperature,
        generalized_jsd_loss=gkd.GKDTrainer.generalized_jsd_loss,
    )
    value = gkd.GKDTrainer.compute_loss(trainer, student, collated(rows), num_items_in_batch=num_items)
    value.backward()
    return value.item(), gradients(student)


def collated(rows):
    examples = [
        {"prompt": "", "input_ids": list(row.ids), "completion_mask": [int(v) for v in row.learned]} for row in rows
    ]
    return DataCollatorForChatML(tokenizer=tiny_tokenizer(), max_length=64)(examples)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


def assert_same(got, want, *, rtol=CLOSE):
    assert got[0] == pytest.approx(want[0], rel=rtol)
    assert float((got[1] - want[1]).norm()) < rtol * float(want[1].norm())


def block(rows=5, vocabulary=11, dtype=torch.float32):
    """A student's and a teacher's logits for a block, and labels."""
    source = torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(rows, vocabulary, generator=source).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher, torch.arange(rows)


def compared(loss, student, teacher, labels):
    return loss(TokenLossInputs(student, Dense(teacher), labels))


# --- the same ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "beta"), SAME)
def test_gkd_trainer_has_the_same_loss_and_gradient(student, teacher, loss, beta):
    rows = answered()
    assert len({len(row.ids) for row in rows}) > 2
    assert_same(of_kdkit(student, teacher, rows, loss), of_gkd(student, teacher, rows, beta))


@pytest.mark.parametrize(("loss", "beta"), SAME)
def test_distillation_trainer_has_the_same_loss_and_gradient(student, teacher, loss, beta):
    rows = answered()
    ours = of_kdkit(student, teacher, rows, loss)
    student.zero_grad()
    batch = collate(rows)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        taught = teacher.base_model(**inputs).last_hidden_state[:, :-1]
    value, _, count = _chunked_divergence_loss(
        student.base_model(**inputs).last_hidden_state[:, :-1],
        taught,
        student.lm_head.weight,
        teacher.lm_head.weight,
        batch.labels_mask[:, 1:],
        beta,
    )
    value.backward()
    assert int(count) == sum(row.targets for row in rows)
    assert_same(ours, (value.item(), gradients(student)))


@pytest.mark.parametrize(("loss", "beta"), SAME)
def test_generalized_jsd_loss_has_the_same_gradient_of_the_logits(loss, beta):
    student, teacher, labels = block()
    value = compared(loss, student, teacher, labels).mean()
    (ours,) = torch.autograd.grad(value, student)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student[None], teacher[None], labels[None], beta=beta)
    assert_same((value.item(), ours), (theirs.item(), torch.autograd.grad(theirs, student)[0]))


def test_num_items_in_batch_makes_micro_batches_add_up_to_the_same_step(student, teacher):
    rows = answered()
    count = sum(row.targets for row in rows)
    parts = [of_gkd(student, teacher, part, 0.0, num_items=count) for part in (rows[:2], rows[2:])]
    summed = sum(value for value, _ in parts), sum(gradient for _, gradient in parts)
    assert_same(of_kdkit(student, teacher, rows, ForwardKL()), summed)


# --- what TRL means by something else ---------------------------------------------------------------------------------


def test_without_num_items_trl_averages_over_the_micro_batch(student, teacher):
    """Its "batchmean" divides by the valid tokens of the micro-batch: the mean of those weighs tokens unequally."""
    rows = sorted(answered(), key=lambda row: row.targets)
    whole, _ = of_kdkit(student, teacher, rows, ForwardKL())
    parts = [of_kdkit(student, teacher, part, ForwardKL())[0] for part in (rows[:3], rows[3:])]
    means = [of_gkd(student, teacher, part, 0.0)[0] for part in (rows[:3], rows[3:])]
    assert means == pytest.approx(parts, rel=CLOSE)
    assert sum(means) / 2 != pytest.approx(whole, rel=1e-3)


def test_trl_leaves_out_the_square_of_the_temperature():
    """T^2 keeps the gradient's scale when T changes (Hinton et al. 2015); TRL's loss and gradient shrink with it."""
    student, teacher, labels = block()
    value = compared(JSD(0.3, temperature=2.0), student, teacher, labels).mean()
    (ours,) = torch.autograd.grad(value, student)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student[None], teacher[None], labels[None], beta=0.3, temperature=2.0)
    (gradient,) = torch.autograd.grad(theirs, student)
    assert_same((value.item(), ours), (4 * theirs.item(), 4 * gradient))


def test_the_temperature_of_gkd_is_of_sampling_alone(student, teacher):
    """GKDConfig's 0.9 never reaches the loss, which is at 1."""
    rows = answered()
    theirs = of_gkd(student, teacher, rows, 0.0, temperature=0.5)
    assert_same(of_kdkit(student, teacher, rows, ForwardKL()), theirs)
    assert theirs[0] != pytest.approx(of_kdkit(student, teacher, rows, ForwardKL(0.5))[0], rel=1e-2)


def test_trl_has_no_jsd_of_the_same_scale_at_every_beta():
    """Towards beta 0 its value falls to nothing and then jumps to the forward KL; ``normalized`` divides that out."""
    student, teacher, labels = block()
    near = gkd.GKDTrainer.generalized_jsd_loss(student[None], teacher[None], labels[None], beta=0.01).item()
    at = gkd.GKDTrainer.generalized_jsd_loss(student[None], teacher[None], labels[None], beta=0.0).item()
    normalized = compared(JSD(0.01, normalized=True), student, teacher, labels).mean().item()
    assert near < 0.02 * at
    assert normalized == pytest.approx(near / (0.01 * 0.99), rel=1e-4)
    assert normalized == pytest.approx(at, rel=0.05)


def test_trl_computes_in_the_precision_of_the_logits():
    """bfloat16 logits give a bfloat16 divergence there; here it is float32, and right to its digits."""
    student, teacher, labels = block(64, 500, torch.bfloat16)
    exact = compared(ForwardKL(), student.detach().double(), teacher.double(), labels).mean().item()
    ours = compared(ForwardKL(), student, teacher, labels).mean().item()
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student[None], teacher[None], labels[None], beta=0.0)
    assert theirs.dtype == torch.bfloat16
    assert abs(ours - exact) < 1e-6 * exact
    assert abs(theirs.item() - exact) > 1e-4 * exact


def test_trl_learns_what_follows_the_end_token():
    """Its collator learns all after the prompt: also the newline of a template that closes a turn with one."""
    turns = ({"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."})
    example = Example(id="a", prompt=(Message("user", "Why?"),), completion="So.")
    tokenizer = tiny_tokenizer()
    row = ChatEncoder(tokenizer).training(example)
    labels = DataCollatorForChatML(tokenizer=tokenizer, max_length=64)([{"messages": list(turns)}])["labels"][0]
    learned = [token for token, target in zip(row.ids, row.learned, strict=True) if target]
    assert tokenizer.decode(learned) == "So.<|im_end|>"
    assert labels[labels != -100].tolist() == [*learned, *tokenizer("\n")["input_ids"]]


def test_trl_cannot_compare_a_padded_vocabulary(student):
    """Qwen2.5's heads are padded to 151,936 or 152,064 rows: TRL refuses such a pair, kdkit compares what both have."""
    wider, rows = tiny_model(seed=2, vocab=263), answered()
    with pytest.raises(RuntimeError, match="must match"):
        of_gkd(student, wider, rows, 0.0)
    narrow = tiny_model(seed=2, vocab=263)
    narrow.resize_token_embeddings(259, mean_resizing=False)
    shared = of_kdkit(student, wider, rows, ForwardKL(), vocabulary=259)
    assert_same(shared, of_gkd(student, narrow, rows, 0.0))
