"""A model here and the same model behind a socket: the same signals, and whole stages that run on them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import kdkit
from kdkit.api import ExitCode
from kdkit.api.artifacts import Model
from kdkit.models.chat import Encoded
from kdkit.plugins.teachers import openai_http
from kdkit.plugins.teachers.local import LocalTeacher
from kdkit.plugins.teachers.openai import OpenAITeacher
from kdkit.plugins.teachers.plugin import LocalTeacherParams, OpenAITeacherParams
from kdkit.testing.tiny import save_tiny_model
from kdkit.train.batching import collate
from kdkit.train.packing import pack

KEY = "canary-9f8e7d6c5b4a"
ROWS = [{"prompt": f"What is {i} + {i}?", "completion": f"It is {2 * i}."} for i in range(70)]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    # A name that nothing would take for a secret by itself.
    monkeypatch.setenv("TEACHER_ACCESS", KEY)
    monkeypatch.setattr(openai_http, "FIRST_PAUSE", 0.01)


def context(model):
    return SimpleNamespace(
        resolve=lambda _: Model(path=model), precision=lambda _: "fp32", device="cpu", log=lambda _: None
    )


@pytest.mark.parametrize("layout", [pack, collate])
def test_the_server_gives_the_log_probabilities_of_the_local_model(start, teacher_dir, layout):
    url = start().url
    generator = torch.Generator().manual_seed(3)
    rows = [
        Encoded(f"r{i}", tuple(torch.randint(0, 259, (n,), generator=generator).tolist()),
                (False, *(t % 3 > 0 for t in range(n - 1))))
        for i, n in enumerate((40, 7, 3, 120, 64))
    ]  # fmt: skip
    batch = layout(rows)
    local = LocalTeacher(LocalTeacherParams.model_validate_json(json.dumps({"model": "x"})), context(teacher_dir))
    values = {"base_url": url, "model": "t", "tokenizer": "x", "top_k": 32}
    remote = OpenAITeacher(OpenAITeacherParams.model_validate_json(json.dumps(values)), context(teacher_dir))
    assert remote.vocabulary == local.vocabulary
    count = int(batch.labels_mask.sum())
    want = torch.log_softmax(local.signals(batch).block(0, count).logits, dim=-1)
    got = remote.signals(batch).block(0, count)
    remote.close()
    assert got.ids.shape == (count, 32)
    torch.testing.assert_close(got.logprobs, want.gather(-1, got.ids), atol=1e-3, rtol=0)
    torch.testing.assert_close(got.logprobs, want.topk(32).values, atol=1e-3, rtol=0)


def run(tmp_path, stages, **options):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"kdkit": 1, "name": "test", "stages": stages}))
    return kdkit.run(file, out=tmp_path / "runs", **{"inline": True, **options})


def teacher(url, teacher_dir, **values):
    return {"use": "openai", "base_url": url, "model": "t", "tokenizer": str(teacher_dir), "max_retries": 1,
            "api_key_env": "TEACHER_ACCESS", **values}  # fmt: skip


def generate(url, teacher_dir, **values):
    return {"kind": "generate", "teacher": teacher(url, teacher_dir, **values), "sampling": {"max_new_tokens": 6},
            "data": {"use": "jsonl", "source": "./rows.jsonl"}}  # fmt: skip


def distill(url, teacher_dir, student, **values):
    return {"kind": "distill", "model": str(student), "teacher": teacher(url, teacher_dir, **values),
            "data": {"use": "jsonl", "source": "./rows.jsonl"}, "losses": [{"use": "forward-kl"}], "max_steps": 4,
            "per_device_train_batch_size": 4, "precision": "fp32", "logging_steps": 1,
            "learning_rate": 1e-2}  # fmt: skip


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("student") / "m", layers=2, seed=2)


def assert_no_key(*roots):
    files = [file for root in roots for file in root.rglob("*") if file.is_file()]
    assert len(files) > 5
    assert not [file for file in files if KEY.encode() in file.read_bytes()]


def test_a_generate_stage_runs_on_the_server(start, tmp_path, teacher_dir, monkeypatch):
    url = start(key=KEY).url
    # The tiny model seldom ends by itself; which answers are kept is tested elsewhere.
    monkeypatch.setattr("kdkit.plugins.stages.generating._verdict", lambda *_, **__: "kept")
    result = run(tmp_path, {"data": generate(url, teacher_dir)})
    assert result.ok, result.error
    monkeypatch.setenv("KDKIT_STORE", str(tmp_path / "other-store"))
    local = {**generate(url, teacher_dir), "teacher": {"use": "local", "model": str(teacher_dir), "precision": "fp32"}}
    here = run(tmp_path, {"data": local})
    answers = [
        [json.loads(line)["completion"] for line in (r.stage("data").outputs["data"].path).read_text().splitlines()]
        for r in (result, here)
    ]
    assert len(answers[0]) == 70
    assert answers[0] == answers[1]


def test_a_distill_stage_learns_the_same_from_the_server(start, tmp_path, teacher_dir, student):
    url = start(key=KEY).url
    remote = run(tmp_path, {"kd": distill(url, teacher_dir, student, top_k=256)})
    assert remote.ok, remote.error
    stage = distill(url, teacher_dir, student)
    stage["teacher"] = {"use": "local", "model": str(teacher_dir), "precision": "fp32"}
    here = run(tmp_path, {"kd": stage})
    losses = [
        [line["train/forward-kl"] for line in r.stage("kd").metrics() if "train/forward-kl" in line]
        for r in (remote, here)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert_no_key(tmp_path)


def test_the_key_is_nowhere_even_when_it_is_wrong(start, tmp_path, teacher_dir, student, capfd):
    url = start(key="another-key-altogether").url
    result = run(tmp_path, {"kd": distill(url, teacher_dir, student)}, inline=False)
    assert result.exit_code == ExitCode.ENVIRONMENT
    assert "the key in TEACHER_ACCESS is refused" in str(result.error)
    assert_no_key(tmp_path)
    printed = capfd.readouterr()
    assert KEY not in printed.out + printed.err + str(result.error)


def test_a_student_of_another_vocabulary_is_refused_before_the_server_is_asked(tmp_path, teacher_dir):
    student = save_tiny_model(tmp_path / "student", vocab=300)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(student)
    result = run(tmp_path, {"kd": distill("http://127.0.0.1:9/v1", teacher_dir, student)})
    assert result.exit_code == ExitCode.INVALID
    assert "different vocabularies" in str(result.error)


def test_a_server_killed_midway_keeps_what_is_finished(start, served, tmp_path, teacher_dir, monkeypatch):
    monkeypatch.setattr("kdkit.plugins.stages.generating._verdict", lambda *_, **__: "kept")
    running = start(key=KEY)
    asked = []
    answer = served.answer

    def dies(prompts, *rest):
        asked.append(len(prompts))
        if sum(asked) > 64:
            raise RuntimeError("killed")
        return answer(prompts, *rest)

    monkeypatch.setattr(served, "answer", dies)
    stage = generate(running.url, teacher_dir)
    result = run(tmp_path, {"data": stage})
    assert result.exit_code == ExitCode.ENVIRONMENT
    assert "HTTP 500 (the model failed: RuntimeError) (2 attempts)" in str(result.error)
    again = set()
    monkeypatch.setattr(served, "answer", lambda prompts, *rest: again.update(prompts) or answer(prompts, *rest))
    result = run(tmp_path, {"data": stage})
    assert result.ok, result.error
    # Only the second chunk of 64 is asked again; some of it may still wait from the first time.
    assert len(again) == 6


@pytest.mark.parametrize("kind", ["generate", "distill"])
def test_another_model_under_the_same_name_is_noticed_on_resume(
    start, served, tmp_path, teacher_dir, student, monkeypatch, kind
):
    monkeypatch.setattr("kdkit.plugins.stages.generating._verdict", lambda *_, **__: "kept")
    url = start(key=KEY).url
    stage = generate(url, teacher_dir) if kind == "generate" else distill(url, teacher_dir, student)
    work = "answer" if kind == "generate" else "score"
    whole = getattr(served, work)
    calls = []

    def dies(*values):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("killed")
        return whole(*values)

    monkeypatch.setattr(served, work, dies)
    assert not run(tmp_path, {"s": stage}).ok
    monkeypatch.setattr(served, work, whole)
    before = served.fingerprint
    monkeypatch.setattr(served, "fingerprint", "0" * 64)
    result = run(tmp_path, {"s": stage})
    assert result.exit_code == ExitCode.INVALID
    assert f"another one than when this stage began: fingerprint {'0' * 64}, before fingerprint {before}" in str(
        result.error
    )
    monkeypatch.setattr(served, "fingerprint", before)
    result = run(tmp_path, {"s": stage})
    assert result.ok, result.error


def test_speed_settings_stay_out_of_the_content_key(start, tmp_path, teacher_dir, monkeypatch):
    monkeypatch.setattr("kdkit.plugins.stages.generating._verdict", lambda *_, **__: "kept")
    url = start(key=KEY).url
    first = run(tmp_path, {"data": generate(url, teacher_dir)})
    again = run(tmp_path, {"data": generate(url, teacher_dir, concurrency=3, timeout=7.0, max_retries=0)})
    other = run(tmp_path, {"data": generate(url, teacher_dir, top_k=7)})
    entries = [result.stage("data").entry for result in (first, again, other)]
    assert entries[0] == entries[1] != entries[2]


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "kdkit", "serve-teacher", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def ended(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def address(process):
    """The URL that the command prints when it is ready; its other lines are kept from blocking it."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if " at http://" in line:
            return line.split(" at ")[1].split(",")[0]
    raise AssertionError("".join(lines))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_serves_until_a_signal(teacher_dir, signum, code):
    import httpx

    process = command(f"t={teacher_dir}", "--port", 0, "--precision", "fp32", "--api-key-env", "TEACHER_ACCESS")
    guard = threading.Timer(100, process.kill)
    guard.start()
    try:
        url = address(process)
        headers = {"Authorization": f"Bearer {KEY}"}
        body = {"model": "t", "prompt": [1, 2, 3], "max_tokens": 0, "echo": True, "prompt_logprobs": 2}
        answer = httpx.post(f"{url}/completions", json=body, headers=headers, timeout=60, trust_env=False)
        assert answer.status_code == 200
        process.send_signal(signum)
        assert ended(process) == (code, "", "stopped\n")
    finally:
        guard.cancel()
        process.kill()


