"""The evaluate stage: every model answers the same prompts and is scored on the same references.

All models answer before the teacher is loaded, so that speed and memory are those of a model on its own. Where metrics
need the teacher, each model is then loaded a second time for the teacher-forced passes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kdkit.api.artifacts import Model, Scores
from kdkit.api.errors import DataError, Stopped
from kdkit.models.chat import ChatEncoder
from kdkit.models.load import Vocabulary, check_same_vocabulary, load_tokenizer, vocabulary
from kdkit.models.pretrained import read_config
from kdkit.plugins.stages.decoding import Decoded, decode
from kdkit.plugins.stages.forced import Forcing
from kdkit.plugins.stages.judging import verdicts
from kdkit.plugins.stages.memory import PeakMemory, release_memory
from kdkit.plugins.stages.probing import probe
from kdkit.plugins.stages.questions import load_questions, prompt_ids, without_overlong
from kdkit.plugins.stages.results import Answered, Results
from kdkit.plugins.stages.rewarding import answers_as_rollouts, reward_entries
from kdkit.plugins.stages.slots import DECODED, FORCED, all_needs
from kdkit.plugins.stages.subjects import Subject, facts, load_subject
from kdkit.train.rewards import RewardSet

if TYPE_CHECKING:
    from kdkit.api import Completion, StageContext, Teacher
    from kdkit.api.protocols import StageOutputs
    from kdkit.plugins.stages.plugin import EvaluateParams

__all__ = ["run"]


def run(params: EvaluateParams, ctx: StageContext) -> StageOutputs:
    """Write ``scores/scores.json`` and one predictions file per model or baseline and dataset.

    Raises:
        DataError: A dataset has no row with a reference, or a prompt is too long.
        ModelError: A model cannot be loaded, or the teacher has another vocabulary.
        Stopped: A signal asked for it; nothing is kept.
    """
    return _Evaluation(params, ctx).run()


class _Evaluation:
    def __init__(self, params: EvaluateParams, ctx: StageContext) -> None:
        self.params, self.ctx = params, ctx
        self.root = ctx.out / "scores"
        self.results = Results(params.metrics, ctx, self.root / "predictions")
        self.needs = all_needs(params.metrics)
        self.decodes, self.with_teacher = bool(self.needs & DECODED or params.rewards), bool(self.needs & FORCED)
        self.models: dict[str, Model] = {name: ctx.resolve(ref) for name, ref in params.models.items()}
        self.loaded = load_questions(params, ctx)
        self.data = {name: loaded.rows for name, loaded in self.loaded.items()}
        self.answered = {(model, dataset): Answered() for model in self.models for dataset in self.data}
        self.facts: dict[str, dict[str, Any]] = {}
        passes = [
            self.decodes,
            params.judge is not None,
            bool(params.rewards),
            self.with_teacher or "nll" in self.needs,
        ]
        self.steps = max(1, sum(passes) * len(self.answered))
        self.done = 0

    def run(self) -> StageOutputs:
        self._check_models()
        if self.decodes or not self.with_teacher:
            for name in self.models:
                self._alone(name)
                release_memory()
        self._judge()
        self._reward()
        if self.with_teacher:
            with self._teacher() as teacher:
                answers = self._teacher_answers(teacher)
                for name in self.models:
                    self._beside(name, teacher, answers)
                    release_memory()
        self._write()
        return {"scores": Scores(path=self.root)}

    def _check_models(self) -> None:
        """Find a prompt that is too long, or a vocabulary that is not the teacher's, before the first model answers."""
        theirs: Vocabulary | None = None
        if self.with_teacher and self.decodes:
            with self._teacher() as teacher:
                theirs = teacher.vocabulary
        encoders: dict[str, ChatEncoder] = {}
        for name, artifact in self.models.items():
            tokenizer = load_tokenizer(artifact)
            encoders[name] = ChatEncoder(tokenizer)
            if theirs is not None:
                config = read_config(artifact.path, trust_remote_code=artifact.trust_remote_code)
                check_same_vocabulary(vocabulary(tokenizer, config), theirs)
        self.data = without_overlong(self.data, list(encoders.values()), self.params, self.ctx)
        for name, encoder in encoders.items():
            for dataset, rows in self.data.items():
                prompt_ids(encoder, dataset, rows, self.params)
                self.answered[name, dataset].prompts = [encoder.prompt_text(row) for row in rows]

    @contextmanager
    def _teacher(self) -> Iterator[Teacher]:
        """The teacher, whose memory is free again afterwards."""
        if self.params.teacher is None:
            raise DataError("a metric needs a teacher", where=f"stage {self.ctx.name}")
        teacher = self.ctx.build(self.params.teacher)
        try:
            yield teacher
        finally:
            teacher.close()
            release_memory()

    def _alone(self, name: str) -> None:
        """Decode with one model, and score its references where that needs no teacher."""
        self.ctx.log(f"{name}: {self.models[name].name}")
        with PeakMemory(self.ctx.device) as memory:
            subject = load_subject(name, self.models[name], self.params, self.ctx)
            decoded = Decoded()
            if self.decodes:
                decoded = decode(subject, self.data, self.params, self.ctx, lambda dataset: self._step(name, dataset))
        if self.decodes:
            decoded.alone = probe(subject, self.data, self.params)
        self._describe(subject, decoded, memory.peak_bytes if self.decodes else None)
        for dataset, completions in decoded.answers.items():
            self.answered[name, dataset].completions = completions
        if "nll" in self.needs and not self.with_teacher:
            forcing = Forcing(subject, self.params, self.ctx, None)
            for dataset, rows in self.data.items():
                self._step(name, dataset)
                self.answered[name, dataset].forced.scores = forcing.references(dataset, rows)

    def _judge(self) -> None:
        if self.params.judge is None:
            return
        judge, name = self.ctx.build(self.params.judge), self.params.judge.name
        for (model, dataset), answered in self.answered.items():
            self._step(model, dataset)
            rows = self.data[dataset]
            answered.verdicts, unjudged = verdicts(judge, name, answered.prompts, rows, answered.completions)
            if unjudged:
                reasons = ", ".join(f"{count} {reason}" for reason, count in unjudged.items())
                self.ctx.log(f"{model} on {dataset}: not judged: {reasons} (of {len(answered.verdicts)} answers)")
        close = getattr(judge, "close", None)
        if close is not None:
            close()

    def _reward(self) -> None:
        if not self.params.rewards:
            return
        rewards = RewardSet.build(self.params.rewards, self.ctx)
        try:
            for (model, dataset), answered in self.answered.items():
                self._step(model, dataset)
                rollouts = answers_as_rollouts(answered.prompts, self.data[dataset], answered.completions)
                answered.rewards = reward_entries(self.params.rewards, rewards, rollouts)
        finally:
            rewards.close()

    def _teacher_answers(self, teacher: Teacher) -> dict[str, Sequence[Completion]]:
        """The teacher's answers by dataset, made once for all models, with the decoding of the models."""
        if "exposure" not in self.needs:
            return {}
        seed = self.ctx.seed_for("teacher answers")
        self.ctx.log("the teacher answers the prompts")
        return {name: teacher.generate(rows, self.params.sampling, seed) for name, rows in self.data.items()}

    def _beside(self, name: str, teacher: Teacher, answers: dict[str, Sequence[Completion]]) -> None:
        """Score one model's references, and its own answers, beside the teacher."""
        self.ctx.log(f"{name}: teacher-forced")
        subject = load_subject(name, self.models[name], self.params, self.ctx)
        if name not in self.facts:
            self._describe(subject, Decoded(), None)
        forcing = Forcing(subject, self.params, self.ctx, teacher)
        for dataset, rows in self.data.items():
            self._step(name, dataset)
            answered = self.answered[name, dataset]
            if self.needs & {"nll", "teacher-kl"}:
                answered.forced.scores = forcing.references(dataset, rows)
            first = answered.completions[:: self.params.num_samples]
            if dataset in answers:
                answered.forced.add(forcing.exposure(teacher, rows, first, answers[dataset]))
            if "student-kl" in self.needs:
                answered.forced.add(forcing.own(teacher, rows, first))

    def _describe(self, subject: Subject, decoded: Decoded, peak: int | None) -> None:
        decoding = {**self.params.sampling.model_dump(), "num_samples": self.params.num_samples}
        self.facts[subject.name] = {**facts(subject), "decoding": decoding, "speed": decoded.speed(peak)}

    def _step(self, model: str, dataset: str) -> None:
        """Called before each unit of work: one pass of one model over one dataset."""
        if self.ctx.stopping():
            raise Stopped(f"stopped before {model} on {dataset}; an evaluation starts again from the beginning")
        self.ctx.progress(self.done, self.steps)
        self.done += 1

    def _write(self) -> None:
        models: dict[str, Any] = {name: {**self.facts[name], "results": {}, "counts": {}} for name in self.models}
        predictions = {
            (model, dataset): answered.predictions(self.data[dataset])
            for (model, dataset), answered in self.answered.items()
        }
        # All files first: they are what is left to look at when a metric fails.
        for (model, dataset), rows in predictions.items():
            self.results.write(model, dataset, rows)
        for (model, dataset), rows in predictions.items():
            answered = self.answered[model, dataset]
            found = self.results.score(rows, about=f"{model} on {dataset}")
            models[model]["results"][dataset] = {**found, **answered.rewards}
            models[model]["counts"][dataset] = answered.counts(len(self.data[dataset]))
        self.ctx.progress(self.steps, self.steps)
        baselines = self.results.baselines(self.data) if self.params.baselines else {}
        datasets = {
            name: {
                "n": len(rows),
                "overlong": len(self.loaded[name].rows) - len(rows),
                "unreferenced": self.loaded[name].unreferenced,
                "categories": {row.id: row.category for row in rows},
            }
            for name, rows in self.data.items()
        }
        scores = {"models": models, "baselines": baselines, "datasets": datasets}
        text = json.dumps(scores, indent=1, allow_nan=False)
        (self.root / "scores.json").write_text(text, encoding="utf-8")
