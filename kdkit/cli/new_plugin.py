"""Body of ``kdkit new-plugin``: a complete package for one component, made from the files in ``kdkit/templates``."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

from kdkit import api
from kdkit.api.errors import ExitCode, RecipeError
from kdkit.api.specs import KINDS, NAME
from kdkit.cli.output import emit, log, shown, visible
from kdkit.host import Catalog
from kdkit.host.compat import api_range

__all__ = ["NewPlugin", "new_plugin", "rendered"]

_LONGEST: Final = 30
_PREFIX: Final = "kdkit-"
_MARKS: Final = re.compile("kdkit-acme/acme|kdkit-acme|kdkit_acme|acme|Acme|COMPONENT_KIND|KDKIT_RANGE|ABOUT")
"""What templates have in the place of names: they are a plugin called acme."""
_ENDS: Final = ("Params", "Loss", "Reward", "Rows", "Teacher", "Quantizer", "Metric", "Rollouts", "Tracker", "Sandbox",
                "Session")  # fmt: skip
"""How the names of the templates' classes end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPlugin:
    """What a new package is called.

    Attributes:
        name: Of the component, in kebab-case.
        kind: Of the component.
        use: How its recipe names it: with the distribution where another component has the name already.
    """

    name: str
    kind: str
    use: str

    @property
    def dist(self) -> str:
        """Distribution, and its directory."""
        return _PREFIX + self.name

    @property
    def module(self) -> str:
        """Package to import; its prefix keeps keywords and modules of others away."""
        return self.dist.replace("-", "_")

    @property
    def prefix(self) -> str:
        """Start of the names of its classes, none of which is a name of ``kdkit.api``."""
        camel = "".join(part.capitalize() for part in self.name.split("-"))
        return f"My{camel}" if any(camel + end in api.__all__ for end in _ENDS) else camel


def new_plugin(text: str, kind: str | None, parent: Path) -> int:
    """Write the package below ``parent`` and print the next three commands.

    Args:
        text: The component's name; ``kdkit-`` in front of it may be given or left out.
        kind: Component kind; None is refused with those that there are.
        parent: Directory of the package's directory; made when it is absent.

    Returns:
        0.

    Raises:
        RecipeError: ``text`` is no name, ``kind`` no kind, or the package's directory is there already.
        EnvironmentUnmet: ``parent`` cannot be written.
    """
    name = _checked(text)
    if kind is None:
        raise RecipeError("is missing", where="--kind", allowed=", ".join(KINDS))
    taken = _taken(name, kind)
    plugin = NewPlugin(name=name, kind=kind, use=f"{_PREFIX}{name}/{name}" if taken else name)
    target = parent.expanduser() / plugin.dist
    if target.exists() or target.is_symlink():
        raise RecipeError("is there already", where=shown(target), hint="choose another name, or another --dir")
    _write(rendered(plugin), target)
    for line in (*taken, *_installed(plugin.dist)):
        log(f"warning: {line}")
    place = shown(target)
    log(f"{visible(place)} has a {kind} that works: change it, one step at a time")
    place = f"./{place}" if place.startswith("-") else place
    dev = shlex.quote(f"{_as_path(place)}[dev]")
    package, recipe = shlex.quote(place), shlex.quote(f"{place}/recipe.yaml")
    # The installation comes first: it brings pytest, which kdkit does not need itself.
    emit(visible(f"pip install -e {dev}\npytest {package}\nkdkit run {recipe}"))
    return int(ExitCode.OK)


def _write(content: Mapping[str, str], target: Path) -> None:
    """Write the files below ``target``, all or none."""
    # They need torch's neighbours (safetensors), which the other commands do not load.
    from kdkit.engine.files import check_writable
    from kdkit.models.files import staged

    # The place that is named is the one that was given, and not a temporary one.
    check_writable(target.parent, hint="choose another --dir")
    with staged(target) as directory:
        for path, data in content.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_text(data, encoding="utf-8", newline="\n")


def _checked(text: str) -> str:
    """The component's name in ``text``."""
    name = text.removeprefix(_PREFIX)
    if NAME.fullmatch(name) and len(name) <= _LONGEST:
        return name
    # Letters without their accents.
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    proposed = re.sub(r"[^a-z0-9]+", "-", _split_words(plain).lower()).strip("-").removeprefix(_PREFIX)
    proposed = proposed.lstrip("0123456789-")[:_LONGEST].rstrip("-")
    raise RecipeError(
        f"{text[: 2 * _LONGEST]!r} is no name for a component",
        allowed=f"up to {_LONGEST} lower-case letters, digits and single hyphens, a letter first, such as my-loss",
        hint=f"did you mean {proposed}?" if proposed else None,
    )


def _split_words(text: str) -> str:
    """``MyLoss`` as ``My-Loss``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", text)


def _taken(name: str, kind: str) -> list[str]:
    """One line when components that are installed have the same name; a kind that is none is refused."""
    owners = [entry.provider for entry in Catalog.discover(strict=False).entries(kind) if entry.name == name]
    if not owners:
        return []
    yours = f"{_PREFIX}{name}/{name}"
    return [f"there is a {kind} {name!r} already ({', '.join(owners)}): recipes have to write {yours} for yours"]


def _installed(dist: str) -> list[str]:
    """One line when pip would replace a distribution of the same name."""
    try:
        found = version(dist)
    except PackageNotFoundError:
        return []
    return [f"{dist} {found} is installed here already: installing yours will replace it"]


def _as_path(place: str) -> str:
    """``place`` so that pip takes it for a directory, not for a distribution."""
    return place if place.startswith(("/", "./", "../")) else f"./{place}"


def rendered(plugin: NewPlugin) -> dict[str, str]:
    """The package's files: path below its directory to content."""
    root = files("kdkit") / "templates"
    words = {
        "kdkit-acme/acme": plugin.use,
        "kdkit-acme": plugin.dist,
        "kdkit_acme": plugin.module,
        "acme": plugin.name,
        "Acme": plugin.prefix,
        "COMPONENT_KIND": plugin.kind,
        "KDKIT_RANGE": api_range(),
        "ABOUT": "",
    }
    own = dict(_texts(root / plugin.kind))
    words["ABOUT"] = _filled(own.pop("about.md"), words).strip()
    # One pass: what is filled in is never searched for marks again.
    texts = {**dict(_texts(root / "package")), **own}
    if "./rows.jsonl" not in texts["recipe.yaml"]:
        del texts["rows.jsonl"]
    return {_path(path, plugin): _filled(text, words) for path, text in sorted(texts.items())}


def _texts(directory: Traversable, above: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for item in directory.iterdir():
        if item.is_dir():
            found += [] if item.name == "__pycache__" else _texts(item, f"{above}{item.name}/")
        else:
            found.append((above + item.name, item.read_text(encoding="utf-8")))
    return found


def _filled(text: str, words: dict[str, str]) -> str:
    return _MARKS.sub(lambda mark: words[mark[0]], text)


def _path(path: str, plugin: NewPlugin) -> str:
    """Where a template goes; ``gitignore`` would take its neighbours out of kdkit's own repository with its dot."""
    if path == "gitignore":
        return ".gitignore"
    return _filled(path, {"kdkit_acme": plugin.module, "acme": plugin.name.replace("-", "_")})
