"""The built-in and the scripted teachers keep the contract, and the suite catches teachers that do not."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from suites import check, checks_of, variant

import kdkit
from kdkit.api import Dense, KdkitError, Model, Ref, SignalCache, TopK
from kdkit.api.errors import DataError
from kdkit.models.chat import ChatEncoder
from kdkit.models.load import vocabulary
from kdkit.plugins.teachers import plugin
from kdkit.testing.conformance import TeacherConformance
from kdkit.testing.fakes import FakeBuildContext
from kdkit.testing.rows import tiny_rows
from kdkit.testing.teachers import ScriptedTeacher
from kdkit.testing.tiny import save_tiny_model, tiny_model, tiny_tokenizer
from kdkit.train.packing import unpack

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


# -- wrong teachers


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


class TopFive(Teacher):
    top_k = 5


def with_kept(top_k=5, **change):
    kept = {"kept": lambda self, s: replace(s, **{k: f(s) for k, f in change.items()}), "top_k": top_k}
    return type("Wrong", (Teacher,), kept)


class NoFingerprint(Teacher):
    def __init__(self):
        super().__init__()
        self.vocabulary = replace(self.vocabulary, fingerprint="")


class NewFingerprint(Teacher):
    def __init__(self):
        super().__init__()
        self.vocabulary = replace(self.vocabulary, fingerprint=str(id(self)))


class WholeBatch(Teacher):
    """Signals for prompts as well."""

    def rows(self, logits, batch):
        return logits.flatten(0, 1)


class HalfOfTheVocabulary(Teacher):
    def signal(self, logits, labels):
        return Dense(logits[:, :130])


class NotFinite(Teacher):
    def signal(self, logits, labels):
        return Dense(logits.log().detach())


class Undeclared(Teacher):
    top_k = 3


class ShiftedByOne(Teacher):
    def rows(self, logits, batch):
        return logits[batch.labels_mask]


class WithGradient(Teacher):
    def states(self, batch):
        return self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask,
                          position_ids=batch.position_ids, output_hidden_states=True)  # fmt: skip

    def signals(self, batch, **options):
        with torch.enable_grad():
            return super().signals(batch, **options)


class FromTheStart(Teacher):
    """Every block is the first one."""

    def signals(self, batch, **options):
        found = super().signals(batch, **options)
        found.block = lambda start, stop: Dense(found.logits[: stop - start])
        return found


class SeesPadding(Teacher):
    def mask(self, batch):
        return None


class IgnoresDocuments(Teacher):
    """Rows that lie end to end see each other."""

    def padded(self, batch):
        if batch.attention_mask is not None:
            return batch
        ids = batch.input_ids
        places = torch.arange(ids.shape[1]).expand_as(ids)
        return replace(batch, attention_mask=torch.ones_like(ids), position_ids=places)


class WithDropout(Teacher):
    def __init__(self):
        super().__init__()
        self.model.train()
        for layer in self.model.model.layers:
            layer.self_attn.attention_dropout = 0.3


class WritesIntoTheBatch(Teacher):
    def signals(self, batch, **options):
        found = super().signals(batch, **options)
        batch.input_ids.fill_(0)
        return found


class LayersInOrderOfTheModel(Teacher):
    def signals(self, batch, **options):
        found = super().signals(batch, **options)
        found.hidden = lambda layers: tuple(found.kept.values())[: len(layers)]
        return found


class WrongWidths(Teacher):
    def __init__(self):
        super().__init__()
        self.hidden_sizes = (32, 64)


class DropsAPrompt(Teacher):
    def generate(self, prompts, sampling, seed):
        return super().generate(prompts, sampling, seed)[1:]


class NoLimit(Teacher):
    def generate(self, prompts, sampling, seed):
        return super().generate(prompts, sampling.model_copy(update={"max_new_tokens": 99}), seed)


class Counts(Teacher):
    number = 0

    def generate(self, prompts, sampling, seed):
        Counts.number += sampling.do_sample
        return super().generate(prompts, sampling, seed + Counts.number)


class AnswersByPlace(Teacher):
    def generate(self, prompts, sampling, seed):
        script = ScriptedTeacher({p.prompt: str(n) for n, p in enumerate(prompts) if isinstance(p.prompt, str)})
        return script.generate(prompts, sampling, seed)


class ClosesOnce(Teacher):
    def close(self):
        assert self.open, "closed already"
        super().close()


class KnowsEverything(Teacher):
    def check_rows(self, rows):
        pass


class KnowsEverybody(Teacher):
    def check_student(self, found, tokenizer):
        pass


WORDS, FIT = "test_its_vocabulary_says_which_tokens_it_is_about", "test_signals_fit_the_tokens"
PART, KNOWN = "test_top_k_is_a_part_of_a_distribution", "test_it_says_what_it_is_known_to_say"
GRADIENT, BLOCKS = "test_no_gradient_reaches_it", "test_blocks_are_parts_of_the_whole"
ALONE, TWICE = "test_neighbours_and_padding_do_not_matter", "test_the_same_twice_and_from_another_instance"
BATCH, HIDDEN = "test_the_batch_stays_as_it_is", "test_hidden_states_are_those_asked_for"
TEXT, CLOSE = "test_it_answers_every_prompt_in_order", "test_it_may_be_closed_twice"
FIXED = "test_rows_it_does_not_know_are_refused"
WRONG = [
    (NoFingerprint, WORDS, "no fingerprint"),
    (NewFingerprint, WORDS, "another instance has another vocabulary"),
    (HalfOfTheVocabulary, FIT, "logits are"),
    (NotFinite, FIT, "not finite"),
    (Undeclared, FIT, "which its spec does not declare"),
    (with_kept(ids=lambda s: s.ids.int()), FIT, "ids are torch.int32"),
    (with_kept(ids=lambda s: s.ids[:, :1]), FIT, "different shapes"),
    (with_kept(logprobs=lambda s: torch.log_softmax(s.logprobs, -1) + 0.1, tail_mass=lambda s: None), PART, "mass of"),
    (with_kept(logprobs=lambda s: torch.log_softmax(s.logprobs, -1)), PART, "not one together"),
    (with_kept(tail_mass=lambda s: s.tail_mass * 0), PART, "not one together"),
    (with_kept(tail_mass=lambda s: s.tail_mass - 1), PART, "a tail is negative"),
    (with_kept(ids=lambda s: s.ids * 0), PART, "an id stands twice"),
    (with_kept(ids=lambda s: s.ids + 259), PART, "not in the vocabulary"),
    (with_kept(logprobs=lambda s: s.logprobs + 9), PART, "is above 0"),
    (with_kept(250, taken=lambda s: s.taken - 1), PART, "two log-probabilities"),
    (ShiftedByOne, KNOWN, "compared with the reference"),
    (WholeBatch, KNOWN, "compared with the reference"),
    (with_kept(ids=lambda s: s.ids.flip(1)), KNOWN, "log-probabilities are off"),
    (WithGradient, GRADIENT, "logits has a gradient"),
    (FromTheStart, BLOCKS, "is not that part of the whole"),
    (SeesPadding, ALONE, "left: log-probabilities differ"),
    (IgnoresDocuments, ALONE, "packed: log-probabilities differ"),
    (WithDropout, TWICE, "a second time"),
    (WritesIntoTheBatch, BATCH, "input_ids of the batch was changed"),
    (LayersInOrderOfTheModel, HIDDEN, "another order"),
    (WrongWidths, HIDDEN, "hidden state 1 is"),
    (DropsAPrompt, TEXT, "2 completions for 3 prompts"),
    (NoLimit, TEXT, "with max_new_tokens: 6"),
    (Counts, TEXT, "the same seed gives other answers"),
    (AnswersByPlace, TEXT, "order of the prompts"),
    (ClosesOnce, CLOSE, "closed already"),
    (KnowsEverything, FIXED, "a row that it does not know was not refused"),
    (KnowsEverybody, FIXED, "a student with other tokens was not refused"),
]
EVERYTHING = frozenset({"logits", "topk", "text", "hidden"})


def suite(teacher, test):
    logits = teacher.top_k == 0 or teacher is Undeclared
    gives = EVERYTHING - ({"topk"} if logits else {"logits"})
    return variant(
        TeacherConformance,
        build=teacher,
        gives=gives,
        fixed_rows=test == FIXED,
        reference=torch.no_grad()(lambda ids: model_of_teacher()(input_ids=torch.tensor([list(ids)])).logits[0]),
    )


@pytest.mark.parametrize(("teacher", "test", "reason"), WRONG)
def test_a_wrong_teacher_fails(teacher, test, reason, tmp_path):
    with pytest.raises(AssertionError, match=reason):
        check(suite(teacher, test), test, tmp_path)


@pytest.mark.parametrize("test", checks_of(TeacherConformance))
def test_a_right_teacher_passes_and_no_test_is_idle(test, tmp_path):
    assert test in {caught for _, caught, _ in WRONG}
    for teacher in (Teacher, TopFive):
        if not (test == PART and teacher is Teacher):
            check(suite(teacher, test), test, tmp_path)
