"""Who takes part in benchmarks/kd_step.py: each trains the same student on the same rows, step by step.

A contender makes exactly one optimiser step for each entry of ``Job.steps`` and returns the student. How long a step
takes and what it needs is measured from outside, in a hook that torch calls after every step of any optimiser: weights,
gradients and optimiser state are all in memory there, and nothing else is.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import logging
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdkit.api.artifacts import Model
from kdkit.models.chat import Encoded
from kdkit.models.load import load_model
from kdkit.plugins.losses.token import JSD
from kdkit.plugins.teachers.local import LocalTeacher
from kdkit.plugins.teachers.plugin import LocalTeacherParams
from kdkit.train.batching import DataOrder, collate
from kdkit.train.loop import data_task, train
from kdkit.train.objective import LossTerm
from kdkit.train.params import TrainParams

LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Job:
    """What is trained: directories of both models, the rows of every step, precision, device.

    ``recompute``: activations are computed again in the backward pass. ``beta``: of the JSD; 0 is the forward KL.
    """

    student: Path
    teacher: Path
    steps: list[list[Encoded]]
    precision: str = "bf16"
    device: str = "cpu"
    recompute: bool = False
    beta: float = 0.0

    @property
    def compute(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def models(self) -> tuple[Any, Any]:
        """Student with float32 master weights, and teacher in the precision of the matrix products."""
        student = AutoModelForCausalLM.from_pretrained(self.student, dtype=torch.float32)
        teacher = AutoModelForCausalLM.from_pretrained(self.teacher, dtype=self.compute).eval()
        return student.to(self.device).train(), teacher.to(self.device).requires_grad_(requires_grad=False)

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.student)


# --- measuring --------------------------------------------------------------------------------------------------------


class Meter:
    """Seconds between the ends of optimiser steps, and the peak of memory above what is there at such an end."""

    def __init__(self, warmup: int, device: str) -> None:
        self.warmup, self.device = warmup, device
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.base = self.state = self._count = 0
        self._last = self._cpu = 0.0
        register_optimizer_step_post_hook(self._stepped)

    def peak(self) -> int:
        """Bytes at the peak of the measured steps, above weights, gradients and optimiser state."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self.base
        return _status("VmHWM") - self.base

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self._count += 1
        if self._count > self.warmup:
            self.seconds.append(perf_counter() - self._last)
            self.cpu_seconds.append(process_time() - self._cpu)
        elif self._count == self.warmup:
            self._settle(optimizer)
        self._last, self._cpu = perf_counter(), process_time()

    def _settle(self, optimizer: torch.optim.Optimizer) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in held if p.grad is not None]
        moments = [v for p in held for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
        self.state = sum(t.numel() * t.element_size() for t in (*held, *grads, *moments))
        gc.collect()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
            return
        with suppress(OSError, AttributeError):  # only glibc has it: freed memory goes back to the system
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
        self.base = _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


# --- kdkit ------------------------------------------------------------------------------------------------------------


@dataclass
class Context:
    """What kdkit's loop and teacher use of a stage context."""

    job: Job
    out: Path
    name: str = "stage"
    recipe: str = "benchmark"
    values: list[dict[str, float]] = field(default_factory=list)

    @property
    def device(self) -> str:
        return self.job.device

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def seed_for(self, purpose: str) -> int:
        return len(purpose)

    def precision(self, requested: str) -> str:  # noqa: ARG002
        return self.job.precision

    def resolve(self, ref: Any) -> Model:  # noqa: ARG002
        return Model(path=self.job.teacher)

    def log(self, message: str) -> None:
        logging.getLogger(__name__).info(message)

    def metrics(self, values: dict[str, float], *, step: int) -> None:  # noqa: ARG002
        self.values.append(values)

    def progress(self, step: int, total: int, **values: float) -> None:
        pass

    def stopping(self) -> bool:
        return False


def kdkit(job: Job) -> Any:
    """The loop, objective and teacher of a distill stage, with its defaults."""
    with tempfile.TemporaryDirectory() as out:
        ctx = Context(job, Path(out))
        teacher = LocalTeacher(LocalTeacherParams.model_construct(precision=job.precision, model=None), ctx)
        student = load_model(Model(path=job.student), dtype=torch.float32, train=True).to(job.device)
        params = TrainParams.model_construct(
            max_steps=len(job.steps),
            per_device_train_batch_size=len(job.steps[0]),
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            gradient_checkpointing=job.recompute,
            save_steps=10**9,
        )
        term = LossTerm("jsd", 1.0, JSD(job.beta))
        order = ctx.seed_for("data-order")
        task = data_task(student, [term], [_in_order(job, ctx)], [1.0], seed=order, signals=teacher.signals)
        train(task, params, ctx, compute=job.compute)
    return student


def _in_order(job: Job, ctx: Context) -> list[Encoded]:
    """The rows such that kdkit's seeded order walks through them as the job says."""
    rows, size = [row for step in job.steps for row in step], len(job.steps[0])
    order = DataOrder([len(rows)], [1.0], ctx.seed_for("data-order"))
    places = [place for step in range(len(job.steps)) for _, place in order.rows_of_step(step, size)]
    placed = dict(zip(places, rows, strict=True))
    return [placed[place] for place in range(len(rows))]


# --- TRL --------------------------------------------------------------------------------------------------------------


def gkd_trainer(job: Job) -> Any:
    """TRL's GKDTrainer on the job's rows, off-policy (lmbda 0), with its own collator."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher = job.models()
    rows = [
        {"prompt": "", "input_ids": list(row.ids), "completion_mask": [int(v) for v in row.learned]}
        for row in itertools.chain(*job.steps)
    ]
    # max_length is what its collator cuts to, from the left; no row is longer.
    config = GKDConfig(
        **_arguments(job), beta=job.beta, lmbda=0.0, max_length=4096, train_sampling_strategy="sequential"
    )
    return GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=job.tokenizer(),
    )


def _arguments(job: Job) -> dict[str, Any]:
    return {
        "output_dir": str(job.student.parent / "trl"),
        "bf16": job.precision == "bf16",
        "use_cpu": job.device == "cpu",
        "max_steps": len(job.steps),
        "per_device_train_batch_size": len(job.steps[0]),
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": job.recompute,
        "max_grad_norm": 1.0,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def trl_gkd(job: Job) -> Any:
    trainer = gkd_trainer(job)
    trainer.train()
    return trainer.model


def trl_distillation(job: Job) -> Any:
    """TRL's DistillationTrainer, which always samples its answers: here they are the data's, and cost it nothing."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer
    from trl.trainer.utils import pad

    class OnData(DistillationTrainer):
        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            fill = self._tokenizer.pad_token_id
            out: dict[str, Any] = {}
            for part, side in (("prompt", "left"), ("completion", "right")):
                ids = [torch.tensor(row[f"{part}_ids"]) for row in inputs]
                ones = [torch.ones_like(row) for row in ids]
                device = self.accelerator.device
                out[f"{part}_ids"] = pad(ids, padding_value=fill, padding_side=side).to(device)
                out[f"{part}_mask"] = pad(ones, padding_value=0, padding_side=side).to(device)
            return out | {"num_items_in_batch": out["completion_mask"].sum()}

    student, teacher = job.models()
    rows = []
    for row in itertools.chain(*job.steps):
        cut = row.learned.index(True)
        rows.append({"prompt": "", "prompt_ids": list(row.ids[:cut]), "completion_ids": list(row.ids[cut:])})
    config = DistillationConfig(
        **_arguments(job), beta=job.beta, temperature=1.0, shuffle_dataset=False, remove_unused_columns=False
    )
    trainer = OnData(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=job.tokenizer(),
    )
    trainer.train()
    return trainer.model


# --- loops of a few lines ---------------------------------------------------------------------------------------------

Loss = Callable[[Any, Any, Any], torch.Tensor]
"""(student, teacher, padded batch) -> mean over the response tokens."""


def _loop(job: Job, loss: Loss) -> Any:
    student, teacher = job.models()
    if job.recompute:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    half = job.compute == torch.bfloat16
    for rows in job.steps:
        batch = collate(rows, device=job.device)
        with torch.autocast(job.device, torch.bfloat16) if half else nullcontext():
            value = loss(student, teacher, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return student


def plain(job: Job) -> Any:
    """What one writes first: padded rows, the full logits of both models, forward KL where there is a response."""

    def loss(student: Any, teacher: Any, batch: Any) -> torch.Tensor:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        log_q = functional.log_softmax(student(**inputs).logits[:, :-1].float(), dim=-1)
        with torch.no_grad():
            log_p = functional.log_softmax(teacher(**inputs).logits[:, :-1].float(), dim=-1)
        per_token = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        mask = batch.labels_mask[:, 1:]
        return (per_token * mask).sum() / mask.sum()

    if job.beta:
        raise ValueError("the plain loop knows only the forward KL: beta 0")
    return _loop(job, loss)


def liger(job: Job) -> Any:
    """Liger's chunked JSD over the hidden states of both models, compiled on a GPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    divergence = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=job.beta, compiled=job.device == "cuda"
    )

    def loss(student: Any, teacher: Any, batch: Any) -> torch.Tensor:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        hidden = student.base_model(**inputs).last_hidden_state[:, :-1].flatten(0, 1)
        with torch.no_grad():
            taught = teacher.base_model(**inputs).last_hidden_state[:, :-1].flatten(0, 1)
        labels = batch.input_ids[:, 1:].masked_fill(~batch.labels_mask[:, 1:], -100).flatten()
        heads = student.get_output_embeddings().weight, teacher.get_output_embeddings().weight
        value: torch.Tensor = divergence(hidden, heads[0], taught, heads[1], labels)
        return value

    return _loop(job, loss)


CONTENDERS: dict[str, Callable[[Job], Any]] = {
    "kdkit": kdkit,
    "trl-gkd": trl_gkd,
    "trl-distillation": trl_distillation,
    "plain": plain,
    "liger": liger,
}


def measure(who: str, job: Job, warmup: int) -> dict[str, Any]:
    """Train, and say how long the steps after the warm-up took and how much memory they needed."""
    warnings.simplefilter("ignore")
    meter = Meter(warmup, job.device)
    CONTENDERS[who](job)
    measured = job.steps[warmup:]
    if len(meter.seconds) != len(measured):
        raise SystemExit(f"{who} made {len(meter.seconds)} measured steps instead of {len(measured)}")
    return {
        "step_seconds": [round(value, 3) for value in meter.seconds],
        "cpu_seconds": [round(value, 2) for value in meter.cpu_seconds],
        "response_tokens": [sum(row.targets for row in step) for step in measured],
        "peak_bytes": meter.peak(),
        "state_bytes": meter.state,
        "base_bytes": meter.base,
    }
