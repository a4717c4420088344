"""The cache-teacher stage: one pass of the teacher over the rows, in shards that survive an interruption."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from kdkit.api.artifacts import SignalCache
from kdkit.api.errors import DataError, ModelError, StageError, Stopped
from kdkit.models.chat import ChatEncoder
from kdkit.models.load import check_same_vocabulary, load_model, load_tokenizer, token_fingerprint, vocabulary
from kdkit.plugins.stages.caching_ask import Questions
from kdkit.train.encoding import encode_rows
from kdkit.train.signal_cache.description import Identity, RuleFacts, Start, VocabularyFacts, difference
from kdkit.train.signal_cache.files import read_file, write_file
from kdkit.train.signal_cache.identity import teacher_identity, template_hash
from kdkit.train.signal_cache.ids import IdCode
from kdkit.train.signal_cache.rows import Row, row_hash
from kdkit.train.signal_cache.select import Rule
from kdkit.train.signal_cache.store import MOST_SHARDS, Reader, Writer, read_counts, write_counts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdkit.api import StageContext, Teacher
    from kdkit.api.protocols import StageOutputs
    from kdkit.models.chat import Encoded
    from kdkit.plugins.stages.caching_plugin import CacheTeacherStageParams

__all__ = ["run"]

SHARD_ROWS: Final = 256
"""Most rows between two points where the stage can stop and resume."""
SHARD_TOKENS: Final = 2**16
"""Most learned tokens between them, unless a row alone has more: about 9 MB."""
SAMPLE_ROWS: Final = 128
"""Rows whose kept ids make the code."""
_START_BYTES: Final = 2**20


def run(params: CacheTeacherStageParams, ctx: StageContext) -> StageOutputs:
    """Write the cache.

    Raises:
        DataError: No row is left, or the cache to extend is of another teacher, rule, or student.
        ModelError: Teacher and student have different vocabularies.
        ConformanceError: What the teacher says about a row is no distribution.
        StageError: The teacher is not the one that an interrupted attempt asked.
        Stopped: A signal asked for it; finished shards are kept.
    """
    stage = _Stage(params, ctx)
    stage.adopt()
    if stage.start is None or stage.missing(stage.start):
        teacher = ctx.build(params.teacher)
        try:
            stage.work(teacher)
        finally:
            teacher.close()
    return {"cache": stage.finish()}


class _Stage:
    """The rows, cut into shards, and how far the work is.

    Attributes:
        base: The cache that this one extends.
        rows: Rows to ask about, in the order of the datasets: each once, without those of ``base``.
        start: What an earlier attempt, or the preparation, found out.
    """

    def __init__(self, params: CacheTeacherStageParams, ctx: StageContext) -> None:
        self.params, self.ctx = params, ctx
        self.directory, self.started = ctx.out / "cache", ctx.checkpoints / "started.json"
        self.artifact = ctx.resolve(params.student)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.artifact)
        self._tokens = len(self.tokenizer), token_fingerprint(self.tokenizer)
        self.base = self._base()
        self.rows = self._encode()
        self.shards = _cut(self.rows)
        self._first = len(self.base.files) if self.base else 0
        if self._first + len(self.shards) > MOST_SHARDS:
            raise DataError(f"{len(self.rows):,} rows do not fit into one cache", hint="split the datasets")
        self.start = self._resume()

    def _base(self) -> Reader | None:
        if self.params.extends is None:
            return None
        path = self.ctx.resolve(self.params.extends).path
        base = Reader(path)
        self._same(base.description, self.identity(base.description.vocabulary.width), path)
        return base

    def _same(self, base: Identity, identity: Identity, path: Any) -> None:
        if differs := difference(base, identity):
            hint = "extend it with what it was made with, or make a cache of its own without 'extends'"
            raise DataError(f"the cache to extend has {differs}", where=str(path), hint=hint)

    def _encode(self) -> list[Encoded]:
        """Every row once, in the order of the datasets."""
        encoder, params = ChatEncoder(self.tokenizer), self.params
        unique: dict[bytes, Encoded] = {}
        for component in params.data:
            rows = encode_rows(
                self.ctx.load(component).examples,
                encoder,
                max_length=params.max_length,
                overlong=params.overlong,
                log=self.ctx.log,
                name=f"dataset {component.name}",
            )
            for row in rows:
                unique.setdefault(row_hash(row.ids, row.learned), row)
        if self.base is None:
            return list(unique.values())
        new = [row for key, row in unique.items() if self.base.find(key) is None]
        self.ctx.log(f"{len(unique) - len(new):,} rows are in the cache already, {len(new):,} are asked")
        return new

    def identity(self, width: int) -> Identity:
        """What the rows belong to, as it is now, for so many entries of the vocabulary."""
        p, (tokens, fingerprint) = self.params, self._tokens
        return Identity(
            teacher=teacher_identity(p.teacher, self.ctx),
            vocabulary=VocabularyFacts(width=width, tokens=tokens, fingerprint=fingerprint),
            template=template_hash(self.tokenizer),
            rule=RuleFacts(
                mass=p.mass, min_probability=p.min_probability, max_k=p.max_k, temperature=p.temperature, bits=p.bits
            ),
        )

    def _resume(self) -> Start | None:
        """What an earlier attempt found out; what cannot be used of it is made again."""
        if not self.started.exists():
            return None
        try:
            start = Start.model_validate_json(read_file(self.started, _START_BYTES))
            self._writer(start)
        except (DataError, ValueError) as error:
            why = error if isinstance(error, DataError) else "started.json is damaged"
            self.ctx.log(f"the earlier attempt cannot be continued ({why}): starting over")
            self.started.unlink()
            return None
        self._unchanged(start)
        return start

    def _unchanged(self, start: Start) -> None:
        if differs := difference(start, self.identity(start.vocabulary.width)):
            what = f"the rows that are there were taken with {differs}"
            raise StageError(what, where=str(self.directory), hint="run with --fresh")

    def _writer(self, start: Start) -> Writer:
        """For the shards; the code of the ids is in the directory already."""
        return Writer(self.directory, start)

    def adopt(self) -> None:
        """Begin with the shards of the cache that is extended. Without new rows there is nothing else to do."""
        if self.base is None:
            return
        about = self.base.description
        if self.start is not None and self.start.code != about.code:
            self.start = None
        self.directory.mkdir(parents=True, exist_ok=True)
        write_counts(self.directory, self.base.code.counts)
        start = self.start or Start(**{name: getattr(about, name) for name in Start.model_fields})
        self._writer(start).adopt(self.base)
        if not self.rows:
            self.start = start

    def missing(self, start: Start) -> list[int]:
        """Shards that are not there, or not whole."""
        writer = self._writer(start)
        return [i for i, rows in enumerate(self.shards) if not writer.has(self._first + i, _keys(rows))]

    def work(self, teacher: Teacher) -> None:
        """Whatever is left to do.

        Raises:
            ModelError: The teacher cannot read a row that is as long.
        """
        longest, readable = max((len(row.ids) for row in self.rows), default=0), getattr(teacher, "positions", None)
        if readable is not None and longest > readable:
            what = f"a row has {longest} tokens, and the teacher {readable} positions"
            raise ModelError(what, where=f"teacher {self.params.teacher.name}", hint=f"set max_length: {readable}")
        self.start = start = self.start or self._prepare(teacher)
        writer, done, todo = self._writer(start), len(self.rows), self.missing(start)
        questions = self._questions(teacher, start.vocabulary.width)
        done -= sum(len(self.shards[number]) for number in todo)
        for number in todo:
            began, rows = time.monotonic(), self.shards[number]
            writer.write(self._first + number, _keys(rows), questions.ask(rows))
            done += len(rows)
            speed = sum(row.targets for row in rows) / max(time.monotonic() - began, 1e-9)
            self.ctx.progress(done, len(self.rows), tokens_per_s=speed)
            if self.ctx.stopping() and number != todo[-1]:
                raise Stopped(f"stopped after {done} rows, which are kept")

    def finish(self) -> SignalCache:
        """Describe the cache, and say what it costs and what it loses."""
        start = self.start
        if start is None:
            raise StageError("nothing was prepared", where=str(self.directory))
        self._unchanged(start)
        about = self._writer(start).finish(self._first + len(self.shards))
        totals = about.totals.model_dump()
        facts = {**totals, "bytes_per_token": totals["bytes"] / max(totals["tokens"], 1), **about.measured}
        self.ctx.metrics({f"cache/{name}": value for name, value in facts.items()}, step=totals["rows"])
        self.ctx.log(f"cache of {about.teacher.name!r} (fingerprint {about.digest[:12]}): {_summary(facts)}")
        return SignalCache(path=self.directory, info=facts)

    def _prepare(self, teacher: Teacher) -> Start:
        """Make the code of the ids from a sample of rows, unless there is one, and measure the loss on others."""
        model = load_model(self.artifact, dtype=_dtype(self.ctx)).to(self.ctx.device)
        width = check_same_vocabulary(vocabulary(self.tokenizer, model), teacher.vocabulary)
        identity, questions = self.identity(width), self._questions(teacher, width)
        sample, held_out = _samples(self.rows, self.params.measured_rows)
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.base is None:
            counts = np.zeros(width, dtype=np.int64)
            for entry in questions.ask(sample):
                counts += np.bincount(entry.kept.ids, minlength=width)
            write_counts(self.directory, counts)
        else:
            self._same(self.base.description, identity, self.params.extends)
        code = IdCode(read_counts(self.directory, width))
        measured = questions.measure(held_out, model, code, self.ctx.log)
        start = Start(**{name: getattr(identity, name) for name in Identity.model_fields}, code=code.digest,
                      measured=measured)  # fmt: skip
        self.started.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.started, json.dumps(start.model_dump(), allow_nan=False).encode())
        return start

    def _questions(self, teacher: Teacher, width: int) -> Questions:
        p = self.params
        rule = Rule(
            mass=p.mass, min_probability=p.min_probability, max_k=p.max_k, temperature=p.temperature, bits=p.bits,
            vocabulary=width,
        )  # fmt: skip
        return Questions(teacher, rule, p.per_device_batch_size, self.ctx.device)


def _cut(rows: Sequence[Encoded]) -> list[list[Encoded]]:
    """Shards of a bounded number of rows and of tokens."""
    shards: list[list[Encoded]] = []
    tokens = 0
    for row in rows:
        if not shards or len(shards[-1]) >= SHARD_ROWS or tokens + row.targets > SHARD_TOKENS:
            shards.append([])
            tokens = 0
        shards[-1].append(row)
        tokens += row.targets
    return shards


def _samples(rows: Sequence[Encoded], measured: int) -> tuple[list[Encoded], list[Encoded]]:
    """Rows to make the code from and others to measure on, both spread over all rows; one row serves both."""
    places = np.unique(np.linspace(0, len(rows) - 1, num=2 * SAMPLE_ROWS).astype(int)).tolist()
    ones, others = places[::2], places[1::2] or places
    step = max(1, len(others) // measured)
    return [rows[i] for i in ones], [rows[i] for i in others[::step][:measured]]


def _keys(rows: Sequence[Encoded]) -> list[Row]:
    return [Row(row.id, row_hash(row.ids, row.learned), row.targets) for row in rows]


def _dtype(ctx: StageContext) -> torch.dtype:
    return torch.bfloat16 if ctx.precision("auto") == "bf16" else torch.float32


def _summary(facts: Mapping[str, Any]) -> str:
    size = f"{facts['bytes_per_token']:.1f} bytes/token of all files"
    text = f"{facts['rows']:,} rows, {facts['tokens']:,} learned tokens, {size}"
    if "mean_k" in facts:
        rows, tokens = facts.get("measured_rows", 0), facts.get("measured_tokens", 0)
        text += f"; measured on {rows:.0f} rows ({tokens:.0f} tokens): {facts['mean_k']:.1f} ids kept on average"
    if "kl" not in facts:
        return f"{text}; the teacher gives no logits, so the error is not measured"
    names = (("gradient_cosine_start", "at the student's start"), ("gradient_cosine_near_teacher", "near the teacher"))
    cosines = [f"{facts[name]:.5f} {where}" for name, where in names if name in facts]
    error = f"KL(full || cached) {facts['kl']:.4g} nats/token, gradient cosine {' and '.join(cosines)}"
    return f"{text}, {error}"
