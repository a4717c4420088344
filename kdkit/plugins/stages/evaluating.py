"""The evaluate stage: every model answers the same prompts and is scored on the same references."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdkit.api.artifacts import Model, Scores
from kdkit.api.data import Completion, Example, MetricResult, Prediction
from kdkit.api.errors import DataError, StageError, Stopped
from kdkit.api.protocols import RolloutModel
from kdkit.models.chat import ChatEncoder
from kdkit.models.heads import verify_split
from kdkit.models.load import check_same_vocabulary, load_model, load_tokenizer, vocabulary
from kdkit.models.save import read_provenance
from kdkit.plugins.stages.memory import PeakMemory
from kdkit.train.encoding import encode_prompts
from kdkit.train.scoring import ExampleScore, score_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kdkit.api import Metric, StageContext, Teacher
    from kdkit.api.protocols import StageOutputs
    from kdkit.plugins.stages.plugin import EvaluateParams

__all__ = ["run"]


@dataclass(frozen=True, slots=True)
class _Subject:
    """A loaded model under test."""

    name: str
    artifact: Model
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: ChatEncoder


@dataclass(slots=True)
class _Speed:
    """Decoding of one model over all datasets."""

    tokens: int = 0
    prompts: int = 0
    seconds: float = 0.0


def run(params: EvaluateParams, ctx: StageContext) -> StageOutputs:
    """Write ``scores/scores.json`` and one predictions file per model and dataset.

    Raises:
        DataError: A dataset has no row with a reference, or a prompt is too long.
        ModelError: A model cannot be loaded, or the teacher has another vocabulary.
    """
    return _Evaluation(params, ctx).run()


class _Evaluation:
    def __init__(self, params: EvaluateParams, ctx: StageContext) -> None:
        self.params, self.ctx = params, ctx
        self.needs = {need for metric in params.metrics for need in _spec(metric).needs}
        self.metrics: dict[str, Metric] = {metric.name: ctx.build(metric) for metric in params.metrics}
        self.data = {name: _with_references(ctx, name, component) for name, component in params.data.items()}
        self.teacher: Teacher | None = None
        self.root = ctx.out / "scores"
        self.done = 0

    def run(self) -> StageOutputs:
        (self.root / "predictions").mkdir(parents=True, exist_ok=True)
        if self.params.teacher is not None and "teacher-kl" in self.needs:
            self.teacher = self.ctx.build(self.params.teacher)
        try:
            self._check_prompts()
            models = {name: self._model(name, ref) for name, ref in self.params.models.items()}
        finally:
            if self.teacher is not None:
                self.teacher.close()
        datasets = {
            name: {"n": len(rows), "categories": {row.id: row.category for row in rows}}
            for name, rows in self.data.items()
        }
        text = json.dumps({"models": models, "datasets": datasets}, indent=1, allow_nan=False)
        (self.root / "scores.json").write_text(text, encoding="utf-8")
        return {"scores": Scores(path=self.root)}

    def _model(self, name: str, ref: Any) -> dict[str, Any]:
        artifact: Model = self.ctx.resolve(ref)
        self.ctx.log(f"{name}: {artifact.name}")
        with PeakMemory(self.ctx.device) as memory:
            subject = self._load(name, artifact)
            speed = _Speed()
            results, counts = {}, {}
            for dataset, rows in self.data.items():
                predictions = self._predict(subject, dataset, rows, speed)
                self._write(name, dataset, predictions)
                results[dataset] = {m: self._score(m, metric, predictions) for m, metric in self.metrics.items()}
                counts[dataset] = _counts(predictions, decoded="completion" in self.needs)
        provenance = read_provenance(artifact.path)
        return {
            # A stage's output is where it lies; anything else is what the recipe calls it.
            "path": str(artifact.path) if artifact.name.startswith("${") else artifact.name,
            "parameters": subject.model.num_parameters(),
            "bytes": _weight_bytes(subject),
            "trained_tokens": int(provenance.get("trained_tokens", 0)),
            "decoding": self.params.sampling.model_dump(),
            "speed": _speed(speed, memory.peak_bytes),
            "results": results,
            "counts": counts,
        }

    def _load(self, name: str, artifact: Model) -> _Subject:
        dtype = torch.bfloat16 if self.ctx.precision(self.params.precision) == "bf16" else torch.float32
        tokenizer = load_tokenizer(artifact)
        model = load_model(artifact, dtype=dtype).to(self.ctx.device)
        verify_split(model)
        if self.teacher is not None:
            check_same_vocabulary(vocabulary(tokenizer, model), self.teacher.vocabulary)
        return _Subject(name, artifact, model, tokenizer, ChatEncoder(tokenizer))

    def _predict(self, subject: _Subject, dataset: str, rows: Sequence[Example], speed: _Speed) -> list[Prediction]:
        if self.ctx.stopping():
            raise Stopped(f"stopped before {subject.name} on {dataset}; an evaluation starts again from the beginning")
        prompts = self._prompts(subject.encoder, dataset, rows)
        decoded = self._decode(subject, prompts, speed) if "completion" in self.needs else [None] * len(rows)
        scores = self._forced(subject, dataset, rows) if self.needs & {"nll", "teacher-kl"} else {}
        self.done += 1
        self.ctx.progress(self.done, len(self.params.models) * len(self.data))
        return [
            _prediction(row, subject.encoder.prompt_text(row), completion, scores.get(row.id))
            for row, completion in zip(rows, decoded, strict=True)
        ]

    def _prompts(self, encoder: ChatEncoder, dataset: str, rows: Sequence[Example]) -> list[list[int]]:
        limit = self.params.max_prompt_length
        return encode_prompts(rows, encoder, max_prompt_length=limit, name=f"dataset {dataset}")

    def _check_prompts(self) -> None:
        """Find a prompt that is too long for any model before the first model answers."""
        for ref in self.params.models.values():
            encoder = ChatEncoder(load_tokenizer(self.ctx.resolve(ref)))
            for dataset, rows in self.data.items():
                self._prompts(encoder, dataset, rows)

    def _decode(self, subject: _Subject, prompts: Sequence[Sequence[int]], speed: _Speed) -> Sequence[Completion]:
        engine = self.ctx.build(
            self.params.rollout,
            RolloutModel(path=subject.artifact.path, tokenizer=subject.tokenizer, live=subject.model),
        )
        seed = self.ctx.seed_for("evaluation")
        started = time.monotonic()
        completions = engine.generate(prompts, self.params.sampling, [seed + i for i in range(len(prompts))])
        speed.seconds += time.monotonic() - started
        speed.prompts += len(prompts)
        speed.tokens += sum(len(completion.token_ids) for completion in completions)
        return completions

    def _forced(self, subject: _Subject, dataset: str, rows: Sequence[Example]) -> Mapping[str, ExampleScore]:
        """Scores of the first reference of every row that fits ``max_length``, by example id."""
        shared = None
        if self.teacher is not None:
            shared = check_same_vocabulary(vocabulary(subject.tokenizer, subject.model), self.teacher.vocabulary)
        encoded = [subject.encoder.training(_answered(row)) for row in rows]
        fitting = [row for row in encoded if len(row.ids) <= self.params.max_length and row.targets]
        if len(fitting) < len(encoded):
            left_out = len(encoded) - len(fitting)
            self.ctx.log(f"{dataset}: {left_out} rows over max_length={self.params.max_length} have no perplexity")
        scores = score_examples(
            subject.model,
            fitting,
            batch_size=self.params.per_device_eval_batch_size,
            signals=self.teacher.signals if self.teacher is not None else None,
            vocabulary=shared,
        )
        return {row.id: score for row, score in zip(fitting, scores, strict=True)}

    def _score(self, name: str, metric: Metric, predictions: Sequence[Prediction]) -> dict[str, Any]:
        result: MetricResult = metric.score(predictions)
        if len(result.per_example) != result.n or (result.ids and len(result.ids) != result.n):
            raise StageError("per_example, ids and n disagree", where=f"metric {name}")
        spec = next(_spec(m) for m in self.params.metrics if m.name == name)
        ids = result.ids or tuple(p.id for p in predictions)
        facts = {"higher_is_better": spec.higher_is_better, "unit": spec.unit, "ids": list(ids)}
        return {**asdict(result), **facts}

    def _write(self, model: str, dataset: str, predictions: Sequence[Prediction]) -> None:
        file: Path = self.root / "predictions" / f"{model}--{dataset}.jsonl"
        lines = (json.dumps(asdict(p), ensure_ascii=False, allow_nan=False) for p in predictions)
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _spec(metric: Any) -> Any:
    return metric.found.spec


def _with_references(ctx: StageContext, name: str, component: Any) -> list[Example]:
    rows = [row for row in ctx.load(component).examples if row.targets]
    if not rows:
        raise DataError("no row has a reference to score against", where=f"dataset {name}")
    repeated = len(rows) - len({row.id for row in rows})
    if repeated:
        raise DataError(f"{repeated} rows share the id of another row", where=f"dataset {name}")
    return rows


def _answered(row: Example) -> Example:
    return Example(id=row.id, prompt=row.prompt, completion=row.targets[0])


def _prediction(row: Example, prompt: str, completion: Completion | None, score: ExampleScore | None) -> Prediction:
    measures: dict[str, float] = {}
    if score is not None:
        measures = {"nll": score.nll, "tokens": float(score.tokens)}
        if score.teacher_kl is not None:
            measures["teacher_kl"] = score.teacher_kl
    return Prediction(
        prompt=prompt,
        text=completion.text if completion else "",
        references=row.targets,
        id=row.id,
        category=row.category,
        truncated=bool(completion and completion.truncated),
        measures=measures,
        extra=row.extra,
    )


def _counts(predictions: Sequence[Prediction], *, decoded: bool) -> dict[str, int]:
    empty = sum(not p.text.strip() for p in predictions) if decoded else 0
    return {"n": len(predictions), "truncated": sum(p.truncated for p in predictions), "empty": empty}


def _weight_bytes(subject: _Subject) -> int:
    """Bytes of the weights on disk; of the weights in memory for a model that is pruned while loading."""
    if subject.artifact.keep_layers is not None:
        return sum(p.numel() * p.element_size() for p in subject.model.parameters())
    return sum(file.stat().st_size for file in subject.artifact.path.glob("*.safetensors"))


def _speed(speed: _Speed, peak: int | None) -> dict[str, float | int | None]:
    per_second = 1 / speed.seconds if speed.seconds else None
    return {
        "generated_tokens_per_s": speed.tokens * per_second if per_second else None,
        "prompts_per_s": speed.prompts * per_second if per_second else None,
        "peak_memory_bytes": peak,
    }
