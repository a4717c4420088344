"""The backends of quantizer gptq without their packages: what is refused, what is asked for, what is left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from kdkit.api.errors import DataError, EnvironmentUnmet, ExitCode, ModelError, StageError, Stopped
from kdkit.models.quantized.grid import GridSettings
from kdkit.models.quantized.linear import round_to_nearest
from kdkit.models.quantized.packing import pack
from kdkit.plugins.quantizers.backends import auto_gptq, environment, gptqmodel, peer
from kdkit.plugins.quantizers.backends.peer import Follow, PeerJob
from kdkit.plugins.quantizers.backends.work import work_elsewhere

ROOT = Path(__file__).parents[2]
SECRET_ROW = [201, 117, 203, 119, 205, 121, 207, 123, 209, 125, 211, 127]
PROBE = {
    "versions": {
        "torch": "2.13.0", "auto-gptq": "0.7.1", "transformers": "4.53.3", "numpy": "1.26.4", "pyarrow": "18.1.0",
        "peft": "0.10.0", "accelerate": "0.34.2", "datasets": "2.21.0",
    },
    "cuda": True,
}  # fmt: skip


def make_job(**changes):
    job = PeerJob(
        source=Path("/nowhere"),
        rows=[SECRET_ROW],
        shapes={"model.layers.0.mlp.up_proj": (16, 64)},
        blocks=1,
        bits=4,
        group_size=32,
        sym=True,
        desc_act=True,
        static_groups=True,
        damp_percent=0.05,
        true_sequential=True,
        mse=2.4,
        lm_head=False,
        device="cpu",
    )
    return replace(job, **changes)


def python_that_answers(path, answer):
    path.write_text(f"#!{sys.executable}\nprint({json.dumps(answer)!r})\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


# --- what is here -----------------------------------------------------------------------------------------------------


def test_the_pins_are_those_of_the_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert environment.GPTQMODEL in [Requirement(text) for text in project["optional-dependencies"]["gptq"]]


@pytest.mark.parametrize(("found", "usable"), [("7.3.9", False), ("7.4.0", True), ("7.6.3", True), ("7.7.0", False)])
def test_gptqmodel_of_a_known_version(monkeypatch, found, usable):
    monkeypatch.setattr(environment, "version", lambda _name: found)
    state = environment.gptqmodel_state()
    assert state.usable is usable
    assert found in state.found
    assert usable or "kdkit[gptq]" in state.hint


def test_a_missing_gptqmodel_exits_4_with_the_line_that_installs_it(monkeypatch):
    def absent(name):
        raise environment.PackageNotFoundError(name)

    monkeypatch.setattr(environment, "version", absent)
    with pytest.raises(EnvironmentUnmet, match=r"backend gptqmodel .* pip install 'kdkit\[gptq\]'") as caught:
        gptqmodel.ready()
    assert caught.value.exit_code == ExitCode.ENVIRONMENT == 4


def test_auto_gptq_without_cuda_is_refused_with_that_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "has_device", lambda: False)
    monkeypatch.setenv(environment.AUTO_GPTQ_PYTHON, python_that_answers(tmp_path / "python", PROBE))
    with pytest.raises(EnvironmentUnmet, match="no CUDA device") as caught:
        auto_gptq.ready()
    assert caught.value.exit_code == 4
    assert "backend reference" in str(caught.value)


def test_auto_gptq_without_an_environment_says_how_to_make_one(monkeypatch):
    monkeypatch.setattr(environment, "has_device", lambda: True)
    monkeypatch.delenv(environment.AUTO_GPTQ_PYTHON, raising=False)
    with pytest.raises(EnvironmentUnmet, match=r"KDKIT_AUTO_GPTQ_PYTHON is not set; .*python3.11 -m venv") as caught:
        auto_gptq.ready()
    assert "'auto-gptq==0.7.1' 'transformers" in str(caught.value)


@pytest.mark.parametrize(
    ("package", "found", "message"),
    [
        ("transformers", "4.54.0", "transformers 4.54.0 is not"),
        ("numpy", "2.0.0", "numpy 2.0.0 is not <2"),
        ("auto-gptq", None, "auto-gptq is not installed"),
        ("torch", None, "torch is not installed"),
    ],
)
def test_an_environment_that_does_not_fit_is_named(monkeypatch, tmp_path, package, found, message):
    versions = {**PROBE["versions"], package: found}
    answer = {"versions": {name: value for name, value in versions.items() if value}, "cuda": found is not None}
    monkeypatch.setattr(environment, "has_device", lambda: True)
    monkeypatch.setenv(environment.AUTO_GPTQ_PYTHON, python_that_answers(tmp_path / "python", answer))
    state = environment.auto_gptq_state()
    assert not state.usable
    assert message in state.found


def test_an_environment_with_torch_for_the_cpu_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "has_device", lambda: True)
    python = python_that_answers(tmp_path / "python", {**PROBE, "cuda": False})
    monkeypatch.setenv(environment.AUTO_GPTQ_PYTHON, python)
    assert "not built for CUDA" in environment.auto_gptq_state().found


@pytest.mark.parametrize("python", ["/does/not/exist", "/bin/true", "/etc/hostname"])
def test_what_is_no_python_is_named(monkeypatch, python):
    monkeypatch.setattr(environment, "has_device", lambda: True)
    monkeypatch.setenv(environment.AUTO_GPTQ_PYTHON, python)
    assert f"KDKIT_AUTO_GPTQ_PYTHON={python} is no working Python" in environment.auto_gptq_state().found


def test_auto_gptq_in_an_environment_that_fits(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "has_device", lambda: True)
    monkeypatch.setenv(environment.AUTO_GPTQ_PYTHON, python_that_answers(tmp_path / "python", PROBE))
    auto_gptq.ready()
    assert environment.auto_gptq_state().found == "0.7.1 with transformers 4.53.3"


def test_the_probe_of_this_interpreter_imports_no_torch():
    command = [sys.executable, "-X", "importtime", "-I", str(environment.CHILD), "probe"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["versions"]["torch"]
    assert not re.search(r"\| +(torch|transformers|kdkit)$", done.stderr, flags=re.MULTILINE)


def test_doctor_has_a_line_for_each_backend(monkeypatch, capsys):
    from kdkit.cli import doctor

    monkeypatch.delenv(environment.AUTO_GPTQ_PYTHON, raising=False)
    doctor.doctor(as_json=True, quick=True)
    lines = [check for check in json.loads(capsys.readouterr().out)["checks"] if check["name"] == "gptq"]
    assert [line["found"].split(":")[0] for line in lines] == ["backend gptqmodel", "backend auto-gptq"]
    assert "KDKIT_AUTO_GPTQ_PYTHON=DIR/bin/python" in lines[1]["hint"]


# --- what is refused before any work ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [gptqmodel, auto_gptq])
def test_a_group_size_that_does_not_divide_is_refused(backend):
    backend.check(make_job(group_size=-1))
    with pytest.raises(ModelError, match=r"up_proj: group_size 48 does not divide its 64 inputs"):
        backend.check(make_job(group_size=48))


@pytest.mark.parametrize("backend", [gptqmodel, auto_gptq])
@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_damping_that_the_packages_refuse_is_refused_first(backend, damping):
    with pytest.raises(ModelError, match="above 0 and below 1"):
        backend.check(make_job(damp_percent=damping))


def test_gptqmodel_would_leave_out_short_rows():
    gptqmodel.check(make_job(rows=[[1] * 10, [1] * 11]))
    with pytest.raises(DataError, match="no calibration row has more than 10 tokens"):
        gptqmodel.check(make_job(rows=[[1] * 10, []]))


def test_a_head_that_gptqmodel_would_quantise_in_another_way_is_refused():
    with pytest.raises(ModelError, match=r"8 bits and groups of 32.*backend: reference"):
        gptqmodel.check(make_job(lm_head=True, rows=[[1] * 11]))


@pytest.mark.parametrize(("setting", "message"), [("sym", "zero point is 0"), ("lm_head", "output projection")])
def test_what_auto_gptq_cannot_do_is_refused(setting, message):
    auto_gptq.check(make_job())
    with pytest.raises(ModelError, match=message):
        auto_gptq.check(make_job(**{setting: setting == "lm_head"}))


# --- talking with the program -----------------------------------------------------------------------------------------


@pytest.fixture
def talk(tmp_path):
    """Lets a piece of Python stand in for the program; ``job`` is what it was given."""

    def start(body, *, follow=None, job=None):
        program = tmp_path / "program.py"
        program.write_text(
            "import json, os, sys, time\njob = json.loads(sys.stdin.readline())\n"
            f"def tell(**message): print(json.dumps(message), flush=True)\n{body}\n",
            encoding="utf-8",
        )
        directory = tmp_path / "work"
        directory.mkdir()
        variables = peer.environment(directory, EXTRA="1")
        command = [sys.executable, str(program), "gptqmodel"]
        return peer.converse(command, job or {"rows": [SECRET_ROW]}, directory, variables, follow or Follow())

    return start


def test_the_last_answer_comes_back_and_steps_are_followed(talk):
    seen = []
    answer = talk(
        "tell(step=[1, 2]); tell(step=[2, 2]); tell(done={'rows': job['rows'], 'extra': os.environ['EXTRA']})",
        follow=Follow(progress=lambda done, total: seen.append((done, total))),
    )
    assert answer == {"rows": [SECRET_ROW], "extra": "1"}
    assert seen == [(1, 2), (2, 2)]


def test_a_large_job_passes_through_the_pipe(talk):
    rows = [list(range(4096))] * 64
    assert talk("tell(done={'tokens': sum(map(len, job['rows']))})", job={"rows": rows}) == {"tokens": 64 * 4096}


def test_calibration_tokens_and_secrets_stay_off_the_disk_and_out_of_the_environment(talk, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-987654321")
    body = "tell(done={'token': os.environ.get('HF_TOKEN'), 'tmp': os.environ['TMPDIR'], 'cwd': os.getcwd()})"
    answer = talk(body)
    directory = str(tmp_path / "work")
    assert answer == {"token": None, "tmp": directory, "cwd": directory}
    found = [file for file in Path(directory).rglob("*") if file.is_file() and b"201" in file.read_bytes()]
    assert not found


def test_a_failure_is_its_last_line_without_colours(talk):
    with pytest.raises(StageError, match=r"^gptqmodel failed: ValueError: no such layer$"):
        talk("sys.stderr.write('\\x1b[31mbanner\\x1b[0m\\n'); raise ValueError('\\x1b[31mno such layer\\x1b[0m')")


def test_an_end_without_an_answer_is_a_failure(talk):
    with pytest.raises(StageError, match="gptqmodel failed: exit code 3"):
        talk("sys.exit(3)")


def test_a_program_that_is_killed_is_said_to_lack_memory(talk):
    with pytest.raises(StageError, match="memory"):
        talk("import signal; os.kill(os.getpid(), signal.SIGKILL)")


def test_a_wish_to_stop_ends_the_program(talk, tmp_path):
    pid = tmp_path / "pid"
    body = f"open({str(pid)!r}, 'w').write(str(os.getpid())); tell(step=[0, 1]); time.sleep(600)"
    with pytest.raises(Stopped, match="gptqmodel"):
        talk(body, follow=Follow(stopping=pid.exists))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not pid.read_text():
        time.sleep(0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text() or 2**22), 0)


def test_a_program_that_cannot_be_started_is_unmet(tmp_path):
    with pytest.raises(EnvironmentUnmet, match="cannot be started"):
        peer.converse(["/does/not/exist", "auto-gptq"], {}, tmp_path, {}, Follow())


# --- the program, with a stand-in for the package ---------------------------------------------------------------------

FAKE = """
import json, os
print("a banner on standard output")
os.write(1, b"and one from C\\n")

