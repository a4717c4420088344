from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import kdkit
from kdkit.cli.progress import Pace, PlainView, clock, values_text
from kdkit.cli.run import resume_command
from kdkit.engine.events import Event
from kdkit.engine.selection import Selection


def test_a_run_prints_results_on_stdout_and_the_rest_on_stderr(project):
    project.recipe()
    done = project.kdkit("run", "recipe.yaml")
    assert done.returncode == 0
    *lines, last = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["run", *["result"] * 3, "report", "next"]
    assert last.strip() == "(pairs, speed, decoding, limits of the numbers)"
    assert "a  started\n" in done.stderr, "that it never ran is no news"
    assert "never ran" not in done.stderr
    assert "a  done in" in done.stderr
    again = project.kdkit("run", "recipe.yaml")
    assert [line for line in again.stderr.splitlines() if line.endswith("cached")] == [
        "a  cached",
        "b  cached",
        "c  cached",
    ]


def test_a_failure_ends_with_the_command_that_resumes(project):
    project.recipe(more="vars: {note: x}")
    fault = ["--set", "stages.a.fault=raise:2"]
    given = ["--set", "stages.a.table={a b: 1}", "--var", "note=it's", "--out", "my runs"]
    failed = project.kdkit("run", "recipe.yaml", *fault, *given, "--fresh")
    assert failed.returncode == 1
    last = failed.stderr.rstrip().splitlines()[-1]
    assert shlex.split(last) == ["kdkit", "run", "recipe.yaml", *fault, *given]
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in failed.stderr
    resumed = project.kdkit("run", "recipe.yaml", *given)
    assert resumed.returncode == 0
    assert "a  resumed (checkpoint step-000001)" in resumed.stderr


@pytest.mark.parametrize("how", [[], ["--inline"], ["--inline", "--debug"]])
def test_no_secret_is_shown(project, how):
    project.recipe()
    failed = project.kdkit(
        "run", "recipe.yaml", "--set", "stages.a.fault=raise:2", *how, HF_TOKEN="canary-5d41402abc4b"
    )
    assert "ValueError: broken with ***" in failed.stderr
    assert "canary" not in failed.stderr + failed.stdout


def test_debug_adds_the_traceback(project):
    project.recipe()
    failed = project.kdkit("run", "recipe.yaml", "--set", "stages.a.fault=unmet:1", "--inline", "--debug")
    assert failed.returncode == 4
    assert "Traceback" in failed.stderr
    assert failed.stderr.rstrip().splitlines()[-1].startswith("kdkit run recipe.yaml")


