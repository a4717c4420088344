from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

PLUGIN = Path(__file__).with_name("reward_plugins.py")
RIGHT = """<think>
Step 1: read the two numbers.
Step 2: print what they add up to.
</think>
```python
add
```
"""
CORRECTNESS = "{use: correctness, sandbox: {use: fake}}"
ALL = f"""
      - {{use: think, weight: 0.1}}
      - {{use: steps, weight: 0.1, from_step: 20}}
      - {CORRECTNESS}
      - {{use: length, weight: 0.05, correctness: {CORRECTNESS}}}"""


@pytest.fixture
def recipe(kdkit_command, tmp_path):
    """Writes a recipe with these rewards into the directory where the command runs."""
    shutil.copy(PLUGIN, tmp_path / "reward_plugins.py")

    def write(rewards=ALL, more=""):
        text = (
            "kdkit: 1\nname: r\nplugins: [./reward_plugins.py]\nstages:\n"
            f"  grpo:\n    kind: pretend-grpo\n    data: {{use: sums}}\n    rewards: {rewards}\n{more}"
        )
        (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
        return "r.yaml"

    return write


@pytest.fixture
def completion(tmp_path):
    def write(text):
        (tmp_path / "c.txt").write_bytes(text.encode("utf-8", "surrogatepass"))
        return "c.txt"

    return write


def test_try_shows_every_component(kdkit_command, recipe, completion):
    done = kdkit_command("rewards", "try", recipe(), "--completion", completion(RIGHT))
    assert done.code == 0
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["REWARD", "WEIGHT", "VALUE"]
    assert lines[1] == ["think", "0.1", "1"]
    assert lines[2] == ["steps", "0.1", "0.6667", "2", "steps;", "from", "step", "20"]
    assert lines[3] == ["correctness", "1", "1", "AC", "accepted"]
    assert lines[4][:2] == ["length", "0.05"]
    assert lines[4][3:] == ["33", "tokens,", "right"]
    assert lines[5][0] == "total"
    assert float(lines[5][1]) == pytest.approx(0.1 + 0.1 * 2 / 3 + 1 + 0.05 * float(lines[4][2]), abs=1e-3)
    assert "lengths are counted in words and marks" in done.err


def test_try_json(kdkit_command, recipe, completion):
    done = kdkit_command("rewards", "try", recipe(), "--completion", completion(RIGHT), "--example", 2, "--json")
    found = json.loads(done.out)
    assert (done.code, found["stage"], found["example"]) == (0, "grpo", "add 2")
    assert found["components"]["steps"] == {
        "status": "ok",
        "value": pytest.approx(2 / 3),
        "reason": "2 steps",
        "weight": 0.1,
        "from_step": 20,
    }
    total = sum(part["weight"] * part["value"] for part in found["components"].values())
    assert found["total"]["value"] == pytest.approx(total)


def test_try_counts_tokens_of_the_model(kdkit_command, recipe, completion, tiny):
    path = recipe(more="  more: {kind: pretend-grpo, model: '${stages.grpo.model}', data: {use: sums}}\n")
    given = ("--set", f"stages.grpo.model={tiny[0]}", "--json")
    done = kdkit_command("rewards", "try", path, "--completion", completion("four"), *given)
    assert json.loads(done.out)["tokens"] == 4
    assert done.err == ""


def test_try_reads_standard_input(kdkit_command, recipe, monkeypatch):
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"<think>a</think>b")))
    done = kdkit_command("rewards", "try", recipe("[{use: think}]"), "--completion", "-", "--json")
    assert json.loads(done.out)["total"]["value"] == 1.0


def test_sample_rows(kdkit_command, recipe, completion):
    done = kdkit_command("rewards", "try", recipe(), "--completion", completion(RIGHT), "--sample", "--json")
    assert json.loads(done.out)["example"] == "add 100"


def test_data_that_another_stage_makes(kdkit_command, recipe, completion):
    path = recipe(more="  make: {kind: pretend-make}\n")
    given = (
        path,
        "--completion",
        completion(RIGHT),
        "--set",
        "stages.grpo.data={use: jsonl, source: '${stages.make.data}'}",
    )
    done = kdkit_command("rewards", "try", *given)
    assert done.code == 2
    assert "made by a stage of the recipe: ${stages.make.data}; --sample takes rows" in done.err
    done = kdkit_command("rewards", "try", *given, "--sample", "--json")
    assert json.loads(done.out)["components"]["think"]["value"] == 1.0


def test_notes_cannot_move_the_cursor(kdkit_command, recipe, completion):
    done = kdkit_command("rewards", "try", recipe(), "--completion", completion("\x1b[2J" + RIGHT))
    assert "\x1b" not in done.out


