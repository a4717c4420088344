from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from pathlib import Path

import pytest

from kdkit.api import DataError, EnvironmentUnmet, MetricSpec, Params, StageError
from kdkit.api.slots import Found
from kdkit.engine import hardware
from kdkit.engine.boundary import ComponentBoundary, machine_error
from kdkit.engine.env import describe_environment
from kdkit.engine.files import canonical_json, check_writable, json_line, write_atomic
from kdkit.engine.redact import RedactingStream, redact, secrets_of


@pytest.fixture
def cpu(tmp_path, monkeypatch):
    def set_flags(flags):
        file = tmp_path / "cpuinfo"
        file.write_text(f"processor\t: 0\nmodel name\t: A CPU\nflags\t\t: {flags}\n")
        monkeypatch.setattr(hardware, "_CPUINFO", file)
        monkeypatch.setattr(hardware, "torch_version", lambda: "2.13.0+cpu")

    return set_flags


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("avx2 amx_bf16", "bf16"), ("avx512_bf16", "bf16"), ("avx2 avx512f", "fp32"), ("", "fp32")],
)
def test_auto_is_what_the_cpu_multiplies_faster(cpu, flags, expected):
    cpu(flags)
    assert hardware.resolve_precision("auto") == expected
    assert hardware.resolve_precision("fp32") == "fp32"
    assert hardware.resolve_precision("bf16") == "bf16"
    assert hardware.cpu_name() == "A CPU"


class Driver:
    """The five functions of libcuda that are called."""

    def __init__(self, majors, *, broken=False):
        self.majors, self.broken = majors, broken

    def cuInit(self, flags):  # noqa: N802
        return 100 if self.broken else 0

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = len(self.majors)
        return 0

    def cuDeviceGet(self, device, index):  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):  # noqa: N802
        assert attribute == 75
        value._obj.value = self.majors[device.value]
        return 0

    def cuDeviceGetName(self, name, size, device):  # noqa: N802
        name.value = f"GPU {device.value}".encode()
        return 0


@pytest.mark.parametrize(
    ("majors", "version", "expected"),
    [
        ([9], "2.13.0", "bf16"),
        ([8, 9], "2.13.0+cu130", "bf16"),
        ([7], "2.13.0", "fp32"),
        ([9, 7], "2.13.0", "fp32"),
        ([9], "2.13.0+cpu", "fp32"),
        ([9], None, "fp32"),
    ],
)
def test_auto_on_gpus(cpu, monkeypatch, majors, version, expected):
    cpu("avx2")
    monkeypatch.setattr(hardware, "torch_version", lambda: version)
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: Driver(majors))
    assert hardware.resolve_precision("auto") == expected


@pytest.mark.parametrize("driver", [Driver([9], broken=True), Driver([]), OSError("no library")])
def test_a_machine_without_a_usable_gpu_is_a_cpu(cpu, monkeypatch, driver):
    def load(name):
        if isinstance(driver, OSError):
            raise driver
        return driver

    cpu("avx2")
    monkeypatch.setattr(hardware, "torch_version", lambda: "2.13.0")
    monkeypatch.setattr(hardware.ctypes, "CDLL", load)
    assert hardware.cuda_devices() == ()
    assert hardware.pick_device() == "cpu"


def test_devices_have_names(monkeypatch):
    monkeypatch.setattr(hardware, "torch_version", lambda: "2.13.0")
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: Driver([9, 8]))
    assert hardware.cuda_devices() == (("GPU 0", 9), ("GPU 1", 8))


def test_numbers_that_json_lacks_are_strings():
    line = json_line({"a": math.nan, "b": [math.inf, -math.inf], "c": 1.5, "d": {"e": math.nan}})
    assert json.loads(line, parse_constant=pytest.fail) == {
        "a": "NaN",
        "b": ["Infinity", "-Infinity"],
        "c": 1.5,
        "d": {"e": "NaN"},
    }


