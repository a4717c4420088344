"""Versions and extras: does a plugin fit this kdkit, and is what a component needs installed?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

import kdkit
from kdkit.api.errors import EnvironmentUnmet, PluginError
from kdkit.api.slots import Found
from kdkit.host.records import BUILT_IN

__all__ = ["api_range", "check_extras", "extras_of", "installed_version", "kdkit_problem", "requirement_problem"]


def installed_version(dist: str) -> str | None:
    """The installed version of a distribution; for kdkit that of the running code, which metadata may lag behind."""
    if canonicalize_name(dist) == BUILT_IN:
        return kdkit.__version__
    try:
        return version(dist)
    except PackageNotFoundError:
        return None


def api_range() -> str:
    """The versions of kdkit that a plugin written now is for: those with the API of the running one."""
    now = Version(kdkit.__version__)
    least = str(now.public) if now.is_prerelease else f"{now.major}.{now.minor}"
    below = f"{now.major + 1}" if now.major else f"0.{now.minor + 1}"
    return f">={least},<{below}"


def kdkit_problem(requires: Iterable[str]) -> str | None:
    """Why a distribution with these requirements does not fit the running kdkit, or None."""
    for text in requires:
        # Most requirements are about something else, and parsing them all would take as long as loading a plugin.
        if not text.lower().startswith(BUILT_IN):
            continue
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            return f"its requirement {text!r} is not valid"
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        is_kdkit = canonicalize_name(requirement.name) == BUILT_IN
        if is_kdkit and applies and not _satisfied(requirement, kdkit.__version__):
            return f"needs kdkit{requirement.specifier}, this is kdkit {kdkit.__version__}"
    return None


def requirement_problem(requirement: Requirement) -> str | None:
    """Why a recipe's requirement is not met, extras included, or None. Markers are the caller's business."""
    plain = f"{requirement.name}{_extras(requirement.extras)}{requirement.specifier}"
    install = f"install it with: pip install '{plain}'"
    have = installed_version(requirement.name)
    if have is None:
        return f"{plain} is not installed; {install}"
    if not _satisfied(requirement, have):
        return f"{plain} is required and {requirement.name} {have} is installed; {install}"
    try:
        missing = _missing_for(requirement.name, requirement.extras, frozenset())
    except PluginError as error:
        return str(error)
    return f"{plain} is required and lacks {', '.join(missing)}; {install}" if missing else None


def check_extras(found: Found) -> None:
    """Check that the pip extras of a component are installed.

    Raises:
        EnvironmentUnmet: A requirement of an extra is missing or too old; the hint is the pip command.
        PluginError: The distribution does not declare the extra.
    """
    spec = found.spec
    if not spec.extras:
        return
    dist, _, name = found.qualified_name.rpartition("/")
    missing = _missing_for(dist, spec.extras, frozenset())
    if missing:
        extras = ",".join(spec.extras)
        raise EnvironmentUnmet(
            f"{spec.kind} {name!r} needs the extra {extras!r}, which lacks {', '.join(missing)}",
            hint=f"install it with: pip install '{dist}[{extras}]'",
        )


def extras_of(dist: str) -> dict[str, list[str]]:
    """Every extra that an installed distribution declares, with those of its requirements that are not met.

    Empty when there is no such distribution.
    """
    try:
        declared = distribution(dist).metadata.get_all("Provides-Extra") or ()
    except PackageNotFoundError:
        return {}
    return {extra: _missing_for(dist, [extra], frozenset()) for extra in sorted(declared)}


def _extras(extras: Iterable[str]) -> str:
    return f"[{','.join(sorted(extras))}]" if extras else ""


def _satisfied(requirement: Requirement, have: str) -> bool:
    try:
        return requirement.specifier.contains(have, prereleases=True)
    except InvalidVersion:
        return False


def _missing_for(dist: str, extras: Iterable[str], seen: frozenset[tuple[str, str]]) -> list[str]:
    """Requirements of ``extras`` that are not met, nested extras included; ``seen`` ends circles."""
    missing: list[str] = []
    try:
        owner = distribution(dist)
    except PackageNotFoundError:
        return [dist]
    for extra in sorted(extras):
        if (dist, extra) in seen:
            continue
        _require_declared(owner, dist, extra)
        for requirement in _of_extra(owner, extra):
            have = installed_version(requirement.name)
            if have is None or not _satisfied(requirement, have):
                missing.append(f"{requirement.name}{requirement.specifier}")
            elif requirement.extras:
                missing += _missing_for(requirement.name, requirement.extras, seen | {(dist, extra)})
    return list(dict.fromkeys(missing))


def _require_declared(owner: Distribution, dist: str, extra: str) -> None:
    declared = {canonicalize_name(name) for name in owner.metadata.get_all("Provides-Extra") or ()}
    if canonicalize_name(extra) not in declared:
        raise PluginError(
            f"{dist} {owner.version} declares no extra {extra!r}",
            allowed=", ".join(sorted(declared)) or "none",
            hint=f"reinstall {dist}, or report it to its authors",
        )


def _of_extra(owner: Distribution, extra: str) -> Iterator[Requirement]:
    """The requirements that apply with ``extra`` and not without it."""
    for text in owner.requires or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            yield requirement
