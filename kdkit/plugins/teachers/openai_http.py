"""Requests to a server that may be slow, overloaded, broken or hostile.

What can pass by itself (no connection, a time-out, HTTP 429 and 5xx, an answer that ends in the middle) is tried again
with growing pauses; everything else is refused at once. The key goes into one header and nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NoReturn

import httpx

from kdkit.api.errors import EnvironmentUnmet, KdkitError, RecipeError, StageError

__all__ = ["RefusedRequest", "Server", "quoted"]

FIRST_PAUSE: Final = 0.5
"""Seconds before the second attempt; every further pause is twice as long."""
LONGEST_PAUSE: Final = 30.0
LONGEST_RETRY_AFTER: Final = 300.0
"""A server that wants to be left alone for longer is not waited for."""
_QUOTED: Final = 200
_PROBLEM_BYTES: Final = 64 * 1024
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_OWN_FAULT: Final = frozenset({400, 404, 405, 409, 413, 422, 501})
_PASSES: Final = frozenset({408, 425, 429})


class RefusedRequest(StageError):
    """The server understood a request and will not answer it (HTTP 400, 404, 413, 422); ``why`` is its own text."""

    def __init__(self, what: str, *, status: int, why: str, where: str) -> None:
        super().__init__(what, where=where)
        self.status = status
        self.why = why


class _Again(Exception):
    """An attempt failed in a way that another one may not.

    Args:
        what: What happened.
        after: Seconds that the server asks to wait.
        protocol: The server answered, but with something that is no answer.
    """

    def __init__(self, what: str, *, after: float = 0.0, protocol: bool = False) -> None:
        super().__init__(what)
        self.after = after
        self.protocol = protocol


class _Line:
    """One connection, of one thread. Its attempts end in time, also for a server that keeps them alive byte by byte:
    the time-outs of a socket start again with every byte, those of headers included.

    Args:
        client: With one connection at most.
    """

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        self._socket: socket.socket | None = None
        self._cut = threading.Event()

    @contextlib.contextmanager
    def attempt(self, seconds: float) -> Iterator[Callable[[str, Mapping[str, Any]], None]]:
        """The connection is cut after so many seconds, which is then an :class:`_Again`; gives the hook for httpx."""
        self._cut.clear()
        timer = threading.Timer(seconds, self.cut)
        timer.daemon = True
        timer.start()
        try:
            yield self._notice
        except httpx.TransportError as error:
            if self._cut.is_set():
                raise _Again(f"no whole answer within {seconds:g} s") from error
            raise
        finally:
            timer.cancel()

    def cut(self) -> None:
        """End what the connection is waiting for; it cannot be used again."""
        self._cut.set()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                # Not the method of a TLS socket, which would forget its state under the reading thread.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _notice(self, event: str, info: Mapping[str, Any]) -> None:
        """Keep the socket of a new connection, in whatever way it was made."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self._socket = info["return_value"].get_extra_info("socket")
            if self._cut.is_set():
                self.cut()