def test_canonical_json_knows_no_order():
    assert canonical_json({"b": 1, "a": [1, {"d": 2, "c": 3}]}) == canonical_json({"a": [1, {"c": 3, "d": 2}], "b": 1})


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "f.json"
    write_atomic(file, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            write_atomic(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(EnvironmentUnmet, match=r"/dev/null/x: cannot be written: .*no directory; do this"):
        check_writable(Path("/dev/null/x"), hint="do this")
    check_writable(tmp_path / "new" / "deep", hint="")
    assert list((tmp_path / "new" / "deep").iterdir()) == []


class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (MemoryError(), StageError, "out of memory; lower"),
        (OutOfMemoryError("CUDA out of memory"), StageError, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), StageError, "out of memory"),
        (OSError(28, "x", "/a"), EnvironmentUnmet, "/a: the disk is full"),
        (OSError(27, "x", "/a"), EnvironmentUnmet, "larger than this process may write"),
        (PermissionError(13, "x", "/a"), EnvironmentUnmet, "/a: permission denied"),
        (
            RuntimeError('IoError(Os { code: 28, message: "No space left on device" })'),
            EnvironmentUnmet,
            "disk is full",
        ),
    ],
)
def test_what_the_machine_is_to_blame_for(error, kind, message):
    found = machine_error(error)
    assert type(found) is kind
    assert message in str(found)


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError(2, "x"), KeyError("y")])
def test_what_the_program_is_to_blame_for(error):
    assert machine_error(error) is None


def component(kind, home, name, *, packaged=True):
    """A component defined in ``home/plugin.py`` and a function of ``home/impl.py`` that calls its argument."""
    home.mkdir(parents=True)
    if packaged:
        (home / "__init__.py").write_text("")
    (home / "impl.py").write_text("def call(inner):\n    return inner()\n")
    module = importlib.util.spec_from_file_location(f"{kind}_impl", home / "impl.py")
    loaded = importlib.util.module_from_spec(module)
    module.loader.exec_module(loaded)
    spec = MetricSpec(name=name, summary="x", params=Params, build=print, higher_is_better=True)
    return Found(spec, f"acme/{name}", "acme==1.0 v1", f"{home}/plugin.py:1"), loaded.call


def fail():
    raise KeyError("deep")


def test_the_innermost_component_is_blamed(tmp_path):
    outer, call_outer = component("outer", tmp_path / "outer", "outer")
    inner, call_inner = component("inner", tmp_path / "inner", "inner")
    with (
        pytest.raises(StageError, match=r"metric 'inner' of acme 1\.0 \(.*inner/impl\.py:2\): KeyError: 'deep'"),
        ComponentBoundary(outer, [inner]),
    ):
        call_outer(lambda: call_inner(fail))
    with pytest.raises(StageError, match="metric 'outer'"), ComponentBoundary(outer, [inner]):
        call_outer(fail)


def test_a_single_file_owns_itself_and_not_its_neighbours(tmp_path):
    outer, call_outer = component("outer", tmp_path / "outer", "outer")
    file, call_neighbour = component("file", tmp_path / "file", "file", packaged=False)
    with pytest.raises(StageError, match="metric 'outer'"), ComponentBoundary(outer, [file]):
        call_outer(lambda: call_neighbour(fail))


def test_errors_of_kdkit_pass_the_boundary(tmp_path):
    outer, _ = component("outer", tmp_path / "outer", "outer")
    error = DataError("no such column")
    with pytest.raises(DataError) as caught, ComponentBoundary(outer):
        raise error
    assert caught.value is error


def test_which_variables_are_secrets():
    environ = {
        "HF_TOKEN": "hf_abcdefgh",
        "OPENAI_API_KEY": "sk-abcdefgh",
        "AWS_SECRET_ACCESS_KEY": "abcdefghi",
        "TOKENIZERS_PARALLELISM": "false-or-true",
        "HF_HOME": "/home/someone",
        "SHORT_TOKEN": "abc",
    }
    assert set(secrets_of(environ)) == {"hf_abcdefgh", "sk-abcdefgh", "abcdefghi"}


def test_secrets_are_masked_in_text_and_streams(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    assert redact("Bearer hf_abcdefgh!") == "Bearer ***!"
    with (tmp_path / "log").open("wb") as raw:
        stream = RedactingStream(raw, encoding="utf-8", line_buffering=True)
        print("token hf_abcdefgh", file=stream)
        stream.buffer.write(b"bytes\n")
        stream.detach()
    assert (tmp_path / "log").read_text() == "token ***\nbytes\n"


def test_the_environment_is_described_without_secrets_or_host(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("KDKIT_STORE", "/store")
    before = set(sys.modules)
    found = describe_environment()
    assert "torch" not in set(sys.modules) - before
    text = json.dumps(found)
    assert "hf_abcdefgh" not in text
    assert os.uname().nodename not in found
    assert found["variables"]["KDKIT_STORE"] == "/store"
    assert found["versions"]["torch"]
    assert found["precision"] in {"bf16", "fp32"}
