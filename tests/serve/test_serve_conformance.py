"""The teacher `openai` keeps the contract of teachers, with kdkit's own server behind it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from kdkit.api.artifacts import Model
from kdkit.models.load import load_model
from kdkit.plugins.teachers import plugin
from kdkit.serve.model import ServedModel
from kdkit.testing.conformance import TeacherConformance
from kdkit.testing.tiny import tiny_model, tiny_tokenizer

SPEC = next(spec for spec in plugin.kdkit_teachers() if spec.name == "openai")


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """A model whose most probable tokens are ASCII: halves of characters come back as other tokens than were sent."""
    directory = tmp_path_factory.mktemp("served") / "speaker"
    model, tokenizer = tiny_model(seed=1, tied=False), tiny_tokenizer()
    with torch.no_grad():
        model.lm_head.weight[[not tokenizer.decode([token]).isascii() for token in range(259)]] = 0
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


class TestOpenAI(TeacherConformance):
    gives = SPEC.gives
    tolerance = 1e-3

    @pytest.fixture(autouse=True)
    def _server(self, start, speaker):
        found = Model(path=speaker, name="t")
        url = start(model=ServedModel(found, dtype=torch.float32, device="cpu")).url
        values = {"base_url": url, "model": "t", "tokenizer": "./unread", "top_k": 32}
        self.params = SPEC.params.model_validate_json(json.dumps(values))
        self.context = SimpleNamespace(resolve=lambda _: found, log=lambda _: None)
        self.model = load_model(found, dtype=torch.float32)

    def build(self):
        return SPEC.build(self.params, self.context)

    @torch.no_grad()
    def reference(self, ids):
        return self.model(input_ids=torch.tensor([list(ids)])).logits[0]
