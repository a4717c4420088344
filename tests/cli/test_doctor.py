from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from kdkit.api import EnvironmentUnmet
from kdkit.cli import doctor, doctor_speed
from kdkit.cli.doctor_hub import HubQuestion
from kdkit.cli.doctor_speed import measured, speed_checks
from kdkit.host import Catalog, extras_of

# --- speed ------------------------------------------------------------------------------------------------------------


SPEED = {"device": "cpu", "dtype": "fp32", "flops": 2e9, "size": 256, "threads": 1}


def speed(dtype, flops, device="cpu", **more):
    return {"device": device, "dtype": dtype, "flops": flops, "size": 2048, "threads": 2, **more}


def test_every_dtype_is_measured_on_this_machine():
    speeds, problem = measured(limit=250)
    assert problem == ""
    found = {found["dtype"]: found for found in speeds if found["device"] == "cpu"}
    assert list(found) == ["fp32", "bf16", "fp16"]
    for one in found.values():
        assert 1e6 < one["flops"] < 1e16
        assert one["size"] in {256, 512, 1024, 2048}
        assert one["threads"] >= 1


def test_a_machine_that_takes_too_long_is_not_waited_for(tmp_path, monkeypatch):
    program = tmp_path / "slow.py"
    program.write_text("import time\nprint('{\"device\": 1}\\n{\"dev', end='', flush=True)\ntime.sleep(60)")
    monkeypatch.setattr(doctor_speed, "_PROGRAM", program)
    speeds, problem = measured(limit=5)
    assert speeds == [{"device": 1}], "whole lines that came before"
    assert problem == "not measured any further: it took more than 5 s"


def test_a_torch_that_cannot_be_imported_is_said_on_one_line(tmp_path, monkeypatch):
    program = tmp_path / "broken.py"
    program.write_text("raise ImportError('libx.so: cannot open canary-5d41402abc4b')")
    monkeypatch.setattr(doctor_speed, "_PROGRAM", program)
    monkeypatch.setenv("HF_TOKEN", "canary-5d41402abc4b")
    assert measured() == ([], "cannot be measured: ImportError: libx.so: cannot open ***")
    program.write_text("raise SystemExit(3)")
    assert measured() == ([], "cannot be measured: it ended with status 3")


def test_files_beside_the_program_or_in_the_current_directory_stand_for_no_module(tmp_path, monkeypatch):
    (tmp_path / "colorsys.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "program.py").write_text("import colorsys\nprint('{}')")
    monkeypatch.setattr(doctor_speed, "_PROGRAM", tmp_path / "program.py")
    monkeypatch.chdir(tmp_path)
    assert measured() == ([{}], "")


def test_the_program_imports_nothing_of_kdkit():
    text = doctor_speed._PROGRAM.read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if line.startswith(("import kdkit", "from kdkit"))]


def test_speeds_are_lines(monkeypatch):
    monkeypatch.setattr(doctor_speed, "resolve_precision", lambda _: "bf16")
    speeds = [
        speed("fp32", 84.7e9, threads=1),
        speed("bf16", 3.054e12),
        speed("bf16", 7.2e14, "cuda:0", threads=None, size=8192),
        {"device": "cpu", "dtype": "fp16", "error": "not implemented"},
    ]
    lines = [(check.status, check.found) for check in speed_checks(speeds, "stopped")]
    assert lines == [
        ("ok", "cpu fp32: 84.7 GFLOP/s (n = 2,048, 1 thread)"),
        ("ok", "cpu bf16: 3.05 TFLOP/s (n = 2,048, 2 threads)"),
        ("ok", "cuda:0 bf16: 720 TFLOP/s (n = 8,192)"),
        ("note", "cpu fp16: not implemented"),
        ("note", "stopped"),
    ]


