from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kdkit.train.answers
from kdkit.api import Message, Sampling
from kdkit.api.artifacts import Dataset, Model
from kdkit.api.data import Example
from kdkit.cli import prompts
from kdkit.cli.app import app
from kdkit.cli.subjects import find_subjects
from kdkit.engine.manifest import MANIFEST, Manifest, describe_artifact
from kdkit.models.chat import ChatEncoder
from kdkit.testing.tiny import tiny_model, tiny_tokenizer
from kdkit.train.answers import Answer
from kdkit.train.rollout import generate

SHORT = ("--max-new-tokens", 12, "--precision", "fp32")


def expected(prompt, *, seed=0, draws=17, **sampling):
    """What the tiny model says, from the rollouts that training uses."""
    ids = ChatEncoder(tiny_tokenizer()).prompt(Example(id="x", prompt=prompt))
    how = Sampling(max_new_tokens=12, **sampling)
    model = tiny_model(seed=seed)
    (said,) = generate(model, tiny_tokenizer(), [ids], how, [draws], stop_ids=(258,), batch_size=1)
    return len(ids), said


def asked(text, *before):
    return (*before, Message("user", text))


def test_json_has_every_answer_of_every_model(kdkit_command, tiny):
    a, b = tiny
    done = kdkit_command(
        "generate", "--model", a, "--model", f"other={b}", "--prompt", "One?", "--prompt", "Two?", "--json", *SHORT
    )
    assert done.code == 0
    data = json.loads(done.out)
    assert [(m["label"], m["path"], m["chat_template"]) for m in data["models"]] == [
        (str(a), str(a), True),
        ("other", str(b), True),
    ]
    assert data["sampling"] == Sampling(max_new_tokens=12).model_dump()
    assert data["seed"] is None
    assert data["precision"] == "fp32"
    assert [p["prompt"] for p in data["prompts"]] == ["One?", "Two?"]
    for entry in data["prompts"]:
        for label, seed in ((str(a), 0), ("other", 1)):
            tokens, said = expected(asked(entry["prompt"]), seed=seed)
            answer = entry["answers"][label]
            assert (answer["text"], answer["tokens"]) == (said.text, len(said.token_ids))
            assert (answer["prompt_tokens"], answer["truncated"]) == (tokens, said.truncated)
            assert answer["tokens_per_s"] == pytest.approx(answer["tokens"] / answer["seconds"])


def test_system_message_and_raw_text(kdkit_command, tiny):
    def first(*options):
        done = kdkit_command("generate", "--model", f"a={tiny[0]}", "--prompt", "Hi", "--json", *SHORT, *options)
        answer = json.loads(done.out)["prompts"][0]["answers"]["a"]
        return answer["prompt_tokens"], answer["text"]

    for options, prompt in [
        ((), asked("Hi")),
        (("--system", "Be brief."), asked("Hi", Message("system", "Be brief."))),
        (("--raw",), "Hi"),
    ]:
        tokens, said = expected(prompt)
        assert first(*options) == (tokens, said.text)


def test_a_prompt_keeps_its_own_system_message(kdkit_command, tiny):
    own = (Message("system", "Own."), Message("user", "Hi"))
    rows = [own, own[1:]]
    lines = (json.dumps({"messages": [{"role": m.role, "content": m.content} for m in row]}) for row in rows)
    Path("p.jsonl").write_text("\n".join(lines))
    done = kdkit_command(
        "generate", "--model", f"a={tiny[0]}", "--prompts", "p.jsonl", "--system", "Be brief.", "--json", *SHORT
    )
    found = [p["answers"]["a"]["prompt_tokens"] for p in json.loads(done.out)["prompts"]]
    assert found == [expected(own)[0], expected(asked("Hi", Message("system", "Be brief.")))[0]]
    refused = kdkit_command("generate", "--model", f"a={tiny[0]}", "--prompts", "p.jsonl", "--raw")
    assert refused.code == 2
    assert "a, p.jsonl:1: messages need a chat template, which raw text leaves out" in refused.err


