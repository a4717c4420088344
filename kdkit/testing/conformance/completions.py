"""Completions to try policy losses on, and the reduction of an optimiser step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Final

import torch

from kdkit.api.data import PolicyLossInputs, PolicyLossOutput

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "OF_NEED",
    "PER_TOKEN",
    "OneCompletion",
    "aggregate",
    "alone",
    "cast",
    "close",
    "completions",
    "differentiated",
    "filled",
    "narrow",
    "same",
    "take",
    "tensors",
]

_LENGTHS: Final = (5, 1, 3, 8, 2, 4)
PER_TOKEN: Final = (
    "logprobs", "old_logprobs", "advantages", "teacher_logprobs", "ref_logprobs", "importance_weights", "entropy",
)  # fmt: skip
OF_NEED: Final = {"teacher": "teacher_logprobs", "reference": "ref_logprobs", "entropy": "entropy"}


@dataclass(frozen=True, slots=True)
class OneCompletion:
    """A completion alone: everything is [T] float64; ``logprobs`` and ``entropy`` have a gradient."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    teacher_logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor


def completions(needs: frozenset[str] = frozenset(), *, seed: int = 0, width: int | None = None) -> PolicyLossInputs:
    """Six completions of unequal length in float64, with ratios and advantages on all sides of usual clip ranges.

    Args:
        needs: What the loss declared: ``teacher``, ``reference``, ``entropy``.
        seed: Of the values.
        width: Padded length; that of the longest completion by default.
    """
    lengths = torch.tensor(_LENGTHS)
    width = width or int(lengths.max())
    mask = torch.arange(width) < lengths[:, None]
    generator = torch.Generator().manual_seed(seed)

    def normal(spread: float) -> Tensor:
        whole = torch.randn(len(lengths), max(_LENGTHS), generator=generator, dtype=torch.float64) * spread
        return torch.nn.functional.pad(whole, (0, width - whole.shape[1])) * mask

    old = -normal(1.0).abs() - 0.5 * mask
    values = {
        "old_logprobs": old,
        "logprobs": old + normal(0.4),
        "advantages": normal(1.5),
        "importance_weights": torch.where(mask, 1.25 * torch.sigmoid(1.5 + normal(1.0)), 1.0),
        "teacher_logprobs": old + normal(0.7),
        "ref_logprobs": old + normal(0.3),
        "entropy": normal(1.0).abs(),
    }
    absent = {name: None for need, name in OF_NEED.items() if need not in needs}
    return PolicyLossInputs(
        **{**values, **absent},
        mask=mask,
        completion_ids=torch.arange(mask.numel()).reshape(mask.shape) % 7 * mask,
        lengths=lengths,
        group_ids=torch.arange(len(lengths)) // 2,
    )


def aggregate(outputs: Sequence[PolicyLossOutput], masks: Sequence[Tensor]) -> Tensor:
    """The loss of an optimiser step from its micro-batches: one sum, one denominator, as the engine does it.

    A completion without a token that counts is in no denominator.
    """
    tokens = sum(int(mask.sum()) for mask in masks)
    sequences = sum(int(mask.any(dim=1).sum()) for mask in masks)
    total = torch.zeros((), dtype=torch.float64)
    for out, mask in zip(outputs, masks, strict=True):
        sums = torch.where(mask, out.per_token, 0.0).sum(dim=1)
        if out.aggregation == "token-mean":
            total = total + sums.sum() / tokens
        elif out.aggregation == "sequence-mean":
            total = total + (sums / mask.sum(dim=1).clamp_min(1)).sum() / sequences
        else:
            total = total + sums.sum() / (sequences * float(out.constant_length or 0))
    return total


def alone(x: PolicyLossInputs, row: int) -> OneCompletion:
    """The tokens of a row that count; weights and needs that are absent are 1."""
    kept = x.mask[row]
    one = torch.ones_like(x.logprobs[row][kept])
    found = {name: getattr(x, name) for name in PER_TOKEN}
    cut = {name: one.detach() if value is None else value[row][kept] for name, value in found.items()}
    return OneCompletion(weights=cut.pop("importance_weights"), **cut)


def tensors(x: PolicyLossInputs) -> dict[str, Tensor]:
    """The fields that are there, by name."""
    found = {field.name: getattr(x, field.name) for field in fields(x)}
    return {name: value for name, value in found.items() if value is not None}


def take(x: PolicyLossInputs, rows: Tensor) -> PolicyLossInputs:
    """Some of the completions."""
    return PolicyLossInputs(**{name: value[rows] for name, value in tensors(x).items()})


def narrow(x: PolicyLossInputs, width: int) -> PolicyLossInputs:
    """The first ``width`` positions."""
    cut = {name: value[:, :width] if value.dim() == 2 else value for name, value in tensors(x).items()}
    return PolicyLossInputs(**cut)


def cast(x: PolicyLossInputs, dtype: torch.dtype) -> PolicyLossInputs:
    """The same in another dtype."""
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors(x).items()}
    return PolicyLossInputs(**cast)


def filled(x: PolicyLossInputs, fill: float) -> PolicyLossInputs:
    """The same with multiples of ``fill``, another in each field, in all values per token that do not count."""
    found = tensors(x)
    for times, name in enumerate(PER_TOKEN, 1):
        if name in found:
            found[name] = torch.where(x.mask, found[name], times * fill)
    return PolicyLossInputs(**found)


def differentiated(of: Callable[[PolicyLossInputs], Tensor], x: PolicyLossInputs) -> tuple[Tensor, list[Tensor]]:
    """A value, and its gradient with respect to logprobs and, where there is one, entropy."""
    leaves = {"logprobs": x.logprobs.detach().clone().requires_grad_()}
    if x.entropy is not None:
        leaves["entropy"] = x.entropy.detach().clone().requires_grad_()
    value = of(replace(x, **leaves))
    if not value.requires_grad:
        return value.detach(), [torch.zeros_like(leaf) for leaf in leaves.values()]
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    gradients = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves.values(), found, strict=True)]
    return value.detach(), gradients


def same(got: tuple[Tensor, list[Tensor]], wanted: tuple[Tensor, list[Tensor]], tolerance: float, what: str) -> None:
    """Fails unless values and gradients agree."""
    close(got[0], wanted[0], tolerance, what)
    for mine, its in zip(got[1], wanted[1], strict=True):
        close(mine, its, tolerance, f"the gradient of {what}")


def close(got: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Fails unless all elements agree within the tolerance, relative to the largest one if that is above 1."""
    got, wanted = got.detach(), wanted.detach()
    assert got.shape == wanted.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    error = float((got - wanted).abs().max())
    # Written so that NaN fails.
    assert error <= tolerance * max(1.0, float(wanted.abs().max())), f"{what}: off by up to {error:.2e}"
