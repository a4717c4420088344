"""The first signal asks for a checkpoint and an orderly end, the second ends everything at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

from kdkit.api.errors import ExitCode

__all__ = ["StopRequest", "stop_on_signals"]

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Whether and how a person or the system asked the run to stop.

    Attributes:
        signum: The first signal received, or None.
        at_once: A second one came.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.at_once = False
        self._first: Callable[[], None] | None = None
        self._second: Callable[[], None] | None = None

    def requested(self) -> bool:
        """Whether to stop at the next safe point."""
        return self.signum is not None

    @property
    def exit_code(self) -> ExitCode:
        """130 after Ctrl-C, 143 after SIGTERM or a closed terminal."""
        return ExitCode.INTERRUPTED if self.signum == signal.SIGINT else ExitCode.TERMINATED

    @contextlib.contextmanager
    def forwarded(self, *, first: Callable[[], None], second: Callable[[], None]) -> Iterator[None]:
        """While active, what the two signals do; a request that came earlier is passed on at once."""
        self._first, self._second = first, second
        if self.requested():
            first()
        try:
            yield
        finally:
            self._first = self._second = None

    def receive(self, signum: int, frame: FrameType | None = None) -> None:
        """The signal handler: sets flags and passes the request on, nothing that could block."""
        del frame
        if self.signum is None:
            self.signum = signum
            if self._first is not None:
                self._first()
            return
        self.at_once = True
        if self._second is None:
            raise KeyboardInterrupt
        self._second()


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Handle SIGINT, SIGTERM and SIGHUP while active, then restore what was there.

    Outside the main thread Python allows no handlers; then the request simply never comes.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # nohup works by ignoring SIGHUP; that wish is respected.
    handled = [s for s in _SIGNALS if s != signal.SIGHUP or signal.getsignal(s) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, stop.receive) for signum in handled}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
