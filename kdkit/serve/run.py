"""Listening on a socket until a signal comes."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import uvicorn

from kdkit.api.errors import EnvironmentUnmet, RecipeError

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["HttpServer", "check_host", "listen"]

_GRACE_SECONDS: Final = 5


class HttpServer(uvicorn.Server):
    """uvicorn without signal handlers of its own: the command line has them."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
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
