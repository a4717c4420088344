"""Loss and gradient of kdkit and of TRL's GKD trainer on one identical batch, in float32."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from kd_contenders import Job, gkd_trainer

from kdkit.models.heads import split
from kdkit.plugins.losses.token import JSD
from kdkit.plugins.teachers.local import _HiddenSignals
from kdkit.train.objective import CausalObjective, LossTerm, valid_hidden
from kdkit.train.packing import pack

BETAS = (0.0, 0.5, 1.0)


def agreement(job: Job) -> dict[str, dict[str, float]]:
    """Relative differences by beta: of the loss, and of the gradient in the Euclidean norm over all weights."""
    warnings.simplefilter("ignore")
    job = replace(job, precision="fp32", steps=[job.steps[0][:4]])
    found = {}
    for beta in BETAS:
        loss, gradient = of_trl(replace(job, beta=beta))
        own, own_gradient = of_kdkit(replace(job, beta=beta))
        gap = sum(float((own_gradient[name] - grad).square().sum()) for name, grad in gradient.items())
        size = sum(float(grad.square().sum()) for grad in gradient.values())
        found[f"beta {beta:g}"] = {
            "loss": round(loss, 6),
            "loss_difference": float(f"{abs(own - loss) / loss:.2g}"),
            "gradient_difference": float(f"{(gap / size) ** 0.5:.2g}"),
        }
    return found


def of_trl(job: Job) -> tuple[float, dict[str, torch.Tensor]]:
    trainer = gkd_trainer(job)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))  # noqa: SLF001
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return float(loss.detach()), _gradient(trainer.model)


def of_kdkit(job: Job) -> tuple[float, dict[str, torch.Tensor]]:
    student, teacher = job.models()
    batch = pack(job.steps[0], device=job.device)
    parts = split(teacher)
    with torch.no_grad():
        signals = _HiddenSignals(parts, valid_hidden(parts.trunk, batch))
    objective = CausalObjective(student, [LossTerm("jsd", 1.0, JSD(job.beta))], compute=job.compute)
    loss = objective(batch, signals, 1 / sum(row.targets for row in job.steps[0])).loss
    loss.backward()
    return float(loss.detach()), _gradient(student)


def _gradient(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
