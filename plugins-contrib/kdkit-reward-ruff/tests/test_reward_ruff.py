"""What ruff finds costs, whatever the text; nothing of it is run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import kdkit
from kdkit.api import EnvironmentUnmet, RecipeError, Reward, RewardScore, Rollout
from kdkit.testing.conformance import RewardConformance
from kdkit_reward_ruff import reward as implementation
from kdkit_reward_ruff.programs import program_of

RECIPE = Path(__file__).parents[1] / "recipe.yaml"
CLEAN = "def double(x):\n    return 2 * x\n"
MESSY = "import os\nimport sys\n\n\ndef double(x):\n    return 2 * y\n"


def block(code: str, tag: str = "python") -> str:
    return f"Here it is.\n```{tag}\n{code}\n```\n"


def score(text: str, prompt: str = "Double it.", **params: Any) -> RewardScore:
    (found,) = kdkit.build("reward", "ruff", **params)([Rollout(prompt, text, ())])
    assert isinstance(found, RewardScore)
    return found


class TestRuff(RewardConformance):
    range = (0.0, 1.0)

    def build(self) -> Reward:
        built: Reward = kdkit.build("reward", "ruff")
        return built

    def rollouts(self) -> Sequence[Rollout]:
        texts = (block(CLEAN), block(MESSY), block("import os"), block("x = ("), "no program", "")
        return [Rollout("Double it.", text, tuple(text.encode())) for text in texts]


def test_every_finding_costs_its_penalty() -> None:
    found = score(block(MESSY))
    assert found.value == pytest.approx(0.7)
    assert found.reason == "F401 x2, F821"
    assert score(block(MESSY), penalty=0.3).value == pytest.approx(0.1)
    assert score(block(MESSY), penalty=0.5).value == 0.0
    assert score(block(CLEAN)).value == 1.0


def test_rules_are_those_of_the_recipe() -> None:
    assert score(block(MESSY), select=["F401"]).value == pytest.approx(0.8)
    assert score(block(MESSY), ignore=["F401"]).value == pytest.approx(0.9)
    assert score(block(CLEAN), select=["ANN001"]).value == pytest.approx(0.9)
    newer = block("def first[T](items: list[T]) -> T:\n    return items[0]\n")
    assert score(newer, target_version="py312").value == 1.0
    assert score(newer).value == 0.0


@pytest.mark.parametrize(
    "code",
    ["import os  # noqa", "# flake8: noqa\nimport os", "import os  # ruff: ignore[F401]", "# ruff: noqa\nimport os"],
)
def test_comments_silence_nothing(code: str) -> None:
    assert score(block(code)).value == pytest.approx(0.9)


def test_a_program_does_not_choose_its_python() -> None:
    header = "# /// script\n# requires-python = '>=3.13'\n# ///\n"
    assert score(block(header + "type Pair = tuple[int, int]")).value == 0.0


def test_neither_files_nor_variables_configure_ruff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ruff.toml").write_text("[lint.per-file-ignores]\n'*' = ['F401']\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUFF_OUTPUT_FILE", str(tmp_path / "written"))
    assert score(block("import os")).value == pytest.approx(0.9)
    assert [path.name for path in tmp_path.iterdir()] == ["ruff.toml"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("print(1)", "no program in the answer"),
        (block("# only a comment\n\n"), "no program in the answer"),
        (block("def ("), "the program is no Python"),
        (block("x = '\x00'"), "the program is no Python"),
        (block("x = '\ud800'"), "the program is no Python"),
        (block("x = " + "-" * 19_000 + "1"), "ruff cannot read the program"),
        (block("x = 1\n" * 4000), "a program of 24,001 characters, more than 20,000"),
    ],
)
def test_what_is_no_program_scores_nothing(text: str, reason: str) -> None:
    assert score(text) == RewardScore("ok", 0.0, reason)


def test_the_longest_program_is_read() -> None:
    longest = "x = 1\n" * 3333 + "x"
    assert score(block(longest)) == RewardScore("ok", 1.0, "no findings")
    assert score(block(longest + " ")).reason == "a program of 20,001 characters, more than 20,000"


def test_nothing_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    assert score(block(f"open({str(mark)!r}, 'w').close()\n")).value == 1.0
    assert not mark.exists()


def test_a_program_is_checked_once_in_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    reward, asked = kdkit.build("reward", "ruff"), list[bytes]()
    run = subprocess.run

    def counted(*args: Any, input: bytes, **options: Any) -> Any:  # noqa: A002
        asked.append(input)
        return run(*args, input=input, **options)

    monkeypatch.setattr(implementation.subprocess, "run", counted)
    assert len(reward([Rollout("", block(CLEAN), ())] * 5 + [Rollout("", block("import os"), ())])) == 6
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("sys.exit(3)", "ruff failed (3): it says nothing"),
        ("print('disk full', file=sys.stderr); sys.exit(2)", "ruff failed (2): disk full"),
        ("os.kill(os.getpid(), 9)", "ruff failed (-9): it says nothing"),
        ("time.sleep(60)", "ruff took more than 2 seconds"),
    ],
)
def test_a_failure_of_ruff_is_not_the_programs(body: str, reason: str, tmp_path: Path) -> None:
    reward = kdkit.build("reward", "ruff", time_limit=2.0)
    fake = tmp_path / "ruff.py"
    fake.write_text(f"import os, sys, time\n{body}\n")
    reward._command = [sys.executable, str(fake)]
    assert reward([Rollout("", block(CLEAN), ())]) == [RewardScore.infra_error(reason)]


def test_no_ruff_is_an_error_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation.shutil, "which", lambda *_args, **_options: None)
    with pytest.raises(EnvironmentUnmet) as info:
        kdkit.build("reward", "ruff")
    assert str(info.value) == "reward ruff: ruff is not installed; install it with: pip install ruff"
    assert info.value.exit_code == 4


def test_rules_that_do_not_exist_are_refused() -> None:
    with pytest.raises(RecipeError, match="NOPE1"):
        kdkit.build("reward", "ruff", select=["NOPE1"])
    with pytest.raises(RecipeError, match="select"):
        kdkit.build("reward", "ruff", select=["--config=x"])


@pytest.mark.parametrize(
    ("prompt", "text", "program"),
    [
        ("", block("a = 1") + block("b = 2"), "b = 2\n"),
        ("", block("a = 1") + block("b = 2", "cpp") + block("c", ""), "a = 1\n"),
        ("", block("a = 1", ""), "a = 1\n"),
        ("", block("a = 1", "cpp"), None),
        ("", "````python\n```\na = 1\n````", "```\na = 1\n"),
        ("", "```python title=x\r\na = 1\r\n```", "a = 1\n"),
        ("", "```python\na = 1", None),
        ("", f"<think>{block('a = 1')}</think>{block('b = 2')}", "b = 2\n"),
        ("", f"<think>{block('a = 1')}", None),
        ("So: <think>\n", block("a = 1"), None),
        ("So: <think>\n", f"yes</think>{block('a = 1')}", "a = 1\n"),
    ],
)
def test_the_program_of_a_completion(prompt: str, text: str, program: str | None) -> None:
    assert program_of(prompt, text) == program


def test_the_recipe_is_valid_and_the_reward_is_listed() -> None:
    assert kdkit.validate(RECIPE) == []
    command = [sys.executable, "-m", "kdkit", "plugins", "show", "reward", "ruff", "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    (component,) = json.loads(shown.stdout)["components"]
    assert component["dist"] == "kdkit-reward-ruff"
