from __future__ import annotations

from typing import ClassVar

import torch
from kdkit.api import Dense, Teacher, TokenBatch
from kdkit.testing.conformance import TeacherConformance
from kdkit.testing.teachers import ScriptedTeacher

from kdkit_acme import plugin, teacher

(SPEC,) = plugin.kdkit_teachers()


def build(sharpness: float) -> Teacher:
    # The teacher behind it needs no model: each of its numbers follows from a script.
    inner = ScriptedTeacher({"What is 6 times 7?": "42"})
    return teacher.AcmeTeacher(inner, sharpness)


class TestTeacher(TeacherConformance):
    gives: ClassVar[frozenset[str]] = frozenset(SPEC.gives)

    def build(self) -> Teacher:
        return build(1.5)


def test_sharp_distributions_are_the_teachers_at_a_lower_temperature() -> None:
    ids = torch.tensor([[3, 4, 5]])
    learned = torch.tensor([[False, True, True]])
    batch = TokenBatch(ids, torch.ones_like(ids), torch.arange(3)[None], learned, ("1",))
    plain, sharp = (build(sharpness).signals(batch).block(0, 2) for sharpness in (1.0, 2.0))
    assert isinstance(plain, Dense)
    assert isinstance(sharp, Dense)
    wanted = torch.log_softmax(plain.logits / 0.5, -1)
    assert torch.allclose(torch.log_softmax(sharp.logits, -1), wanted)