@pytest.mark.parametrize(
    ("options", "sampling", "seed"),
    [
        (("--temperature", "0.7"), {"temperature": 0.7}, 17),
        (("--top-p", "0.9", "--top-k", "5", "--seed", "3"), {"top_p": 0.9, "top_k": 5}, 3),
    ],
)
def test_a_sampling_option_turns_sampling_on(kdkit_command, tiny, options, sampling, seed):
    models = ("--model", f"a={tiny[0]}", "--model", f"again={tiny[0]}")
    done = kdkit_command("generate", *models, "--prompt", "x", "--prompt", "y", "--json", *SHORT, *options)
    data = json.loads(done.out)
    assert data["sampling"] == Sampling(do_sample=True, max_new_tokens=12, **sampling).model_dump()
    assert data["seed"] == seed
    for index, text in enumerate("xy"):
        answers = data["prompts"][index]["answers"]
        _, said = expected(asked(text), draws=seed + index, do_sample=True, **sampling)
        assert answers["a"]["text"] == said.text
        # The same seed for the same prompt, so that models differ by their weights and not by luck.
        assert answers["again"]["text"] == said.text


def test_only_one_model_is_in_memory(kdkit_command, tiny, monkeypatch):
    alive = []
    load = kdkit.train.answers.load_model

    def counted(*args, **kwargs):
        assert not [ref for ref in alive if ref() is not None]
        model = load(*args, **kwargs)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(kdkit.train.answers, "load_model", counted)
    gc.disable()  # only what the command itself frees counts
    try:
        done = kdkit_command("generate", "--model", tiny[0], "--model", tiny[1], "--prompt", "x", *SHORT)
    finally:
        gc.enable()
    assert done.code == 0
    assert len(alive) == 2