class QuantizeConfig:
    def __init__(self, **given):
        self.given = given

class GPTQModel:
    @classmethod
    def load(cls, source, config, device):
        self = cls()
        workers = os.environ.get("GPTQMODEL_CPU_WORKERS")
        samples = os.environ.get("GPTQMODEL_LOG_CALIBRATION_SAMPLES")
        self.facts = {"source": source, "device": device, "workers": workers, "samples": samples, **config.given}
        return self

    def quantize(self, rows, batch_size, calibration_sort):
        self.facts["rows"] = rows
        if os.environ.get("FAKE_SLEEP"):
            import time
            time.sleep(600)
        self.layer_callback(layer_idx=0, submodule_finalized=False)
        self.layer_callback(layer_idx=0, submodule_finalized=True)
        rows = [("a", "0.25", "0.05"), ("b", "rtn fallback", "0.05"), ("c", "0.5", "1.0")]
        return {"gptq": [{"layer": 0, "module": m, "loss": l, "damp": d} for m, l, d in rows]}

    def save(self, out):
        os.makedirs(out)
        with open(os.path.join(out, "facts.json"), "w") as file:
            json.dump(self.facts, file)
"""


@pytest.fixture
def fake_gptqmodel(tmp_path, monkeypatch):
    packages = tmp_path / "packages"
    (packages / "gptqmodel-7.6.0.dist-info").mkdir(parents=True)
    metadata = "Metadata-Version: 2.1\nName: gptqmodel\nVersion: 7.6.0\n"
    (packages / "gptqmodel-7.6.0.dist-info" / "METADATA").write_text(metadata, encoding="utf-8")
    (packages / "gptqmodel.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(packages))


def run_fake(tmp_path, monkeypatch, **changes):
    """What the stand-in was asked for, and what the backend made of its answer."""
    directory = tmp_path / "work"
    directory.mkdir()
    asked = {}

    def read(job, checkpoint, program, answer):
        asked.update(json.loads((checkpoint / "facts.json").read_text(encoding="utf-8")))
        return program, answer

    monkeypatch.setattr(gptqmodel, "result", read)
    seen = []
    made = gptqmodel.quantize(make_job(**changes), directory, Follow(progress=lambda *step: seen.append(step)))
    return asked, made, seen


@pytest.mark.usefixtures("fake_gptqmodel")
def test_gptqmodel_is_asked_for_what_the_job_says(tmp_path, monkeypatch):
    asked, (program, answer), seen = run_fake(tmp_path, monkeypatch, group_size=64, damp_percent=0.02, bits=8)
    assert program == "gptqmodel 7.6.0"
    assert {name: asked[name] for name in ("bits", "group_size", "sym", "desc_act", "static_groups")} == {
        "bits": 8, "group_size": 64, "sym": True, "desc_act": True, "static_groups": True,
    }  # fmt: skip
    assert (asked["damp_percent"], asked["mse"], asked["true_sequential"]) == (0.02, 2.4, True)
    # Its default sorts columns in a way of its own, and leaves a path of this machine in the checkpoint.
    assert (asked["act_group_aware"], asked["offload_to_disk"]) == (False, False)
    assert asked["rows"] == [{"input_ids": SECRET_ROW, "attention_mask": [1] * len(SECRET_ROW)}]
    assert asked["format"] == "gptq"
    assert asked["samples"] == "0"  # it would write rows of calibration into its log
    assert seen == [(1, 1)]
    assert answer["losses"] == {"0.a": 0.25, "0.c": 0.5}
    assert answer["fallback"] == ["0.b", "0.c"]


@pytest.mark.usefixtures("fake_gptqmodel")
def test_asymmetric_grids_are_asked_for_in_the_second_version(tmp_path, monkeypatch):
    asked, _, _ = run_fake(tmp_path, monkeypatch, sym=False, desc_act=False, static_groups=False, mse=0)
    assert (asked["sym"], asked["format"]) == (False, "gptq_v2")
    assert (asked["desc_act"], asked["static_groups"], asked["mse"]) == (False, False, 0.0)


@pytest.mark.usefixtures("fake_gptqmodel")
@pytest.mark.parametrize(
    ("cores", "given", "expected"), [(1, "", 2), (2, "", 2), (16, "", 8), (64, "", 12), (8, "1", 2)]
)
def test_gptqmodel_gets_two_workers_or_more(monkeypatch, cores, given, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", given)
    assert gptqmodel.workers() == str(expected)


@pytest.mark.usefixtures("fake_gptqmodel")
def test_the_program_ends_when_its_parent_does(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SLEEP", "1")
    command = [sys.executable, "-P", str(environment.CHILD), "gptqmodel"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as child:
        facts = {**make_job().settings(), "source": "x", "out": str(tmp_path / "out"), "rows": [SECRET_ROW]}
        child.stdin.write(json.dumps(facts).encode() + b"\n")
        child.stdin.close()
        assert child.wait(60) == 1


# --- reading the result -----------------------------------------------------------------------------------------------


def written(tmp_path, shapes, **changes):
    """A checkpoint as another program writes it: no name of ours, all in one file."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, (out, width) in shapes.items():
        weight = torch.randn(out, width, generator=torch.Generator().manual_seed(len(name)))
        linear = round_to_nearest(weight, GridSettings(bits=4, sym=True, mse=0), changes.get("group_size", 32))
        tensors |= {f"{name}.{part}": tensor for part, tensor in pack(linear, version=1).items()}
    tmp_path.mkdir(exist_ok=True)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    facts = {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False,
        "checkpoint_format": "gptq", "damp_percent": 0.05, "true_sequential": True, "static_groups": False, **changes,
    }  # fmt: skip
    config = {"model_type": "llama", "quantization_config": facts}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "quantize_config.json").write_text(json.dumps(facts), encoding="utf-8")
    return tmp_path


