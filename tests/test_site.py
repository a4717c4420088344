"""The documentation site: builds strictly, needs no network, and fits a phone. ``make docs`` builds it for readers."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
SHOWN = ["index.html", "how-it-works.html", "methods/minillm.html", "comparison.html"]


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if importlib.util.find_spec("mkdocs") is None:
        assert "KDKIT_REQUIRE_DOCS" not in os.environ, "the extra docs is not installed"
        pytest.skip("the extra docs is not installed")
    place = tmp_path_factory.mktemp("site")
    done = build(ROOT, place)
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = shutil.which("chromium")
    if found is None:
        assert "KDKIT_REQUIRE_BROWSER" not in os.environ, "no Chromium is installed"
        pytest.skip("no Chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


def test_every_page_is_in_the_site(site):
    for page in DOCS:
        assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").is_file(), page


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|img|iframe|source)[^>]+src="(?:https?:)?//[^"]*"', text) == [], page
        assert re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect|icon)"[^>]+href="(?:https?:)?//', text) == [], page


def test_formulas_are_mathml(site):
    formulas = 0
    for page in DOCS:
        text = (site / page.relative_to(ROOT / "docs")).with_suffix(".html").read_text(encoding="utf-8")
        assert "arithmatex" not in text, page
        assert "$$" not in text, page
        formulas += text.count("<math ")
    assert formulas > 20


def test_the_api_reference_has_what_is_public(site):
    import kdkit
    import kdkit.adapters
    import kdkit.api

    text = (site / "reference" / "api.html").read_text(encoding="utf-8")
    modules = (kdkit, kdkit.api, kdkit.adapters)
    public = [name for module in modules for name in module.__all__ if not name.startswith("__")]
    missing = [name for name in public if not re.search(rf'id="kdkit\.[a-z_.]*{name}"', text)]
    assert missing == [], "mkdocstrings leaves out what has no docstring"


def test_the_tutorial_shows_the_code_of_the_package(site):
    text = (site / "tutorial" / "your-loss.html").read_text(encoding="utf-8")
    for word in ("FocalKLParams", "TestFocalKL", "hatchling", "focal-kl"):
        assert word in text


def test_recipes_that_pages_link_to_are_shown(site):
    text = (site / "repository" / "recipes" / "quickstart.yaml.html").read_text(encoding="utf-8")
    assert "smollm2-135m-instruct" in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_a_phone(site, scheme, browser):
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(240_000)
    foreign: list[str] = []
    page.on("request", lambda request: foreign.append(request.url) if not request.url.startswith("file:") else None)
    for name in SHOWN:
        page.goto((site / name).as_uri())
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, name
    assert [url for url in foreign if not url.startswith("data:")] == []
    context.close()


def test_a_link_to_nothing_fails_the_build(site, tmp_path):
    for entry in ROOT.iterdir():
        if entry.name not in {"docs", "site", "mkdocs.yml", ".git"}:
            (tmp_path / entry.name).symlink_to(entry)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / "index.md").open("a", encoding="utf-8") as front:
        front.write("\n[a](limits.md#nowhere)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "does not contain an anchor '#nowhere'" in done.stderr
