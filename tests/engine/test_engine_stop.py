from __future__ import annotations

import signal
import threading

import pytest

from kdkit.api import ExitCode
from kdkit.engine.stop import StopRequest, stop_on_signals


def test_the_first_signal_is_passed_on_and_the_second_too():
    stop, calls = StopRequest(), []
    with stop.forwarded(first=lambda: calls.append("first"), second=lambda: calls.append("second")):
        stop.receive(signal.SIGINT)
        assert stop.requested()
        stop.receive(signal.SIGTERM)
    assert calls == ["first", "second"]
    assert stop.at_once
    assert stop.exit_code == ExitCode.INTERRUPTED


def test_a_request_that_came_before_the_worker_is_passed_on_at_once():
    stop, calls = StopRequest(), []
    stop.receive(signal.SIGTERM)
    with stop.forwarded(first=lambda: calls.append("first"), second=lambda: None):
        assert calls == ["first"]
    assert stop.exit_code == ExitCode.TERMINATED


def test_without_a_worker_the_second_signal_interrupts():
    stop = StopRequest()
    stop.receive(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stop.receive(signal.SIGINT)


def test_handlers_are_restored():
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested()
    assert {s: signal.getsignal(s) for s in before} == before


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_run_without_handlers():
    seen = []

    def work():
        with stop_on_signals() as stop:
            seen.append(stop.requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
