from __future__ import annotations

import re
from collections import Counter

import pytest
from docs_blocks import PAGES, ROOT, Reader, blocks, links

from kdkit.testing.tiny import save_tiny_model

NOT_RUN = {
    "docs/how-to/new-plugin.md": 5,
    "docs/how-to/quantise-export.md": 1,
    "docs/reference/hooks.md": 1,
}
"""Blocks that are marked as not run, each with its reason beside it: a new one has to be entered here."""


def ids(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=ids)
def test_every_block_runs_or_is_valid(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader = Reader(tmp_path)
    for block in blocks(page):
        if not block.reason:
            try:
                reader.read(block)
            except Exception as error:
                raise AssertionError(f"{block}: {error}") from error


def test_blocks_that_are_not_run_are_counted():
    marked = Counter(ids(page) for page in PAGES for block in blocks(page) if block.reason)
    assert marked == NOT_RUN


def test_every_mark_belongs_to_a_block():
    for page in PAGES:
        marks = page.read_text(encoding="utf-8").count("<!-- not run:")
        assert marks == sum(bool(block.reason) for block in blocks(page)), page


def test_there_is_something_to_check():
    languages = Counter(block.language for page in PAGES for block in blocks(page))
    assert languages["yaml"] > 90
    assert languages["console"] > 25
    assert languages["python"] > 20


def test_no_fence_is_left_open():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(re.findall(r"^ *`{3,}", text, re.MULTILINE)) == 2 * len(blocks(page)), page


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"], ids=ids)
def test_links_lead_to_files(page):
    broken = [f"{line}: {target}" for line, target in links(page) if not (page.parent / target).exists()]
    assert broken == []


# --- the checks find mistakes -----------------------------------------------------------------------------------------

WHOLE = "{kind: dequantize, model: a/b}"
WRONG = {
    "an option that is none": ("```console\nkdkit run my.yaml --untill kd\n```\n", "--untill"),
    "a command that is none": ("```console\nkdkit trian my.yaml\n```\n", "no command 'kdkit trian'"),
    "an argument that is missing": ("```console\nkdkit runs show\n```\n", "Missing parameter: run"),
    "a recipe that is not there": ("```console\nkdkit run recipes/none.yaml\n```\n", "no recipe recipes/none.yaml"),
    "a stage that is none": ("```console\nkdkit run recipes/quickstart.yaml --until no\n```\n", "no stage {'no'}"),
    "a setting that is none": (
        "```console\nkdkit run recipes/quickstart.yaml --set stages.kd.max_stepz=3\n```\n",
        "max_stepz",
    ),
    "a second line": ("```console\nkdkit doctor\nkdkit plugins list --kind loss --xml\n```\n", "--xml"),
    "a component that is none": ("```console\nkdkit plugins show loss forward\n```\n", "no loss 'forward'"),
    "a target that is none": ("```console\nmake everything\n```\n", "everything"),
    "an extra that is none": ("```console\npip install 'kdkit[vllm]'\n```\n", "vllm"),
    "a script that is not there": ("```console\npython benchmarks/none.py\n```\n", "none.py"),
    "another program": ("```console\ncurl http://127.0.0.1\n```\n", "no check for the program 'curl'"),
    "a loss that is none": ("```yaml\nlosses: [{use: forwardkl}]\n```\n", "no loss 'forwardkl'"),
    "a parameter that is none": (
        "```yaml\nstages:\n  s: {kind: dequantize, model: a/b, dtypes: float16}\n```\n",
        "unknown key 'dtypes'",
    ),
    "a fragment over a page's recipe": (
        f"```yaml\nkdkit: 1\nname: a\nstages:\n  s: {WHOLE}\n```\n```yaml\nstages:\n  s: {{dtype: float8}}\n```\n",
        "stages.s.dtype",
    ),
    "a fragment with a key that no frame has": ("```yaml\nloss: [{use: forward-kl}]\n```\n", "loss"),
    "code that raises": ("```python\nraise ValueError('wrong')\n```\n", "wrong"),
    "code that uses a block before it": ("```python\nx = 1\n```\n```python\nraise ValueError(x)\n```\n", "1"),
    "a language that nobody checks": ("```fortran\nx = 1\n```\n", "_fortran"),
    "no language": ("```\nx = 1\n```\n", "'_'"),
    "JSON lines": ('```jsonl\n{"a": 1}\n{"a": \n```\n', "Expecting value"),
    "TOML": ("```toml\na = \n```\n", "Invalid value"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_found(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, complaint = WRONG[name]
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    reader = Reader(tmp_path)
    *before, last = blocks(page)
    for block in before:
        reader.read(block)
    with pytest.raises(Exception, match=re.escape(complaint)):
        reader.read(last)


def test_a_wrong_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[here](page.md) and [there](none.md#part)\n```text\n[not](this.md)\n```\n", encoding="utf-8")
    assert [target for _, target in links(page) if not (tmp_path / target).exists()] == ["none.md"]


# --- the tutorials run ------------------------------------------------------------------------------------------------


def test_the_tutorial_with_rows_of_ones_own_runs(tmp_path, monkeypatch):
    import kdkit

    monkeypatch.chdir(tmp_path)
    tiny = str(save_tiny_model(tmp_path / "tiny", layers=4))
    reader = Reader(tmp_path)
    for block in blocks(ROOT / "docs" / "tutorial" / "your-data.md"):
        reader.read(block)
    var = {"teacher": tiny, "student": {"from": tiny, "keep_layers": 2}}
    small = {"stages.kd.max_steps": 2, "stages.eval.sampling.max_new_tokens": 4}
    result = kdkit.run("my.yaml", var=var, set=small, inline=True)
    assert result.ok, result.error
    assert list(result.report["models"]) == ["base", "kd", "teacher"]
    assert result.report["models"]["kd"]["metrics"]["rouge-l"]["n"] >= 2


def test_the_mistakes_that_the_tutorial_shows_are_named_as_it_says(tmp_path, monkeypatch):
    import kdkit

    monkeypatch.chdir(tmp_path)
    page = blocks(ROOT / "docs" / "tutorial" / "your-data.md")
    (recipe,) = [block.text for block in page if block.title == "my.yaml"]
    (shown,) = [block.text for block in page if block.language == "text"]
    (tmp_path / "rows.jsonl").touch()
    wrong = recipe.replace("use: jsonl\n", "use: jsonlines\n", 1).replace("max_steps:", "max_stepz:")
    (tmp_path / "my.yaml").write_text(wrong)
    assert [str(problem) for problem in kdkit.validate("my.yaml")] == shown.splitlines()


def test_the_plugin_of_the_tutorial_runs_from_a_file(tmp_path, monkeypatch):
    import kdkit

    monkeypatch.chdir(tmp_path)
    tiny = str(save_tiny_model(tmp_path / "tiny", layers=2))
    reader = Reader(tmp_path)
    for block in blocks(ROOT / "docs" / "tutorial" / "your-loss.md"):
        if block.title in {"my_losses.py", "mine.yaml"}:
            reader.read(block)
    small = {"stages.sft.model": tiny, "stages.sft.max_steps": 2, "stages.sft.per_device_train_batch_size": 2}
    result = kdkit.run("mine.yaml", set=small, inline=True)
    assert result.ok, result.error
