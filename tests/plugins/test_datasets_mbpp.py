from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from kdkit.api import DataError, Rollout
from kdkit.plugins.datasets.code_params import MbppParams
from kdkit.plugins.datasets.codeforces_text import THINK_SYSTEM
from kdkit.plugins.datasets.mbpp import MbppLoader
from kdkit.plugins.rewards.correctness import Correctness
from kdkit.plugins.rewards.judge import Judge
from kdkit.plugins.rewards.params import CorrectnessParams
from kdkit.plugins.sandboxes.unsafe import UnsafeLocal


def row(task_id, **given):
    tests = [f"assert f({task_id}, 1) == 2", "assert f(2, 2) == 4", "assert f(3, 0) == 3"]
    text = f"Write a function to add {task_id} and 1."
    return {"text": text, "code": "def f(a, b):\r\n\treturn a + b", "task_id": task_id, "test_setup_code": "",
            "test_list": tests, "challenge_test_list": [], **given}  # fmt: skip


@pytest.fixture
def load(tmp_path, load_context):
    def loaded(*rows, **given):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(one) + "\n" for one in rows))
        params = MbppParams.model_validate_json(json.dumps({"source": str(file), **given}))
        return MbppLoader(params).load(load_context)

    return loaded


def ids(rows):
    return {example.id for example in rows.examples}


@pytest.mark.parametrize("task", ["sft", "rl"])
def test_official_parts(load, task):
    numbers = [1, 10, 11, 510, 511, 600, 601, 974]
    rows = [row(number) for number in numbers]
    parts = {"test": {11, 510}, "validation": {511, 600}, "train": {601, 974}, "all": set(numbers)}
    for split, wanted in parts.items():
        found = load(*rows, split=split, task=task)
        assert ids(found) == {f"mbpp/{number}" for number in wanted}
        assert found.counts.get("few-shot", 0) == (0 if split == "all" else 2)


def test_rows_that_are_not_mbpp_go_by_their_text(load):
    rows = [row(name) for name in ("a", "b", 0, 975, None, 12345)]
    parts = [ids(load(*rows, split=part, test_fraction=0.4, validation_fraction=0.3)) for part in
             ("train", "validation", "test")]  # fmt: skip
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(rows)
    assert "mbpp/975" in set.union(*parts)


def test_two_tasks_that_ask_the_same_stay_two(load):
    same = {"text": "Add.", "test_list": ["assert f(1, 1) == 2"]}
    rows = [row(76, **same), row(347, **same)]
    assert load(*rows, split="test", task="rl").counts["kept"] == 2
    assert load(*rows, split="test", task="rl", dedup="exact").counts["duplicate"] == 1


def test_prompts_and_answers(load):
    (example,) = load(row(601)).examples
    (message,) = example.prompt
    assert message.content == (
        "Write a Python function for this task.\n\nWrite a function to add 601 and 1.\n\nIt has to pass this test:\n\n"
        "```python\nassert f(601, 1) == 2\n```\n\n"
        "Put the function, with what it imports, into one code block that begins with ```python."
    )
    assert example.completion == "```python\ndef f(a, b):\n\treturn a + b\n```"
    assert example.echo == "Write a function to add 601 and 1."
    assert example.extra["test_list"] == row(601)["test_list"]
    (asked,) = load(row(601), task="rl", prompt_style="think", shown_tests=0).examples
    assert (asked.prompt[0].content, asked.completion) == (THINK_SYSTEM, None)
    assert "It is called `f` and takes 2 arguments." in asked.prompt[1].content
    assert "assert" not in asked.prompt[1].content
    (usual,) = load(row(601), shown_tests=9).examples
    assert "It has to pass these tests:\n\n```python\n" + "\n".join(row(601)["test_list"]) in usual.prompt[0].content
    with pytest.raises(ValidationError, match="asks for reasoning"):
        load(row(601), prompt_style="think")


