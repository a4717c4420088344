"""The formulas of `grpo` are those of TRL, called as they are. Runs where TRL is installed (extra: peers)."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections import defaultdict
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from kdkit.api import PolicyLossInputs
from kdkit.plugins.losses.grpo import GRPO
from kdkit.testing.conformance.completions import aggregate
from kdkit.train.policy.advantages import group_advantages

trl = pytest.importorskip("trl")

WIDTH = 12
LENGTHS = torch.tensor([5, 12, 1, 8, 3, 9, 12, 2])


@pytest.fixture(scope="module")
def trainer_module():
    with suppress(ImportError):
        from trl.trainer import grpo_trainer

        return grpo_trainer
    pytest.skip("this version of TRL has no GRPO trainer")


def values(seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(WIDTH) < LENGTHS[:, None]

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = -normal(8, WIDTH).abs()
    new, ref = old + 0.3 * normal(8, WIDTH), old + 0.2 * normal(8, WIDTH)
    return mask, old, new, ref, normal(8)


class Args(SimpleNamespace):
    """Whatever else this version of TRL asks about is off."""

    def __getattr__(self, name):
        return 1.0 if name in {"temperature", "steps_per_generation"} else None


def theirs(module, loss_type, new, **settings):
    """Loss of TRL's own method, whose log-probabilities are replaced."""
    mask, old, _, ref, advantages = values()
    numbers = SimpleNamespace(
        num_processes=1, gather=lambda t: t, reduce=lambda t, **_: t, device="cpu", sync_gradients=True
    )
    logged = {mode: defaultdict(list) for mode in ("train", "eval")}
    beta = settings.get("beta", 0.0)
    trainer = Args(
        loss_type=loss_type,
        importance_sampling_level=settings.get("level", "token"),
        epsilon_low=0.2,
        epsilon_high=settings.get("epsilon_high", 0.2),
        beta=beta,
        args=Args(delta=settings.get("delta"), use_bias_correction_kl=False),
        max_completion_length=16,
        top_entropy_quantile=1.0,
        current_gradient_accumulation_steps=1,
        accelerator=numbers,
        model=SimpleNamespace(training=True),
        _metrics=logged,
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
    )
    batch = {
        "prompt_ids": torch.zeros(8, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(8, 1, dtype=torch.int64),
        "completion_ids": torch.zeros(8, WIDTH, dtype=torch.int64),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }
    return module.GRPOTrainer._compute_loss(trainer, SimpleNamespace(training=True), batch)


def ours(loss_type, new, *, epsilon_high=0.2, beta=0.0, delta=None, level="token"):
    mask, old, _, ref, advantages = values()
    loss = GRPO(
        loss_type=loss_type,
        epsilon=0.2,
        epsilon_high=epsilon_high,
        beta=beta,
        delta=delta,
        importance_sampling_level=level,
        constant_length=16 if loss_type == "dr_grpo" else None,
    )
    out = loss(
        PolicyLossInputs(
            logprobs=new,
            old_logprobs=old,
            advantages=advantages[:, None].expand(-1, WIDTH),
            mask=mask,
            completion_ids=torch.zeros(8, WIDTH, dtype=torch.int64),
            lengths=LENGTHS,
            group_ids=torch.arange(8) // 4,
            ref_logprobs=ref,
        )
    )
    return aggregate([out], [mask])


def differentiated(of):
    leaf = values()[2].clone().requires_grad_()
    value = of(leaf)
    return float(value.detach()), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"epsilon_high": 0.28, "beta": 0.04}, {"delta": 1.5}, {"level": "sequence"}],
    ids=["plain", "kl", "delta", "sequence"],
)
def test_loss_and_gradient_are_trls(trainer_module, loss_type, settings):
    value, gradient = differentiated(lambda new: theirs(trainer_module, loss_type, new, **settings))
    mine, own = differentiated(lambda new: ours(loss_type, new, **settings))
    assert mine == pytest.approx(value, abs=1e-10)
    cosine = torch.nn.functional.cosine_similarity(own.flatten(), gradient.flatten(), dim=0)
    assert float(cosine) > 0.9999
    torch.testing.assert_close(own, gradient, rtol=1e-8, atol=1e-12)


def their_advantages(module, rewards, size, scale):
    """TRL computes advantages within a long method: those of its statements that do."""
    source = inspect.getsource(module.GRPOTrainer)
    found = re.search(
        r"( +)mean_grouped_rewards = torch\.nanmean\(rewards\.view.*?(?=\n +is_std_zero = )", source, re.DOTALL
    )
    if found is None:
        pytest.skip("this version of TRL computes advantages in another way")
    names = {
        "torch": torch,
        "nanstd": module.nanstd,
        "rewards": rewards,
        "num_generations": size,
        "self": SimpleNamespace(scale_rewards=scale),
    }
    exec(textwrap.dedent(found.group(0)), names)
    return torch.nan_to_num(names["advantages"], nan=0.0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("missing", [(), (2, 7, 8, 9, 10, 11)])
def test_advantages_are_trls(trainer_module, scale, missing):
    rewards = torch.randn(16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rewards[12:] = 0.3
    rewards[list(missing)] = torch.nan
    wanted = their_advantages(trainer_module, rewards.clone(), 4, scale)
    got = group_advantages(rewards, torch.arange(16) // 4, scale).values
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
