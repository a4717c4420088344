"""Bodies of ``kdkit plugins list`` and ``kdkit plugins show``."""

from __future__ import annotations

import json as jsonlib
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Final

from packaging.utils import canonicalize_name
from rich.console import Console
from rich.text import Text

from kdkit.api.errors import ExitCode
from kdkit.api.specs import Spec
from kdkit.host import BrokenPlugin, Catalog, Entry, ParamDoc, describe_params
from kdkit.host import missing as errors
from kdkit.host.snippet import yaml_snippet

__all__ = ["list_plugins", "show_plugin"]

_WIDTH: Final = 80
_COMMON: Final = frozenset(field.name for field in fields(Spec))


def list_plugins(json: bool, kind: str | None) -> int:  # noqa: FBT001 - the command's option
    """Print all components, or those of one kind, then the plugins that are broken.

    Returns:
        0, also when plugins are broken.

    Raises:
        RecipeError: There is no such kind.
    """
    catalog = Catalog.discover()
    entries = catalog.entries(kind)
    if json:
        return _print_json([_as_json(entry, catalog) for entry in entries], catalog.broken, disabled=catalog.disabled)
    out = _console()
    rows = [(entry.kind, _name(entry, catalog), entry.provider, _summary(entry, catalog)) for entry in entries]
    header, *lines = _columns([("KIND", "NAME", "FROM", "SUMMARY"), *rows], out.width if out.is_terminal else None)
    _line(out, header, style="bold")
    for line in lines:
        _line(out, line)
    for broken in catalog.broken:
        text = f"broken: {broken.label} ({broken.entry_point}): {broken.error} (kdkit plugins show {broken.dist})"
        _line(out, text, style="red")
    if catalog.disabled:
        _line(out, f"disabled: {', '.join(catalog.disabled)} (KDKIT_DISABLE_PLUGINS)")
    return ExitCode.OK


def show_plugin(kind_or_name: str, name: str | None, json: bool) -> int:  # noqa: FBT001 - the command's option
    """Print what a component takes and gives, or what a distribution provides.

    Args:
        kind_or_name: A kind when ``name`` is given; else a component name, ``DIST/NAME`` or a distribution.
        name: Short or qualified component name.
        json: Print JSON.

    Returns:
        0, or 3 when the distribution shown is broken.

    Raises:
        RecipeError: Nothing has that name, or it is ambiguous within its kind.
        PluginError: A broken or missing plugin may provide it.
    """
    catalog = Catalog.discover()
    entries, broken = _named(catalog, kind_or_name) if name is None else ([catalog.entry(kind_or_name, name)], [])
    if json:
        _print_json([_as_json(entry, catalog) | _details(entry, catalog) for entry in entries], broken)
    else:
        out = _console()
        for entry in entries:
            _show_entry(out, entry, catalog)
        for item in broken:
            _line(out, f"broken: {item.label} ({item.entry_point}): {item.error}", style="red")
            if item.traceback:  # a plugin for another kdkit was not even imported
                _line(out, textwrap.indent(item.traceback.rstrip(), "  "))
    return ExitCode.PLUGIN if broken else ExitCode.OK


def _named(catalog: Catalog, name: str) -> tuple[list[Entry], list[BrokenPlugin]]:
    """The components called ``name`` in any kind; else everything of the distribution called so."""
    entries = [entry for entry in catalog.entries() if name in (entry.name, entry.qualified_name)]
    if entries:
        return entries, []
    dist = canonicalize_name(name)
    entries = [entry for entry in catalog.entries() if entry.dist == dist]
    broken = [item for item in catalog.broken if item.dist == dist]
    if not (entries or broken):
        raise errors.unknown_anywhere(catalog, name)
    return entries, broken


# --- text -------------------------------------------------------------------------------------------------------------


def _console() -> Console:
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


def _line(out: Console, text: str, style: str = "") -> None:
    out.print(Text(text, style=style), soft_wrap=True)


def _name(entry: Entry, catalog: Catalog) -> str:
    return entry.qualified_name if catalog.is_ambiguous(entry) else entry.name


def _summary(entry: Entry, catalog: Catalog) -> str:
    mark = f"(ambiguous: {entry.name!r} alone is refused) " if catalog.is_ambiguous(entry) else ""
    return mark + entry.spec.summary