@pytest.mark.parametrize(
    ("rewards", "more", "options", "code", "message"),
    [
        ("[]", "", (), 2, "no stage has rewards"),
        (ALL, "", ("--stage", "kd"), 2, "stage 'kd' has no rewards; allowed: grpo"),
        (ALL, "", ("--example", "3"), 2, "there is no row 3; allowed: 0 to 2"),
        (ALL, "  b: {kind: pretend-grpo, data: {use: sums}, rewards: [{use: think}]}\n", (), 2, "several stages"),
        ("[{use: thinks}]", "", (), 2, "did you mean"),
        ("[{use: think, from_step: -1}]", "", (), 2, "from_step"),
        (
            "[{use: correctness, sandbox: {use: fake, usable: false}}]",
            "",
            (),
            4,
            "cannot be run safely here: told to be",
        ),
        ("[{use: correctness, sandbox: {use: fake, down: true}}]", "", (), 1, ""),
    ],
)
def test_errors_of_try(kdkit_command, recipe, completion, rewards, more, options, code, message):
    done = kdkit_command("rewards", "try", recipe(rewards, more), "--completion", completion(RIGHT), *options)
    assert (done.code, message in done.err) == (code, True), done.err
    assert "Traceback" not in done.err


def test_files_that_cannot_be_read(kdkit_command, recipe, completion, tmp_path):
    path = recipe()
    assert kdkit_command("rewards", "try", path, "--completion", "missing.txt").code == 2
    assert kdkit_command("rewards", "try", path, "--completion", completion("\ud800")).code == 2
    assert kdkit_command("rewards", "try", path, "--completion", tmp_path).code == 4


def test_a_stage_is_chosen(kdkit_command, recipe, completion):
    path = recipe(more="  b: {kind: pretend-grpo, data: {use: sums}, rewards: [{use: think}]}\n")
    done = kdkit_command("rewards", "try", path, "--completion", completion(RIGHT), "--stage", "b", "--json")
    assert list(json.loads(done.out)["components"]) == ["think"]


def test_of_several_stages_the_one_that_learns_is_taken(kdkit_command, recipe, completion):
    """The recipe of GRPO measures the same rewards on held-out prompts."""
    path = recipe(more="  after: {kind: pretend-measure, data: {use: sums}, rewards: [{use: think}]}\n")
    done = kdkit_command("rewards", "try", path, "--completion", completion(RIGHT), "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["stage"] == "grpo"


# -- doctor


def test_doctor_finds_nothing_with_the_built_in_rewards(kdkit_command, recipe):
    done = kdkit_command("rewards", "doctor", recipe(), "--json")
    found = json.loads(done.out)
    assert found["flagged"] == []
    assert done.code == 0
    assert len(found["completions"]) >= 40
    assert len({entry["name"] for entry in found["completions"]}) == len(found["completions"])
    honest = found["honest"]["components"]
    assert {name: part["value"] for name, part in honest.items()} == {
        "think": 1.0,
        "steps": 1.0,
        "correctness": 0.0,
        "length": 0.0,
    }
    assert all(entry["total"]["status"] == "ok" for entry in found["completions"])


@pytest.mark.parametrize("reward", ["think", "steps", "repetition"])
def test_no_reward_alone_pays_a_hostile_completion_more_than_an_honest_try(kdkit_command, recipe, reward):
    done = kdkit_command("rewards", "doctor", recipe(f"[{{use: {reward}}}]"), "--json")
    found = json.loads(done.out)
    honest = found["honest"]["total"]["value"]
    assert (done.code, found["flagged"]) == (0, [])
    assert max(entry["total"]["value"] for entry in found["completions"]) <= honest


def test_the_language_alone_pays_for_any_prose(kdkit_command, recipe):
    done = kdkit_command("rewards", "doctor", recipe("[{use: language, language: es}]"), "--json")
    found = json.loads(done.out)
    assert done.code == 5
    assert found["honest"]["total"]["value"] == 0.0
    assert {"huge", "padding"} <= set(found["flagged"])


def test_doctor_flags_a_reward_that_can_be_hacked(kdkit_command, recipe):
    done = kdkit_command("rewards", "doctor", recipe("[{use: tag-count}, {use: correctness, sandbox: {use: fake}}]"))
    assert done.code == 5
    lines = done.out.splitlines()
    assert lines[0].split() == ["COMPLETION", "TOTAL", "tag-count", "correctness"]
    assert lines[1].split() == ["honest-wrong", "0.1", "0.1", "0"]
    assert "flagged: tag-spam: One well-formed pair of tags after the other." in lines
    marked = [line for line in lines if line.startswith("!")]
    assert any(line.split()[1:3] == ["tag-spam", "1"] for line in marked)
    assert lines[-1].startswith(f"{len(marked)} of ")


def test_doctor_flags_a_length_reward_that_pays_for_padding(kdkit_command, recipe):
    padded = f"[{{use: length, correctness: {CORRECTNESS}, wrong_short: -1.0, wrong_long: -0.5}}]"
    done = kdkit_command("rewards", "doctor", recipe(padded), "--json")
    assert done.code == 5
    assert {"padding", "huge-lines", "never-closed"} & set(json.loads(done.out)["flagged"])


def test_doctor_names_a_reward_that_raises(kdkit_command, recipe):
    done = kdkit_command("rewards", "doctor", recipe("[{use: broken}]"))
    assert done.code == 1
    assert "ZeroDivisionError" in done.err
    assert "Traceback" not in done.err


def test_doctor_needs_an_honest_answer_that_can_be_scored(kdkit_command, recipe):
    done = kdkit_command("rewards", "doctor", recipe("[{use: rouge}]"))
    assert done.code == 2
    assert "an honest answer to example 'add 0' cannot be scored: rouge: no reference answer" in done.err


def test_help(kdkit_command):
    for command in ("try", "doctor"):
        assert kdkit_command("rewards", command, "--help").code == 0