ANSWER = {"losses": {"0.a": 0.5}, "fallback": ["0.b"]}


def test_the_layers_come_back_in_the_order_that_was_asked_for(tmp_path):
    shapes = {"model.layers.0.b": (16, 64), "model.layers.0.a": (8, 32)}
    made = peer.result(make_job(shapes=shapes), written(tmp_path / "c", shapes), "gptqmodel 7.6.0", ANSWER)
    assert list(made.linears) == list(shapes)
    assert (made.losses, made.fell_back) == ({"model.layers.0.a": 0.5}, ("model.layers.0.b",))
    assert made.linears["model.layers.0.b"].dequantized(dtype=made.linears["model.layers.0.b"].scales.dtype).shape == (
        16,
        64,
    )


def test_a_whole_row_is_one_group(tmp_path):
    shapes = {"model.layers.0.a": (16, 64)}
    checkpoint = written(tmp_path / "c", shapes, group_size=-1)
    made = peer.result(make_job(shapes=shapes, group_size=-1), checkpoint, "gptqmodel 7.6.0", ANSWER)
    assert made.linears["model.layers.0.a"].scales.shape == (16, 1)


def test_other_layers_than_asked_for_are_refused(tmp_path):
    shapes = {"model.layers.0.a": (16, 64)}
    job = make_job(shapes={**shapes, "model.layers.0.b": (16, 64)})
    with pytest.raises(StageError, match=r"model\.layers\.0\.b is one of 1"):
        peer.result(job, written(tmp_path / "c", shapes), "gptqmodel 7.6.0", ANSWER)


