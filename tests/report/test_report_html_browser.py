"""``report.html`` in a real Chromium: nothing runs, nothing loads, nothing overflows, and it can be used."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import HOSTILE, enrich, run
from made_up_scores import metric, model

from kdkit.report.collect import collect
from kdkit.report.html import render_html

VIEWS = [(width, scheme) for width in (1280, 400) for scheme in ("light", "dark")]
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
LISTEN = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (e) => violations.push(`${e.violatedDirective} ${e.blockedURI}`));
window.alert = () => { document.title = "owned"; };
"""
WIDER = """() => document.documentElement.scrollWidth - window.innerWidth"""


def missing(reason: str) -> Any:
    if os.environ.get("KDKIT_REQUIRE_BROWSER") == "1":
        pytest.fail(f"{reason}, and KDKIT_REQUIRE_BROWSER=1 asks for these tests")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        missing("no Chromium is installed (Debian: apt-get install chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed (pip install 'kdkit[test]')")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=list(ARGUMENTS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it, in which every text of a stranger is an attack."""
    root = tmp_path_factory.mktemp("page")
    directory = run(root / "store", datasets=("dolly", "bugnet"), texts=HOSTILE)
    report = enrich(collect([directory], recipe="demo", seed=17), '<b onmouseover="alert(1)">' + "w" * 300)
    report["notes"] += [*HOSTILE, "n" * 3000]
    report["recipe"] = "r" * 300
    for entry in report["models"].values():
        entry["path"] = "/" + "p" * 300
    (root / "report.html").write_text(render_html(report, [directory]), encoding="utf-8")
    return root / "report.html"


class Visit:
    """An open page, and everything that it did."""

    def __init__(self, page: Any, file: Path) -> None:
        self.page, self.file = page, file
        self.messages: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.messages.append(message.text))
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("dialog", lambda dialog: self.messages.append(dialog.message) or dialog.dismiss())
        page.add_init_script(LISTEN)
        page.goto(file.as_uri(), wait_until="load")

    def check_quiet(self) -> None:
        assert self.messages == []
        assert self.requests == [self.file.as_uri()]
        assert self.page.evaluate("() => window.violations") == []


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    contexts = []

    def do(file: Path, width: int = 1280, scheme: str = "light", **options: Any) -> Visit:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        contexts.append(context)
        return Visit(context.new_page(), file)

    yield do
    for context in contexts:
        context.close()


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_hostile_page_runs_loads_and_overflows_nothing(visit, hostile, width, scheme) -> None:
    made = visit(hostile, width, scheme)
    assert made.page.evaluate(WIDER) <= 0
    made.page.evaluate("() => document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    # The sheet of the page's own colours is really used.
    paper = made.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[scheme]
    assert made.page.evaluate(WIDER) <= 0
    for element in made.page.query_selector_all(".group")[:20]:
        element.hover()
    assert made.page.title() == f"Report: {'r' * 300}"
    assert made.page.query_selector("#injected") is None
    made.check_quiet()


def test_hostile_text_is_readable(visit, hostile) -> None:
    page = visit(hostile).page
    page.evaluate("() => document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    shown = page.inner_text("#samples")
    for text in (HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[3], "x" * 1000, "שלום", "👩‍👩‍👧‍👦", "⟨U+202E⟩", "␛[31m"):
        assert text in shown
    direction = """() => [...document.querySelectorAll('.text')].filter((e) => e.textContent.startsWith('ש'))
        .map((e) => [getComputedStyle(e).direction, getComputedStyle(e).overflowX])"""
    assert set(map(tuple, page.evaluate(direction))) == {("rtl", "hidden")}


def test_the_policy_blocks_what_escaping_might_miss(visit, hostile) -> None:
    made = visit(hostile)
    made.page.evaluate(
        """() => {
            const script = document.createElement('script');
            script.textContent = "document.title = 'owned'";
            const image = new Image();
            image.src = 'https://127.0.0.1:9/x.png';
            const link = document.createElement('div');
            link.innerHTML = '<p onclick="document.title = 1" style="color: red">x</p>';
            document.body.append(script, image, link);
            link.firstChild.click();
        }"""
    )
    made.page.wait_for_function("() => window.violations.length >= 4")
    assert made.page.title() == f"Report: {'r' * 300}"
    blocked = {violation.split()[0] for violation in made.page.evaluate("() => window.violations")}
    assert blocked == {"script-src-elem", "script-src-attr", "style-src-attr", "img-src"}


def test_search_and_group_filter_the_samples(visit, hostile) -> None:
    made = visit(hostile)
    page = made.page
    counts = "() => [...document.querySelectorAll('.sample')].filter((each) => !each.hidden).length"
    assert (page.evaluate(counts), page.inner_text("#count")) == (32, "32 of 32")
    page.fill("#query", "QUESTION breaks")
    some = page.evaluate(counts)
    assert 0 < some < 32
    assert page.inner_text("#count") == f"{some} of 32"
    texts = page.evaluate(
        "() => [...document.querySelectorAll('.sample:not([hidden])')].map((each) => each.textContent.toLowerCase())"
    )
    assert all("question" in text and "breaks" in text for text in texts)
    page.fill("#query", "</script>")
    assert page.evaluate(counts) > 0
    page.fill("#query", "nothing has these words")
    assert (page.evaluate(counts), page.inner_text("#count")) == (0, "0 of 32")
    page.fill("#query", "")
    page.select_option("#group", "worst")
    assert page.evaluate(counts) == 8
    made.check_quiet()


def test_tables_sort_by_keyboard_and_keep_the_baselines_last(visit, hostile) -> None:
    made = visit(hostile)
    page = made.page
    names = "() => [...document.querySelector('.sortable').rows].map((row) => row.cells[0].innerText.split('\\n')[0])"
    order = page.evaluate(names)
    assert order == ["model", "base", "sft", "kd", "kd-int4", "teacher", "identity", "empty", "majority", "reference"]
    button = page.locator(".sortable").first.locator("th button").nth(3)
    assert "perplexity" in button.inner_text()
    button.focus()
    page.keyboard.press("Enter")
    heading = page.locator(".sortable").first.locator("th[aria-sort]")
    assert heading.get_attribute("aria-sort") == "descending"
    assert page.evaluate(names)[1] == "base"
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert page.evaluate(names)[1] == "teacher"
    assert page.evaluate(names)[6:] == order[6:]
    page.locator(".sortable").first.locator("th button").first.click()
    assert page.evaluate(names)[1:6] == ["teacher", "sft", "kd-int4", "kd", "base"]
    made.check_quiet()


def test_wide_tables_scroll_in_their_own_box_by_keyboard(visit, hostile) -> None:
    page = visit(hostile, 400).page
    box = page.locator(".scroll").first
    inner, outer = box.evaluate("(each) => [each.scrollWidth, each.clientWidth]")
    assert inner > outer
    box.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('.scroll').scrollLeft > 0")
    # The names stay in view.
    assert box.locator("tbody th").first.evaluate("(each) => each.getBoundingClientRect().left") >= 0


@pytest.mark.parametrize("width", [1280, 400])
def test_without_scripts_everything_is_readable(visit, hostile, width) -> None:
    made = visit(hostile, width, java_script_enabled=False)
    page = made.page
    assert not page.is_visible("#query")
    assert page.is_visible("text=Best and worst by rouge-l of kd")
    first = page.locator("details.sample").first
    first.locator("summary").focus()
    page.keyboard.press("Enter")
    assert first.locator(".text").first.is_visible()
    assert not page.locator("th button").count()
    assert made.requests == [hostile.as_uri()]


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_a_small_report_is_fine_too(visit, write, tmp_path, width, scheme) -> None:
    report = collect([write({"only": model({"data": {"rouge-l": metric([3.0])}})})], recipe="small", seed=1)
    (tmp_path / "report.html").write_text(render_html(report), encoding="utf-8")
    made = visit(tmp_path / "report.html", width, scheme)
    assert made.page.evaluate(WIDER) <= 0
    assert not made.page.query_selector("#query")
    made.check_quiet()


def test_text_of_charts_stays_inside_and_apart(visit, hostile) -> None:
    page = visit(hostile, 400).page
    outside = """() => [...document.querySelectorAll('svg text')].filter((text) => {
        const a = text.getBoundingClientRect(), b = text.closest('svg').getBoundingClientRect();
        return a.width > 0 && (a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1);
    }).map((text) => text.textContent)"""
    assert page.evaluate(outside) == []
    overlapping = """() => [...document.querySelectorAll('svg')].flatMap((svg) => {
        const boxes = [...svg.querySelectorAll('text')].map((text) => [text.textContent, text.getBoundingClientRect()]);
        return boxes.flatMap(([one, a], i) => boxes.slice(i + 1).filter(([, b]) =>
            Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
            Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3).map(([other]) => `${one} / ${other}`));
    })"""
    assert page.evaluate(overlapping) == []
