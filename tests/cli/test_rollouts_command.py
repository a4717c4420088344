from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kdkit.train.policy.records import Record, write_records

RECORD = Record(
    iteration=1, step=0, group=0, sample=0, attempt=0, counts=True, id="row-0", prompt="What is 1 + 1?", text="two",
    tokens=3, truncated=False, status="ok", reason=None, total=0.5, advantage=1.25,
    rewards={"correctness": 1.0, "length": -0.5}, notes={"correctness": "AC accepted", "length": None},
)  # fmt: skip
FIRST = [
    RECORD,
    replace(RECORD, sample=1, total=-0.25, text="wrong \x1b[31m", advantage=-1.0, truncated=True, tokens=9),
]
SECOND = [
    replace(RECORD, iteration=2, step=4, total=0.75, text="newest", rewards={"correctness": 0.5}, notes={}),
    replace(RECORD, iteration=2, step=4, total=-0.25, text="as bad, but later", counts=False, advantage=None),
    replace(RECORD, iteration=2, step=4, total=None, status="infra-error", reason="gone", text="unjudged",
            counts=False, rewards={"correctness": None}, notes={"correctness": "gone"}),
]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "runs" / "code" / "2026-01-02"
    (path / "stages").mkdir(parents=True)
    (path / "plan.json").write_text("{}")
    older = tmp_path / "runs" / "zebra" / "2026-01-01"
    older.mkdir(parents=True)
    (older / "plan.json").write_text("{}")
    for records in (FIRST, SECOND):
        write_records(path / "stages" / "grpo" / "rollouts", records)
    return path


def test_a_line_for_every_iteration(kdkit_command, run):
    done = kdkit_command("runs", "rollouts", "LAST")
    assert done.code == 0
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["ITERATION", "STEP", "COMPLETIONS", "LEARNED", "TOKENS", "TRUNCATED", "TOTAL", "correctness",
                        "length"]  # fmt: skip
    assert lines[1] == ["1", "0", "2", "2", "6.0", "50%", "0.125", "1", "-0.5"]
    assert lines[2] == ["2", "4", "3", "1", "3.0", "0%", "0.25", "0.75", "-0.5"]
    assert "kdkit runs rollouts runs/code/2026-01-02 --stage grpo --worst 5" in done.out


def test_the_worst_and_the_best_with_what_was_said_about_them(kdkit_command, run):
    done = kdkit_command("runs", "rollouts", run, "--worst", 2, "--best", 1)
    heads = [line for line in done.out.splitlines() if line.startswith("==")]
    assert heads == [
        "== worst 1: total -0.25 · not learned from · iteration 2 · prompt row-0 · 3 tokens",
        "== worst 2: total -0.25 · advantage -1 · iteration 1 · prompt row-0 · 9 tokens, truncated",
        "== best 1: total 0.75 · advantage 1.25 · iteration 2 · prompt row-0 · 3 tokens",
    ]
    assert "  correctness 1 (AC accepted)\n  length -0.5\n-- prompt\nWhat is 1 + 1?\n-- completion\nas bad" in done.out
    assert "wrong \\x1b[31m" in done.out
    assert "\x1b" not in done.out
    assert "unjudged" not in done.out


def test_one_iteration_as_json(kdkit_command, run):
    done = kdkit_command("runs", "rollouts", "code/2026-01-02", "--iteration", 2, "--best", 5, "--json")
    found = json.loads(done.out)
    assert found["stage"] == "grpo"
    (line,) = found["iterations"]
    assert line == {"iteration": 2, "step": 4, "completions": 3, "learned_from": 1, "judged": 2, "tokens": 3.0,
                    "truncated": 0.0, "total": 0.25, "rewards": {"correctness": 0.75, "length": -0.5}}  # fmt: skip
    assert [record["text"] for record in found["best"]] == ["newest", "as bad, but later"]
    assert found["worst"] == []
    assert found["best"][1]["notes"] == {"correctness": "AC accepted"}


def test_what_cannot_be_found(kdkit_command, run, tmp_path):
    for arguments, expected in (
        (("nothing",), "there is no run 'nothing'"),
        (("zebra/2026-01-01",), "no stage of this run has rollouts"),
        (("LAST", "--stage", "sft"), "stage 'sft' has no rollouts; allowed: grpo"),
        (("LAST", "--iteration", 7), "iteration 7 has no rollouts"),
    ):
        done = kdkit_command("runs", "rollouts", *arguments)
        assert done.code == 2
        assert expected in done.err, done.err
        assert len(done.err.splitlines()) == 1
    write_records(run / "stages" / "other" / "rollouts", FIRST)
    assert "choose one with --stage" in kdkit_command("runs", "rollouts", "LAST").err
    (run / "stages" / "other" / "rollouts" / "iteration-000001.parquet").write_text("no")
    done = kdkit_command("runs", "rollouts", "LAST", "--stage", "other")
    assert done.code == 2
    assert "cannot be read as rollouts" in done.err
    assert len(done.err.splitlines()) == 1
