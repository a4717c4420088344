"""What kdkit reads of this package. Keep it light: what lists or checks components imports it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kdkit.api import Component, Params, Sandbox, SandboxSpec, hookimpl
from pydantic import Field

_AUTO: Any = {"use": "auto"}


class AcmeParams(Params):
    """Another sandbox, with a memory."""

    inner: Component[Sandbox] = Field(_AUTO, validate_default=True)
    """What runs programs, and keeps them from doing harm."""
    remember: int = Field(1024, ge=0)
    """Outcomes that are remembered; the oldest are forgotten first."""


def _build(params: AcmeParams) -> Sandbox:
    from kdkit_acme import sandbox

    spec: Any = params.inner.found.spec
    inner: Sandbox = spec.build(params.inner.params)
    return sandbox.AcmeSandbox(inner, params.remember)


@hookimpl
def kdkit_sandboxes() -> Iterator[SandboxSpec[Any]]:
    """The sandboxes of this package."""
    yield SandboxSpec(
        name="acme",
        summary="Another sandbox that runs the same program only once",
        params=AcmeParams,
        build=_build,
    )
