"""What becomes of rows, and which are refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import sample

import kdkit
import kdkit_humaneval
from kdkit.api import DataError, DatasetLoader, Example, RecipeError
from kdkit.testing.conformance import DatasetConformance
from kdkit.testing.fakes import FakeBuildContext

SAMPLE = Path(kdkit_humaneval.__file__).with_name("sample.jsonl")
ROWS = [json.loads(line) for line in SAMPLE.read_text("utf-8").splitlines()]
Write = Callable[[Sequence[str]], Path]


def build(path: Path, **params: Any) -> DatasetLoader:
    built: DatasetLoader = kdkit.build("dataset", "humaneval", source=str(path), **params)
    return built


def load(path: Path, **params: Any) -> list[Example]:
    return list(build(path, **params).load(FakeBuildContext()).examples)


class TestHumanEval(DatasetConformance):
    params: ClassVar[dict[str, str]] = {}

    def build(self) -> DatasetLoader:
        return build(SAMPLE, **self.params)

    def build_on(self, path: Path) -> DatasetLoader:
        return build(path, **self.params)


class TestHumanEvalToComplete(TestHumanEval):
    params: ClassVar[dict[str, str]] = {"prompt_style": "complete"}


class TestHumanEvalToFixPacked(TestHumanEval):
    params: ClassVar[dict[str, str]] = {"task": "fix"}
    suffix: ClassVar[str] = ".jsonl.gz"


def test_a_problem_to_write() -> None:
    example = sample()["unrotate"]
    (message,) = example.prompt
    assert not isinstance(message, str)
    assert message.role == "user"
    assert message.content.startswith("Complete this Python function. Answer with the whole function")
    assert "def rotate(" in message.content
    assert message.content.endswith('    \'abc\'\n    """\n```')
    assert example.completion is not None
    assert example.completion.endswith("    return rotate(word, -places)\n```")
    facts = example.extra["humaneval"]
    assert facts["before"].endswith("return word[places:] + word[:places]\n\n\n")
    assert facts["continues"] is False


def test_a_problem_to_complete() -> None:
    example = sample(prompt_style="complete")["unrotate"]
    assert example.prompt == ROWS[2]["prompt"] == example.extra["humaneval"]["before"]
    assert example.completion == "    return rotate(word, -places)\n"


def test_a_problem_to_fix() -> None:
    example = sample(task="fix")["unrotate"]
    (message,) = example.prompt
    assert not isinstance(message, str)
    assert "return rotate(word, places)\n```" in message.content
    assert "-places" not in message.content
    assert "return rotate(word, places)" in example.echo
    assert example.category == "operator misuse"
    assert example.completion == sample()["unrotate"].completion


def test_a_call_at_the_end_of_the_tests_is_left_to_the_judge(written: Write) -> None:
    row = {**ROWS[0], "test": ROWS[0]["test"] + "\n\ncheck(middle)\n"}
    (example,) = load(written([json.dumps(row)]))
    assert example.extra["humaneval"]["test"] == sample()["middle"].extra["humaneval"]["test"]
    assert "check(middle)" not in example.extra["humaneval"]["test"]


def test_files_of_both_kinds_in_their_order(written: Write, tmp_path: Path) -> None:
    plain = written([*map(json.dumps, ROWS), ""])
    packed = tmp_path / "problems.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert load(plain) == load(packed)
    assert [row.id for row in load(plain)] == [f"Sample/{number}" for number in range(8)]
    assert [row.id for row in load(plain, max_rows=2)] == ["Sample/0", "Sample/1"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"entry_point": "other"}, "'prompt' defines no function 'other'"),
        ({"task_id": ""}, "has no text in 'task_id'; its columns: task_id, prompt"),
        ({"canonical_solution": 3}, "has no text in 'canonical_solution'"),
        ({"prompt": None, "\x1b[2J": 1}, "has no text in 'prompt'; its columns: task_id, prompt, entry_point"),
        ({"prompt": "def middle(\ud83d"}, "'prompt' has half of a character: surrogates not allowed"),
        ({"test": "def check("}, "'test' is no Python"),
        ({"test": "assert middle('a') == 'a'"}, "'test' defines no function 'check'"),
    ],
)
def test_rows_that_are_refused(change: dict[str, Any], reason: str, written: Write) -> None:
    path = written([json.dumps(ROWS[1]), json.dumps({**ROWS[0], **change})])
    with pytest.raises(DataError) as info:
        load(path)
    assert str(info.value).startswith(f"{path}:2: {reason}")
    assert str(info.value).isprintable()


def test_a_row_that_has_nothing_to_fix(written: Write) -> None:
    path = written([json.dumps({**ROWS[0], "buggy_solution": None})])
    assert load(path)
    with pytest.raises(DataError, match="has no text in 'buggy_solution'"):
        load(path, task="fix")


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["{"], ":1: is no JSON"),
        (["[" * 100_000], ":1: is no JSON"),
        (["[1]"], ":1: is no JSON object"),
        ([json.dumps(ROWS[0])] * 2, ":2: task_id 'Sample/0' is there twice"),
        ([], ": has no rows"),
    ],
)
def test_files_that_are_refused(lines: list[str], reason: str, written: Write) -> None:
    path = written(lines)
    with pytest.raises(DataError) as info:
        load(path)
    assert str(info.value).startswith(f"{path}{reason}")


def test_what_is_no_file_of_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a directory; allowed: a file of JSON Lines"):
        load(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "missing.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / "bytes.jsonl")
    packed = gzip.compress(json.dumps(ROWS[0]).encode())
    for damaged in (packed[:-9], packed[:10] + bytes(20), packed[:-8] + bytes(8), b"not packed at all"):
        (tmp_path / "damaged.jsonl.gz").write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read"):
            load(tmp_path / "damaged.jsonl.gz")


def test_a_repair_has_no_prompt_to_complete() -> None:
    with pytest.raises(RecipeError, match="use prompt_style: chat"):
        sample(task="fix", prompt_style="complete")
