"""Losses of hidden states that are wrong on purpose, beside two that are right."""

from __future__ import annotations

import torch
from torch import nn

from kdkit.api import DataError, ModelError


class Right:
    """Mean square over the width, a sum over pairs of layers."""

    layers = ()

    def projector(self, student_dim, teacher_dim):
        return nn.Linear(student_dim, teacher_dim)

    def values(self, own, its):
        return (own - its).square().mean(-1)

    def __call__(self, x):
        pairs = zip(x.student, x.teacher, strict=True)
        return sum(self.values(own, its.detach()) for own, its in pairs)


class NoProjector(Right):
    """For widths that are equal."""

    def projector(self, student_dim, teacher_dim):
        if student_dim != teacher_dim:
            raise ModelError(f"the student is {student_dim} wide, the teacher {teacher_dim}")


# --- layers and projectors


class OneList(Right):
    layers = (1, 2)


class LayersAsText(Right):
    layers = (("1", "2"),)


class Twice(Right):
    layers = ((1, 2), (0, 0), (1, 2))


class OtherLayersEachTime(Right):
    made = 0

    def __init__(self):
        type(self).made += 1
        self.layers = ((1, type(self).made),)


class TheOtherWay(Right):
    def projector(self, student_dim, teacher_dim):
        return nn.Linear(teacher_dim, student_dim)


class ToAThirdWidth(Right):
    def projector(self, student_dim, teacher_dim):
        return nn.Linear(student_dim, teacher_dim + 1)


class AFunction(Right):
    def projector(self, student_dim, teacher_dim):
        return lambda state: state[:, :1].expand(-1, teacher_dim)


class CentresTokens(Right):
    def projector(self, student_dim, teacher_dim):
        return nn.Sequential(nn.Linear(student_dim, teacher_dim), OverTokens())


class OverTokens(nn.Module):
    def forward(self, states):
        return states - states.mean(0)


class DropsOut(Right):
    def projector(self, student_dim, teacher_dim):
        return nn.Sequential(nn.Linear(student_dim, teacher_dim), nn.Dropout(0.5))


class OneForAllPairs(Right):
    def __init__(self):
        self.made = {}

    def projector(self, student_dim, teacher_dim):
        return self.made.setdefault((student_dim, teacher_dim), nn.Linear(student_dim, teacher_dim))


class ASeedOfItsOwn(Right):
    made = 0

    def projector(self, student_dim, teacher_dim):
        type(self).made += 1
        module = nn.Linear(student_dim, teacher_dim)
        nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(self.made))
        return module


class Frozen(Right):
    def projector(self, student_dim, teacher_dim):
        return nn.Linear(student_dim, teacher_dim).requires_grad_(requires_grad=False)


class NotRegistered(Right):
    def projector(self, student_dim, teacher_dim):
        return Hidden(student_dim, teacher_dim)


class Hidden(nn.Module):
    def __init__(self, student_dim, teacher_dim):
        super().__init__()
        self.maps = [torch.randn(student_dim, teacher_dim, dtype=torch.float64, requires_grad=True)]

    def forward(self, states):
        return states @ self.maps[0]


class Unused(Right):
    def projector(self, student_dim, teacher_dim):
        module = nn.Linear(student_dim, teacher_dim)
        module.register_parameter("scale", nn.Parameter(torch.ones(1)))
        return module


class CutToTheSmaller(NoProjector):
    def projector(self, student_dim, teacher_dim):
        return None

    def values(self, own, its):
        width = min(own.shape[-1], its.shape[-1])
        return (own[:, :width] - its[:, :width]).square().mean(-1)


class AnotherError(NoProjector):
    def projector(self, student_dim, teacher_dim):
        if student_dim != teacher_dim:
            raise DataError("the data have other widths")


class TwoLines(NoProjector):
    def projector(self, student_dim, teacher_dim):
        if student_dim != teacher_dim:
            raise ModelError("the widths\ndiffer")


# --- the formula


class SumOverTheWidth(Right):
    def values(self, own, its):
        return (own - its).square().sum(-1)


class MeanOfThePairs(Right):
    def __call__(self, x):
        return super().__call__(x) / len(x.student)


class FirstPairOnly(Right):
    def __call__(self, x):
        return self.values(x.student[0], x.teacher[0].detach())


class TwiceTheGradient(Right):
    def __call__(self, x):
        value = super().__call__(x)
        return 2 * value - value.detach()


class NoGradient(Right):
    def __call__(self, x):
        return super().__call__(x).detach()


class Stacked(Right):
    def __call__(self, x):
        return (torch.stack(x.student) - torch.stack(x.teacher).detach()).square().mean(-1).sum(0)


class WidthOfTheFirstPair(Right):
    def __call__(self, x):
        pairs = zip(x.student, x.teacher, strict=True)
        return sum((own - its.detach()).square().sum(-1) for own, its in pairs) / x.student[0].shape[-1]


