from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kdkit
from kdkit.api import ConformanceError, DataError, Dense, Example, Message, Model, Ref, Rows, SignalCache, TokenBatch
from kdkit.api.errors import StageError, Stopped
from kdkit.models.chat import ChatEncoder
from kdkit.models.load import vocabulary
from kdkit.plugins.losses.token import ForwardKL
from kdkit.plugins.stages import caching, caching_ask, training
from kdkit.plugins.stages.caching_plugin import CacheTeacherStageParams
from kdkit.plugins.teachers.cache import CacheTeacher
from kdkit.plugins.teachers.local import LocalTeacher
from kdkit.plugins.teachers.plugin import CacheTeacherParams, LocalTeacherParams
from kdkit.testing.tiny import save_tiny_model, tiny_model, tiny_tokenizer
from kdkit.train.batching import collate
from kdkit.train.objective import CausalObjective, LossTerm
from kdkit.train.packing import pack
from kdkit.train.signal_cache.identity import check_weights, model_identity
from kdkit.train.signal_cache.rows import row_hash, rows_of
from kdkit.train.signal_cache.select import Rule, as_topk
from kdkit.train.signal_cache.store import Reader

ROWS = [{"prompt": f"What is {i} + {i}?", "completion": f"It is {2 * i}."} for i in range(40)]
DATA = {"use": "jsonl", "source": "./rows.jsonl", "split": "train", "test_fraction": 0.2}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_tiny_model(root / "teacher", layers=3, seed=1)
    save_tiny_model(root / "student", layers=2, seed=2)
    return root


# --- recipes ----------------------------------------------------------------------------------------------------------


def recipe(tmp_path: Path, stages: dict) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"kdkit": 1, "name": "test", "stages": stages}))
    return file


def cache_stage(models: Path, **values) -> dict:
    teacher = {"use": "local", "model": str(models / "teacher"), "precision": "fp32"}
    base = {"kind": "cache-teacher", "teacher": teacher, "student": str(models / "student"), "data": DATA}
    return {**base, "max_length": 512, **values}


def distill(models: Path, teacher: dict | None = None, **values) -> dict:
    base = {"kind": "distill", "model": str(models / "student"), "data": DATA, "max_length": 512, "max_steps": 6}
    rest = {"precision": "fp32", "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    return {
        **base,
        **rest,
        "teacher": teacher or {"use": "cache", "cache": "${stages.cache.cache}"},
        "losses": [{"use": "forward-kl"}],
        **values,
    }


def run(tmp_path: Path, stages: dict) -> kdkit.RunResult:
    return kdkit.run(recipe(tmp_path, stages), inline=True, out=tmp_path / "runs")


def losses(result: kdkit.RunResult, stage: str) -> list[float]:
    return [line["train/loss"] for line in result.stage(stage).metrics() if "train/loss" in line]


def test_training_from_a_fine_cache_is_training_with_the_teacher(tmp_path, models):
    fine = {"mass": 1.0, "min_probability": 0.0, "max_k": 259, "bits": 16}
    live = {"use": "local", "model": str(models / "teacher"), "precision": "fp32"}
    stages = {"cache": cache_stage(models, **fine), "kd": distill(models), "live": distill(models, live)}
    result = run(tmp_path, stages)
    assert result.ok, result.error
    assert losses(result, "kd") == pytest.approx(losses(result, "live"), rel=1e-4)
    assert losses(result, "kd")[-1] < losses(result, "kd")[0]
    weights = [_weights(result.stage(name).outputs["model"].path) for name in ("kd", "live")]
    start = _weights(models / "student")
    assert torch.dist(*weights) < 0.01 * torch.dist(weights[1], start)


