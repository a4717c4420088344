"""The sandbox: tried before it is used, and refused when a canary gets out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kdkit.api import EnvironmentUnmet, SandboxLimits, SandboxReport
from kdkit_docker_sandbox.canaries import ISOLATES, LIMITS, run_canaries
from kdkit_docker_sandbox.docker import Docker
from kdkit_docker_sandbox.session import DockerSession

if TYPE_CHECKING:
    from kdkit_docker_sandbox.plugin import DockerParams

__all__ = ["DockerSandbox"]

_HINT: Final = "kdkit sandbox check docker shows every canary; the sandbox auto needs no docker"
_passed: set[Docker] = set()
"""What worked in this process. A docker that is changed meanwhile has another image or does not answer."""


class DockerSandbox:
    """See :class:`kdkit.api.Sandbox` and ``DockerParams``."""

    def __init__(self, params: DockerParams) -> None:
        self._params = params

    def probe(self) -> SandboxReport:
        """Run every canary in a container."""
        try:
            return self._try(Docker.find(self._params.image))
        except EnvironmentUnmet as error:
            return SandboxReport(usable=False, reason=error.what, hint=error.hint or "")

    def open(self, limits: SandboxLimits, /) -> DockerSession:
        """A session; the canaries run before the first one of a process.

        Raises:
            EnvironmentUnmet: There is no docker or no image, or a canary got out; says what to do.
        """
        docker = Docker.find(self._params.image)
        if docker not in _passed:
            report = self._try(docker)
            if not report.usable:
                raise EnvironmentUnmet(report.reason, where="sandbox docker", hint=report.hint)
        return DockerSession(docker, limits, self._params.workers)

    def _try(self, docker: Docker) -> SandboxReport:
        _passed.discard(docker)
        session = DockerSession(docker, LIMITS, self._params.workers)
        try:
            canaries = run_canaries(session)
        finally:
            session.close()
        dead = next((canary for canary in canaries if not canary.passed), None)
        if dead is not None:
            reason = f"canary {dead.name!r} failed: {dead.found or 'no detail'}"
            return SandboxReport(usable=False, reason=reason, hint=_HINT, canaries=canaries)
        _passed.add(docker)
        return SandboxReport(usable=True, isolates=ISOLATES, canaries=canaries)
