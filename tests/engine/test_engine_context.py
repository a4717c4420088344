from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kdkit.api import DataError, Dataset, EnvironmentUnmet, ExitCode, KdkitError, Model, ModelError, StageError
from kdkit.api.errors import Stopped
from kdkit.api.slots import ModelOptions, Ref, StageOutput
from kdkit.engine import hub_data
from kdkit.engine.anchor import anchored
from kdkit.engine.context import Context, derive_seed
from kdkit.engine.hashing import HashMemo
from kdkit.engine.inputs import Inputs, artifact_at, is_hub_id, is_local
from kdkit.engine.job import Outcome, StageJob
from kdkit.engine.manifest import Manifest, describe_artifact
from kdkit.engine.metrics import MetricsFile, Trackers
from kdkit.engine.resolved import to_yaml
from kdkit.recipe.nodes import plain
from kdkit.recipe.yaml import load_bytes
from kdkit.testing.tiny import save_tiny_model


@pytest.fixture
def make_context(tmp_path):
    events = []

    def make(*, stopping=lambda: False, **changes):
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        facts = {
            "recipe": "r.yaml", "base_dir": str(tmp_path), "stage": "kd", "key": "k", "out": str(out),
            "run_dir": str(tmp_path), "precision": "fp32", "pins": {}, "upstream": {}, "code": [], "resumed": False,
        }  # fmt: skip
        job = StageJob(**{**facts, **changes})
        context = Context(
            job, recipe="r", seed=17, emit=events.append, trackers=Trackers([], None, print), stopping=stopping
        )
        context.events = events
        return context

    return make


def test_seeds_depend_on_recipe_and_purpose_only(make_context):
    expected = int.from_bytes(hashlib.sha256(b"17/data-order").digest()[:8], "big") % 2**63
    assert (
        make_context(stage="sft").seed_for("data-order") == make_context(stage="kd").seed_for("data-order") == expected
    )
    assert derive_seed(17, "dropout") != expected
    assert derive_seed(18, "data-order") != expected


@given(st.integers(), st.text())
def test_seeds_fit_every_generator(seed, purpose):
    assert 0 <= derive_seed(seed, purpose) < 2**63


def test_precision_is_what_the_plan_resolved(make_context):
    assert make_context(precision="fp32").precision("auto") == "fp32"
    assert make_context(precision="bf16").precision("auto") == "bf16"
    assert make_context(precision="bf16").precision("fp32") == "fp32"


def test_a_log_line_is_one_line(make_context):
    context = make_context()
    context.log("two\n  lines")
    assert context.events[-1].data == {"message": "two lines"}


def test_a_log_line_calls_an_output_as_the_results_of_a_run_do(make_context):
    context = make_context()
    context.log("${stages.kd-2.model} and ${stages.a.data}: ${vars.x} ${stages.a}")
    assert context.events[-1].data == {"message": "kd-2.model and a.data: ${vars.x} ${stages.a}"}


def test_progress_is_thinned_but_the_end_is_shown(make_context, monkeypatch):
    monkeypatch.setattr("kdkit.engine.context.monotonic", lambda: 5.0)
    context = make_context()
    for step in range(1, 101):
        context.progress(step, 100, loss=1.0)
    assert [event.data["step"] for event in context.events] == [1, 100]


def test_metrics_are_valid_json_lines(make_context, tmp_path):
    context = make_context()
    context.metrics({"loss": math.nan, "x": 1}, step=1)
    (line,) = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": "NaN", "x": 1.0}


def test_a_resumed_stage_writes_no_step_twice(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "x": 1}\n{"step": 2, "x": 2}\n{"step": 3, "x": 3}\n{"step": 4, "x"')
    metrics = MetricsFile(file, resumed=True)
    metrics.append({"x": 30.0}, 3)
    metrics.append({"x": 40.0}, 4)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["step"], row["x"]) for row in rows] == [(1, 1), (2, 2), (3, 30.0), (4, 40.0)]