@pytest.mark.parametrize(
    ("auto", "speeds", "text"),
    [
        (
            "fp32",
            [speed("fp32", 1e9), speed("bf16", 2e9)],
            "auto means fp32, but bf16 multiplied 2.0 times as fast on cpu",
        ),
        (
            "bf16",
            [speed("fp32", 3e9), speed("bf16", 1e9)],
            "auto means bf16, but fp32 multiplied 3.0 times as fast on cpu",
        ),
        ("bf16", [speed("fp32", 1.2e9), speed("bf16", 1e9)], None),
        ("bf16", [speed("fp32", 1e9), speed("bf16", 9e9)], None),
        ("bf16", [speed("fp32", 9e9)], None),
        # Where there is a device, what the processor does decides nothing.
        (
            "bf16",
            [speed("fp32", 9e9), speed("bf16", 1e9), speed("fp32", 1e12, "cuda:0"), speed("bf16", 9e12, "cuda:0")],
            None,
        ),
    ],
)
def test_another_precision_is_advised_when_it_is_faster(auto, speeds, text, monkeypatch):
    monkeypatch.setattr(doctor_speed, "resolve_precision", lambda _: auto)
    notes = [check for check in speed_checks(speeds, "") if check.status == "note"]
    assert [note.found for note in notes] == ([text] if text else [])
    if text:
        other = "bf16" if auto == "fp32" else "fp32"
        assert notes[0].hint == f"try it with precision: {other} in a stage"


