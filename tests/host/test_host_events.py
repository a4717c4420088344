from __future__ import annotations

from pathlib import Path

import pytest

from kdkit.api import RunFinished, StageFinished, StageStarted
from kdkit.host import Catalog

LISTENER = """
import builtins
from kdkit.api import hookimpl

@hookimpl{options}
def {hook}({arguments}):
    builtins.kdkit_test_heard.append(("{who}", {heard}))
    {then}
"""
STARTED = StageStarted(recipe="r", stage="sft", kind="sft", key="k", run_dir=Path("/r"))
EVENTS = {
    "kdkit_stage_started": STARTED,
    "kdkit_stage_finished": StageFinished(
        recipe="r", stage="sft", kind="sft", key="k", run_dir=Path("/r"), status="ok", seconds=1.0, entry=None
    ),
    "kdkit_run_finished": RunFinished(recipe="r", run_dir=Path("/r"), status="failed", seconds=2.0),
}


@pytest.fixture
def heard(monkeypatch):
    events: list[tuple[str, object]] = []
    monkeypatch.setattr("builtins.kdkit_test_heard", events, raising=False)
    return events


@pytest.fixture
def listen(install):
    def listen(who: str, *, dist=None, hook="kdkit_stage_started", event=True, then="pass", options=""):
        source = LISTENER.format(
            who=who,
            hook=hook,
            arguments="event" if event else "",
            heard="event" if event else "None",
            then=then,
            options=options,
        )
        install(dist or f"kdkit-{who}", {f"listener_{who}": source})

    return listen


@pytest.mark.parametrize("hook", EVENTS)
def test_each_event_reaches_its_hook_only(hook, listen, heard, catalog):
    for name in EVENTS:
        listen(name.removeprefix("kdkit_"), hook=name)
    assert catalog().notify(EVENTS[hook]) == []
    assert heard == [(hook.removeprefix("kdkit_"), EVENTS[hook])]


def test_built_ins_hear_first_then_by_distribution(listen, heard):
    for who, dist in [("b", None), ("own", "kdkit"), ("a", None)]:
        listen(who, dist=dist)
    Catalog.discover(strict=False).notify(STARTED)
    assert [who for who, _ in heard] == ["own", "a", "b"]


def test_a_plugin_can_ask_to_be_first(listen, heard, catalog):
    listen("a")
    listen("b", options="(tryfirst=True)")
    catalog().notify(STARTED)
    assert [who for who, _ in heard] == ["b", "a"]


@pytest.mark.parametrize("error", ["ValueError('no\\n disk')", "SystemExit('no disk')"])
def test_a_listener_that_raises_is_named_and_stops_nobody(error, listen, heard, catalog):
    listen("a", then=f"raise {error}")
    listen("b")
    (line,) = catalog().notify(STARTED)
    name = error.partition("(")[0]
    assert line == f"kdkit-a 1.0 (entry point 'listener_a'): kdkit_stage_started: {name}: no disk"
    assert [who for who, _ in heard] == ["a", "b"]


def test_interrupting_a_listener_interrupts_the_run(listen, heard, catalog):
    listen("a", then="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        catalog().notify(STARTED)


def test_a_listener_need_not_take_the_event(listen, heard, catalog):
    listen("a", event=False)
    assert catalog().notify(STARTED) == []
    assert heard == [("a", None)]


def test_what_listeners_print_stays_off_stdout(listen, heard, catalog, capsys):
    listen("a", then="print('hello')")
    catalog().notify(STARTED)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")
