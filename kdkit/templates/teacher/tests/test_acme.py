from __future__ import annotations

import pytest
import torch
from kdkit.api import Dense, RecipeError, Sampling, Teacher, TokenBatch
from kdkit.testing.conformance import TeacherConformance
from kdkit.testing.teachers import ScriptedTeacher

from kdkit_acme import plugin, teacher

(SPEC,) = plugin.kdkit_teachers()


class TestTeacher(TeacherConformance):
    def build(self) -> Teacher:
        return teacher.AcmeTeacher(ScriptedTeacher({"What is 6 times 7?": "42"}), sharpness=2.0)