def _weights(path: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return torch.cat([value.flatten() for _, value in sorted(load_file(path / "model.safetensors").items())])


def test_the_stage_says_what_the_cache_costs_and_loses(tmp_path, models):
    result = run(tmp_path, {"cache": cache_stage(models, max_k=20)})
    assert result.ok, result.error
    artifact = result.stage("cache").outputs["cache"]
    assert isinstance(artifact, SignalCache)
    facts = artifact.info
    files = sum(f.stat().st_size for f in artifact.path.iterdir())
    assert facts["bytes_per_token"] == pytest.approx(files / facts["tokens"])
    assert 0.01 < facts["kl"] < 2
    assert 0.5 < facts["gradient_cosine_start"] < 0.9999
    assert 0 < facts["gradient_cosine_near_teacher"] < facts["gradient_cosine_start"]
    assert 0 < facts["measured_rows"] < facts["rows"]
    assert 0 < facts["measured_tokens"] < facts["tokens"]
    assert facts["mean_k"] <= 20
    logged = {k: v for line in result.stage("cache").metrics() for k, v in line.items()}
    assert logged["cache/kl"] == facts["kl"]
    about = json.loads((artifact.path / "cache.json").read_text())
    assert about["rule"]["temperature"] == 1.0
    assert str(models) not in json.dumps(about)


def test_a_cached_cache_is_not_made_again_and_other_rules_are_another_cache(tmp_path, models):
    keys = [run(tmp_path, {"cache": cache_stage(models, **v)}).stage("cache").entry.name for v in ({}, {}, {"bits": 8})]
    assert keys[0] == keys[1] != keys[2]


def test_losses_with_another_temperature_are_refused(tmp_path, models, monkeypatch):
    stages = {"cache": cache_stage(models, temperature=2.0), "kd": distill(models)}
    with monkeypatch.context() as patch:
        patch.setattr(training, "load_student", lambda *_: pytest.fail("the student is not needed to see it"))
        result = run(tmp_path, stages)
    assert "signals were taken at temperature 2, the loss 'forward-kl' wants 1" in str(result.error)
    assert "set 'temperature: 2' on the loss" in str(result.error)
    assert "kd" not in result.stages
    stages["kd"]["losses"] = [{"use": "forward-kl", "temperature": 2.0}]
    assert run(tmp_path, stages).ok


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"max_length": 20, "overlong": "truncate"},
            "is in the teacher cache with other tokens; rows must be rendered",
        ),
        ({"data": {**DATA, "split": "all"}}, "is not in the teacher cache; add its dataset to the data"),
        ({"eval_data": {**DATA, "split": "test"}}, "is not in the teacher cache; add its dataset to the data"),
    ],
)
def test_rows_that_are_not_in_the_cache_are_refused_before_the_first_step(tmp_path, models, change, message):
    result = run(tmp_path, {"cache": cache_stage(models), "kd": distill(models, **change)})
    assert message in str(result.error)
    assert "rows have no signals; the first: row '" in str(result.error)
    assert "\n" not in str(result.error)
    assert "kd" not in result.stages


def test_a_cache_of_another_teacher_is_refused_when_the_recipe_names_one(tmp_path, models):
    teacher = {"use": "cache", "cache": "${stages.cache.cache}", "model": str(models / "student")}
    result = run(tmp_path, {"cache": cache_stage(models), "kd": distill(models, teacher)})
    assert "the teacher cache was not taken from" in str(result.error)
    teacher["model"] = str(models / "teacher")
    assert run(tmp_path, {"cache": cache_stage(models), "kd": distill(models, teacher)}).ok


