"""The code blocks of README.md and docs/, and what each language is checked by; tests/test_docs_blocks.py uses it."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main
import yaml

from kdkit.cli.app import app
from kdkit.recipe import check_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?ms)^(?P<indent> *)(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<text>.*?)^(?P=indent)(?P=fence) *$")
MARK = re.compile(r"<!-- not run: (.+?) -->\s*\Z")
INCLUDE = re.compile(r"(?m)^--8<--\n(.+)\n--8<--$")
"""The form on three lines: that on one is a Python expression, which formatters take for one."""
RECIPE_KEYS = {"stages", "vars", "plugins", "requires", "track", "seed"}
PLACEHOLDERS = {
    "name: TEXT": "name: rouge",
    "TEXT": "http://127.0.0.1:8000/v1",
    "${stages.NAME.scores}": "${stages.before.scores}",
}
"""What snippets of the reference leave open, beside files."""
BEFORE = {
    "kind": "evaluate",
    "models": {"a": "a/b"},
    "data": {"a": {"use": "instructions"}},
    "metrics": [{"use": "length"}],
}
"""A stage whose output a fragment may name."""
CHEAP = [["plugins", "list"], ["plugins", "show"], ["validate"], ["schema"], ["doctor"]]
"""Commands that need neither a model nor a run: these are carried out."""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    title: str
    text: str
    reason: str
    """Why it is not run; empty for those that are."""

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, included files filled in."""
    source = page.read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(source):
        language, _, rest = fence["info"].strip().partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        mark = MARK.search(source[: fence.start()])
        indent = fence["indent"]
        text = re.sub(f"^{indent}", "", fence["text"], flags=re.MULTILINE) if indent else fence["text"]
        text = INCLUDE.sub(lambda name: (ROOT / name[1]).read_text(encoding="utf-8").rstrip(), text)
        assert not re.search("-- ?8 ?<", text), f"{page.name} includes something in another way"
        line = source.count("\n", 0, fence.start()) + 1
        found.append(Block(page, line, language, title[1] if title else "", text, mark[1] if mark else ""))
    return found


