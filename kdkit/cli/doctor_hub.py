"""Whether the Hugging Face Hub can be reached, for ``kdkit doctor``."""

from __future__ import annotations

import os
import queue
import threading
import urllib.error
import urllib.request
from http.client import HTTPException
from time import monotonic
from typing import Final
from urllib.parse import urlsplit

from kdkit.cli.checks import Check
from kdkit.models.hub import is_offline

__all__ = ["HubQuestion"]

_SECONDS: Final = 3.0
_DEFAULT: Final = "https://huggingface.co"


class HubQuestion:
    """A HEAD request for the Hub's front page, without token or cookies, that is under way while others are asked.

    Args:
        ask: Whether to ask at all; offline it never is.
        seconds: How long to wait, name lookup included, which a socket's own timeout does not cover.
    """

    def __init__(self, *, ask: bool, seconds: float = _SECONDS) -> None:
        self._endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or _DEFAULT
        self._seconds = seconds
        self._until = monotonic() + seconds
        self._answer: queue.Queue[tuple[bool, str]] = queue.Queue()
        self._asked = ask and not is_offline()
        if self._asked:
            threading.Thread(target=self._run, daemon=True).start()

    def check(self) -> Check:
        """The finding; waits for the answer, or for the end of the time."""
        token = f"HF_TOKEN {'set' if os.environ.get('HF_TOKEN') else 'not set'}"
        if not self._asked:
            return Check("hub", "ok", f"{'offline' if is_offline() else 'online, not asked'}, {token}")
        try:
            reached, answer = self._answer.get(timeout=max(0.0, self._until - monotonic()))
        except queue.Empty:
            reached, answer = False, f"did not answer within {self._seconds:g} s"
        hint = "" if reached else "without a network set HF_HUB_OFFLINE=1: caches are then used at once"
        return Check("hub", "ok" if reached else "note", f"online, {self._host()} {answer}, {token}", hint)

    def _host(self) -> str:
        """The endpoint without what may be secret: user, password, path and query."""
        try:
            return urlsplit(self._endpoint).hostname or "the address in HF_ENDPOINT"
        except ValueError:
            return "the address in HF_ENDPOINT"

    def _run(self) -> None:
        start = monotonic()
        try:
            if urlsplit(self._endpoint).scheme not in {"http", "https"}:
                raise ValueError("no http or https address")
            request = urllib.request.Request(self._endpoint, method="HEAD", headers={"User-Agent": "kdkit"})  # noqa: S310
            with urllib.request.urlopen(request, timeout=self._seconds):  # noqa: S310 - the scheme is checked above
                pass
        except urllib.error.HTTPError as error:
            self._answer.put((True, f"answers with status {error.code}"))
        except (OSError, ValueError, HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            self._answer.put((False, f"cannot be reached ({type(reason).__name__})"))
        else:
            self._answer.put((True, f"answers in {monotonic() - start:.2f} s"))
