"""The built-in and the scripted teachers keep the contract."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


import kdkit
from kdkit.api import Model, Ref, SignalCache
from kdkit.models.chat import ChatEncoder
from kdkit.plugins.teachers import plugin
from kdkit.testing.conformance import TeacherConformance
from kdkit.testing.fakes import FakeBuildContext
from kdkit.testing.rows import tiny_rows
from kdkit.testing.teachers import ScriptedTeacher
from kdkit.testing.tiny import save_tiny_model, tiny_model, tiny_tokenizer

SPECS = {spec.name: spec for spec in plugin.kdkit_teachers()}


@cache
def model_of_teacher():
    return tiny_model(seed=1)


def built(name, **params):
    return SPECS[name].build(SPECS[name].params(**params), FakeBuildContext())


class TestLocal(TeacherConformance):
    gives = SPECS["local"].gives

    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path):
        self.directory = save_tiny_model(tmp_path / "teacher", seed=1)

    def build(self):
        return built("local", model=Ref(Model, str(self.directory)), precision="fp32")

    @torch.no_grad()
    def reference(self, ids):
        return model_of_teacher()(input_ids=torch.tensor([list(ids)])).logits[0]


class TestCache(TeacherConformance):
    gives = SPECS["cache"].gives
    fixed_rows = SPECS["cache"].fixed_rows

    @pytest.fixture(autouse=True)
    def _written(self, tmp_path, run_recipe):
        lines = [f'{{"prompt": "{n}+{n}?", "completion": "It is {2 * n}."}}\n' for n in range(12)]
        (tmp_path / "rows.jsonl").write_text("".join(lines))
        model = str(save_tiny_model(tmp_path / "teacher", seed=1))
        teacher = {"use": "local", "model": model, "precision": "fp32"}
        data = {"use": "jsonl", "source": str(tmp_path / "rows.jsonl")}
        stage = {"kind": "cache-teacher", "teacher": teacher, "student": model, "data": data}
        result = run_recipe({"stages": {"cache": stage}}, inline=True)
        self.path = result.stage("cache").outputs["cache"].path
        self.examples = kdkit.build("dataset", "jsonl", source=data["source"]).load(FakeBuildContext()).examples

    def build(self):
        return built("cache", cache=Ref(SignalCache, str(self.path)))

    def rows(self):
        return [ChatEncoder(tiny_tokenizer()).training(example) for example in self.examples]


class TestScripted(TeacherConformance):
    gives = frozenset({"logits", "text"})

    def build(self):
        return ScriptedTeacher({tiny_rows()[0].prompt: "an echo"})


class TestScriptedTopK(TestScripted):
    gives = frozenset({"topk", "text"})

    def build(self):
        return ScriptedTeacher(top_k=5)
