"""What kdkit sees of this package. Light: the sandbox is imported when it is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from kdkit.api import Params, Runtime, SandboxSpec, hookimpl

if TYPE_CHECKING:
    from kdkit.api import Sandbox


class DockerParams(Params):
    """Every program runs in a container of its own: without a network, on a file system that it cannot write, as
    nobody, without capabilities, with limits on memory, processes, time and output. Python only.
    """

    image: str = Field("python:3.12-slim", pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$")
    """An image with ``python3`` on its path. It has to be on the machine already: nothing is pulled."""
    workers: Annotated[int | None, Runtime(), Field(ge=1, le=64)] = None
    """Containers at the same time; by default one per core."""


def _build(params: DockerParams) -> Sandbox:
    from kdkit_docker_sandbox.sandbox import DockerSandbox

    return DockerSandbox(params)


@hookimpl
def kdkit_sandboxes() -> Iterator[SandboxSpec[DockerParams]]:
    """The sandbox of this package."""
    yield SandboxSpec(
        name="docker",
        summary="A Docker container for each program, without network and as nobody",
        params=DockerParams,
        build=_build,
    )
