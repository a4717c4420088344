"""The stage lm-eval: every model on every task, with the loading of kdkit and the scoring of the harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from kdkit.api.artifacts import Scores
from kdkit.api.errors import ModelError, Stopped
from kdkit.plugins.stages.lm_eval_scores import Collected, collected
from kdkit.plugins.stages.lm_eval_tasks import Tasks, guarded
from kdkit.plugins.stages.memory import release_memory
from kdkit.plugins.stages.subjects import Subject, facts, load_subject

if TYPE_CHECKING:
    from kdkit.api import StageContext
    from kdkit.api.protocols import StageOutputs
    from kdkit.plugins.stages.lm_eval_plugin import LmEvalParams

__all__ = ["run"]


def run(params: LmEvalParams, ctx: StageContext) -> StageOutputs:
    """Write ``scores/scores.json``, and what the harness says of every example to ``scores/lm-eval``.

    Raises:
        DataError: A task is not known, or its files are wrong.
        EnvironmentUnmet: A task's data has to be fetched and cannot be.
        ModelError: A model cannot be loaded, or has no chat template where one is to be applied.
        Stopped: A signal asked for it; nothing is kept.
    """
    return _Run(params, ctx).run()


class _Run:
    def __init__(self, params: LmEvalParams, ctx: StageContext) -> None:
        self.params, self.ctx = params, ctx
        self.root = ctx.out / "scores"
        directory = ctx.resolve(params.include_path).path if params.include_path is not None else None
        self.models = {name: ctx.resolve(ref) for name, ref in params.models.items()}
        self.tasks = Tasks(params, directory, ctx.seed_for("lm-eval"))
        self.steps = len(params.models) * len(params.tasks)
        self.scores: dict[str, Any] = {"models": {}, "baselines": {}, "datasets": {}, "harness": {}}

    def run(self) -> StageOutputs:
        # A task that cannot be loaded is found before the first model is.
        for name, task in self.params.tasks.items():
            loaded = self.tasks.load(task)
            self.scores["harness"][name] = {part: str(found.VERSION) for part, found in loaded["tasks"].items()}
        self.ctx.log(f"lm-evaluation-harness {lm_eval.__version__}: {', '.join(self.params.tasks.values())}")
        for place, name in enumerate(self.models):
            self._model(name, place * len(self.params.tasks))
            release_memory()
        self.ctx.progress(self.steps, self.steps)
        self.root.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.scores, indent=1, allow_nan=False)
        (self.root / "scores.json").write_text(text, encoding="utf-8")
        return {"scores": Scores(path=self.root)}

    def _model(self, name: str, done: int) -> None:
        self.ctx.log(f"{name}: {self.models[name].name}")
        subject = load_subject(name, self.models[name], self.params, self.ctx)
        model = _wrapped(subject, self.params)
        few = self.params.num_fewshot
        decoding = {
            "harness": f"lm-eval {lm_eval.__version__}",
            "num_fewshot": "as the task says" if few is None else few,
            "apply_chat_template": self.params.apply_chat_template,
        }
        results: dict[str, Any] = {}
        self.scores["models"][name] = {**facts(subject), "decoding": decoding, "speed": {}, "results": results}
        for offset, (dataset, task) in enumerate(self.params.tasks.items()):
            if self.ctx.stopping():
                raise Stopped(f"stopped before {name} on {dataset}; an evaluation starts again from the beginning")
            self.ctx.progress(done + offset, self.steps)
            found = self._task(model, task)
            results[dataset] = found.metrics
            self.scores["datasets"][dataset] = {"n": len(found.categories), "categories": found.categories}
            for line in found.notes:
                self.ctx.log(f"{name} on {dataset}: {line}")
            _write(self.root / "lm-eval" / f"{name}--{dataset}.jsonl", found.samples)

    def _task(self, model: HFLM, task: str) -> Collected:
        loaded = self.tasks.load(task)
        with guarded(allow_code=self.params.allow_code):
            answered = evaluate(
                model,
                loaded,
                limit=self.params.limit,
                bootstrap_iters=0,
                system_instruction=self.params.system_instruction,
                apply_chat_template=self.params.apply_chat_template,
                fewshot_as_multiturn=self.params.apply_chat_template,
            )
        return collected(loaded["tasks"], answered["samples"], resamples=self.params.resamples)


class _Quiet(HFLM):
    """The harness's model without progress bars: the stage shows its own."""

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:  # noqa: FBT001, FBT002 - the harness's
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:  # noqa: FBT001, FBT002
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:  # noqa: FBT001, FBT002
        return super().generate_until(requests, disable_tqdm=disable_tqdm)


def _wrapped(subject: Subject, params: LmEvalParams) -> HFLM:
    if params.apply_chat_template and subject.tokenizer.chat_template is None:
        hint = "leave apply_chat_template out"
        raise ModelError("it has no chat template", where=f"model {subject.name}", hint=hint)
    return _Quiet(
        pretrained=subject.model,
        tokenizer=subject.tokenizer,
        backend="causal",
        batch_size=params.per_device_eval_batch_size,
        max_length=params.max_length,
    )


def _write(file: Path, samples: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", errors="backslashreplace") as out:
        for sample in samples:
            out.write(json.dumps(sample, ensure_ascii=False, default=str) + "\n")
