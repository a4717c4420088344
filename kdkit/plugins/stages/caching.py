"""The cache-teacher stage: one pass of the teacher over the rows, in shards that survive an interruption."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from kdkit.api.artifacts import SignalCache
from kdkit.api.data import Dense
from kdkit.api.errors import Stopped
from kdkit.models.chat import ChatEncoder
from kdkit.models.heads import split
from kdkit.models.load import check_same_vocabulary, load_model, load_tokenizer, vocabulary
from kdkit.train.batching import collate, micro_batches
from kdkit.train.encoding import encode_rows
from kdkit.train.objective import block_tokens, valid_hidden
from kdkit.train.packing import pack
from kdkit.train.signal_cache.encode import decode_row, encode_row, join
from kdkit.train.signal_cache.identity import teacher_identity, template_hash
from kdkit.train.signal_cache.ids import IdCode
from kdkit.train.signal_cache.measure import Loss, measure
from kdkit.train.signal_cache.rows import Row, row_hash, rows_of
from kdkit.train.signal_cache.select import Rule
from kdkit.train.signal_cache.store import Entry, Writer, read_counts, write_counts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kdkit.api import StageContext, Teacher, TokenBatch
    from kdkit.api.protocols import StageOutputs
    from kdkit.models.chat import Encoded
    from kdkit.plugins.stages.caching_plugin import CacheTeacherStageParams

__all__ = ["run"]

SHARD_ROWS: Final = 256
"""Rows between two points where the stage can stop and resume."""
SAMPLE_ROWS: Final = 128
"""Rows whose kept ids make the code."""


def run(params: CacheTeacherStageParams, ctx: StageContext) -> StageOutputs:
    """Write the cache.

    Raises:
        DataError: No row is left.
        ModelError: Teacher and student have different vocabularies.
        Stopped: A signal asked for it; finished shards are kept.
    """
    stage = _Stage(params, ctx)
    if not stage.started.exists() or stage.missing():
        teacher = ctx.build(params.teacher)
        try:
            stage.work(teacher)
        finally:
            teacher.close()
    return {"cache": stage.finish()}


@dataclass(frozen=True, slots=True)
class _Start:
    """What has to be known before the first shard: widths, and what the cache will lose."""

    width: int
    tokens: int
    fingerprint: str
    measured: Mapping[str, float]


class _Stage:
    """The rows, cut into shards, and how far the work is."""

    def __init__(self, params: CacheTeacherStageParams, ctx: StageContext) -> None:
        self.params, self.ctx = params, ctx
        self.artifact = ctx.resolve(params.student)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.artifact)
        self.rows = self._encode()
        self.shards = [self.rows[start : start + SHARD_ROWS] for start in range(0, len(self.rows), SHARD_ROWS)]
        self.directory = ctx.out / "cache"
        self.started = ctx.checkpoints / "started.json"

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
        return list(unique.values())

    def start(self) -> _Start:
        """What an earlier attempt found out."""
        return _Start(**json.loads(self.started.read_text(encoding="utf-8")))

    def writer(self) -> Writer:
        """For the shards; the code of the ids is in the directory already."""
        code = IdCode(read_counts(self.directory, self.start().width))
        return Writer(self.directory, code, self.params.bits)

    def missing(self) -> list[int]:
        """Shards that are not there, or not whole."""
        writer = self.writer()
        return [number for number, rows in enumerate(self.shards) if not writer.has(number, _keys(rows))]

    def work(self, teacher: Teacher) -> None:
        """Whatever is left to do."""
        if not self.started.exists():
            self._prepare(teacher)
        width, writer, done = self.start().width, self.writer(), len(self.rows)
        todo = self.missing()
        done -= sum(len(self.shards[number]) for number in todo)
        for number in todo:
            began = time.monotonic()
            entries = self._ask(teacher, self.shards[number], self._rule(width))
            writer.write(number, entries)
            done += len(entries)
            tokens = sum(entry.row.tokens for entry in entries)
            speed = tokens / max(time.monotonic() - began, 1e-9)
            self.ctx.progress(done, len(self.rows), tokens_per_s=speed)
            if self.ctx.stopping() and number != todo[-1]:
                raise Stopped(f"stopped after {done} rows, which are kept")

    def finish(self) -> SignalCache:
        """Describe the cache, and say what it costs and what it loses."""
        start = self.start()
        rule = asdict(self._rule(start.width))
        width = rule.pop("vocabulary")
        data = self.writer().finish(
            len(self.shards),
            {
                "teacher": teacher_identity(self.params.teacher, self.ctx),
                "vocabulary": {
                    "width": width,
                    "tokens": start.tokens,
                    "fingerprint": start.fingerprint,
                },
                "template": template_hash(self.tokenizer),
                "rule": rule,
                "measured": dict(start.measured),
            },
        )
        totals = data["totals"]
        facts = {**totals, "bytes_per_token": totals["bytes"] / totals["tokens"], **start.measured}
        self.ctx.metrics({f"cache/{name}": value for name, value in facts.items()}, step=totals["rows"])
        self.ctx.log(_summary(facts))
        return SignalCache(path=self.directory, info=facts)

    def _prepare(self, teacher: Teacher) -> None:
        """Make the code of the ids from a sample of rows, and measure the loss on others."""
        model = load_model(self.artifact, dtype=_dtype(self.ctx)).to(self.ctx.device)
        own = vocabulary(self.tokenizer, model)
        width = check_same_vocabulary(own, teacher.vocabulary)
        rule = self._rule(width)
        sample, held_out = _samples(self.rows, self.params.measured_rows)
        counts = np.zeros(width, dtype=np.int64)
        for entry in self._ask(teacher, sample, rule):
            counts += np.bincount(entry.kept.ids, minlength=width)
        self.directory.mkdir(parents=True, exist_ok=True)
        write_counts(self.directory, counts)
        code = IdCode(read_counts(self.directory, width))
        measured = self._measure(teacher, model, held_out, rule, code)
        start = _Start(width, own.tokens, own.fingerprint, measured)
        self.started.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.started.with_name(f".{self.started.name}")
        temporary.write_text(json.dumps(asdict(start)), encoding="utf-8")
        temporary.replace(self.started)

    def _rule(self, width: int) -> Rule:
        p = self.params
        return Rule(
            mass=p.mass, min_probability=p.min_probability, max_k=p.max_k, temperature=p.temperature, bits=p.bits,
            vocabulary=width,
        )  # fmt: skip

    def _ask(self, teacher: Teacher, rows: Sequence[Encoded], rule: Rule) -> list[Entry]:
        """What is kept of each row, in the order of the rows."""
        found: dict[bytes, Entry] = {}
        for part in micro_batches(rows, self.params.per_device_batch_size):
            batch = pack(part, device=self.ctx.device)
            docs = rows_of(batch)
            signals, tokens = teacher.signals(batch), sum(doc.tokens for doc in docs)
            blocks = [rule.keep(signals.block(*span)) for span in _spans(tokens, rule.vocabulary)]
            kept, start = join(blocks), 0
            for doc in docs:
                found[doc.hash] = Entry(doc, kept.part(start, start + doc.tokens))
                start += doc.tokens
        return [found[key.hash] for key in _keys(rows)]

    @torch.no_grad()
    def _measure(
        self, teacher: Teacher, model: PreTrainedModel, rows: Sequence[Encoded], rule: Rule, code: IdCode
    ) -> dict[str, float]:
        """Error and k on rows that the code was not made from; only k for a teacher that gives no logits."""
        total, sizes = Loss(), []
        for part in micro_batches(rows, self.params.per_device_batch_size):
            batch = collate(part, device=self.ctx.device)
            signals, logits = teacher.signals(batch), _Logits(model, batch)
            for start, stop in _spans(logits.tokens, rule.vocabulary):
                signal = signals.block(start, stop)
                kept = rule.keep(signal)
                sizes.append(kept.k)
                if isinstance(signal, Dense):
                    read = decode_row(encode_row(kept, code, rule.bits), kept.tokens, code)
                    dense = signal.logits[:, : rule.vocabulary].float()
                    measure(total, dense, logits.block(start, stop)[:, : rule.vocabulary], read, rule.temperature)
        values = total.values() if total.tokens else {}
        return {"mean_k": float(np.concatenate(sizes).mean()), **values}


class _Logits:
    """The student's logits of a padded batch, a block at a time."""

    def __init__(self, model: PreTrainedModel, batch: TokenBatch) -> None:
        self._parts = split(model)
        self._hidden = valid_hidden(self._parts.trunk, batch)
        self.tokens = len(self._hidden)

    def block(self, start: int, stop: int) -> torch.Tensor:
        """[stop - start, V] float32."""
        return self._parts.project(self._hidden[start:stop]).float()


