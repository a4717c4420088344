"""Deliberately wrong teachers: each must fail the suite for its own reason, and every check must catch one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from right_teacher import Teacher, model_of_teacher
from suites import check, checks_of, variant

from kdkit.api import Dense, Example
from kdkit.testing.conformance import TeacherConformance
from kdkit.testing.teachers import ScriptedTeacher

PROMPT = [Example(id="x", prompt="?")]


class TopFive(Teacher):
    top_k = 5


def with_kept(top_k=5, **change):
    kept = {"kept": lambda self, s: replace(s, **{k: f(s) for k, f in change.items()}), "top_k": top_k}
    return type("Wrong", (Teacher,), kept)


def with_vocabulary(change):
    def made(self):
        Teacher.__init__(self)
        self.vocabulary = change(self.vocabulary)

    return type("Wrong", (Teacher,), {"__init__": made})


def with_signal(change, top_k=0):
    """Another signal in place of the logits, or of the top-k signal."""
    return type("Wrong", (Teacher,), {"signal": lambda self, logits, labels: change(logits), "top_k": top_k})


class TheSecondTime(TopFive):
    """Changes its mind when it is asked again."""

    asked = 0

    def signals(self, batch, **options):
        self.asked += 1
        return super().signals(batch, **options)

    def kept(self, signal):
        return self.changed(signal) if self.asked > 1 else signal


class OtherTokens(TheSecondTime):
    def changed(self, signal):
        return replace(signal, ids=(signal.ids + 1) % 259)


class OneTokenLess(TheSecondTime):
    def changed(self, signal):
        return replace(signal, ids=signal.ids[1:], logprobs=signal.logprobs[1:])


class EverythingEveryTime(Teacher):
    """Every block is the whole."""

    def signals(self, batch, **options):
        found = super().signals(batch, **options)
        found.block = lambda start, stop: Dense(found.logits)
        return found


class LosesATokenOfPackedRows(Teacher):
    def rows(self, logits, batch):
        found = super().rows(logits, batch)
        return found[1:] if self.packed else found

    def padded(self, batch):
        self.packed = batch.attention_mask is None
        return super().padded(batch)


class StatesThatAreNoNumbers(Teacher):
    def signals(self, batch, **options):
        found = super().signals(batch, **options)
        found.kept = {layer: state * torch.nan for layer, state in found.kept.items()}
        return found


class Strings(Teacher):
    def generate(self, prompts, sampling, seed):
        return [completion.text for completion in super().generate(prompts, sampling, seed)]


class AnswersNobody(Teacher):
    def generate(self, prompts, sampling, seed):
        return super().generate(prompts or PROMPT, sampling, seed)


class Cold(Teacher):
    temperature = 0.0


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
    (with_vocabulary(lambda v: {"size": v.size}), WORDS, "vocabulary is a dict"),
    (with_vocabulary(lambda v: replace(v, fingerprint="")), WORDS, "no fingerprint"),
    (with_vocabulary(lambda v: replace(v, size=0)), WORDS, "a size of 0"),
    (with_vocabulary(lambda v: replace(v, tokens=0)), WORDS, "has 0 tokens"),
    (NewFingerprint, WORDS, "another instance has another vocabulary"),
    (HalfOfTheVocabulary, FIT, "logits are"),
    (NotFinite, FIT, "not finite"),
    (Undeclared, FIT, "a top-k signal, which its spec does not declare"),
    (with_signal(Dense, 5), FIT, "it gives logits, which its spec does not declare"),
    (with_signal(lambda logits: Dense(logits.round().long())), FIT, "logits are torch.int64"),
    (with_signal(lambda logits: logits), FIT, "Tensor is no signal"),
    (with_kept(ids=lambda s: s.ids[:, 0], logprobs=lambda s: s.logprobs[:, 0]), FIT, r"not \[N, K\]"),
    (with_kept(ids=lambda s: s.ids[1:], logprobs=lambda s: s.logprobs[1:]), FIT, r"\d+ rows for \d+ tokens"),
    (with_kept(temperature=lambda s: 0.0), FIT, "the temperature is 0.0"),
    (with_kept(ids=lambda s: s.ids.int()), FIT, "ids are torch.int32"),
    (with_kept(ids=lambda s: s.ids[:, :1]), FIT, "different shapes"),
    (with_kept(logprobs=lambda s: torch.log_softmax(s.logprobs, -1) + 0.1, tail_mass=lambda s: None), PART, "mass of"),
    (with_kept(logprobs=lambda s: torch.log_softmax(s.logprobs, -1)), PART, "not one together"),
    (with_kept(tail_mass=lambda s: s.tail_mass * 0), PART, "not one together"),
    (with_kept(tail_mass=lambda s: s.tail_mass - 1), PART, "a tail is negative"),
    (with_kept(ids=lambda s: s.ids * 0), PART, "an id stands twice"),
    (with_kept(ids=lambda s: s.ids + 259), PART, "not in the vocabulary"),
    (with_kept(logprobs=lambda s: s.logprobs + 9), PART, "a log-probability is above 0"),
    (with_kept(logprobs=lambda s: s.logprobs * torch.nan), PART, "a log-probability is NaN"),
    (with_kept(logprobs=lambda s: s.logprobs - torch.inf), PART, "no log-probability at all"),
    (with_kept(tail_mass=lambda s: s.tail_mass[:1]), PART, r"tail_mass is \(1,\)"),
    (with_kept(taken=lambda s: s.taken[:1]), PART, r"taken is \(1,\)"),
    (with_kept(taken=lambda s: s.taken + 99), PART, "of a taken token is above 0"),
    (with_kept(250, taken=lambda s: s.taken - 1), PART, "two log-probabilities"),
    (ShiftedByOne, KNOWN, "compared with the reference"),
    (WholeBatch, KNOWN, "compared with the reference"),
    (with_kept(ids=lambda s: s.ids.flip(1)), KNOWN, "log-probabilities are off"),
    (with_kept(tail_mass=lambda s: s.tail_mass * 0.9), KNOWN, "the tail is not what the other tokens have"),
    (WithGradient, GRADIENT, "logits has a gradient"),
    (EverythingEveryTime, BLOCKS, r"the block \d+ to \d+ has \d+ rows"),
    (FromTheStart, BLOCKS, "is not that part of the whole"),
    (SeesPadding, ALONE, "left: log-probabilities differ"),
    (IgnoresDocuments, ALONE, "packed: log-probabilities differ"),
    (LosesATokenOfPackedRows, ALONE, r"packed: signals for \d+ tokens, not"),
    (WithDropout, TWICE, "a second time"),
    (OtherTokens, TWICE, "a second time: other tokens are kept"),
    (OneTokenLess, TWICE, "a second time: signals for"),
    (WritesIntoTheBatch, BATCH, "input_ids of the batch was changed"),
    (LayersInOrderOfTheModel, HIDDEN, "another order"),
    (WrongWidths, HIDDEN, "hidden state 1 is"),
    (StatesThatAreNoNumbers, HIDDEN, "hidden state 0 is not finite"),
    (WithGradient, HIDDEN, "hidden state 0 has a gradient"),
    (DropsAPrompt, TEXT, "2 completions for 3 prompts"),
    (NoLimit, TEXT, "with max_new_tokens: 6"),
    (Strings, TEXT, "str is no Completion"),
    (AnswersNobody, TEXT, "no prompts have answers"),
    (Counts, TEXT, "the same seed gives other answers"),
    (AnswersByPlace, TEXT, "order of the prompts"),
    (ClosesOnce, CLOSE, "closed already"),
    (Cold, FIXED, "the temperature is 0.0"),
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