def test_templates(load, tmp_path):
    (tmp_path / "p.jinja").write_text("{{ function }}|{{ tests }}|{{ text }}")
    (example,) = load(row(601), prompt_style="template", template=str(tmp_path / "p.jinja")).examples
    assert example.prompt == "f|assert f(601, 1) == 2|Write a function to add 601 and 1."


def test_the_sanitized_form(load):
    sanitized = {"source_file": "a.ipynb", "task_id": 601, "prompt": "Add.", "code": "def f(a, b): return a + b",
                 "test_imports": ["import math"], "test_list": ["assert math.isclose(f(1, 2), 3.0)"]}  # fmt: skip
    (example,) = load(sanitized, task="rl").examples
    assert example.echo == "Add."
    assert example.extra["test_imports"] == ["import math"]


def test_what_cannot_be_judged_is_left_out_of_rl_and_said(load, load_context):
    rows = [
        row(601),
        row(602, test_list=["assert f(1) == 1", "assert f(1) == sys.getsizeof(1)"]),
        row(603, test_setup_code="a ="),
        row(11, test_list=["assert f(1) != 1"]),
    ]
    found = load(*rows, task="rl")
    assert ids(found) == {"mbpp/601"}
    assert found.counts == {"read": 4, "kept": 1, "broken": 0, "unjudgeable": 2, "other-split": 1}
    (line,) = load_context.lines
    assert "left out 2 problems that cannot be judged (mbpp/602: test 2 - neither side is a literal; mbpp/603:" in line
    assert load(*rows, task="sft").counts["kept"] == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text": " ", "prompt": ""}, "empty-prompt"),
        ({"test_list": []}, "no-tests"),
        ({"code": " "}, "empty-completion"),
    ],
)
def test_rows_without_something_are_counted(load, change, reason):
    assert load(row(601, **change)).counts[reason] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_list": "assert f(1)"}, "'test_list' is not a list of texts"),
        ({"test_list": [1]}, "'test_list' is not a list of texts"),
        ({"task_id": 1.5}, "'task_id' is a number"),
        ({"code": None}, "has no 'code'"),
        ({"text": None}, "has no 'prompt'"),
        ({"test_imports": "import math"}, "'test_imports' is not a list of texts"),
    ],
)
def test_broken_rows_have_a_place(load, change, message):
    with pytest.raises(DataError, match=r"rows\.jsonl:1") as error:
        load({**row(601), **change})
    assert message in str(error.value)


def judged(rows, program=None):
    params = CorrectnessParams.model_construct(
        **{name: field.default for name, field in CorrectnessParams.model_fields.items()}
    )
    reward = Correctness(params, Judge(UnsafeLocal(2), mode="tokens", tolerance=1e-6))
    scores = reward([Rollout("", program or one.completion, (), one) for one in rows])
    reward.close()
    return {one.id: score.reason for one, score in zip(rows, scores, strict=True)}


def test_the_sample_passes_its_own_tests_and_nothing_passes_all():
    rows = MbppLoader(MbppParams()).sample().examples
    assert set(judged(rows).values()) == {"AC accepted"}
    wrong = judged(rows, "```python\nimport sys\nsys.exit(0)\n```")
    assert set(wrong.values()) == {"RE runtime error"}
    assert all(one.completion is None for one in MbppLoader(MbppParams(task="rl")).sample().examples)


@pytest.mark.shared
def test_the_real_file(shared_data, load_context):
    source = shared_data / "code_eval" / "mbpp.jsonl"

    def rows(**given):
        params = MbppParams.model_validate_json(json.dumps({"source": str(source), **given}))
        return MbppLoader(params).load(load_context)

    counts = {split: rows(split=split, task="rl").counts["kept"] for split in ("train", "validation", "test")}
    assert counts == {"train": 374, "validation": 89, "test": 500}
    assert [line.partition("(")[2] for line in load_context.lines] == ["mbpp/596: test 1 - neither side is a literal)"]
    assert set(judged(rows(split="test", max_rows=25).examples).values()) == {"AC accepted"}
