"""Finds out whether code reaches for the network."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from unittest.mock import patch

__all__ = ["NetworkUsed", "network_refused"]

_LOCAL_FAMILIES: Final = frozenset(
    int(getattr(socket, name)) for name in ("AF_UNIX", "AF_NETLINK", "AF_ALG") if hasattr(socket, name)
)


class NetworkUsed(AssertionError, OSError):
    """Code tried to reach another machine; an ``OSError``, so that it cleans up as it would without a network."""


@contextmanager
def network_refused() -> Iterator[list[str]]:
    """Inside the block nothing of this process reaches another machine; whoever tries is named when it ends.

    This machine (127.0.0.1, ::1, sockets in files) stays within reach, so that servers of tests work. Worker processes
    are not watched: they are told by ``HF_HUB_OFFLINE`` to stay offline.

    Yields:
        What was tried so far.

    Raises:
        NetworkUsed: Where it is tried, and again at the end of the block, because libraries swallow the first one.
    """
    tried: list[str] = []

    def refuse(what: str) -> None:
        tried.append(what)
        raise NetworkUsed(f"the network was used: {what}")

    with patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}), _watched(refuse):
        yield tried
    if tried:
        raise NetworkUsed(f"the network was used: {', '.join(dict.fromkeys(tried))}")


@contextmanager
def _watched(refuse: Any) -> Iterator[None]:
    def guarded(name: str, place: int) -> Any:
        real = getattr(socket.socket, name)

        def call(self: socket.socket, *args: Any) -> Any:
            address = args[place]
            if int(self.family) not in _LOCAL_FAMILIES and not _is_here(address[0]):
                refuse(f"{name} to {address[0]}:{address[1]}")
            return real(self, *args)

        return patch.object(socket.socket, name, call)

    def guarded_lookup(name: str) -> Any:
        real = getattr(socket, name)

        def call(host: Any, *args: Any, **named: Any) -> Any:
            if host and not _is_here(host) and not _address(host):
                refuse(f"address of {_text(host)}")
            return real(host, *args, **named)

        return patch.object(socket, name, call)

    with (
        guarded("connect", 0),
        guarded("connect_ex", 0),
        guarded("sendto", -1),
        guarded_lookup("getaddrinfo"),
        guarded_lookup("gethostbyname"),
    ):
        yield


def _is_here(host: Any) -> bool:
    """Whether a host of an address is this machine; an unspecified address (0.0.0.0) is."""
    if _text(host) in {"", "localhost", "localhost.localdomain", socket.gethostname()}:
        return True
    address = _address(host)
    return address is not None and (address.is_loopback or address.is_unspecified)


def _address(host: Any) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is written as; names have none."""
    try:
        return ipaddress.ip_address(_text(host).partition("%")[0])
    except ValueError:
        return None


def _text(host: Any) -> str:
    return host.decode(errors="replace") if isinstance(host, bytes) else str(host)