@pytest.mark.parametrize("change", [{"bits": 8}, {"group_size": 64}, {"shapes": {"model.layers.0.a": (16, 32)}}])
def test_a_layer_quantised_in_another_way_is_refused(tmp_path, change):
    shapes = {"model.layers.0.a": (16, 64)}
    with pytest.raises(StageError, match="in another way"):
        peer.result(make_job(**{"shapes": shapes, **change}), written(tmp_path / "c", shapes), "x", ANSWER)


# --- auto-gptq's transformers -----------------------------------------------------------------------------------------


def test_rotary_frequencies_survive_the_way_back_to_transformers_4():
    config = {"dtype": "float16", "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}, "hidden_size": 8}
    old = auto_gptq.old_config(config)
    assert old == {**config, "torch_dtype": "float16", "rope_theta": 100000.0}
    scaled = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 32.0}}
    old = auto_gptq.old_config(scaled)
    assert (old["rope_theta"], old["rope_scaling"]) == (5e5, {"rope_type": "llama3", "factor": 32.0})
    assert auto_gptq.old_config({"rope_theta": 1e4}) == {"rope_theta": 1e4}


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}])
def test_transformers_5_reads_the_same_with_the_old_names(rope):
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=64, rope_parameters={**rope, "rope_theta": 50000.0}).to_dict()
    again = LlamaConfig.from_dict(auto_gptq.old_config(config))
    assert again.rope_parameters == {**rope, "rope_theta": 50000.0}


