"""Body of ``kdkit doctor``: what this machine offers. Changes nothing; what is heavy runs in other processes."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, cast

from kdkit.api.errors import EnvironmentUnmet, ExitCode
from kdkit.api.specs import SandboxSpec
from kdkit.cli.checks import Check
from kdkit.cli.doctor_hub import HubQuestion
from kdkit.cli.doctor_speed import measured, speed_checks
from kdkit.cli.output import emit, emit_json, wrapped
from kdkit.engine.env import versions
from kdkit.engine.files import check_writable
from kdkit.engine.hardware import cpu_name, cuda_devices, memory_bytes, resolve_precision, threads
from kdkit.engine.store import store_root
from kdkit.host import Catalog, extras_of
from kdkit.host.records import BUILT_IN
from kdkit.models.catalogue import KNOWN, models_dir
from kdkit.models.locate import pulled
from kdkit.plugins.quantizers.backends.environment import states

__all__ = ["doctor"]

_NEEDED: Final = ("torch", "transformers", "datasets", "accelerate")
_GIB: Final = 2**30
_LITTLE: Final = 2 * _GIB
"""Free bytes below which a small model with one checkpoint may not fit."""


def doctor(*, as_json: bool, quick: bool = False) -> int:
    """Print what works and what is missing.

    Args:
        as_json: Print JSON; ``matmul`` there has the measured speeds as numbers, ``extras`` what each of them lacks.
        quick: Neither measure nor ask the Hub.

    Returns:
        0, or 4 when something that every run needs is missing.
    """
    hub = HubQuestion(ask=not quick)
    software = list(_software())
    speeds, problem = ([], "") if quick or any(check.status == "missing" for check in software) else measured()
    extras = extras_of(BUILT_IN)
    catalog = Catalog.discover(strict=False)
    checks = [
        *software,
        *_hardware(),
        *speed_checks(speeds, problem),
        *_disks(),
        hub.check(),
        *_models(),
        *_extras(extras, catalog),
        *_backends(),
        *_plugins(catalog),
        *_sandbox(catalog),
    ]
    if as_json:
        emit_json({"checks": [asdict(check) for check in checks], "matmul": speeds, "extras": extras})
    else:
        _print(checks)
    missing = any(check.status == "missing" for check in checks)
    return int(ExitCode.ENVIRONMENT if missing else ExitCode.OK)


def _print(checks: Sequence[Check]) -> None:
    """A line for each check; a terminal gets it in lines of its own width, with what was found in one column."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for check in checks:
        head = f"{check.status:<8}{check.name:<14}"
        line = f"{head}{check.found}" + (f"  ({check.hint})" if check.hint else "")
        emit(wrapped(line, width, len(head)) if width else line)


def _software() -> Iterator[Check]:
    found = versions()
    for name in ("kdkit", "python", *_NEEDED):
        if name in found:
            yield Check(name, "ok", found[name])
        else:
            yield Check(name, "missing", "not installed", f"pip install {name}")


def _hardware() -> Iterator[Check]:
    yield Check("cpu", "ok", f"{cpu_name()}, {threads()} threads")
    yield Check("memory", "ok", f"{memory_bytes() / _GIB:.1f} GiB")
    devices = cuda_devices()
    yield Check("cuda", "ok" if devices else "note", ", ".join(name for name, _ in devices) or "no device")
    yield Check("precision", "ok", f"auto means {resolve_precision('auto')} here")


def _disks() -> Iterator[Check]:
    yield _store()
    yield _temporary()


def _store() -> Check:
    root = store_root()
    # Path.exists raises for what lies in a directory of somebody else.
    existing = next(path for path in (root, *root.parents) if os.path.exists(path))  # noqa: PTH110
    try:
        check_writable(existing, hint="set KDKIT_STORE to a directory you may write")
    except EnvironmentUnmet as error:
        return Check("store", "missing", f"{root}: {error.what}", error.hint or "")
    free = shutil.disk_usage(existing).free
    hint = "" if free >= _LITTLE else "set KDKIT_STORE to a directory on a larger disk"
    return Check("store", "note" if hint else "ok", f"{root}, {free / _GIB:.1f} GiB free", hint)


def _temporary() -> Check:
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError:  # it tries to write to all of them
        return Check("temp", "missing", "no directory for temporary files can be written", "set TMPDIR to one that can")
    free = shutil.disk_usage(temporary).free
    hint = "" if free >= _LITTLE else "set TMPDIR to a directory on a larger disk"
    return Check("temp", "note" if hint else "ok", f"{temporary}, {free / _GIB:.1f} GiB free", hint)


def _models() -> Iterator[Check]:
    for name, model in KNOWN.items():
        directory = pulled(model)
        if directory is None:
            yield Check("model", "note", f"{name} is not in {_short(models_dir())}", f"kdkit models pull {name}")
        else:
            yield Check("model", "ok", f"{name} in {_short(directory)}")


def _extras(extras: Mapping[str, Sequence[str]], catalog: Catalog) -> Iterator[Check]:
    """The optional parts of kdkit itself, and what needs each."""
    users: dict[str, list[str]] = {}
    for entry in catalog.entries():
        for extra in entry.spec.extras if entry.built_in else ():
            users.setdefault(extra, []).append(f"{entry.kind} {entry.name}")
    for extra, lacking in extras.items():
        what = f"{extra} ({', '.join(users[extra])})" if extra in users else extra
        if lacking:
            yield Check("extra", "note", f"{what}: lacks {', '.join(lacking)}", f"pip install '{BUILT_IN}[{extra}]'")
        else:
            yield Check("extra", "ok", f"{what}: installed")


def _backends() -> Iterator[Check]:
    """What the quantizer gptq can work with besides its own code."""
    for name, state in states().items():
        yield Check("gptq", "ok" if state.usable else "note", f"backend {name}: {state.found}", state.hint)


def _plugins(catalog: Catalog) -> Iterator[Check]:
    yield Check("components", "ok", str(len(catalog.entries())))
    for broken in catalog.broken:
        yield Check("plugin", "note", str(broken), f"kdkit plugins show {broken.dist}")


def _sandbox(catalog: Catalog) -> Iterator[Check]:
    """Programs that try to break out are run: whether a sandbox holds cannot be read off the machine."""
    if any(entry.name == "auto" and entry.dist == BUILT_IN for entry in catalog.entries("sandbox")):
        spec = cast("SandboxSpec[Any]", catalog.find("sandbox", f"{BUILT_IN}/auto").spec)
        report = spec.build(spec.params()).probe()
        hint = "" if report.usable else report.hint
        yield Check("sandbox", "ok" if report.usable else "note", report.reason, hint)


def _short(path: Path) -> str:
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
