"""Built-in sandboxes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from kdkit.api import Params, Runtime, SandboxSpec, hookimpl

if TYPE_CHECKING:
    from kdkit.api import Sandbox


class SandboxParams(Params):
    """Programs run in fork servers, which have done the usual imports."""

    workers: Annotated[int | None, Runtime(), Field(ge=1, le=64)] = None
    """Programs that run at the same time; by default one per core."""


class UnsafeParams(Params):
    """Programs run as you, with your files and your network. For machines where no sandbox works, and for programs
    that you would run yourself.
    """

    workers: Annotated[int | None, Runtime(), Field(ge=1, le=64)] = None
    """Programs that run at the same time; by default one per core."""


def _auto(params: SandboxParams) -> Sandbox:
    from kdkit.plugins.sandboxes.providers import auto

    return auto(params.workers)


def _bubblewrap(params: SandboxParams) -> Sandbox:
    from kdkit.plugins.sandboxes.providers import bubblewrap

    return bubblewrap(params.workers)


def _landlock(params: SandboxParams) -> Sandbox:
    from kdkit.plugins.sandboxes.providers import landlock

    return landlock(params.workers)


def _unsafe(params: UnsafeParams) -> Sandbox:
    from kdkit.plugins.sandboxes.unsafe import UnsafeLocal

    return UnsafeLocal(params.workers)


@hookimpl
def kdkit_sandboxes() -> Iterator[SandboxSpec[Any]]:
    """The sandboxes."""
    yield SandboxSpec(
        name="auto",
        summary="The best sandbox that works on this machine; none is an error",
        params=SandboxParams,
        build=_auto,
    )
    yield SandboxSpec(
        name="bubblewrap",
        summary="Namespaces, a system call filter and limits; needs bwrap (Linux)",
        params=SandboxParams,
        build=_bubblewrap,
    )
    yield SandboxSpec(
        name="landlock",
        summary="Landlock, a system call filter and limits; works in containers (Linux)",
        params=SandboxParams,
        build=_landlock,
    )
    yield SandboxSpec(
        name="unsafe-local",
        summary="No isolation at all: programs run as you do, with limits only",
        params=UnsafeParams,
        build=_unsafe,
    )