def test_code_of_the_model_is_never_named_to_auto_gptq():
    assert auto_gptq.old_config({"auto_map": {"AutoConfig": "evil.Config"}, "hidden_size": 8}) == {"hidden_size": 8}


# --- in a stage -------------------------------------------------------------------------------------------------------


class Stage:
    """What a backend needs of a stage."""

    def __init__(self, checkpoints):
        self.checkpoints, self.steps, self.lines = checkpoints, [], []

    def progress(self, step, total, /, **_values):
        self.steps.append((step, total))

    def log(self, message, /):
        self.lines.append(message)

    def stopping(self):
        return False


@pytest.mark.usefixtures("fake_gptqmodel")
def test_a_stage_learns_of_progress_and_of_layers_that_were_rounded(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "version", lambda _name: "7.6.0")
    shapes = {"0.a": (8, 32), "0.b": (8, 32)}

    def read(job, checkpoint, program, answer):
        written(checkpoint, shapes)
        return peer.result(job, checkpoint, program, answer)

    monkeypatch.setattr(gptqmodel, "result", read)
    stage = Stage(tmp_path / "checkpoints")
    (stage.checkpoints / "backend" / "checkpoint").mkdir(parents=True)  # of an attempt that was killed
    result = work_elsewhere("gptqmodel", make_job(shapes=shapes), stage)
    assert set(result.linears) == set(shapes)
    assert stage.steps == [(1, 1)]
    assert stage.lines == [f"{name}: gptqmodel 7.6.0 rounded it to nearest" for name in ("0.b", "0.c")]
    assert not (stage.checkpoints / "backend").exists()


