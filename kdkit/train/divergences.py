"""Log-probabilities of teacher and student on the same classes, and true divergences between them.

Everything is in the dtype of the student's logits, at least float32, and returns one value per token. Classes are the
V vocabulary entries for a dense teacher, and the K kept entries plus one tail bucket for a top-k teacher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kdkit.api.data import Dense, TokenLossInputs, TopK
from kdkit.api.errors import ConformanceError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["forward_kl", "log_classes", "upcast"]


def upcast(logits: Tensor) -> Tensor:
    """Half-precision logits as float32; float32 and float64 unchanged."""
    return logits.float() if logits.dtype in {torch.float16, torch.bfloat16} else logits


def log_classes(x: TokenLossInputs, temperature: float) -> tuple[Tensor, Tensor]:
    """Teacher's and student's log-probabilities at ``temperature`` over the same classes, both [N, C].

    The teacher's are detached. C is V for a dense signal and K + 1 for a top-k signal: the last class is everything
    outside the top-k, so that nothing is renormalised (reference: TRL's tail bucket).

    Raises:
        ConformanceError: No teacher signal, another vocabulary, a top-k signal taken at another temperature, or ids
            beyond the student's logits.
    """
    student = torch.log_softmax(upcast(x.student_logits) / temperature, dim=-1)
    if isinstance(x.teacher, Dense):
        if x.teacher.logits.shape != x.student_logits.shape:
            raise ConformanceError(
                f"teacher logits {tuple(x.teacher.logits.shape)} do not match "
                f"student logits {tuple(x.student_logits.shape)}"
            )
        logits = upcast(x.teacher.logits.detach()).to(student.dtype)
        return torch.log_softmax(logits / temperature, dim=-1), student
    if isinstance(x.teacher, TopK):
        return _with_tail(x.teacher, student, temperature)
    raise ConformanceError("this loss needs a teacher signal", hint="use it in a distill stage with a teacher")


def _with_tail(signal: TopK, student: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if signal.temperature != temperature:
        raise ConformanceError(
            f"the top-k signal was taken at temperature {signal.temperature:g}, the loss wants {temperature:g}",
            hint="use the same temperature, or take the signal again",
        )
    if signal.ids.numel() and (highest := int(signal.ids.max())) >= student.shape[-1]:
        raise ConformanceError(
            f"the top-k signal names token {highest}, student and teacher share {student.shape[-1]} entries",
            hint="take the teacher's top-k over the entries that both models have",
        )
    kept = signal.logprobs.detach().to(student.dtype)
    given = signal.tail_mass
    tail = _log_rest(kept) if given is None else given.detach().to(student.dtype).log()
    # The student's tail is summed over the real remaining entries: 1 - sum(top-k) would lose it to rounding.
    rest = torch.logsumexp(student.scatter(-1, signal.ids, -torch.inf), dim=-1)
    own = student.gather(-1, signal.ids)
    return _append(kept, tail), _append(own, rest)


def _append(classes: Tensor, tail: Tensor) -> Tensor:
    return torch.cat([classes, tail.unsqueeze(-1)], dim=-1)


def _log_rest(logprobs: Tensor) -> Tensor:
    """log(1 - sum(exp(logprobs))) along the last axis; -inf when the dtype cannot tell the sum from one."""
    total = torch.logsumexp(logprobs, dim=-1)
    limit = -4 * torch.finfo(total.dtype).eps
    rest = torch.log(-torch.expm1(total.clamp(max=limit)))
    return torch.where(total < limit, rest, torch.full_like(rest, -torch.inf))


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), [N], with 0 log 0 = 0; it is 0 when p = q."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(dim=-1)