class Reader:
    """Goes through a page as a reader does: saves files, keeps the recipe, tries everything else."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.recipe: Path | None = None
        self.names: dict[str, Any] = {"__name__": "page"}

    def read(self, block: Block) -> None:
        """Check one block. Raises ``AssertionError`` or what the block raised."""
        if block.title:
            (self.place / block.title).write_text(block.text, encoding="utf-8")
        getattr(self, f"_{block.language}")(block)

    def _text(self, block: Block) -> None:
        """Output, formulas and pictures: nothing to run."""

    def _python(self, block: Block) -> None:
        if block.title:
            compile(block.text, str(block), "exec")
            return
        flags = annotations.compiler_flag  # signatures name types that a page does not import
        exec(compile(block.text, str(block), "exec", flags=flags, dont_inherit=True), self.names)

    def _json(self, block: Block) -> None:
        json.loads(block.text)

    def _jsonl(self, block: Block) -> None:
        assert [json.loads(line) for line in block.text.splitlines()]

    def _toml(self, block: Block) -> None:
        assert tomllib.loads(block.text)

    # --- recipes ---

    def _yaml(self, block: Block) -> None:
        if re.search(r"^kdkit: 1$", block.text, re.MULTILINE):
            self.recipe = self.place / (block.title or "recipe.yaml")
            self.recipe.write_text(block.text, encoding="utf-8")
            problems = check_recipe(self.recipe).problems
        else:
            problems = check_recipe(self._framed(block)).problems
        self._expect(problems)

    def _expect(self, problems: Sequence[Any]) -> None:
        """Fails with problems, but for files that a reader is to have and packages that are not installed here."""
        own = re.compile(f"no such (file or )?directory: {re.escape(str(self.place))}")
        ours = [text for text in map(str, problems) if not about_contrib(text) and not own.search(text)]
        assert not ours, "; ".join(ours)

    def _framed(self, block: Block) -> Path:
        """A whole recipe around a fragment: that of the page, or one that has a place for it."""
        fragment = yaml.safe_load(replaced(block.text))
        if all(isinstance(value, dict) and "kind" in value for value in fragment.values()):
            fragment = {"stages": fragment}
        whole: dict[str, Any] = {"kdkit": 1, "name": "frame", "stages": {"before": BEFORE}}
        if set(fragment) <= RECIPE_KEYS:
            if self.recipe is not None:
                whole = {"extends": f"./{self.recipe.name}", "name": "frame"}
            whole["stages"] = {**whole.get("stages", {}), **fragment.pop("stages", {})}
            whole |= fragment
        else:
            whole["stages"] = framed_stages(fragment)
        path = self.place / "fragment.yaml"
        path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
        return path

    # --- commands ---

    def _sh(self, block: Block) -> None:
        self._console(block)

    def _console(self, block: Block) -> None:
        for words in commands(block.text):
            self._command(words)

    def _command(self, words: list[str]) -> None:
        program, *rest = words
        if program == "kdkit":
            values = parsed(rest)
            self._check_recipes(values)
            if any(rest[: len(cheap)] == cheap for cheap in CHEAP) and "--out" not in rest:
                self._carry_out(rest)
        elif program == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            assert set(rest) <= set(targets), f"no target {rest}"
        elif program == "pip":
            assert rest[0] == "install"
            known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            for extras in re.findall(r"kdkit\[(.+?)\]", " ".join(rest)):
                assert set(extras.split(",")) <= set(known["optional-dependencies"]), extras
        else:
            assert program == "python", f"no check for the program {program!r}: mark the block <!-- not run: why -->"
            scripts = [word for word in rest if "/" in word]
            assert scripts, rest
            assert all((ROOT / script).exists() for script in scripts), rest

    def _check_recipes(self, values: dict[str, Any]) -> None:
        """The recipe that a command names is valid with the options that it gives, and has the stages it names."""
        given = values.get("recipe")
        for path in [given] if given else values.get("recipes") or []:
            file = self._file(path)
            if file is None:
                continue
            options = {"sets": values.get("sets") or [], "variables": values.get("variables") or []}
            checked = check_recipe(file, **options)
            self._expect(checked.problems)
            stages = set(checked.recipe.stages if checked.recipe else ())
            single = [values.get(name) for name in ("first", "until", "stage")]
            named = {*filter(None, single), *(values.get("only") or ()), *(values.get("force") or ())}
            assert not checked.recipe or named <= stages, f"no stage {named - stages}"

    def _carry_out(self, words: list[str]) -> None:
        from typer.testing import CliRunner

        files = {word: self._file(word) for word in words if word.endswith(".yaml")}
        if None in files.values():
            return
        result = CliRunner().invoke(app, [str(files.get(word, word)) for word in words])
        said = f"{words}: {result.output} {result.exception}"
        assert result.exit_code == 0 or about_contrib(said), said

    def _file(self, name: Any) -> Path | None:
        """A recipe of the repository or of the page; None for one that a reader is to have."""
        found = [file for file in (ROOT / name, self.place / name) if file.is_file()]
        assert found or not str(name).startswith("recipes/"), f"no recipe {name}"
        return found[0] if found else None


def about_contrib(problem: str) -> bool:
    """Whether a problem is that a package of plugins-contrib is not installed here; they have tests of their own."""
    packages = [path.parent.name for path in ROOT.glob("plugins-contrib/*/pyproject.toml")]
    plugins = [path.read_text(encoding="utf-8") for path in ROOT.glob("plugins-contrib/*/*/plugin.py")]
    names = [name for text in plugins for name in re.findall(r'name="([a-z0-9-]+)"', text)]
    missing = "|".join(map(re.escape, [*packages, *names])) or "(?!)"
    pattern = rf"no [a-z ]+ '(?:{missing})'|(?:{missing})(?:[<>=~!].*?)? is not installed"
    return re.search(pattern, problem) is not None


def replaced(text: str) -> str:
    """A snippet with its placeholders filled in."""
    for placeholder, value in PLACEHOLDERS.items():
        text = re.sub(rf"\b{placeholder}\b" if placeholder.isupper() else re.escape(placeholder), value, text)
    return text


def framed_stages(fragment: dict[str, Any]) -> dict[str, Any]:
    """Stages with a place for the one key of ``fragment``, a component or a list of them."""
    ((key, value),) = fragment.items()
    tiny = {"model": "smollm2-135m-instruct"}
    rows = {"use": "instructions"}
    local = {"use": "local", **tiny}
    text = json.dumps(value)
    if key == "losses" and re.search(r'"(grpo|minillm|on-policy-reverse-kl)"', text):
        kind = "grpo" if '"grpo"' in text else "minillm"
        more: dict[str, Any] = {"rewards": [{"use": "repetition"}]} if kind == "grpo" else {"teacher": local}
        return {"frame": {"kind": kind, **tiny, **more, "data": rows, "losses": value}}
    if key == "losses" and not re.search(r'"use": "(?!cross-entropy)', text):
        return {"frame": {"kind": "sft", **tiny, "data": rows, "losses": value}}
    stages: dict[str, dict[str, Any]] = {
        "losses": {"kind": "distill", **tiny, "teacher": local, "data": rows},
        "teacher": {"kind": "distill", **tiny, "data": rows},
        "data": {"kind": "sft", **tiny},
        "rewards": {"kind": "grpo", **tiny, "data": rows},
        "quantizer": {"kind": "quantize", **tiny},
        "rollout": {"kind": "minillm", **tiny, "teacher": local, "data": rows},
        "metrics": {"kind": "evaluate", "models": {"a": tiny["model"]}, "data": {"a": rows}},
    }
    if key == "sandbox":
        return framed_stages({"rewards": [{"use": "correctness", "sandbox": value}]})
    stage = {**stages[key], key: value}
    if key == "quantizer" and '"gptq"' in text:
        stage["calibration"] = rows
    if key == "metrics" and re.search(r'"(teacher-kl|student-kl|exposure-bias)"', text):
        stage["teacher"] = local
    if '"pass-at-k"' in text:
        stage["judge"] = {"use": "correctness"}
    return {"frame": stage}


def commands(text: str) -> Iterator[list[str]]:
    """Commands of a console block as words: comments, variables before them and line ends escaped are gone."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            del words[0]
        if words[:2] == ["python", "-m"] and words[2] == "pytest":
            words = ["python", *words[3:]]
        if words:
            yield words


def parsed(words: list[str]) -> dict[str, Any]:
    """What the real command line makes of ``words``; raises a usage error when it would refuse them."""
    command: Any = typer.main.get_command(app)
    path = "kdkit"
    while getattr(command, "commands", None) and words and words[0] in command.commands:
        command, path, words = command.commands[words[0]], f"{path} {words[0]}", words[1:]
    if words[-1:] in (["--help"], ["--version"]):
        return {}
    assert not getattr(command, "commands", None), f"no command {' '.join([path, *words[:1]])!r}"
    context = command.make_context(path, [word for word in words if word != "--debug"])
    return dict(context.params)


def links(page: Path) -> Iterator[tuple[int, str]]:
    """Relative links of a page, with their lines."""
    text = FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), page.read_text(encoding="utf-8"))
    for found in re.finditer(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)", text):
        yield text.count("\n", 0, found.start()) + 1, found[1]
