"""The built-in stages keep the contract, and the suite catches stages that do not."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

sys.path.insert(0, str(Path(__file__).parent))

from suites import check, checks_of, variant

from kdkit.api import Component, Dataset, DatasetLoader, Model, Params, Ref, Runtime, StageSpec
from kdkit.api.errors import Stopped
from kdkit.plugins.quantizers.rtn import RtnQuantizer
from kdkit.plugins.quantizers.rtn_plugin import RtnParams
from kdkit.plugins.stages import plugin
from kdkit.testing.conformance import StageConformance
from kdkit.testing.conformance.quantizer import PretendContext

SPECS = {spec.name: spec for spec in plugin.kdkit_stages()}
SCRIPTED = '''
from kdkit.api import Params, TeacherSpec, hookimpl
from kdkit.testing.teachers import ScriptedTeacher

class P(Params):
    """Nothing."""

@hookimpl
def kdkit_teachers():
    yield TeacherSpec(name="scripted", summary="Answers from a script", params=P, gives=frozenset({"text"}),
                      build=lambda params, ctx: ScriptedTeacher())
'''


def jsonl(rows):
    return {"use": "jsonl", "source": str(rows)}


def local(model):
    return {"use": "local", "model": str(model), "precision": "fp32"}


class Training(StageConformance):
    resumes = True

    def params(self, model, rows):
        return {
            "model": str(model),
            "data": jsonl(rows),
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "logging_steps": 1,
        }


class TestSft(Training):
    spec = SPECS["sft"]
    wrong = ({"max_steps": 0}, {"learning_rate": "fast"}, {"losses": [{"use": "forward-kl"}]}, {"data": "rows.jsonl"})


class TestDistill(Training):
    spec = SPECS["distill"]
    wrong = ({"on_policy": 2.0}, {"teacher": {"use": "nobody"}}, {"losses": []})

    def params(self, model, rows):
        return {**super().params(model, rows), "teacher": local(model)}


class TestGrpo(Training):
    spec = SPECS["grpo"]
    wrong = ({"rewards": []}, {"num_generations": 0})

    def params(self, model, rows):
        more = {"rewards": [{"use": "length"}], "num_generations": 2, "num_rollouts": 4, "max_completion_length": 4}
        return {**super().params(model, rows), **more}


class TestMiniLLM(Training):
    spec = SPECS["minillm"]
    wrong = ({"teacher_mixed_alpha": 3.0}, {"sampling": {"max_new_tokens": 0}})

    def params(self, model, rows):
        more = {"teacher": local(model), "sampling": {"max_new_tokens": 4}, "num_rollouts": 4, "ppo_epochs": 1}
        return {**super().params(model, rows), **more}


class TestCacheTeacher(StageConformance):
    spec = SPECS["cache-teacher"]
    wrong = ({"max_k": 0}, {"bits": 3})

    def params(self, model, rows):
        return {"teacher": local(model), "student": str(model), "data": jsonl(rows)}


class TestGenerate(StageConformance):
    spec = SPECS["generate"]
    wrong = ({"sampling": {"temperature": 0}}, {"teacher": {"use": "cache", "cache": "./x"}})

    @pytest.fixture(autouse=True)
    def _scripted(self, install_plugin):
        install_plugin(SCRIPTED)

    def params(self, model, rows):
        return {"teacher": {"use": "scripted"}, "data": jsonl(rows)}


class TestEvaluate(StageConformance):
    spec = SPECS["evaluate"]
    deterministic = False  # it measures speed and memory
    wrong = ({"metrics": []}, {"num_samples": 2}, {"metrics": [{"use": "teacher-kl"}]})

    def params(self, model, rows):
        metrics = [{"use": "rouge-l"}, {"use": "perplexity"}]
        more = {"sampling": {"max_new_tokens": 4}, "precision": "fp32"}
        return {"models": {"tiny": str(model)}, "data": jsonl(rows), "metrics": metrics, **more}


class TestReport(StageConformance):
    spec = SPECS["report"]
    deterministic = False  # it says when it was made
    wrong = ({"scores": []},)

    @pytest.fixture(autouse=True)
    def _scores(self, run_recipe, tmp_path_factory, tiny_model):
        rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
        rows.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}"}) + "\n" for n in range(6)))
        stage = {"kind": "evaluate", **TestEvaluate().params(tiny_model, rows)}
        self.scores = run_recipe({"stages": {"eval": stage}}, inline=True).stage("eval").outputs["scores"].path

    def params(self, model, rows):
        return {"scores": [str(self.scores)]}


class TestQuantize(StageConformance):
    spec = SPECS["quantize"]
    wrong = ({"quantizer": {"use": "gptq"}}, {"quantizer": {"use": "rtn", "bits": 5}})

    def params(self, model, rows):
        return {"model": str(model), "quantizer": {"use": "rtn", "bits": 4}}


class TestDequantize(StageConformance):
    spec = SPECS["dequantize"]
    wrong = ({"dtype": "int8"},)

    def params(self, model, rows):
        work = model.parent / "quantized"
        for name in ("out", "checkpoints", "run"):
            (work / name).mkdir(parents=True)
        ctx = PretendContext(out=work / "out", checkpoints=work / "checkpoints", run_dir=work / "run")
        RtnQuantizer(RtnParams()).quantize(model, [], work / "out" / "model", ctx)
        return {"model": str(work / "out" / "model")}


class TestLmEval(StageConformance):
    spec = SPECS["lm-eval"]
    wrong = ({"tasks": []}, {"include_path": "org/tasks"}, {"limit": 0})

    @pytest.fixture(autouse=True)
    def _installed(self, tmp_path_factory, monkeypatch):
        pytest.importorskip("lm_eval")
        import datasets.config

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))

    def params(self, model, rows):
        tasks = model.parent / "tasks"
        shutil.copytree(Path(__file__).parents[1] / "plugins" / "lm_eval_tasks", tasks)
        models, few = {"tiny": str(model)}, {"limit": 2, "precision": "fp32"}
        return {"models": models, "tasks": ["kdkit_pick"], "include_path": str(tasks), **few}


def test_every_built_in_stage_is_here():
    suites = {suite for one in StageConformance.__subclasses__() for suite in (one, *one.__subclasses__())}
    assert {suite.spec.name for suite in suites if suite.__name__.startswith("Test")} == set(SPECS)


# -- wrong stages


class CountParams(Params):
    """Writes a line for every row, with a checkpoint after each."""

    model: Ref[Model]
    """Copied."""
    data: Component[DatasetLoader]
    """Rows."""
    times: int = Field(2, ge=1)
    """How often."""
    noisy: Annotated[bool, Runtime()] = False
    """Say more."""


def right(params, ctx):
    """Copies the model and counts rows, one line at a time."""
    shutil.copytree(ctx.resolve(params.model).path, ctx.out / "model", dirs_exist_ok=True)
    rows = [row.prompt for row in ctx.load(params.data).examples]
    ctx.checkpoints.mkdir(exist_ok=True)
    saved = ctx.checkpoints / "lines.json"
    lines = json.loads(saved.read_text()) if saved.exists() else []
    for number in range(len(lines), params.times):
        lines.append(f"{number}: {len(rows)} rows")
        saved.write_text(json.dumps(lines))
        ctx.progress(number + 1, params.times)
        ctx.metrics({"rows": float(len(rows))}, step=number)
        if ctx.stopping() and number + 1 < params.times:
            raise Stopped("stopped, checkpoint saved")
    (ctx.out / "data.jsonl").write_text("\n".join(lines))
    return {"model": Model(path=ctx.out / "model"), "data": Dataset(path=ctx.out / "data.jsonl")}


OUTPUTS = {"model": Model, "data": Dataset}


def spec_of(run, params=CountParams, **changes):
    return StageSpec(name="count", summary="Counts", params=params, run=run, outputs=OUTPUTS, **changes)


def without_data(params, ctx):
    made = right(params, ctx)
    return {"model": made["model"]}


def beside_its_directory(params, ctx):
    made = right(params, ctx)
    outside = ctx.run_dir / "data.jsonl"
    shutil.move(made["data"].path, outside)
    return {**made, "data": Dataset(path=outside)}


def empty_model(params, ctx):
    made = right(params, ctx)
    shutil.rmtree(made["model"].path)
    made["model"].path.mkdir()
    return made


def the_time(params, ctx):
    import time

    made = right(params, ctx)
    (made["model"].path / "made.txt").write_text(str(time.time_ns()))
    return made


def another_file(params, ctx):
    made = right(params, ctx)
    (made["model"].path / f"part-{random.random()}").touch()
    return made


def into_the_model(params, ctx):
    (ctx.resolve(params.model).path / "seen.txt").touch()
    return right(params, ctx)


def into_the_current_directory(params, ctx):
    Path("log.txt").touch()
    return right(params, ctx)


def beyond_the_total(params, ctx):
    ctx.progress(9, 3)
    return right(params, ctx)


def infinite(params, ctx):
    ctx.metrics({"loss": float("inf")}, step=1)
    return right(params, ctx)


def between_two_steps(params, ctx):
    ctx.metrics({"loss": 1.0}, step=1.5)
    return right(params, ctx)


def in_words(params, ctx):
    ctx.metrics({"loss": "high"}, step=1)
    return right(params, ctx)


def before_the_first_step(params, ctx):
    ctx.metrics({"loss": 1.0}, step=-1)
    return right(params, ctx)


def fails_like_a_program(params, ctx):
    if ctx.stopping():
        raise ValueError("asked to stop")
    return right(params, ctx)


def deaf(params, ctx):
    return right(params, type("Deaf", (), {"__getattr__": lambda s, n: getattr(ctx, n), "stopping": lambda s: False})())


def forgetful(params, ctx):
    if ctx.stopping():
        raise Stopped("stopped, nothing saved")
    return right(params, ctx)


def doubled_after_a_stop(params, ctx):
    """The step that was saved last is done again."""
    saved = ctx.checkpoints / "lines.json"
    if saved.exists():
        saved.write_text(json.dumps(["0: 16 rows", *json.loads(saved.read_text())]))
    return right(params, ctx)


class Accepting(CountParams):
    """Takes any number."""

    times: int = 2
    """How often."""


NUMBERS = itertools.count()


class Changing(CountParams):
    """Another default every time."""

    token: int = Field(default_factory=lambda: next(NUMBERS))
    """A number."""


MAKES, AGAIN = "test_it_makes_what_it_declares", "test_what_is_done_is_not_done_again"
SAME, PLACE = "test_the_same_again_elsewhere", "test_it_writes_into_its_own_directory_only"
SAYS, REFUSED = "test_what_it_says_of_itself_makes_sense", "test_wrong_parameters_are_refused"
STOPS = "test_a_signal_stops_it"


def misplaced(params):
    """A check that refuses everything and says nowhere where."""
    return [((), "no\x1b[0m")] if params.times < 1 else []


WRONG = [
    (spec_of(without_data), MAKES, "the stage failed: .*returned model"),
    (spec_of(beside_its_directory), MAKES, "not a file or directory below ctx.out"),
    (spec_of(empty_model), MAKES, "output 'model' is an empty directory"),
    (spec_of(right, Changing), AGAIN, "the same parameters have 3 keys"),
    (spec_of(the_time), SAME, r"made\.txt differ the second time"),
    (spec_of(another_file), SAME, "has other files the second time"),
    (spec_of(into_the_model), PLACE, r"model/seen\.txt changed"),
    (spec_of(into_the_current_directory), PLACE, r"log\.txt changed"),
    (spec_of(beyond_the_total), SAYS, r"progress\(9, 3\)"),
    (spec_of(infinite), SAYS, "metric 'loss' is inf"),
    (spec_of(between_two_steps), SAYS, r"metrics of step 1\.5"),
    (spec_of(in_words), SAYS, "the stage failed: .*could not convert string to float: 'high'"),
    (spec_of(before_the_first_step), SAYS, "metrics of step -1"),
    (spec_of(right, Accepting), REFUSED, r"were accepted: {'times': 0}"),
    (spec_of(right, Accepting, check=misplaced), REFUSED, "control characters"),
    (spec_of(fails_like_a_program), STOPS, "after a signal it failed: .*asked to stop"),
    (spec_of(deaf), STOPS, "ran to its end; it says that it resumes"),
    (spec_of(forgetful), STOPS, "started again instead of continuing"),
    (spec_of(doubled_after_a_stop), STOPS, "is another one after an interruption"),
]


def suite(spec):
    return variant(
        StageConformance,
        spec=spec,
        params=lambda model, rows: {"model": str(model), "data": jsonl(rows)},
        wrong=({"times": 0},),
        resumes=True,
    )


@pytest.mark.parametrize(("spec", "test", "reason"), WRONG, ids=[f"{s.run.__name__}-{t}" for s, t, _ in WRONG])
def test_a_wrong_stage_fails(spec, test, reason, tmp_path):
    with pytest.raises(AssertionError, match=reason):
        check(suite(spec), test, tmp_path)


@pytest.mark.parametrize("test", checks_of(StageConformance))
def test_a_right_stage_passes_and_no_test_is_idle(test, tmp_path):
    assert test in {caught for _, caught, _ in WRONG}
    check(suite(spec_of(right)), test, tmp_path)