def test_another_tokenizer_is_refused_with_what_to_do(tmp_path, models):
    from transformers import AutoTokenizer

    other = tmp_path / "other"
    shutil.copytree(models / "student", other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<another token>"])
    tokenizer.save_pretrained(other)
    result = run(tmp_path, {"cache": cache_stage(models), "kd": distill(models, model=str(other))})
    assert "the teacher cache has another tokenizer" in str(result.error)
    assert "make the cache again with this student" in str(result.error)


def test_a_cache_of_a_recipe_is_extended_by_new_rows(tmp_path, models):
    """The second stage asks about a fifth of the rows; training sees all of them."""
    more = cache_stage(models, data={**DATA, "split": "all"}, extends="${stages.cache.cache}")
    kd = distill(models, {"use": "cache", "cache": "${stages.more.cache}"}, data={**DATA, "split": "all"})
    result = run(tmp_path, {"cache": cache_stage(models), "more": more, "kd": kd})
    assert result.ok, result.error
    one, two = (result.stage(name).outputs["cache"] for name in ("cache", "more"))
    assert one.info["rows"] < two.info["rows"] == 40
    name = "shard-00000.kdsc"
    assert (one.path / name).read_bytes() == (two.path / name).read_bytes()
    wrong = {**more, "temperature": 2.0}
    refused = run(tmp_path, {"cache": cache_stage(models), "more": wrong})
    assert "the cache to extend has another temperature (1 and 2)" in str(refused.error)


def test_another_chat_template_is_refused(tmp_path, models):
    from transformers import AutoTokenizer

    other = tmp_path / "other"
    shutil.copytree(models / "student", other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template += "\n"
    tokenizer.save_pretrained(other)
    result = run(tmp_path, {"cache": cache_stage(models), "kd": distill(models, model=str(other))})
    assert "was made with another chat template" in str(result.error)


def test_only_a_teacher_with_distributions_can_be_cached(tmp_path, models):
    teacher = {"use": "cache", "cache": "./nowhere"}
    found = kdkit.validate(recipe(tmp_path, {"kd": distill(models, teacher), "cache": {"kind": "cache-teacher"}}))
    assert any("nowhere" in problem.message for problem in found)
    wrong = {"use": "cache", "cache": "${stages.cache.cache}"}
    stages = {"cache": cache_stage(models), "gen": {"kind": "generate", "teacher": wrong, "data": DATA}}
    assert any("'cache' gives no text" in problem.message for problem in kdkit.validate(recipe(tmp_path, stages)))


# --- the stage by itself ----------------------------------------------------------------------------------------------


class Context:
    """What the stage and the teachers use of their context."""

    device, name = "cpu", "cache"

    def __init__(self, root: Path, models: Path, teacher, *, rows=None, stop_after: int | None = None):
        self.out, self.checkpoints = root / "out", root / "checkpoints"
        self.out.mkdir(parents=True, exist_ok=True)
        self.models, self.teacher, self.rows, self.stop_after = models, teacher, rows or examples(), stop_after
        self.logs: list[str] = []
        self.progressed = 0

    def resolve(self, ref):
        return ref if isinstance(ref, SignalCache) else Model(path=self.models / str(ref))

    def load(self, component):
        return Rows(examples=self.rows[component.name])

    def build(self, component):
        assert self.teacher is not None, "the teacher is not needed"
        return self.teacher

    def precision(self, requested):
        return "fp32"

    def stopping(self):
        return self.stop_after is not None and self.progressed >= self.stop_after

    def progress(self, step, total, **values):
        self.progressed += 1

    def log(self, message):
        self.logs.append(message)

    def metrics(self, values, *, step):
        pass


class Named:
    def __init__(self, name: str):
        self.name = name


def examples() -> dict[str, list[Example]]:
    """Two datasets whose ids collide."""

    def made(salt: str) -> list[Example]:
        return [
            Example(id=f"{i}", prompt=(Message("user", f"{salt} {i}?"),), completion=f"{salt * (i % 5)} {i * i}.")
            for i in range(12)
        ]

    return {"a": made("a"), "b": made("b")}


@pytest.fixture
def local(models):
    params = LocalTeacherParams.model_construct(model=Ref(Model, "teacher"), precision="fp32", batch_size=8)
    return LocalTeacher(params, Context(models / "work", models, None))


def stage_params(**values) -> CacheTeacherStageParams:
    fields = {name: field.default for name, field in CacheTeacherStageParams.model_fields.items()}
    own = {"teacher": _component(), "student": "student", "data": [Named("a"), Named("b")], "max_length": 300}
    return CacheTeacherStageParams.model_construct(**{**fields, **own, **values})


def _component() -> Named:
    teacher = Named("local")
    teacher.params = LocalTeacherParams.model_construct(
        model=Ref(Model, "teacher"), precision="fp32", batch_size=8
    )  # fmt: skip
    return teacher


def make(root: Path, models: Path, teacher, *, rows=None, stop_after=None, **values) -> Path:
    ctx = Context(root, models, teacher, rows=rows, stop_after=stop_after)
    return caching.run(stage_params(**values), ctx)["cache"].path


def cached(path: Path, models: Path) -> CacheTeacher:
    params = CacheTeacherParams.model_construct(cache=SignalCache(path=path), model=None)
    return CacheTeacher(params, Context(path.parent, models, None))


def encoded():
    encoder = ChatEncoder(tiny_tokenizer())
    return [encoder.training(example) for rows in examples().values() for example in rows]


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_stopped_stage_keeps_whole_shards_and_ends_with_the_same_bytes(tmp_path, models, local, monkeypatch):
    monkeypatch.setattr(caching, "SHARD_ROWS", 5)
    monkeypatch.setattr(local, "close", lambda: None)
    want = files(make(tmp_path / "straight", models, local))
    assert sorted(want) == ["cache.json", "counts.bin", *(f"shard-0000{i}.kdsc" for i in range(5))]
    with pytest.raises(Stopped, match="stopped after 10 rows"):
        make(tmp_path / "stopped", models, local, stop_after=2)
    left = tmp_path / "stopped" / "out" / "cache"
    assert sorted(files(left)) == ["counts.bin", "shard-00000.kdsc", "shard-00001.kdsc"]
    # As a kill leaves it: a shard half written, and one cut off by a full disk.
    (left / "shard-00002.kdsc.tmp").write_bytes(b"KDSC")
    (left / "shard-00001.kdsc").write_bytes(want["shard-00001.kdsc"][:-9])
    assert files(make(tmp_path / "stopped", models, local)) == want
    (tmp_path / "stopped" / "out" / "cache" / "cache.json").unlink()
    assert files(make(tmp_path / "stopped", models, None)) == want, "a finished stage needs no teacher to be published"


@pytest.mark.parametrize("form", [pack, collate], ids=["packed", "padded"])
def test_signals_are_those_of_the_teacher_for_rows_in_any_order(tmp_path, models, local, form, monkeypatch):
    monkeypatch.setattr(local, "close", lambda: None)
    rule = {"mass": 0.98, "min_probability": 1e-3, "max_k": 60, "bits": 10}
    teacher = cached(make(tmp_path, models, local, **rule), models)
    rows = encoded()
    batch = form([rows[i] for i in (13, 1, 20, 0, 12)])
    assert len(set(batch.example_ids)) < 5, "ids collide"
    tokens = int(batch.labels_mask[:, 1:].sum())
    got, dense = teacher.signals(batch).block(0, tokens), local.signals(batch).block(0, tokens)
    want = as_topk(Rule(**rule, temperature=1.0, vocabulary=259).keep(dense), 1.0, "cpu")
    assert got.ids.shape == want.ids.shape
    assert torch.allclose(got.tail_mass, want.tail_mass, rtol=2e-3)
    for row in range(tokens):
        mine, theirs = (dict(zip(s.ids[row].tolist(), s.logprobs[row].tolist(), strict=True)) for s in (got, want))
        kept = {i: v for i, v in theirs.items() if v > -100}
        assert {i for i, v in mine.items() if v > -100} == set(kept)
        assert max(abs(mine[i] - v) for i, v in kept.items()) < 0.03
    assert torch.equal(teacher.signals(batch).block(3, 9).tail_mass, got.tail_mass[3:9])


def test_the_gradient_from_the_cache_is_that_of_the_teachers_topk_up_to_rounding(tmp_path, models, local, monkeypatch):
    """The stated error: half a level, which is 1.5 percent of a probability of 0.05 at 8 bits."""
    monkeypatch.setattr(local, "close", lambda: None)
    rule = {"mass": 0.99, "min_probability": 1e-3, "max_k": 100, "bits": 8}
    teacher = cached(make(tmp_path, models, local, **rule), models)
    batch = pack(encoded()[:8])
    tokens = int(batch.labels_mask[:, 1:].sum())
    exact = as_topk(
        Rule(**rule, temperature=1.0, vocabulary=259).keep(local.signals(batch).block(0, tokens)), 1.0, "cpu"
    )

    class Exact:
        def block(self, start, stop, /):
            return type(exact)(*(t[start:stop] for t in (exact.ids, exact.logprobs, exact.tail_mass)), 1.0)

    found = []
    for signals in (Exact(), teacher.signals(batch)):
        model = tiny_model(layers=2, seed=2).train()
        objective = CausalObjective(model, [LossTerm("forward-kl", 1.0, ForwardKL())], block=16)
        objective(batch, signals, 1 / tokens).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.dist(*found) < 0.01 * found[0].norm()
    assert torch.dist(*found) > 0


def test_a_row_that_is_cut_or_unknown_is_refused_by_name(tmp_path, models, local):
    teacher = cached(make(tmp_path, models, local), models)
    rows = encoded()
    with pytest.raises(DataError, match="row '3' is in the teacher cache with other tokens; rows must be rendered"):
        teacher.signals(pack([rows[0], rows[3].cut(len(rows[3].ids) - 1)]))
    strange = type(rows[0])("strange", rows[0].ids[1:], rows[0].learned[1:])
    with pytest.raises(DataError, match="row 'strange' is not in the teacher cache; add its dataset"):
        teacher.signals(collate([rows[1], strange]))
    own = vocabulary(tiny_tokenizer(), tiny_model())
    teacher.check_student(own, tiny_tokenizer())
    teacher.check_rows(rows)
    with pytest.raises(DataError, match="2 of 26 rows have no signals; the first: row 'strange'"):
        teacher.check_rows([*rows, strange, strange])
    narrow = replace(own, size=258)
    with pytest.raises(DataError, match="is about 259 entries, the student has 258"):
        teacher.check_student(narrow, tiny_tokenizer())
    other = replace(own, fingerprint="0" * 64)
    with pytest.raises(DataError, match=r"has another tokenizer .* make the cache again with this student"):
        teacher.check_student(other, tiny_tokenizer())


def test_a_batch_without_learned_tokens_has_no_signals(tmp_path, models, local):
    teacher = cached(make(tmp_path, models, local), models)
    ids = torch.zeros((1, 3), dtype=torch.int64)
    batch = TokenBatch(ids, None, torch.arange(3)[None], torch.zeros((1, 3), dtype=torch.bool))
    assert teacher.signals(batch).block(0, 0).ids.shape[0] == 0


def test_rows_are_kept_once_and_every_row_has_its_tokens(tmp_path, models, local):
    rows = {"a": examples()["a"], "b": examples()["a"]}
    path = make(tmp_path, models, local, rows=rows)
    about = json.loads((path / "cache.json").read_text())
    assert about["totals"]["rows"] == 12
    assert about["totals"]["tokens"] == sum(row.targets for row in encoded()[:12])


def test_a_wider_student_is_served_the_entries_both_have(tmp_path, models, local):
    """Heads of one family are padded to different widths; the teacher has 259 entries."""
    save_tiny_model(tmp_path / "wide" / "student", vocab=300, seed=2)
    shutil.copytree(models / "teacher", tmp_path / "wide" / "teacher")
    path = make(tmp_path, tmp_path / "wide", local)
    teacher = cached(path, models)
    assert teacher.vocabulary.size == 259
    teacher.check_student(vocabulary(tiny_tokenizer(), tiny_model(vocab=300)), tiny_tokenizer())
    teacher.check_rows(encoded())


def test_a_teacher_without_logits_is_cached_without_a_measured_error(tmp_path, models, local):
    class Sparse:
        vocabulary = local.vocabulary

        def signals(self, batch, /):
            dense = local.signals(batch)

            class Signals:
                def block(self, start, stop, /):
                    return as_topk(
                        Rule(
                            mass=1.0, min_probability=0.0, max_k=20, temperature=1.0, bits=16, vocabulary=259
                        ).keep(dense.block(start, stop)), 1.0, "cpu",
                    )  # fmt: skip

            return Signals()

        def close(self):
            pass

    ctx = Context(tmp_path, models, Sparse())
    info = caching.run(stage_params(), ctx)["cache"].info
    assert "kl" not in info
    assert "the error is not measured" in ctx.logs[-1]
    assert info["mean_k"] <= 20


# --- what an earlier attempt, another teacher or a broken one leave behind --------------------------------------------


class Changed:
    """A teacher whose logits are changed, a block at a time."""

    def __init__(self, inner, change):
        self.vocabulary, self._inner, self._change = inner.vocabulary, inner, change

    def signals(self, batch, /):
        dense, change = self._inner.signals(batch), self._change

        class Signals:
            def block(self, start, stop, /):
                values = dense.block(start, stop).logits.clone()
                change(values)
                return Dense(values)

        return Signals()

    def close(self):
        pass


class Counting(Changed):
    """A teacher that counts the documents it is asked about."""

    def __init__(self, inner):
        super().__init__(inner, lambda values: None)
        self.asked: list[str] = []

    def signals(self, batch, /):
        self.asked += batch.example_ids
        return super().signals(batch)


def test_a_row_without_a_distribution_is_refused_by_name_however_often(tmp_path, models, local):
    def spoil(values):
        values[-1, 100] = float("nan")

    for _ in range(2):
        with pytest.raises(ConformanceError, match=r"^row '\d+': the teacher gives logits that are NaN .* token \d+;"):
            make(tmp_path, models, Changed(local, spoil))
    assert not (tmp_path / "checkpoints" / "started.json").exists()


def test_the_row_that_is_named_is_the_one_that_is_wrong(models, local):
    rows = encoded()[:6]
    target = rows[4]
    batch = pack(rows)
    place = 0
    for row in rows_of(batch):
        if row.hash == row_hash(target.ids, target.learned):
            break
        place += row.tokens

    def spoil(values):
        values[place + 2, 0] = float("inf")

    rule = Rule(mass=0.9, min_probability=0.0, max_k=9, temperature=1.0, bits=7, vocabulary=259)
    questions = caching_ask.Questions(Changed(local, spoil), rule, 8, "cpu")
    with pytest.raises(ConformanceError) as caught:
        list(questions.ask(rows))
    assert str(caught.value).startswith(f"row {target.id!r}: ")
    assert "for its learned token 2;" in str(caught.value)


def test_figures_that_are_not_finite_are_left_out_with_a_line(tmp_path, models, local, monkeypatch):
    values = {"kl": 0.5, "gradient_cosine_start": float("nan"), "gradient_cosine_near_teacher": 0.9}
    monkeypatch.setattr(caching_ask.Loss, "values", lambda self: values)
    ctx = Context(tmp_path, models, local)
    info = caching.run(stage_params(), ctx)["cache"].info
    assert "gradient_cosine_start" not in info
    assert any(line.startswith("gradient_cosine_start not finite") for line in ctx.logs)


def damage_counts(root: Path) -> None:
    file = root / "out" / "cache" / "counts.bin"
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage",
    [
        damage_counts,
        lambda root: (root / "out" / "cache" / "counts.bin").unlink(),
        lambda root: (root / "checkpoints" / "started.json").write_text(""),
        lambda root: (root / "checkpoints" / "started.json").write_text('{"code": NaN}'),
    ],
    ids=["counts flipped", "counts gone", "started empty", "started broken"],
)
def test_a_damaged_beginning_is_made_again(tmp_path, models, local, monkeypatch, damage):
    monkeypatch.setattr(caching, "SHARD_ROWS", 12)
    monkeypatch.setattr(local, "close", lambda: None)
    rows = {name: part[:8] for name, part in examples().items()}
    want = files(make(tmp_path / "straight", models, local, rows=rows))
    with pytest.raises(Stopped):
        make(tmp_path / "stopped", models, local, rows=rows, stop_after=1)
    damage(tmp_path / "stopped")
    ctx = Context(tmp_path / "stopped", models, local, rows=rows)
    assert files(caching.run(stage_params(), ctx)["cache"].path) == want
    assert any("cannot be continued" in line and line.endswith("starting over") for line in ctx.logs)


def test_an_attempt_is_not_continued_with_another_teacher(tmp_path, models, local, monkeypatch):
    monkeypatch.setattr(caching, "SHARD_ROWS", 12)
    monkeypatch.setattr(local, "close", lambda: None)
    with pytest.raises(Stopped):
        make(tmp_path, models, local, stop_after=1)
    others = tmp_path / "others"
    shutil.copytree(models / "student", others / "student")
    save_tiny_model(others / "teacher", layers=3, seed=99)
    with pytest.raises(StageError, match=r"were taken with another teacher .* run with --fresh"):
        make(tmp_path, others, local)
    with pytest.raises(StageError, match=r"were taken with another temperature \(1 and 2\)"):
        make(tmp_path, models, local, temperature=2.0)


def test_a_teacher_that_changes_under_way_is_found_at_the_end(tmp_path, models, local):
    own = tmp_path / "models"
    shutil.copytree(models / "student", own / "student")
    shutil.copytree(models / "teacher", own / "teacher")

    def change(values):
        config = own / "teacher" / "config.json"
        config.write_text(config.read_text() + " ")

    with pytest.raises(StageError, match="were taken with another teacher"):
        make(tmp_path, own, Changed(local, change))
    assert not (tmp_path / "out" / "cache" / "cache.json").exists()


def test_shards_are_cut_by_tokens_too(tmp_path, models, local, monkeypatch):
    rows = encoded()
    monkeypatch.setattr(caching, "SHARD_TOKENS", max(row.targets for row in rows) + 1)
    shards = caching._cut(rows)
    assert [row for shard in shards for row in shard] == rows
    assert all(len(shard) == 1 or sum(row.targets for row in shard) <= caching.SHARD_TOKENS for shard in shards)
    assert len(shards) > 4
    assert len(files(make(tmp_path, models, local))) == len(shards) + 2


def test_an_extended_cache_asks_only_about_new_rows_and_reads_like_one_made_at_once(tmp_path, models, local):
    some = {"a": examples()["a"], "b": examples()["a"][:3]}
    base = make(tmp_path / "base", models, Counting(local), rows=some)
    teacher = Counting(local)
    extends = SignalCache(path=base)
    path = make(tmp_path / "more", models, teacher, extends=extends)
    assert len(set(teacher.asked)) == 12, "the rows of b alone"
    assert teacher.asked.count("0") <= 2, "once to measure, once to keep"
    whole = cached(path, models)
    whole.check_rows(encoded())
    batch = pack(encoded()[8:16])
    tokens = int(batch.labels_mask[:, 1:].sum())
    got = whole.signals(batch).block(0, tokens)
    once = cached(make(tmp_path / "once", models, Counting(local)), models).signals(batch).block(0, tokens)
    for row in range(tokens):
        pairs = (zip(s.ids[row].tolist(), s.logprobs[row].tolist(), strict=True) for s in (got, once))
        mine, theirs = ({i: v for i, v in pair if v > -100} for pair in pairs)
        assert mine == pytest.approx(theirs, abs=1e-5)
    ctx = Context(tmp_path / "none", models, None)
    again = caching.run(stage_params(extends=SignalCache(path=path)), ctx)["cache"]
    assert "24 rows are in the cache already, 0 are asked" in ctx.logs[0]
    assert again.info["rows"] == 24
    about = [json.loads((place / "cache.json").read_text()) for place in (path, again.path)]
    assert about[0]["shards"] == about[1]["shards"]


def test_only_a_cache_of_the_same_teacher_and_rule_is_extended(tmp_path, models, local):
    extends = SignalCache(path=make(tmp_path / "base", models, Counting(local)))
    with pytest.raises(DataError, match=r"the cache to extend has another bits \(7 and 9\)"):
        make(tmp_path / "bits", models, None, extends=extends, bits=9)
    others = tmp_path / "others"
    shutil.copytree(models / "student", others / "student")
    save_tiny_model(others / "teacher", layers=3, seed=99)
    with pytest.raises(DataError, match="the cache to extend has another teacher"):
        make(tmp_path / "teacher", others, None, extends=extends)


def test_training_says_whose_cache_it_reads(tmp_path, models, local):
    path = make(tmp_path, models, local)
    ctx = Context(tmp_path, models, None)
    CacheTeacher(CacheTeacherParams.model_construct(cache=SignalCache(path=path), model=None), ctx)
    (line,) = ctx.logs
    assert line.startswith("teacher cache of 'local teacher' (fingerprint ")
    assert line.endswith("at temperature 1, 24 rows")


def test_a_model_whose_tokenizer_alone_was_used_is_not_the_teacher(tmp_path, models, local):
    about = Reader(make(tmp_path, models, local)).description
    student = Model(path=models / "student", name="student")
    served = about.teacher.model_copy(update={"models": {"tokenizer": model_identity(student)}, "name": "openai m"})
    with pytest.raises(DataError, match="is of 'openai m', whose weights were not to be seen"):
        check_weights(about.model_copy(update={"teacher": served}), student, "here")
    check_weights(about, Model(path=models / "teacher"), "here")


def test_only_a_teacher_of_fixed_rows_is_asked_about_its_rows():
    class Loose:
        temperature = 9.0

        def check_student(self, *_):
            raise AssertionError

        check_rows = check_student

    def spec(fixed: bool) -> SimpleNamespace:
        return SimpleNamespace(found=SimpleNamespace(spec=SimpleNamespace(fixed_rows=fixed)), name="loose")

    assert training._row_teacher(SimpleNamespace(teacher=spec(False), losses=[]), Loose()) is None
    assert training._row_teacher(SimpleNamespace(teacher=spec(True), losses=[]), Loose()) is not None
