from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kdkit
from kdkit.api import DataError, Example, Message, Model, Rows, SignalCache
from kdkit.api.errors import Stopped
from kdkit.models.chat import ChatEncoder
from kdkit.models.load import vocabulary
from kdkit.plugins.losses.token import ForwardKL
from kdkit.plugins.stages import caching
from kdkit.plugins.stages.caching_plugin import CacheTeacherStageParams
from kdkit.plugins.teachers.cache import CacheTeacher
from kdkit.plugins.teachers.local import LocalTeacher
from kdkit.plugins.teachers.plugin import CacheTeacherParams, LocalTeacherParams
from kdkit.testing.tiny import save_tiny_model, tiny_model, tiny_tokenizer
from kdkit.train.batching import collate
from kdkit.train.objective import CausalObjective, LossTerm
from kdkit.train.packing import pack
from kdkit.train.signal_cache.select import Rule, as_topk

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
    files = sum(f.stat().st_size for f in artifact.path.iterdir() if f.name != "cache.json")
    assert facts["bytes_per_token"] == pytest.approx(files / facts["tokens"])
    assert 0.01 < facts["kl"] < 2
    assert 0.5 < facts["gradient_cosine"] < 0.9999
    assert facts["mean_k"] <= 20
    logged = {k: v for line in result.stage("cache").metrics() for k, v in line.items()}
    assert logged["cache/kl"] == facts["kl"]
    about = json.loads((artifact.path / "cache.json").read_text())
    assert about["rule"]["temperature"] == 1.0
    assert str(models) not in json.dumps(about)


def test_a_cached_cache_is_not_made_again_and_other_rules_are_another_cache(tmp_path, models):
    keys = [run(tmp_path, {"cache": cache_stage(models, **v)}).stage("cache").entry.name for v in ({}, {}, {"bits": 8})]
    assert keys[0] == keys[1] != keys[2]


def test_losses_with_another_temperature_are_refused(tmp_path, models):
    stages = {"cache": cache_stage(models, temperature=2.0), "kd": distill(models)}
    result = run(tmp_path, stages)
    assert "was taken at temperature 2, the loss wants 1" in str(result.error)
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
    params = LocalTeacherParams.model_construct(model="teacher", precision="fp32", batch_size=8)
    return LocalTeacher(params, Context(models / "work", models, None))


def stage_params(**values) -> CacheTeacherStageParams:
    fields = {name: field.default for name, field in CacheTeacherStageParams.model_fields.items()}
    own = {"teacher": _component(), "student": "student", "data": [Named("a"), Named("b")], "max_length": 300}
    return CacheTeacherStageParams.model_construct(**{**fields, **own, **values})


def _component() -> Named:
    teacher = Named("local")
    teacher.params = LocalTeacherParams.model_construct(model="teacher", precision="fp32", batch_size=8)
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
    teacher.check(own, tiny_tokenizer(), rows)
    with pytest.raises(DataError, match="2 of 26 rows have no signals; the first: row 'strange'"):
        teacher.check(own, tiny_tokenizer(), [*rows, strange, strange])
    narrow = replace(own, size=258)
    with pytest.raises(DataError, match="is about 259 entries, the student has 258"):
        teacher.check(narrow, tiny_tokenizer(), rows)


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
    teacher.check(vocabulary(tiny_tokenizer(), tiny_model(vocab=300)), tiny_tokenizer(), encoded())


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