def _columns(rows: Sequence[Sequence[str]], width: int | None, cap: int = 32) -> Iterator[str]:
    """Rows as aligned lines; with a width, the last column wraps within it.

    A cell longer than ``cap`` moves the rest of its own row only.
    """
    widths = [max(len(cell) for cell in column if len(cell) <= cap) for column in zip(*rows, strict=True)]
    for row in rows:
        head = "".join(f"{cell:<{size}}  " for cell, size in zip(row[:-1], widths, strict=False))
        if width is None or width - len(head) < _WIDTH // 4:
            yield (head + row[-1]).rstrip()
        else:
            yield from textwrap.wrap(row[-1], width, initial_indent=head, subsequent_indent=" " * len(head)) or [head]


def _show_entry(out: Console, entry: Entry, catalog: Catalog) -> None:
    _line(out, f"{entry.kind} {_name(entry, catalog)}", style="bold")
    _line(out, f"  {entry.spec.summary}")
    facts = {"from": entry.provider, "version": str(entry.spec.version), "source": entry.source}
    facts |= {key: _fact(value) for key, value in _declared(entry.spec).items()}
    for key, value in facts.items():
        _line(out, f"  {key:<{max(map(len, facts))}}  {value}")
    _show_params(out, describe_params(entry.spec.params))
    _line(out, f"\n{textwrap.indent(yaml_snippet(entry, catalog), '  ')}")


def _show_params(out: Console, docs: Sequence[ParamDoc]) -> None:
    rows = [("  PARAMETER", "TYPE", "DEFAULT", "CONSTRAINT")]
    rows += [(f"  {doc.name}", doc.type, doc.default, doc.constraint) for doc in docs]
    header, *lines = _columns(rows, None, cap=29)
    _line(out, f"\n{header}" if docs else "\n  no parameters", style="bold")
    for line, doc in zip(lines, docs, strict=True):
        for part in _wrapped(line, "      "):
            _line(out, part)
        for part in _wrapped(f"      {doc.doc}", "      ") if doc.doc else ():
            _line(out, part, style="dim")


def _wrapped(line: str, indent: str) -> list[str]:
    """``line`` within 80 columns, its alignment kept; long names are never cut."""
    if len(line) <= _WIDTH:
        return [line]
    wrapper = textwrap.TextWrapper(
        _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )
    return wrapper.wrap(line)


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} ({item})" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# --- JSON -------------------------------------------------------------------------------------------------------------


def _print_json(
    components: list[dict[str, Any]], broken: Iterable[BrokenPlugin], disabled: Iterable[str] | None = None
) -> int:
    data: dict[str, Any] = {"components": components, "broken": [_broken_json(item) for item in broken]}
    if disabled is not None:
        data["disabled"] = list(disabled)
    sys.stdout.write(jsonlib.dumps(data, indent=2, ensure_ascii=False) + "\n")
    return ExitCode.OK


def _broken_json(broken: BrokenPlugin) -> dict[str, Any]:
    return {**asdict(broken), "kinds": None if broken.kinds is None else sorted(broken.kinds)}


def _as_json(entry: Entry, catalog: Catalog) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "name": entry.name,
        "qualified_name": entry.qualified_name,
        "dist": entry.dist,
        "version": entry.version,
        "built_in": entry.built_in,
        "ambiguous": catalog.is_ambiguous(entry),
        "summary": entry.spec.summary,
    }


def _details(entry: Entry, catalog: Catalog) -> dict[str, Any]:
    return {
        "source": entry.source,
        "spec_version": entry.spec.version,
        "declares": _declared(entry.spec),
        "params": [asdict(doc) for doc in describe_params(entry.spec.params)],
        "snippet": yaml_snippet(entry, catalog),
    }


def _declared(spec: Spec[Any]) -> dict[str, Any]:
    """What the spec says besides name, parameters and code: needs, gives, outputs, range, extras."""
    declared: dict[str, Any] = {"extras": list(spec.extras)}
    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name in _COMMON or callable(value) or value is None:
            continue
        if isinstance(value, Mapping):
            declared[field.name] = {key: item.type_name for key, item in value.items()}
        elif isinstance(value, frozenset | set):
            declared[field.name] = sorted(value)
        else:
            declared[field.name] = list(value) if isinstance(value, tuple) else value
    return {key: value for key, value in declared.items() if value not in ([], {}, "")}