def test_a_signal_ends_it_while_an_answer_is_written(teacher_dir):
    import httpx

    process = command(f"t={teacher_dir}", "--port", 0, "--precision", "fp32")
    guard = threading.Timer(100, process.kill)
    guard.start()
    try:
        url = address(process)
        body = {"model": "t", "prompt": "x" * 200, "max_tokens": 1800, "temperature": 0}

        def ask():
            with contextlib.suppress(httpx.HTTPError):
                httpx.post(f"{url}/completions", json=body, timeout=100, trust_env=False)

        asking = threading.Thread(target=ask)
        asking.start()
        # It is at work once it takes no longer than that to be asked.
        asking.join(0.5)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        code, _, err = ended(process)
        asking.join(60)
        assert code in {130, 143}
        assert "Traceback" not in err
    finally:
        guard.cancel()
        process.kill()


def test_mistakes_are_one_line(kdkit_main, teacher_dir, tmp_path, monkeypatch):
    for arguments, code, says in (
        (("--host", "0.0.0.0"), 2, "needs a key"),
        (("--api-key-env", "NOT_THERE"), 4, "NOT_THERE is not set"),
        (("--api-key-env", KEY), 2, "not the key"),
        (("--port", 70000), 2, "0 to 65,535"),
        (("--max-top-k", 513), 2, "1 to 512"),
        (("--host", "192.0.2.77", "--api-key-env", "TEACHER_ACCESS"), 4, "cannot listen"),
    ):
        done = kdkit_main("serve-teacher", f"t={teacher_dir}", *arguments)
        assert done[0] == code, done
        assert says in done[1]
        assert KEY not in done[1]
        assert done[1].count("\n") == 1
    done = kdkit_main("serve-teacher", tmp_path / "nothing")
    assert (done[0], done[1].count("\n")) == (2, 1)
    monkeypatch.setenv("TEACHER_ACCESS", "short")
    assert "8 or more" in kdkit_main("serve-teacher", f"t={teacher_dir}", "--api-key-env", "TEACHER_ACCESS")[1]
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "kdkit.serve.run", raising=False)
    done = kdkit_main("serve-teacher", f"t={teacher_dir}")
    assert (done[0], "pip install 'kdkit[serve]'" in done[1]) == (4, True)


@pytest.fixture
def kdkit_main(monkeypatch, capsys, tmp_path):
    from kdkit.cli.app import main

    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kdkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), capsys.readouterr().err

    return call