def test_forced_stages_that_are_done_are_not_forced_again():
    chosen = Selection(first="b", force=("a", "b"), fresh=True)
    command = resume_command(Path("r.yaml"), [], [], Path("runs"), chosen, pending=("b",), inline=True)
    assert command == "kdkit run r.yaml --from b --force b --inline"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "none.yaml"], 2, "none.yaml"),
        (["run", "recipe.yaml", "--from", "aa"], 2, "no stage 'aa'"),
        (["run", "recipe.yaml", "--out", "/dev/null/x"], 4, "/dev/null/x/demo: cannot be written"),
        (["plan", "recipe.yaml", "--set", "stages.a.stepz=1"], 2, "steps"),
        (["runs", "show", "nothing"], 2, "there is no run 'nothing'"),
        (["models", "pull", "nothing"], 2, "nothing"),
        (["run"], 2, "RECIPE"),
        (["fly"], 2, "fly"),
    ],
)
def test_mistakes_are_one_line_and_have_an_exit_code(project, arguments, code, message):
    project.recipe()
    done = project.kdkit(*arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_plan_shows_what_a_run_would_do(project):
    kdkit.run(project.recipe("  a: {kind: count}\n  b: {kind: count, steps: 1}"), inline=True)
    done = project.kdkit("plan", "recipe.yaml", "--set", "stages.a.learning_rate=2e-5")
    rows = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    assert rows[0] == ["STAGE", "KEY", "STATE", "WHY"]
    assert rows[1][2:] == ["run", "learning_rate 1e-05 -> 2e-05"]
    assert rows[2][2:] == ["cached"]
    data = json.loads(project.kdkit("plan", "recipe.yaml", "--only", "b", "--json").stdout)
    assert [(stage["stage"], stage["state"], stage["selected"]) for stage in data["stages"]] == [
        ("a", "cached", False),
        ("b", "cached", True),
    ]


def test_runs_are_listed_shown_and_compared(project):
    first = kdkit.run(project.recipe(), inline=True)
    second = kdkit.run(project.recipe(), set={"stages.a.steps": 4}, inline=True)
    kdkit.run(project.recipe(), set={"stages.a.fault": "unmet:1", "stages.a.steps": 9}, inline=True)
    runs = json.loads(project.kdkit("runs", "list", "--json").stdout)["runs"]
    assert [run["status"] for run in runs] == ["ok", "ok", "failed"]
    assert "no such device" in runs[2]["error"]
    assert [stage["state"] for stage in runs[2]["stages"]] == ["failed", "waiting", "waiting"]
    assert project.kdkit("runs", "list").stdout.count("demo") == 3
    shown = project.kdkit("runs", "show", "demo").stdout
    assert "status  failed" in shown
    assert "no such device; use another" in shown
    a, b = (f"demo/{run.run_dir.name}" for run in (first, second))
    diff = json.loads(project.kdkit("runs", "diff", a, b, "--json").stdout)
    assert diff["parameters"][0] == {"stage": "a", "change": "steps 3 -> 4"}
    assert [key["stage"] for key in diff["keys"]] == ["a", "b", "c"]
    assert diff["metrics"] == [{"metric": "a:train/loss", "a": 1 / 3, "b": 0.25}]
    assert "steps 3 -> 4" in project.kdkit("runs", "diff", a, b).stdout
    assert project.kdkit("runs", "diff", a, a).stdout == "no differences\n"


def test_a_killed_run_is_unfinished(project):
    run = kdkit.run(project.recipe(project.one), inline=True)
    lines = (run.run_dir / "events.jsonl").read_text().splitlines()
    (run.run_dir / "events.jsonl").write_text("\n".join(lines[:-1]) + '\n{"time": "2026')
    (listed,) = json.loads(project.kdkit("runs", "list", "--json").stdout)["runs"]
    assert listed["status"] == "unfinished"


def test_no_runs_is_no_error(project):
    assert project.kdkit("runs", "list").stdout == "no runs in runs\n"


def test_doctor_says_what_is_there(project):
    done = project.kdkit("doctor", "--quick", "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    checks = {check["name"]: check for check in found["checks"]}
    assert {"kdkit", "torch", "cpu", "precision", "store", "temp", "hub", "model", "extra", "sandbox"} <= set(checks)
    assert (found["matmul"], "matmul" in checks) == ([], False)
    assert checks["hub"]["found"].startswith("offline")
    broken = project.kdkit("doctor", "--quick", KDKIT_STORE="/dev/null/store")
    assert broken.returncode == 4
    assert "missing store" in broken.stdout


def test_doctor_never_shows_a_token(project):
    done = project.kdkit("doctor", "--quick", HF_TOKEN="canary-123456789")
    assert "HF_TOKEN set" in done.stdout
    assert "canary" not in done.stdout + done.stderr


def test_the_version_is_printed():
    done = subprocess.run([sys.executable, "-m", "kdkit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"kdkit {kdkit.__version__}\n"


HEAVY = ("torch", "transformers", "datasets", "accelerate")
COMMANDS = [
    [],
    ["run"],
    ["plan"],
    ["validate"],
    ["report"],
    ["doctor"],
    ["schema"],
    ["plugins", "list"],
    ["plugins", "show"],
    ["runs", "list"],
    ["runs", "show"],
    ["runs", "diff"],
    ["models", "pull"],
    ["models", "prune"],
    ["generate"],
]


def test_every_command_has_a_light_help():
    code = (
        "import sys\nfrom kdkit.cli.app import app\n"
        f"for words in {COMMANDS!r}:\n"
        "    try:\n        app(args=[*words, '--help'], prog_name='kdkit')\n"
        "    except SystemExit as end:\n        assert end.code == 0, words\n"
        f"assert not [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert len(sys.modules) < 400\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: kdkit") == len(COMMANDS)


@pytest.mark.parametrize(
    "arguments", [["validate", "recipe.yaml"], ["plan", "recipe.yaml"], ["doctor"], ["runs", "list"]]
)
def test_reading_commands_import_nothing_heavy(project, arguments):
    project.recipe()
    code = (
        f"import sys\nsys.argv = ['kdkit', *{arguments!r}]\nfrom kdkit.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# --- what a person sees -----------------------------------------------------------------------------------------------


class Stream:
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self): ...

    def isatty(self):
        return False


LOG = "not clearly better than copying the input (the identity baseline): base on rouge-l, sft on rouge-l"


@pytest.fixture
def terminal(monkeypatch):
    """A stream that says it is a terminal of 40 columns."""
    stream = Stream()
    stream.isatty, stream.fileno, stream.encoding = lambda: True, lambda: 2, "utf-8"
    monkeypatch.setattr("os.get_terminal_size", lambda _fd: os.terminal_size((40, 24)))
    return stream


def test_lines_on_a_terminal_end_between_words(terminal):
    PlainView(6, terminal).show(Event("log", "report", {"message": LOG}))
    lines = terminal.text.splitlines()
    assert max(map(len, lines)) <= 40
    assert lines[0].startswith("report  not clearly")
    assert all(line.startswith(" " * 8) for line in lines[1:])
    assert " ".join(line.strip() for line in lines).split() == ["report", *LOG.split()]


def test_lines_in_a_file_stay_whole():
    stream = Stream()
    PlainView(6, stream).show(Event("log", "report", {"message": LOG * 9}))
    assert stream.text.count("\n") == 1


def test_paths_stay_whole_and_long_names_of_stages_leave_room(terminal):
    path = "/a/path/that/is/longer/than-a-line/of-the-terminal.jsonl"
    PlainView(30, terminal).show(Event("log", "s" * 30, {"message": f"reads {path} and writes"}))
    assert terminal.text.splitlines() == ["s" * 30 + "  reads", f"  {path}", "  and writes"]


def test_a_terminal_that_does_not_tell_its_width_has_80_columns(terminal, monkeypatch):
    monkeypatch.setattr("os.get_terminal_size", lambda _fd: (_ for _ in ()).throw(OSError("inappropriate ioctl")))
    PlainView(6, terminal).show(Event("log", "report", {"message": LOG}))
    assert 40 < max(map(len, terminal.text.splitlines())) <= 80


def test_why_a_stage_runs_again_is_said():
    stream = Stream()
    view = PlainView(2, stream)
    view.show(Event("stage-started", "kd", {"state": "run", "why": "max_steps 12 -> 30"}))
    view.show(Event("stage-started", "kd", {"state": "resume", "why": ""}))
    assert stream.text.splitlines() == ["kd  started (max_steps 12 -> 30)", "kd  resumed"]


def test_progress_is_a_plain_line_every_few_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("kdkit.cli.progress.monotonic", lambda: now[0])
    stream = Stream()
    view = PlainView(2, stream)
    for step in range(1, 13):
        now[0] += 1.0
        view.show(Event("progress", "kd", {"step": step, "total": 20, "loss": 0.51234, "tokens_per_s": 5200.0}))
    assert stream.text.splitlines() == [
        "kd  step 5/20  loss 0.5123  tokens/s 5,200  eta 0:15",
        "kd  step 10/20  loss 0.5123  tokens/s 5,200  eta 0:10",
    ]


def test_a_resumed_stage_has_an_honest_eta(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("kdkit.cli.progress.monotonic", lambda: now[0])
    pace = Pace()
    assert pace.eta(200, 400) == ""
    now[0] = 10.0
    assert pace.eta(210, 400) == "3:10"


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (10, "0:10"), (3661, "1:01:01")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_values_that_json_lacks_are_shown_as_they_came():
    assert values_text({"step": 1, "total": 2, "loss": "NaN", "n": 3}) == "loss NaN  n 3"


def test_the_live_view_draws_and_ends(project):
    from kdkit.cli.live import LiveView

    stream = Stream()
    stream.encoding = "utf-8"
    stream.fileno = lambda: -1
    with LiveView(2, stream) as view:
        view.show(Event("stage-started", "kd", {"state": "run", "why": "[never] ran"}))
        view.show(Event("progress", "kd", {"step": 1, "total": 2, "loss": 0.5}))
        view.show(Event("stage-finished", "kd", {"status": "ok", "seconds": 1.0}))
        view.show(Event("stage-cached", "x", {}))
        view.show(Event("log", "kd", {"message": LOG}))
    assert "kd  started ([never] ran)" in stream.text
    assert f"{LOG[:76].rsplit(' ', 1)[0]}\n    " in stream.text, "80 columns, and no word cut"
    assert "kd  done in 1.0 s" in stream.text