def _samples(rows: Sequence[Encoded], measured: int) -> tuple[list[Encoded], list[Encoded]]:
    """Rows to make the code from and others to measure on, both spread over all rows; one row serves both."""
    places = np.unique(np.linspace(0, len(rows) - 1, num=2 * SAMPLE_ROWS).astype(int)).tolist()
    ones, others = places[::2], places[1::2] or places
    step = max(1, len(others) // measured)
    return [rows[i] for i in ones], [rows[i] for i in others[::step][:measured]]


def _keys(rows: Sequence[Encoded]) -> list[Row]:
    return [Row(row.id, row_hash(row.ids, row.learned), row.targets) for row in rows]


def _spans(tokens: int, width: int) -> Iterator[tuple[int, int]]:
    size = block_tokens(width)
    for start in range(0, tokens, size):
        yield start, min(tokens, start + size)


def _dtype(ctx: StageContext) -> torch.dtype:
    return torch.bfloat16 if ctx.precision("auto") == "bf16" else torch.float32


def _summary(facts: Mapping[str, Any]) -> str:
    text = (
        f"{facts['rows']:,} rows, {facts['tokens']:,} learned tokens, {facts['bytes_per_token']:.1f} bytes/token, "
        f"{facts['mean_k']:.1f} tokens kept on average"
    )
    if "kl" not in facts:
        return f"{text}; the teacher gives no logits, so the error is not measured"
    error = f"KL(full || cached) {facts['kl']:.4g} nats/token, gradient cosine {facts['gradient_cosine']:.5f}"
    return f"{text}; {error} on held-out rows"
