"""A right teacher for others to spoil."""

from __future__ import annotations

import copy
from functools import cache

import torch
from suites import variant

from kdkit.api import Dense, KdkitError, TopK
from kdkit.api.errors import DataError
from kdkit.models.load import vocabulary
from kdkit.testing.conformance import TeacherConformance
from kdkit.testing.teachers import ScriptedTeacher
from kdkit.testing.tiny import tiny_model, tiny_tokenizer
from kdkit.train.packing import unpack


@cache
def model_of_teacher():
    return tiny_model(seed=1)


class Teacher:
    """A right one for others to spoil: full logits, the five best of them when asked for, hidden states and text."""

    temperature = 1.0
    top_k = 0

    def __init__(self):
        self.model, self.tokenizer = copy.deepcopy(model_of_teacher()), tiny_tokenizer()
        self.vocabulary = vocabulary(self.tokenizer, self.model)
        self.hidden_sizes = (32, 32, 32)
        self.open = True

    def signals(self, batch, *, layers=()):
        return Signals(self, self.padded(batch), layers)

    def padded(self, batch):
        return batch if batch.attention_mask is not None else unpack(batch)

    def mask(self, batch):
        return batch.attention_mask

    @torch.no_grad()
    def states(self, batch):
        return self.model(
            input_ids=batch.input_ids,
            attention_mask=self.mask(batch),
            position_ids=batch.position_ids,
            output_hidden_states=True,
        )

    def rows(self, logits, batch):
        """Row t of the logits is about token t + 1."""
        return logits[:, :-1][batch.labels_mask[:, 1:]]

    def signal(self, logits, labels):
        if not self.top_k:
            return Dense(logits)
        everything = torch.log_softmax(logits, -1)
        best = everything.topk(self.top_k)
        taken = everything.gather(1, labels[:, None])[:, 0]
        return self.kept(TopK(best.indices, best.values, 1 - best.values.exp().sum(1), taken=taken))

    def kept(self, signal):
        return signal

    def generate(self, prompts, sampling, seed):
        script = ScriptedTeacher(default=f"{seed} of many words" if sampling.do_sample else "many words")
        return script.generate(prompts, sampling, seed)

    def close(self):
        self.open = False

    def check_rows(self, rows):
        known = {row.ids for row in TeacherConformance.rows(variant(TeacherConformance, build=Teacher)())}
        if any(row.ids not in known for row in rows):
            raise DataError("a row is not known")

    def check_student(self, found, tokenizer):
        if found.fingerprint != self.vocabulary.fingerprint:
            raise KdkitError("another vocabulary")


class Signals:
    def __init__(self, teacher, batch, layers):
        found = teacher.states(batch)
        self.teacher, self.layers = teacher, layers
        self.logits = teacher.rows(found.logits, batch)
        self.labels = batch.input_ids[batch.labels_mask]
        self.kept = {layer: teacher.rows(found.hidden_states[layer], batch) for layer in layers}

    def block(self, start, stop):
        return self.teacher.signal(self.logits[start:stop], self.labels[start:stop])

    def hidden(self, layers):
        return tuple(self.kept[layer] for layer in layers)
