"""Log-probabilities of teacher and student on the same classes, and true divergences between them.

Everything is in the dtype of the student's logits, at least float32, and returns one value per token. Classes are the
V vocabulary entries for a dense teacher, and the K kept entries plus one tail bucket for a top-k teacher.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch

from kdkit.api.data import Dense, TokenLossInputs, TopK
from kdkit.api.errors import ConformanceError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "adaptive_kl",
    "forward_kl",
    "jensen_shannon",
    "log_classes",
    "log_mixture",
    "reverse_kl",
    "total_variation",
    "upcast",
]

_EMPTY: Final = -1e4
"""Log-probability of a class without mass: its exponential is 0 in every dtype."""


def upcast(logits: Tensor) -> Tensor:
    """Half-precision logits as float32; float32 and float64 unchanged."""
    return logits.float() if logits.dtype in {torch.float16, torch.bfloat16} else logits


def log_classes(x: TokenLossInputs, temperature: float) -> tuple[Tensor, Tensor]:
    """Teacher's and student's log-probabilities at ``temperature`` over the same classes, both [N, C].

    The teacher's are detached. C is V for a dense signal and K + 1 for a top-k signal: the last class is everything
    outside the top-k, so that nothing is renormalised (reference: TRL's tail bucket).

    Raises:
        ConformanceError: No teacher signal, another vocabulary, a top-k signal taken at another temperature, or ids
            that repeat or lie beyond the student's logits.
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
    # A temperature that was stored in float32, or computed, is the same one.
    if not math.isclose(signal.temperature, temperature, rel_tol=1e-6):
        raise ConformanceError(
            f"the top-k signal was taken at temperature {signal.temperature:g}, the loss wants {temperature:g}",
            hint="use the same temperature, or take the signal again",
        )
    kept = signal.logprobs.detach().to(student.dtype)
    # Empty slots are classes without mass in both models, at a finite value so that mixtures have a gradient. They
    # repeat the row's most probable id, which leaves the id they happen to hold in the student's tail.
    empty = kept == -torch.inf
    _check_ids(signal.ids, empty, student.shape[-1])
    best = signal.ids.gather(-1, kept.argmax(dim=-1, keepdim=True))
    ids = torch.where(empty, best, signal.ids)
    tail = _log_tail(signal, kept, whole=(~empty).sum(dim=-1) == student.shape[-1])
    # The student's tail is summed over the real remaining entries: 1 - sum(top-k) would lose it to rounding.
    rest = torch.logsumexp(student.scatter(-1, ids, -torch.inf), dim=-1)
    own = student.gather(-1, ids).masked_fill(empty, _EMPTY)
    return _append(kept.masked_fill(empty, _EMPTY), tail), _append(own, rest)


def _check_ids(ids: Tensor, empty: Tensor, size: int) -> None:
    """Refuse ids [N, K] that, ``empty`` slots aside, are no set of entries below ``size`` at every token."""
    if not ids.numel():
        return
    # Whatever an empty slot holds, it gets an id of its own below zero.
    places = -1 - torch.arange(ids.shape[-1], device=ids.device)
    ordered = torch.where(empty, places, ids).sort(dim=-1).values
    lowest, highest = int(ids.masked_fill(empty, 0).min()), int(ordered[:, -1].max())
    if lowest < 0 or highest >= size:
        raise ConformanceError(
            f"the top-k signal names token {lowest if lowest < 0 else highest}, "
            f"student and teacher share {size} entries",
            hint="take the teacher's top-k over the entries that both models have",
        )
    # A repeated id would give the student that entry's probability twice: its classes would sum to more than one.
    again = ordered[:, 1:] == ordered[:, :-1]
    if bool(again.any()):
        raise ConformanceError(
            f"the top-k signal names token {int(ordered[:, 1:][again][0])} more than once for one token",
            hint="every kept entry has an id of its own",
        )


def _log_tail(signal: TopK, kept: Tensor, *, whole: Tensor) -> Tensor:
    """Log of the teacher's mass outside the kept entries, [N]; -inf where these are the ``whole`` vocabulary.

    A tail below the dtype's resolution is not known to be zero: KL(q || p) would be infinite if it were. A mass that
    the signal states is taken at its word, unless it is zero, or less by rounding.
    """
    least = math.log(torch.finfo(kept.dtype).eps)
    if signal.tail_mass is None:
        tail = _log_rest(kept).clamp(min=least)
    else:
        given = signal.tail_mass.detach().to(kept.dtype)
        tail = torch.where(given > 0, given.clamp_min(torch.finfo(kept.dtype).tiny).log(), least)
    return tail.masked_fill(whole, -torch.inf)


def _append(classes: Tensor, tail: Tensor) -> Tensor:
    return torch.cat([classes, tail.unsqueeze(-1)], dim=-1)


def _log_rest(logprobs: Tensor) -> Tensor:
    """log(1 - sum(exp(logprobs))) along the last axis; -inf when the dtype cannot tell the sum from one."""
    total = torch.logsumexp(logprobs, dim=-1)
    limit = -4 * torch.finfo(total.dtype).eps
    rest = torch.log(-torch.expm1(total.clamp(max=limit)))
    return torch.where(total < limit, rest, torch.full_like(rest, -torch.inf))


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), [N], with 0 log 0 = 0; it is 0 when p = q.

    Args:
        log_p: [N, C] log-probabilities.
        log_q: [N, C] log-probabilities. Gradients flow into both arguments that want them.
    """
    p = log_p.exp()
    # The gap is masked before the product: 0 times an infinite gap has no gradient.
    gap = torch.where(p > 0, log_p - log_q, torch.zeros_like(p))
    return (p * gap).sum(dim=-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p), [N]; see :func:`forward_kl`."""
    return forward_kl(log_q, log_p)


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q), [N, C], for 0 < share < 1."""
    # Of two infinities, logaddexp has no gradient; this is as good as -inf to everything that is summed from it.
    least = torch.finfo(log_p.dtype).min / 4
    return torch.logaddexp(log_p.clamp(min=least) + math.log(share), log_q.clamp(min=least) + math.log1p(-share))


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, [N], for 0 < beta < 1.

    Agarwal et al. 2024 (GKD). It goes to 0 with beta, or with 1 - beta: beta -> 0 gives beta KL(p || q).
    """
    log_m = log_mixture(log_p, log_q, beta)
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


def adaptive_kl(log_p: Tensor, log_q: Tensor, head_mass: float) -> Tensor:
    """(g_head KL(p || q) + g_tail KL(q || p)) / (g_head + g_tail), [N].

    Wu et al. 2024 (Rethinking Kullback-Leibler Divergence in Knowledge Distillation for LLMs). The head is
    the smallest set of the teacher's most probable classes with at least ``head_mass`` of its probability, g_head and
    g_tail are the sums of |p - q| over head and rest. The two weights are constants of the step: no gradient flows
    through them. They are halves where p = q.
    """
    with torch.no_grad():
        p, q = log_p.exp(), log_q.exp()
        ordered, places = p.sort(dim=-1, descending=True)
        gaps = (p - q).abs().gather(-1, places)
        # A class belongs to the head when those before it do not reach the mass yet.
        head = ordered.cumsum(dim=-1) - ordered < head_mass
        both = gaps.sum(dim=-1)
        share = torch.where(both > 0, (gaps * head).sum(dim=-1) / both, torch.full_like(both, 0.5))
    return share * forward_kl(log_p, log_q) + (1 - share) * reverse_kl(log_p, log_q)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Half the sum of |p - q|, [N], between 0 and 1."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)