class LastBlockLost(Right):
    def __call__(self, x):
        value = super().__call__(x)
        return torch.where(torch.arange(len(value)) < len(value) // 64 * 64, value, 0.0) if len(value) > 64 else value


class NothingWithoutGradients(Right):
    def __call__(self, x):
        return super().__call__(x) * (1.0 if torch.is_grad_enabled() else 0.0)


class OneNumber(Right):
    def __call__(self, x):
        return super().__call__(x).mean()


class OnePerPair(Right):
    def __call__(self, x):
        pairs = zip(x.student, x.teacher, strict=True)
        return torch.stack([self.values(own, its.detach()) for own, its in pairs], -1)


class AlwaysDouble(Right):
    def values(self, own, its):
        return super().values(own.double(), its.double())


# --- where the models agree


class AFloor(Right):
    def values(self, own, its):
        return super().values(own, its) + 1e-6


class PullsAtEquality(Right):
    def values(self, own, its):
        return super().values(own, its) + (own - own.detach()).sum(-1)


class SignedDifference(Right):
    def values(self, own, its):
        return (own - its).mean(-1)


# --- tokens


class MeanOfTheBlock(Right):
    def __call__(self, x):
        value = super().__call__(x)
        return value.mean().expand(len(value))


class CentredOverTokens(Right):
    def values(self, own, its):
        return super().values(own - own.mean(0), its - its.mean(0))


class ScaledByTheBlock(Right):
    def values(self, own, its):
        return super().values(own, its) / (1 + its.abs().max())


class AfterTheFirst(Right):
    def __call__(self, x):
        value = super().__call__(x)
        return torch.cat([value[:1], value[1:] * 2])


class OnlyAmongOthers(Right):
    def __call__(self, x):
        value = super().__call__(x)
        return value if len(value) > 1 else value * 0


class GradientToNeighbours(Right):
    def values(self, own, its):
        return super().values(own, its) + 0.1 * (own - own.detach()).sum()


class DividedByTheLength(Right):
    def values(self, own, its):
        return (own / own.norm(dim=-1, keepdim=True) - its / its.norm(dim=-1, keepdim=True)).square().mean(-1)


class RootOfTheSquares(Right):
    def values(self, own, its):
        return super().values(own, its) + 0 * own.square().sum(-1).sqrt()


class ZerosAreLeftOut(Right):
    def __call__(self, x):
        known = (x.student[0] != 0).any(-1)
        value = super().__call__(x)
        return value * known * len(value) / known.sum()


# --- what it leaves alone


class RunningMean(Right):
    def __init__(self):
        self.mean = None

    def __call__(self, x):
        value = super().__call__(x)
        self.mean = value.detach().mean() if self.mean is None else 0.9 * self.mean + 0.1 * value.detach().mean()
        return value / self.mean


class Noisy(Right):
    def values(self, own, its):
        return super().values(own + 1e-9 * torch.randn_like(own), its)


class NoisyGradient(Right):
    def values(self, own, its):
        return super().values(own, its) + 1e-3 * ((own - own.detach()) * torch.rand_like(own)).sum(-1)


class WritesIntoTheStudent(Right):
    def values(self, own, its):
        return own.sub_(its).square().mean(-1)


class WritesIntoTheTeacher(Right):
    def values(self, own, its):
        return its.sub_(own.detach()).square().mean(-1) + (own - own.detach()).sum(-1)


class GradientToTheTeacher(Right):
    def __call__(self, x):
        return sum(self.values(own, its) for own, its in zip(x.student, x.teacher, strict=True))


# --- numbers


class InHalfPrecision(Right):
    def values(self, own, its):
        return super().values(own, its) if own.dtype is torch.float64 else super().values(own.bfloat16(), its).float()


class GradientInHalfPrecision(Right):
    def values(self, own, its):
        value = super().values(own, its)
        if own.dtype is torch.float64:
            return value
        rough = super().values(own.bfloat16(), its).float()
        return value.detach() + rough - rough.detach()


class RoundedValue(Right):
    def values(self, own, its):
        value = super().values(own, its)
        return value if value.dtype is torch.float64 else value.bfloat16().float()


class BoundedEntries(Right):
    def values(self, own, its):
        return (own.clamp(-100, 100) - its.clamp(-100, 100)).square().mean(-1)


# --- through the engine


class WrongForSevenTokens(Right):
    """The engine cuts into blocks of any size, of which the direct checks try a few."""

    def __call__(self, x):
        value = super().__call__(x)
        return value * (2 if len(value) == 7 else 1)


class GradientLostForSevenTokens(Right):
    def __call__(self, x):
        value = super().__call__(x)
        return value.detach() + 0 * value if len(value) == 7 else value


class LostInBf16(Right):
    def projector(self, student_dim, teacher_dim):
        return NoneInBf16(student_dim, teacher_dim)


class NoneInBf16(nn.Linear):
    def forward(self, states):
        out = super().forward(states)
        return out if out.dtype is not torch.bfloat16 else out - out.detach()
