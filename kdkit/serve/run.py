"""Listening on a socket until a signal comes."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from kdkit.api.errors import EnvironmentUnmet, RecipeError

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["HttpServer", "check_host", "listen"]

_GRACE_SECONDS: Final = 5
HEAD_SECONDS: Final = 30.0
"""Time for sending the head of a request; for the body there is ``Limits.body_seconds``."""


class _InTime(H11Protocol):
    """A connection that is closed when the head of a request does not come in time; uvicorn waits for it for ever."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for the first request."""
        super().connection_made(transport)
        self._wait(transport)

    def data_received(self, data: bytes) -> None:
        """A whole head ends the waiting; the first bytes of the next one start it again."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._end()
        elif self._late is None:
            self._wait(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for."""
        self._end()
        super().connection_lost(exc)

    def _wait(self, transport: asyncio.Transport) -> None:
        self._late = self.loop.call_later(HEAD_SECONDS, transport.close)

    def _end(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class HttpServer(uvicorn.Server):
    """uvicorn without signal handlers of its own: the command line has them."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_InTime,
                log_level="error",
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=_GRACE_SECONDS,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals as they are."""
        yield

    def stop(self) -> None:
        """Finish what is under way, for a few seconds, and return from ``run``."""
        self.should_exit = True

    def stop_at_once(self) -> None:
        """Return from ``run`` without waiting."""
        self.should_exit = self.force_exit = True


def check_host(host: str, *, has_key: bool) -> None:
    """Refuse to be reachable from other machines without a key.

    Raises:
        RecipeError: ``host`` is not this machine alone.
        EnvironmentUnmet: It has no address.
    """
    addresses = [str(info[4][0]).partition("%")[0] for info in _addresses(host, 0)]
    if not has_key and not all(ipaddress.ip_address(address).is_loopback for address in addresses):
        raise RecipeError(
            f"{host} can be reached from other machines, which needs a key",
            where="--host",
            hint="put a key into an environment variable and name it with --api-key-env",
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 lets the system choose.

    Raises:
        EnvironmentUnmet: The port is taken, or the address is not this machine's.
    """
    family, kind, protocol, _, address = _addresses(host, port)[0]
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except OSError as error:
        found.close()
        raise EnvironmentUnmet(
            f"cannot listen on {host}:{port}: {error.strerror}", hint="choose another --port, or 0 for a free one"
        ) from error
    return found


def _addresses(host: str, port: int) -> list[tuple[int, int, int, str, tuple[str, int]]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise EnvironmentUnmet(f"{host!r} is no address of this machine", where="--host") from error
    return found  # type: ignore[return-value]