def test_a_fresh_stage_keeps_its_order_of_steps(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", resumed=False)
    for step in (5, 1):
        metrics.append({}, step)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [5, 1]


def test_stopping_asks_the_signal(make_context):
    assert not make_context().stopping()
    assert make_context(stopping=lambda: True).stopping()


def entry_with(tmp_path, artifact_of):
    entry = tmp_path / "sft-abc"
    (entry / "model").mkdir(parents=True)
    artifact = artifact_of(entry / "model")
    manifest = Manifest(
        kind="sft", key="abc", recipe="r", stage="sft", seed=1, created="", seconds=0.0,
        outputs={"model": describe_artifact(artifact, entry)}, files={},
    )  # fmt: skip
    (entry / "manifest.json").write_text(json.dumps(manifest.to_json()))
    return entry


def test_a_stages_model_is_resolved_with_the_references_options(make_context, tmp_path):
    entry = entry_with(tmp_path, lambda path: Model(path=path, format="gptq", info={"bits": 4}))
    context = make_context(upstream={"sft": str(entry)})
    ref = Ref(Model, StageOutput("sft", "model"), ModelOptions(keep_layers=3))
    expected = Model(path=entry / "model", format="gptq", info={"bits": 4}, keep_layers=3, name="${stages.sft.model}")
    assert context.resolve(ref) == expected
    assert context.resolve(Ref(Model, StageOutput("sft", "model"))).keep_layers is None


def test_an_artifact_of_another_type_is_refused(make_context, tmp_path):
    entry = entry_with(tmp_path, lambda path: Dataset(path=path))
    with pytest.raises(StageError, match="is no model"):
        make_context(upstream={"sft": str(entry)}).resolve(Ref(Model, StageOutput("sft", "model")))


def test_a_literal_is_what_the_plan_found(make_context, tmp_path):
    elsewhere = save_tiny_model(tmp_path / "elsewhere")
    context = make_context(pins={"model some/model": str(elsewhere)})
    model = context.resolve(Ref(Model, "some/model"))
    assert (model.path, model.format, model.name) == (elsewhere, "full", "some/model")


def test_a_quantized_directory_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')
    assert artifact_at(Ref(Model, "./x"), tmp_path).format == "gptq"


@pytest.mark.parametrize(("literal", "local", "hub"), [
    ("./a", True, False), ("..", True, False), ("~/a", True, False), ("/a/b", True, False),
    ("org/name", False, True), ("name", False, False), ("a/b/c", False, False), ("a/", False, False),
])  # fmt: skip
def test_kinds_of_literals(literal, local, hub):
    assert (is_local(literal), is_hub_id(literal)) == (local, hub)


def test_a_bare_word_is_no_dataset(tmp_path):
    (tmp_path / "rows").mkdir()
    with pytest.raises(DataError, match=r"'rows' is neither a path nor a Hub id.*write \./rows"):
        Inputs(tmp_path, HashMemo(tmp_path / "memo")).locate(Ref(Dataset, "rows"))


def test_an_input_is_hashed_once(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("x")
    inputs = Inputs(tmp_path, HashMemo(tmp_path / "memo"))
    first = inputs.locate(Ref(Dataset, "./rows.jsonl"))
    monkeypatch.setattr(HashMemo, "sha256", lambda *_: pytest.fail("hashed again"))
    assert inputs.locate(Ref(Dataset, "./rows.jsonl")) == first
    assert inputs.pins() == {"dataset ./rows.jsonl": str(tmp_path / "rows.jsonl")}


# --- datasets on the Hub ----------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    return tmp_path


def test_the_commit_of_a_dataset_comes_from_the_cache(hub_cache):
    refs = hub_cache / "hub/datasets--org--rows/refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("c0ffee\n")
    assert hub_data.dataset_commit("org/rows", None, offline=True) == "c0ffee"
    located = Inputs(hub_cache).locate(Ref(Dataset, "org/rows"))
    assert (located.pin, located.digest) == ("commit:c0ffee", "commit:c0ffee")


def test_a_prepared_table_is_enough(hub_cache):
    (hub_cache / "home/datasets/org___rows/default/0.0.0/beef").mkdir(parents=True)
    assert hub_data.dataset_commit("org/rows", None, offline=True) == "beef"


def test_an_unknown_dataset_offline_is_an_unmet_environment(hub_cache):
    with pytest.raises(EnvironmentUnmet, match="org/rows: not in the Hub cache, and offline; name a local file"):
        hub_data.dataset_commit("org/rows", None, offline=True)


def test_the_hub_is_asked_when_it_may_be(hub_cache, monkeypatch):
    class Api:
        def dataset_info(self, repo, *, revision, timeout):
            assert (repo, revision) == ("org/rows", "v2")
            return type("Info", (), {"sha": "abc"})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert hub_data.dataset_commit("org/rows", "v2", offline=False) == "abc"


def test_an_unreachable_hub_falls_back_to_the_cache(hub_cache, monkeypatch):
    class Api:
        def dataset_info(self, repo, **options):
            raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    with pytest.raises(EnvironmentUnmet, match="cannot be reached"):
        hub_data.dataset_commit("org/rows", None, offline=False)
    (hub_cache / "hub/datasets--org--rows/snapshots/abc").mkdir(parents=True)
    assert hub_data.dataset_commit("org/rows", None, offline=False) == "abc"


def test_a_hub_dataset_is_resolved_at_the_commit_of_the_plan(make_context, hub_cache, monkeypatch):
    asked = []

    def snapshot(repo, *, repo_type, revision, local_files_only):
        asked.append((repo, repo_type, revision, local_files_only))
        return str(hub_cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    context = make_context(pins={"dataset org/rows @v2": "commit:abc"})
    assert context.resolve(Ref(Dataset, "org/rows")).path == hub_cache
    assert asked == [("org/rows", "dataset", "abc", True)]


# --- what travels to and from a worker --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [StageError("x", where="w", hint="h"), ModelError("m"), Stopped("s")])
def test_an_outcome_survives_the_journey(error):
    back = Outcome.from_json(json.loads(json.dumps(Outcome.of(error).to_json())))
    assert (type(back.error), str(back.error), back.exit_code) == (type(error), str(error), error.exit_code)
    assert back.status == ("stopped" if isinstance(error, Stopped) else "failed")


def test_the_exit_code_of_a_plugins_own_error_survives():
    class GateMissed(KdkitError):
        exit_code = ExitCode.GATE

    back = Outcome.from_json(json.loads(json.dumps(Outcome.of(GateMissed("below 0.5")).to_json())))
    assert back.exit_code == ExitCode.GATE


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3)
)


@given(documents)
def test_resolved_yaml_reads_back_equal(data):
    assert yaml.safe_load(to_yaml(data)) == data


@pytest.mark.parametrize(
    "text", ["1e-5", "on", "no", "null", "0o17", "12:30", "017", "~", ".nan", "", "a: b", "x #y", "ö", "${vars.x}", "-"]
)
def test_text_stays_text_for_the_recipe_reader(text):
    node, problems = load_bytes(to_yaml({"key": text, "n": 1e-5, "l": [text]}).encode(), "x.yaml")
    assert not problems
    assert plain(node) == {"key": text, "n": 1e-5, "l": [text]}


def test_relative_paths_in_parameters_start_from_the_recipe(project):
    recipe = project.load("  a: {kind: count, template: t.jinja, nested: {depth: 4}}")
    params = anchored(recipe.stages["a"].params, Path("/base"))
    assert params.template == Path("/base/t.jinja")
    assert params.nested.depth == 4
    untouched = project.load("  a: {kind: count}").stages["a"].params
    assert anchored(untouched, Path("/base")) is untouched