class Server:
    """An HTTP client for one base URL. Safe to use from several threads.

    Args:
        base_url: Such as ``http://127.0.0.1:8000/v1``.
        key: Sent as a bearer token; None sends none.
        key_name: The environment variable it came from, for errors.
        timeout: Seconds that one attempt may take, from connecting to the last byte.
        max_retries: Further attempts after the first.

    Raises:
        RecipeError: ``base_url`` names no host.
    """

    def __init__(
        self,
        base_url: str,
        *,
        key: str | None,
        key_name: str | None,
        timeout: float,
        max_retries: int,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._key = key
        self._key_name = key_name
        self._timeout = timeout
        self._max_retries = max_retries
        self._stopped = threading.Event()
        self._host = _host(self.base_url)
        self._headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        # A proxy of the environment is for the outside world.
        self._outside = self._host not in _LOOPBACK
        self._tls = httpx.create_ssl_context(trust_env=self._outside)
        self._own = threading.local()
        self._lines: list[_Line] = []
        self._lock = threading.Lock()

    @property
    def shows_key(self) -> bool:
        """Whether others on the way can read the key."""
        return self._key is not None and self._outside and httpx.URL(self.base_url).scheme != "https"

    def get(self, path: str, *, limit: int) -> dict[str, Any]:
        """The JSON object at ``path``; see :meth:`post`."""
        return self._ask("GET", path, None, limit)

    def post(self, path: str, body: Mapping[str, Any], *, limit: int) -> dict[str, Any]:
        """The JSON object that the server answers to ``body``.

        Args:
            path: Below the base URL.
            body: JSON values.
            limit: Bytes that the answer may have.

        Raises:
            EnvironmentUnmet: No answer after all attempts, or the key is refused.
            RefusedRequest: The server refuses this request.
            StageError: The answer is too large, is no JSON object, or leads elsewhere.
        """
        return self._ask("POST", path, json.dumps(body).encode(), limit)

    def stop(self) -> None:
        """End pauses and requests under way, which fail."""
        self._stopped.set()
        with self._lock:
            for line in self._lines:
                line.cut()

    def close(self) -> None:
        """Close all connections; may be called twice."""
        self.stop()
        with self._lock:
            for line in self._lines:
                line.client.close()

    def quoted(self, text: object) -> str:
        """What a server says, fit for one line of ours: without the key, short, printable."""
        return quoted(text, self._key)

    def _ask(self, method: str, path: str, body: bytes | None, limit: int) -> dict[str, Any]:
        url = f"{self.base_url}{path}"
        problem = _Again("stopped")
        for attempt in range(self._max_retries + 1):
            if self._stopped.is_set():
                break
            try:
                return self._attempt(method, url, body, limit)
            except _Again as error:
                problem = error
            if attempt < self._max_retries:
                self._pause(attempt, problem)
        raise self._given_up(url, problem)

    def _pause(self, attempt: int, problem: _Again) -> None:
        """Wait as long as the server asks, or twice as long as before; jitter keeps clients from coming together."""
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * (0.5 + secrets.randbelow(501) / 1000)
        self._stopped.wait(max(pause, problem.after))

    def _given_up(self, url: str, problem: _Again) -> KdkitError:
        attempts = self._max_retries + 1
        what = f"{problem} ({attempts} {'attempt' if attempts == 1 else 'attempts'})"
        if problem.protocol:
            return StageError(what, where=url)
        hint = "see that the server runs and that base_url is right; what is finished is kept, so run again"
        return EnvironmentUnmet(what, where=url, hint=hint)

    def _attempt(self, method: str, url: str, body: bytes | None, limit: int) -> dict[str, Any]:
        line = self._line()
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            with (
                line.attempt(self._timeout) as trace,
                line.client.stream(method, url, content=body, headers=headers, extensions={"trace": trace}) as response,
            ):
                if response.status_code != httpx.codes.OK:
                    self._refuse(response, url)
                data = self._read(response, url, limit)
        except httpx.TimeoutException as error:
            raise _Again(f"no whole answer within {self._timeout:g} s") from error
        except httpx.TransportError as error:
            raise _Again(f"no connection ({self.quoted(error) or type(error).__name__})") from error
        except RuntimeError as error:
            if not line.client.is_closed:
                raise
            raise _Again("stopped") from error
        return self._decode(data, url)

    def _line(self) -> _Line:
        """That of this thread."""
        line: _Line | None = getattr(self._own, "line", None)
        if line is None:
            client = httpx.Client(
                headers=self._headers,
                timeout=httpx.Timeout(self._timeout, connect=min(self._timeout, 10.0)),
                limits=httpx.Limits(max_connections=1, max_keepalive_connections=1),
                verify=self._tls,
                follow_redirects=False,
                trust_env=self._outside,
            )
            line = self._own.line = _Line(client)
            with self._lock:
                self._lines.append(line)
        return line

    def _read(self, response: httpx.Response, url: str, limit: int) -> bytes:
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.strip().lower() not in {"", "identity"}:
            # Nobody asked for it, and a few bytes may unpack to gigabytes.
            raise StageError(f"answers in the encoding {self.quoted(encoding)}", where=url, allowed="plain bytes")
        parts, size = [], 0
        for part in response.iter_raw():
            parts.append(part)
            size += len(part)
            if size > limit:
                raise StageError(f"the answer is larger than the {limit:,} bytes it may have", where=url)
        return b"".join(parts)

    def _decode(self, data: bytes, url: str) -> dict[str, Any]:
        try:
            value = json.loads(data, parse_constant=_no_number, object_pairs_hook=_unique)
        except _NoNumber as error:
            raise StageError(f"the answer has the number {error}", where=url, allowed="finite numbers") from error
        except _Twice as error:
            raise StageError(f"the answer has {self.quoted(error)} twice in one mapping", where=url) from error
        except (ValueError, RecursionError) as error:
            raise _Again("the answer is no whole JSON", protocol=True) from error
        if not isinstance(value, dict):
            raise StageError(f"the answer is a JSON {type(value).__name__}", where=url, allowed="a JSON object")
        return value

    def _refuse(self, response: httpx.Response, url: str) -> NoReturn:
        """Raise what the status means."""
        status = response.status_code
        why = self._why(response)
        said = f"HTTP {status}" + (f" ({why})" if why else "")
        if status in _PASSES or (status >= 500 and status != 501):
            raise _Again(said, after=_retry_after(response, url, said))
        if status in {401, 403}:
            given = f"the key in {self._key_name} is refused" if self._key_name else "a key is wanted"
            hint = f"put the right key into {self._key_name}" if self._key_name else "name its variable as api_key_env"
            raise EnvironmentUnmet(f"{given}: {said}", where=url, hint=hint)
        if 300 <= status < 400:
            raise StageError(f"answers with a redirect, HTTP {status}", where=url, hint="give the final base_url")
        if status in _OWN_FAULT:
            raise RefusedRequest(f"refuses the request: {said}", status=status, why=why or said, where=url)
        raise StageError(f"answers {said}", where=url)

    def _why(self, response: httpx.Response) -> str:
        """The message in the body of an error, as far as there is one."""
        data = b""
        try:
            for part in response.iter_raw():
                data += part
                if len(data) > _PROBLEM_BYTES:
                    return ""
            value = json.loads(data)
        except (httpx.HTTPError, ValueError, RecursionError):
            return ""
        for name in ("error", "message", "detail"):
            value = value.get(name, value) if isinstance(value, dict) else value
        return self.quoted(value) if isinstance(value, str) else ""


def _host(base_url: str) -> str:
    try:
        host = httpx.URL(base_url).host
        host.encode("idna")
    except (httpx.InvalidURL, UnicodeError) as error:
        raise RecipeError(f"{quoted(base_url)} names no host", where="teacher.base_url") from error
    return host


class _NoNumber(Exception):
    """NaN or an infinity, which JSON does not have and Python reads."""


class _Twice(Exception):
    """A name that stands twice in one mapping: of its two values, neither is to be trusted."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _Twice(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return value


def _no_number(name: str) -> NoReturn:
    raise _NoNumber(name)


def _retry_after(response: httpx.Response, url: str, said: str) -> float:
    """Seconds in ``Retry-After``; 0 when there are none or it is a date.

    Raises:
        EnvironmentUnmet: The server asks for a longer wait than makes sense.
    """
    text = response.headers.get("Retry-After", "").strip()
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        return 0.0
    if int(text) > LONGEST_RETRY_AFTER:
        raise EnvironmentUnmet(f"{said}, to be asked again after {int(text):,} s", where=url, hint="run again then")
    return float(text)


def quoted(text: object, key: str | None = None) -> str:
    """A stranger's text for an error line: printable, at most 200 characters, without the key."""
    words = str(text)
    if key:
        words = words.replace(key, "***")
    words = " ".join("".join(char if char.isprintable() else " " for char in words[: 4 * _QUOTED]).split())
    return words if len(words) <= _QUOTED else f"{words[: _QUOTED - 3]}..."
