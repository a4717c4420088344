from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_stages import problems, recipe, run

import kdkit
from kdkit.api import EnvironmentUnmet, Example, Message, Model
from kdkit.api.errors import DataError, ModelError
from kdkit.models.load import load_model
from kdkit.models.pretrained import read_model
from kdkit.models.quantized.tensors import weight_bytes
from kdkit.plugins.stages.quantizing import _calibration
from kdkit.testing.tiny import save_tiny_model

RTN = {"use": "rtn", "bits": 4}
ROWS = {"use": "jsonl", "source": "./rows.jsonl", "split": "all"}
COUNTS = """
from pathlib import Path
import shutil
from kdkit.api import Params, QuantizerSpec, hookimpl
from kdkit.api.data import QuantizedInfo

class Counts:
    def quantize(self, model_dir, calibration, out_dir, ctx):
        ctx.log("rows " + " ".join(row.completion.split()[-1] for row in calibration))
        if MODE == "half":
            (out_dir).mkdir()
            (out_dir / "config.json").write_text("{}")
        else:
            shutil.copytree(model_dir, out_dir)
        return QuantizedInfo(
            bits=4, group_size=8, bytes_on_disk=1, layer_errors={"a": 0.1, "b": 0.2}, kept_rtn=["b"], notes=["b is odd"]
        )

@hookimpl
def kdkit_quantizers():
    spec = {"params": Params, "build": lambda p: Counts(), "needs_calibration": True}
    yield QuantizerSpec(name="counts", summary="Counts", **spec)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("m") / "model", layers=3, tied=False)


def quantize(source, **values):
    return {"kind": "quantize", "model": str(source), "quantizer": RTN, **values}


def evaluate(**models):
    metrics = [{"use": "perplexity"}]
    return {"kind": "evaluate", "models": models, "data": ROWS, "metrics": metrics, "precision": "fp32"}


def events(result):
    return [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]


def counting(tmp_path, mode="whole", **values):
    """A recipe with a quantizer of a plugin file that says which rows it got."""
    (tmp_path / "counts.py").write_text(f"MODE = {mode!r}\n{COUNTS}")
    model = save_tiny_model(tmp_path / "model")
    stage = quantize(model, quantizer={"use": "counts"}, calibration=ROWS, **values)
    file = recipe(tmp_path, {"q": stage})
    file.write_text(json.dumps({**json.loads(file.read_text()), "plugins": ["./counts.py"]}))
    result = kdkit.run(file, inline=True, out=tmp_path / "runs")
    return result, [event["message"] for event in events(result) if event["type"] == "log"]


def test_a_model_is_quantised_scored_and_turned_back(tmp_path, model):
    stages = {
        "q": quantize(model),
        "back": {"kind": "dequantize", "model": "${stages.q.model}", "dtype": "float32"},
        "eval": evaluate(exact=str(model), q="${stages.q.model}", back="${stages.back.model}"),
        "report": {"kind": "report", "scores": ["${stages.eval.scores}"], "baseline": "exact"},
    }
    result = run(tmp_path, stages)
    assert result.ok, result.error
    made, back = result.stage("q").outputs["model"], result.stage("back").outputs["model"]
    assert (made.format, back.format) == ("gptq", "full")
    assert (made.info["bits"], made.info["group_size"], made.info["quantizer"]) == (4, 32, "rtn")
    assert made.info["bytes"] == weight_bytes(made.path) < made.info["bytes_before"] == weight_bytes(model)
    scores = json.loads((result.stage("eval").outputs["scores"].path / "scores.json").read_text())["models"]
    assert scores["q"]["bytes"] == weight_bytes(made.path)
    assert {name: entry["kernel"] for name, entry in scores.items()} == {
        "exact": "torch float32 on cpu",
        "q": "torch float32 on cpu, dequantised",
        "back": "torch float32 on cpu",
    }
    assert scores["q"]["quantization"]["layer_errors"] == made.info["layer_errors"]
    assert not {"exact", "back"} & {name for name, entry in scores.items() if entry.get("quantization")}
    values = {name: entry["results"]["jsonl"]["perplexity"]["value"] for name, entry in scores.items()}
    assert values["q"] == pytest.approx(values["back"], rel=1e-6)
    assert values["q"] != pytest.approx(values["exact"], rel=1e-3)
    assert scores["q"]["parameters"] == scores["exact"]["parameters"]
    plain, loaded = read_model(back.path, dtype=torch.float32), load_model(made, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), loaded.parameters(), strict=True))
    facts = json.loads((made.path / "kdkit.json").read_text())
    assert facts["quantization"]["layer_errors"] == made.info["layer_errors"]
    assert facts["base_model"] == str(model)
    again = events(run(tmp_path, stages))
    assert [event["stage"] for event in again if event["type"] == "stage-cached"] == list(stages)
    assert not [event for event in again if event["type"] == "stage-started"]


def test_a_quantised_model_can_be_trained(tmp_path, model):
    train = {"kind": "sft", "model": "${stages.q.model}", "data": ROWS, "max_steps": 2, "precision": "fp32"}
    result = run(tmp_path, {"q": quantize(model), "sft": train})
    assert result.ok, result.error
    path = result.stage("sft").outputs["model"].path
    assert "quantization_config" not in json.loads((path / "config.json").read_text())
    read_model(path, dtype=torch.float32)


def test_layers_that_the_recipe_drops_are_not_in_the_result(tmp_path, model):
    stage = quantize(model, model={"from": str(model), "keep_layers": [0, 2]})
    result = run(tmp_path, {"q": stage})
    assert result.ok, result.error
    made = result.stage("q").outputs["model"]
    assert len(made.info["layer_errors"]) == 14
    assert load_model(made, dtype=torch.float32).config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ({"q": {}, "again": {"model": "${stages.q.model}"}}, "is already quantised (gptq)"),
        ({"q": {"quantizer": {"use": "rtn", "group_size": 48}}}, "group_size 48 does not divide"),
    ],
)
def test_refusals(tmp_path, model, stages, said):
    result = run(tmp_path, {name: quantize(model, **values) for name, values in stages.items()})
    assert not result.ok
    assert said in str(result.error)


def test_a_backend_that_is_not_here_ends_a_run_before_it_begins(tmp_path, model, monkeypatch):
    from kdkit.plugins.quantizers.backends import environment

    def absent(name):
        raise environment.PackageNotFoundError(name)

    monkeypatch.setattr(environment, "version", absent)
    quantizer = {"use": "gptq", "backend": "gptqmodel"}
    first = {"kind": "dequantize", "model": str(model)}  # which can only fail
    stages = {"first": first, "q": quantize(model, quantizer=quantizer, calibration=ROWS)}
    with pytest.raises(EnvironmentUnmet, match=r"backend gptqmodel .*not installed; run: pip install") as caught:
        run(tmp_path, stages)
    assert caught.value.exit_code == 4
    assert not list(tmp_path.rglob("events.jsonl"))


def test_a_model_with_code_of_its_own_is_refused(tmp_path, model):
    from kdkit.plugins.stages.quantizing import _refuse

    _refuse(Model(path=model))
    with pytest.raises(ModelError, match="code of its own"):
        _refuse(Model(path=model, trust_remote_code=True))


def test_a_literal_checkpoint_is_known_for_one(tmp_path, model):
    first = run(tmp_path, {"q": quantize(model)})
    path = str(first.stage("q").outputs["model"].path)
    assert not run(tmp_path, {"again": quantize(path)}).ok
    assert run(tmp_path, {"back": {"kind": "dequantize", "model": path}}).ok


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_dequantised_model_has_the_precision_that_was_asked_for(tmp_path, model, dtype):
    back = {"kind": "dequantize", "model": "${stages.q.model}", "dtype": dtype}
    result = run(tmp_path, {"q": quantize(model), "back": back})
    assert result.ok, result.error
    made = result.stage("back").outputs["model"]
    assert {str(tensor.dtype) for tensor in load_file(made.path / "model.safetensors").values()} == {f"torch.{dtype}"}
    assert json.loads((made.path / "config.json").read_text())["dtype"] == dtype
    facts = json.loads((made.path / "kdkit.json").read_text())
    assert "quantization" not in facts
    assert facts["base_model"] == str(model)


def test_only_quantised_models_are_dequantised(tmp_path, model):
    result = run(tmp_path, {"back": {"kind": "dequantize", "model": str(model)}})
    assert not result.ok
    assert "is not quantised" in str(result.error)


def test_mistakes_are_found_before_it_runs(tmp_path, model):
    found = problems(tmp_path, {"q": quantize(model, calibration=ROWS, max_rows=3)})
    assert found == [
        "'rtn' looks at no rows; leave calibration out",
        "'rtn' looks at no rows; leave max_rows out",
    ]
    assert problems(tmp_path, {"q": quantize(model, quantizer={"use": "rtn", "bits": 3})})


def test_a_checkpoint_of_another_program_is_described_by_its_own_words(tmp_path, model):
    path = run(tmp_path, {"q": quantize(model)}).stage("q").outputs["model"].path
    foreign = shutil.copytree(path, tmp_path / "foreign", ignore=shutil.ignore_patterns("kdkit.json", "README.md"))
    result = run(tmp_path, {"eval": evaluate(foreign=str(foreign))})
    assert result.ok, result.error
    scores = json.loads((result.stage("eval").outputs["scores"].path / "scores.json").read_text())["models"]
    facts = scores["foreign"]["quantization"]
    assert (facts["quantizer"], facts["bits"], facts["group_size"], facts["layer_errors"]) == ("gptq", 4, 32, {})


def test_rows_of_calibration_reach_the_quantizer(tmp_path):
    result, lines = counting(tmp_path, max_rows=6)
    assert result.ok, result.error
    (line,) = [line for line in lines if line.startswith("rows ")]
    numbers = [int(word.rstrip(".")) for word in line.split()[1:]]
    assert len(numbers) == len(set(numbers)) == 6
    assert set(numbers) <= {2 * i for i in range(40)}
    info = result.stage("q").outputs["model"].info
    assert (info["kept_rtn"], info["notes"]) == (["b"], ["b is odd"])
    assert "b is odd" in lines
    assert "1 of 2 layers are rounded to nearest: b" in lines


def calibration(*datasets, max_rows=100, seed=5):
    """Ids of the rows that calibrate, and what is said of them."""
    logs: list[str] = []
    ctx = SimpleNamespace(
        name="q", log=logs.append, seed_for=lambda _purpose: seed, load=lambda rows: SimpleNamespace(examples=rows)
    )
    return [row.id for row in _calibration(datasets, max_rows, ctx)], logs


def test_rows_of_calibration_are_a_sample_of_all_datasets():
    first, second = ([Example(id=f"{name}{i:02}", prompt="x") for i in range(40)] for name in "ab")
    chosen, _ = calibration(first, second, max_rows=12)
    assert len(set(chosen)) == 12
    assert chosen == sorted(chosen)
    assert {row[0] for row in chosen} == {"a", "b"}
    # The same for the same seed, and not the first ones.
    assert chosen == calibration(first, second, max_rows=12)[0] != calibration(first, second, max_rows=12, seed=6)[0]
    assert chosen[:6] != [row.id for row in first[:6]]
    assert len(calibration(first, second, max_rows=80)[0]) == 80


def test_rows_without_text_are_left_out_or_refused():
    empty = [
        Example(id="a", prompt=" \n", completion=" "),
        Example(id="b", prompt=(Message("user", ""),)),
    ]
    texts = [
        Example(id="c", prompt="x"),
        Example(id="d", prompt=(Message("user", "x"),)),
        Example(id="e", prompt="", completion="x"),
    ]
    assert calibration([*empty, *texts]) == (
        ["c", "d", "e"],
        ["calibration: 2 of 5 rows have no text and are left out"],
    )
    for rows in ([], empty):
        with pytest.raises(DataError, match=rf"stage q: none of the {len(rows)} rows of calibration has any text"):
            calibration(rows)


def test_a_quantizer_that_writes_half_a_model_is_named(tmp_path):
    result, _ = counting(tmp_path, mode="half")
    assert not result.ok
    assert "the quantizer wrote no complete model: " in str(result.error)


def test_what_a_killed_attempt_left_is_removed(tmp_path):
    from kdkit.plugins.stages.quantizing import _clear

    for name in ("model", ".model.1234abcd", "metrics"):
        (tmp_path / name).mkdir()
    _clear(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics"]


def test_the_artifact_of_the_stage_says_its_format(tmp_path, model):
    made = run(tmp_path, {"q": quantize(model)}).stage("q").outputs["model"]
    assert isinstance(made, Model)
    assert load_model(made, dtype=torch.bfloat16, train=True).lm_head.weight.requires_grad