def test_an_unmet_backend_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "has_device", lambda: False)
    with pytest.raises(EnvironmentUnmet, match="no CUDA device"):
        work_elsewhere("auto-gptq", make_job(), Stage(tmp_path / "checkpoints"))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.usefixtures("fake_gptqmodel")
def test_nothing_is_left_behind_by_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "version", lambda _name: "7.6.0")
    stage = Stage(tmp_path / "checkpoints")
    with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
        work_elsewhere("gptqmodel", make_job(), stage)
    assert not (stage.checkpoints / "backend").exists()


def test_the_quantizer_asks_when_it_is_built(monkeypatch):
    from kdkit.plugins.quantizers.gptq import GptqQuantizer
    from kdkit.plugins.quantizers.gptq_plugin import GptqParams

    monkeypatch.setattr(environment, "has_device", lambda: False)
    GptqQuantizer(GptqParams())
    with pytest.raises(EnvironmentUnmet, match="no CUDA device"):
        GptqQuantizer(GptqParams(backend="auto-gptq"))


def test_a_checkpoint_for_auto_gptq_has_the_head_and_the_old_names(tmp_path):
    import torch
    from safetensors.torch import load_file

    from kdkit.models.quantized.checkpoint import write_checkpoint
    from kdkit.models.quantized.form import GptqFormat
    from kdkit.models.quantized.layers import quantizable
    from kdkit.testing.tiny import tiny_model, tiny_tokenizer

    # float16 already, so that nothing is copied by rounding.
    model = tiny_model(layers=1).to(torch.float16)
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    grid = GridSettings(bits=4, sym=True, mse=0.0)
    layers = quantizable(model, lm_head=False).items()
    linears = {name: round_to_nearest(layer.weight.float(), grid, 32) for name, layer in layers}
    form = GptqFormat.standard(sym=True, bits=4, group_size=32)
    for name, head in (("any", False), ("auto-gptq", True)):
        write_checkpoint(tmp_path / "source", tmp_path / name, linears, form, write_head=head)
        tensors = load_file(tmp_path / name / "model.safetensors")
        config = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        assert ("lm_head.weight" in tensors) is head
        assert ("rope_theta" in config, "torch_dtype" in config) == (head, head)
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