# --- Hub --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A server that says what it was asked."""
    asked: list[tuple[str, str, dict[str, str]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append((self.command, self.path, dict(self.headers)))
            self.send_response(self.server.status)
            self.end_headers()

        def log_message(self, *args): ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.status, server.asked = 200, asked
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_ENDPOINT", f"http://someone:canary-pass@127.0.0.1:{server.server_port}/secret-path")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_hub_is_asked_once_without_a_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-token")
    # A password within the address is no part of a host that can be looked up.
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    check = HubQuestion(ask=True, seconds=30).check()
    assert check.status == "ok"
    assert check.found.startswith("online, 127.0.0.1 answers in ")
    assert check.found.endswith("HF_TOKEN set")
    ((method, path, headers),) = hub.asked
    assert (method, path) == ("HEAD", "/")
    assert not {name.lower() for name in headers} & {"authorization", "cookie"}
    assert "canary" not in str(hub.asked)


def test_a_status_is_an_answer(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}/")
    hub.status = 503
    check = HubQuestion(ask=True, seconds=30).check()
    assert (check.status, check.found) == ("ok", "online, 127.0.0.1 answers with status 503, HF_TOKEN not set")


@pytest.mark.parametrize(("variable", "ask"), [("HF_HUB_OFFLINE", True), ("TRANSFORMERS_OFFLINE", True), (None, False)])
def test_the_hub_is_not_asked(hub, monkeypatch, variable, ask):
    if variable:
        monkeypatch.setenv(variable, "1")
    check = HubQuestion(ask=ask).check()
    assert check.found == ("offline, HF_TOKEN not set" if variable else "online, not asked, HF_TOKEN not set")
    assert hub.asked == []


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:{port}", "file:///etc/passwd", "http://a:b@[", "http://u:canary-x@"]
)
def test_a_hub_that_cannot_be_reached_is_a_note(monkeypatch, address):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setenv("HF_ENDPOINT", address.format(port=taken.getsockname()[1]))
        check = HubQuestion(ask=True, seconds=30).check()
    assert check.status == "note"
    assert "cannot be reached" in check.found
    assert "HF_HUB_OFFLINE=1" in check.hint
    assert "canary" not in check.found


def test_a_hub_that_says_nothing_is_not_waited_for(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        check = HubQuestion(ask=True, seconds=0.3).check()
    assert check.status == "note"
    assert "did not answer within 0.3 s" in check.found or "cannot be reached (TimeoutError)" in check.found


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_extras_say_what_they_lack(monkeypatch):
    found = extras_of("kdkit")
    assert found["test"] == [], "the tests run, so their extra is installed"
    assert extras_of("no-such-distribution") == {}
    checks = list(doctor._extras({"chrf": [], "gptq": ["gptqmodel>=7.4"]}, Catalog.discover(strict=False)))
    assert [(check.status, check.found, check.hint) for check in checks] == [
        ("ok", "chrf (metric chrf): installed", ""),
        ("note", "gptq: lacks gptqmodel>=7.4", "pip install 'kdkit[gptq]'"),
    ]


@pytest.mark.parametrize(("free", "status"), [(5 * 2**30, "ok"), (2**30, "note")])
def test_little_room_is_a_note(free, status, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free, 0, free))
    checks = {check.name: check for check in doctor._disks()}
    assert {name: check.status for name, check in checks.items()} == {"store": status, "temp": status}
    assert f"{free / 2**30:.1f} GiB free" in checks["temp"].found
    if status == "note":
        assert "KDKIT_STORE" in checks["store"].hint
        assert "TMPDIR" in checks["temp"].hint


@pytest.fixture
def no_sandbox(monkeypatch):
    """Nothing is tried in a sandbox, which takes seconds."""
    monkeypatch.setattr(doctor, "_sandbox", lambda catalog: iter(()))


def test_what_every_run_needs_has_exit_code_4(no_sandbox, monkeypatch, capsys):
    found = {name: version for name, version in doctor.versions().items() if name != "torch"}
    monkeypatch.setattr(doctor, "versions", lambda: found)
    monkeypatch.setattr(doctor, "measured", lambda: pytest.fail("there is no torch to measure with"))
    assert doctor.doctor(as_json=False) == 4
    assert "missing torch         not installed  (pip install torch)" in capsys.readouterr().out.splitlines()
    assert doctor.doctor(as_json=True) == 4


def test_what_is_worth_knowing_only_has_exit_code_0(no_sandbox, monkeypatch, install_plugin, capsys):
    install_plugin("import nothing_of_the_sort", "kdkit-broken-here")
    monkeypatch.setattr(doctor, "measured", lambda: ([], "cannot be measured: it is busy"))
    assert doctor.doctor(as_json=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "note    matmul        cannot be measured: it is busy" in lines
    (broken,) = [line for line in lines if line.startswith("note    plugin ")]
    assert broken.endswith("'nothing_of_the_sort'  (kdkit plugins show kdkit-broken-here)")


def test_a_store_in_a_directory_of_somebody_else_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("KDKIT_STORE", str(tmp_path / "theirs" / "store"))
    real = Path.stat

    def stat(path, **options):
        if path.is_relative_to(tmp_path / "theirs"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr(doctor, "check_writable", refusing := Refusing())
    check = doctor._store()
    assert refusing.asked == [tmp_path]
    assert (check.status, check.hint) == ("missing", "set KDKIT_STORE")
    assert check.found == f"{tmp_path}/theirs/store: cannot be written"


class Refusing:
    """Says of every directory that it cannot be written."""

    def __init__(self):
        self.asked = []

    def __call__(self, directory, *, hint):
        self.asked.append(directory)
        raise EnvironmentUnmet("cannot be written", where=str(directory), hint="set KDKIT_STORE")


def test_no_directory_for_temporary_files_is_missing(monkeypatch):
    def gettempdir():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(doctor.tempfile, "gettempdir", gettempdir)
    temp = {check.name: check for check in doctor._disks()}["temp"]
    assert (temp.status, temp.hint) == ("missing", "set TMPDIR to one that can")


def test_the_command_itself_loads_no_torch(tmp_path):
    code = (
        "import sys\nsys.argv = ['kdkit', 'doctor', '--json']\nfrom kdkit.cli import doctor_speed, doctor\n"
        f"doctor.measured = lambda: ([{SPEED!r}], '')\n"
        "from kdkit.cli.app import main\ntry: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stderr.splitlines()[-1] == "False"
    found = json.loads(done.stdout)
    assert found["matmul"] == [SPEED]
    assert set(found["extras"]) >= {"gguf", "test"}
    assert [check["found"] for check in found["checks"] if check["name"] == "matmul"] == [
        "cpu fp32: 2 GFLOP/s (n = 256, 1 thread)"
    ]


def test_a_terminal_gets_lines_of_its_width_and_a_file_one_for_each_check(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert doctor.doctor(as_json=False, quick=True) == 0
    whole = capsys.readouterr().out.splitlines()
    assert max(map(len, whole)) > 120
    assert all(line.startswith(("ok ", "note ")) for line in whole)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert doctor.doctor(as_json=False, quick=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > len(whole)
    assert [line for line in lines if len(line) > 80 and " " in line[22:]] == []
    assert all(line[:22].strip() == "" for line in lines if not line.startswith(("ok ", "note ")))
    assert " ".join(" ".join(lines).split()) == " ".join(" ".join(whole).split())