def test_a_model_without_a_chat_template_reads_raw_text(kdkit_command, tiny, tmp_path):
    base = shutil.copytree(tiny[0], tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    arguments = ("generate", "--model", "./base", "--prompt", "Hi", "--json", *SHORT)
    done = kdkit_command(*arguments)
    assert json.loads(done.out)["models"][0]["chat_template"] is False
    assert json.loads(done.out)["prompts"][0]["answers"]["./base"]["text"] == expected("Hi")[1].text
    assert "./base: no chat template, so it reads the prompt as raw text" in done.err
    refused = kdkit_command(*arguments, "--system", "s")
    assert refused.code == 2
    assert "./base, --prompt: a system message needs a chat template" in refused.err


# --- models -----------------------------------------------------------------------------------------------------------


def stage(entry: Path, **outputs) -> Path:
    """A finished stage with these outputs."""
    described = {name: describe_artifact(artifact, entry) for name, artifact in outputs.items()}
    facts = {"kind": "distill", "key": "k", "recipe": "r", "stage": "kd", "seed": 1, "created": "", "seconds": 1.0}
    manifest = Manifest(**facts, outputs=described, files={})
    (entry / MANIFEST).write_text(json.dumps(manifest.to_json()))
    return entry


@pytest.fixture
def run_dir(tmp_path, tiny, monkeypatch):
    """``runs/demo/latest`` with the stages ``kd`` (a model) and ``data`` (no model)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store/kd").mkdir(parents=True)
    shutil.copytree(tiny[0], tmp_path / "store/kd/model")
    stage(tmp_path / "store/kd", model=Model(path=tmp_path / "store/kd/model", keep_layers=(0,)))
    (tmp_path / "store/data").mkdir()
    stage(tmp_path / "store/data", rows=Dataset(path=tmp_path / "store/data/data.jsonl"))
    run = tmp_path / "runs/demo/time"
    (run / "stages").mkdir(parents=True)
    for name in ("kd", "data"):
        (run / "stages" / name).symlink_to(tmp_path / "store" / name)
    (run.parent / "latest").symlink_to("time")
    return Path("runs/demo/latest")


def test_the_result_of_a_stage_is_a_model(run_dir):
    entry = run_dir / "stages/kd"
    model = run_dir.resolve().parents[2] / "store/kd/model"
    for written in (entry, f"./{entry}", entry.absolute(), f"kd={entry}", model.parent):
        (subject,) = find_subjects([str(written)])
        assert subject.model.path == model
        assert subject.model.keep_layers == (0,)
    (subject,) = find_subjects([f"{entry}/model"])
    assert subject.model.path == model


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("runs/demo/latest", r"is a run, not a model; allowed: stages/NAME below it, with NAME of data, kd"),
        ("runs/demo/latest/stages/data", r"has no model among its outputs: rows \(dataset\)"),
        ("runs/demo/latest/stages/none", "no such directory"),
        ("kd=", "no known model is called 'kd='"),
    ],
)
def test_what_is_no_model_is_named(run_dir, kdkit_command, written, message):
    done = kdkit_command("generate", "--model", written, "--prompt", "x")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert re.search(message, done.err)


def test_a_damaged_manifest_is_a_wrong_model(run_dir, kdkit_command):
    (run_dir / "stages/kd/manifest.json").write_text("{}")
    done = kdkit_command("generate", "--model", run_dir / "stages/kd", "--prompt", "x")
    assert done.code == 2
    assert "stages/kd: is no result of a stage: manifest.json cannot be read" in done.err


def test_a_label_and_a_path_with_an_equals_sign(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny[0], "lr=1/m")
    assert [(s.label, s.written) for s in find_subjects(["lr=1/m", "a-1.5=./lr=1/m"])] == [
        ("lr=1/m", "lr=1/m"),
        ("a-1.5", "./lr=1/m"),
    ]


def test_a_directory_wins_over_the_hub_id_of_its_spelling(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny[0], "out/kd")
    (subject,) = find_subjects(["out/kd"])
    assert subject.model.path == tmp_path / "out/kd"


# --- prompts ----------------------------------------------------------------------------------------------------------


def read(data: bytes, name: str = "p.txt"):
    Path(name).write_bytes(data)
    return [(example.id, example.prompt) for example in prompts.read_prompts([], name)]


def test_a_text_file_has_one_prompt_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read("\ufeffUno más\r\n\n  def f():\u2028\n{x}\n".encode()) == [
        ("p.txt:1", "Uno más"),
        ("p.txt:3", "  def f():\u2028"),
        ("p.txt:4", "{x}"),
    ]


def test_json_lines_have_prompts_or_messages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"prompt": "p", "completion": "c"}, {"messages": turns}, {"prompt": turns[:1], "messages": None}]
    data = "\n".join(map(json.dumps, rows)).encode()
    question = (Message("user", "q"),)
    for name in ("p.txt", "p.jsonl"):
        assert read(data, name) == [(f"{name}:1", "p"), (f"{name}:2", question), (f"{name}:3", question)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "p.jsonl: has no prompt in it"),
        (b"\n \n", "p.jsonl: has no prompt in it"),
        (b"plain text", "p.jsonl:1: is not JSON"),
        (b'{"prompt": "x"}\n{"prompt": ', "p.jsonl:2: is not JSON: Expecting value at character 12"),
        (b'{"prompt": "x"}\n[1]', "p.jsonl:2: is a list; allowed: an object"),
        (b'{"prompt": 3}', "p.jsonl:1: 'prompt' is a number"),
        (b'{"prompt": "x", "messages": []}', "p.jsonl:1: has 'prompt' and also 'messages'"),
        (b'{"instruction": "x"}', "p.jsonl:1: has neither 'prompt' nor 'messages' (keys: 'instruction')"),
        (b'{"messages": [{"role": "boss", "content": "x"}]}', "p.jsonl:1: the role of messages[0] is 'boss'"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "p.jsonl:1: the prompt is empty"),
        (b'{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}', "role 'system'"),
        (b'{"prompt": "  "}', "p.jsonl:1: the prompt is empty"),
        (b'{"prompt": "\\ud800"}', "p.jsonl:1: the prompt is not valid Unicode text"),
        (b'{"prompt": "\xff"}', "p.jsonl:1: is not UTF-8 at byte 13"),
        (b"[" * 100_000, "p.jsonl:1: is nested too deeply"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "p.jsonl:1: is not JSON"),
        (b"x" * (prompts.MAX_LINE + 1), "p.jsonl:1: the line is longer than 10,000,000 bytes"),
        (b'{"prompt": "x"}\n' * (prompts.MAX_PROMPTS + 1), "p.jsonl: has more than 10,000 prompts"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:40],
)
def test_a_broken_file_of_prompts_is_one_line(kdkit_command, tiny, data, message):
    Path("p.jsonl").write_bytes(data)
    done = kdkit_command("generate", "--model", tiny[0], "--prompts", "p.jsonl")
    assert done.code == 2
    assert done.out == ""
    assert message in done.err
    assert len(done.err.splitlines()) == 1
    assert len(done.err) < 400


def test_prompts_from_standard_input_follow_those_of_the_command_line(kdkit_command, tiny, monkeypatch):
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"two\nthree\n")))
    done = kdkit_command("generate", "--model", tiny[0], "--prompt", "one", "--prompts", "-", "--json", *SHORT)
    found = [(p["where"], p["prompt"]) for p in json.loads(done.out)["prompts"]]
    assert found == [("--prompt", "one"), ("standard input:1", "two"), ("standard input:2", "three")]


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prompt", "x"], 2, "--model"),
        (["--model", "A"], 2, "there is nothing to ask; give --prompt"),
        (["--model", "A", "--prompt", ""], 2, "--prompt: the prompt is empty"),
        (["--model", "A", "--prompt", "x", "--prompt", " "], 2, "--prompt 2: the prompt is empty"),
        (["--model", "A", "--prompts", "none.txt"], 2, "none.txt: no such file"),
        (["--model", "A", "--prompts", "."], 2, "--prompts .: is a directory"),
        (["--model", "./none", "--prompt", "x"], 2, "none: no such directory"),
        (["--model", "nonesuch", "--prompt", "x"], 2, "no known model is called 'nonesuch'"),
        (["--model", "./" + "n" * 300, "--prompt", "x"], 2, "cannot be read: File name too long"),
        (["--model", "n" * 5000, "--prompt", "x"], 2, "cannot be read: File name too long"),
        (["--model", "", "--prompt", "x"], 2, "the model has no name"),
        (["--model", "smollm2-135m-instruct", "--prompt", "x"], 4, "kdkit models pull smollm2-135m-instruct"),
        (["--model", "acme/none", "--prompt", "x"], 4, "acme/none: not in the Hub cache and offline"),
        (["--model", "A", "--model", "A", "--prompt", "x"], 2, "two models are called"),
        (["--model", "n=A", "--model", "n=A", "--prompt", "x"], 2, "two models are called 'n'"),
        (["--model", "A", "--prompt", "x", "--temperature", "0"], 2, "leave it out for greedy decoding"),
        (["--model", "A", "--prompt", "x", "--temperature", "nan"], 2, "--temperature: "),
        (["--model", "A", "--prompt", "x", "--top-p", "1.5"], 2, "--top-p: input should be less than or equal to 1"),
        (["--model", "A", "--prompt", "x", "--top-k", "-1"], 2, "--top-k: "),
        (["--model", "A", "--prompt", "x", "--max-new-tokens", "0"], 2, "--max-new-tokens: "),
        (["--model", "A", "--prompt", "x", "--max-new-tokens", "many"], 2, "--max-new-tokens"),
        (["--model", "A", "--prompt", "x", "--precision", "int3"], 2, "--precision"),
        (["--model", "A", "--prompt", "x", "--seed", "1"], 2, "--seed: greedy decoding draws nothing"),
        (["--model", "A", "--prompt", "x", "--system", "s", "--raw"], 2, "--system: raw text has no system message"),
        (["--model", "A", "--prompt", "x", "--system", "\udcff"], 2, "--system: is not valid Unicode text"),
        (["--model", "A", "--prompt", "\udcff"], 2, "--prompt: the prompt is not valid Unicode text"),
        (["--model", "A", "--prompt", "x" * 3000], 2, "do not fit the context of A (2,048 tokens); shorten the prompt"),
        (["--model", "A", "--prompt", "x" * 1900], 2, "use --max-new-tokens 129 or less"),
    ],
)
def test_mistakes_are_found_before_any_weights_are_loaded(kdkit_command, tiny, monkeypatch, arguments, code, message):
    monkeypatch.setattr(kdkit.train.answers, "load_model", lambda *_, **__: pytest.fail("loaded"))
    done = kdkit_command(
        "generate", *(text.replace("A", str(tiny[0])) if text in {"A", "n=A"} else text for text in arguments)
    )
    assert done.code == code
    assert message.replace(" A ", f" {tiny[0]} ") in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    assert len(done.err) < 600


@pytest.mark.parametrize(
    ("missing", "message"),
    [("tokenizer.json", "no tokenizer"), ("config.json", "no config.json"), ("model.safetensors", "no *.safetensors")],
)
def test_an_incomplete_model(kdkit_command, tiny, tmp_path, missing, message):
    (shutil.copytree(tiny[0], tmp_path / "m") / missing).unlink()
    done = kdkit_command("generate", "--model", f"b={tiny[1]}", "--model", "./m", "--prompt", "x")
    assert done.code == 2
    assert message in done.err
    assert done.out == ""


def test_a_broken_quantized_model_is_refused_by_name(kdkit_command, tiny, tmp_path):
    copy = shutil.copytree(tiny[0], tmp_path / "m")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    done = kdkit_command("generate", "--model", "./m", "--prompt", "x")
    assert done.code == 2
    assert "bits is None" in done.err


def test_no_memory_is_one_line(kdkit_command, tiny, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(kdkit.train.answers, "load_model", full)
    done = kdkit_command("generate", "--model", f"big={tiny[0]}", "--prompt", "x")
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("error: big: out of memory; a smaller model")


# --- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_prints_the_answers_so_far(kdkit_command, tiny, monkeypatch, as_json):
    def until_ctrl_c(model, *_, **__):
        yield Answer("Forty-two.", 3, 5, 0.5, truncated=False)
        if model.name == "b":
            raise KeyboardInterrupt
        yield Answer("Because.", 2, 5, 0.5, truncated=False)

    monkeypatch.setattr(kdkit.train.answers, "answers", until_ctrl_c)
    done = kdkit_command(
        *("generate", "--model", f"a={tiny[0]}", "--model", f"b={tiny[1]}", "--prompt", "What?", "--prompt", "Why?"),
        *(["--json"] if as_json else []),
    )
    assert done.code == 130
    assert done.err.splitlines()[-1] == "stopped"
    if as_json:
        assert done.out == ""
    else:
        assert done.out.count("Forty-two.") == 2
        assert done.out.count("Because.") == 1
        assert done.out.endswith("-- b (stopped before this answer)\n")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_real_process_stops_cleanly(tiny, tmp_path, signum, code):
    (tmp_path / "p.txt").write_text("again and again\n" * 5000)
    process = subprocess.Popen(
        [sys.executable, "-m", "kdkit", "generate", "--model", str(tiny[0]), "--prompts", "p.txt"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # In a background job a child would inherit ignored signals.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    try:
        assert "started" in process.stderr.readline()
        process.send_signal(signum)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code
    assert err.splitlines()[-1] == "stopped"
    assert "Traceback" not in err
    assert out == "" or out.startswith("== prompt 1 of 5000 (p.txt:1)\n")


def test_the_command_as_users_call_it(tiny):
    """Through the process, with an ASCII locale: nothing but text on stdout, and no character that breaks it."""
    done = subprocess.run(
        [sys.executable, "-m", "kdkit", "generate", "--model", f"ä={tiny[0]}", "--prompt", "¿Año?", *map(str, SHORT)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii").splitlines()[:2] == ["== prompt", "\\xbfA\\xf1o?"]
    assert b"\x1b" not in done.stdout + done.stderr


def test_help_says_what_the_command_does():
    done = CliRunner().invoke(app, ["generate", "--help"])
    assert done.exit_code == 0
    for text in ("--model [NAME=]MODEL", "--prompts FILE", "one below the other", "--model kd=runs/quickstart/latest"):
        assert text in done.output


def test_typer_runs_the_command(tiny):
    done = CliRunner().invoke(app, ["generate", "--model", str(tiny[0]), "--prompt", "x", *map(str, SHORT)])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"== prompt\nx\n\n-- {tiny[0]} (")
