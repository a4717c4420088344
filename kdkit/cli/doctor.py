"""Body of ``kdkit doctor``: what this machine offers. Changes nothing; no network, no heavy import."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from kdkit.api.errors import EnvironmentUnmet, ExitCode
from kdkit.api.specs import SandboxSpec
from kdkit.cli.output import emit, emit_json
from kdkit.engine.env import versions
from kdkit.engine.files import check_writable
from kdkit.engine.hardware import cpu_name, cuda_devices, memory_bytes, resolve_precision, threads
from kdkit.engine.store import store_root
from kdkit.host import Catalog
from kdkit.host.records import BUILT_IN
from kdkit.models.catalogue import KNOWN, models_dir
from kdkit.models.hub import is_offline
from kdkit.models.locate import pulled
from kdkit.plugins.quantizers.backends.environment import states

__all__ = ["doctor"]

_NEEDED = ("torch", "transformers", "datasets", "accelerate")
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; ``status`` is ``ok``, ``note`` (worth knowing) or ``missing`` (kdkit cannot work)."""

    name: str
    status: str
    found: str
    hint: str = ""


def doctor(*, as_json: bool) -> int:
    """Print what works and what is missing.

    Returns:
        0, or 4 when something that every run needs is missing.
    """
    checks = [*_software(), *_hardware(), _store(), *_models(), *_backends(), *_plugins(), *_sandbox()]
    if as_json:
        emit_json({"checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            line = f"{check.status:<8}{check.name:<14}{check.found}"
            emit(f"{line}  ({check.hint})" if check.hint else line)
    missing = any(check.status == "missing" for check in checks)
    return int(ExitCode.ENVIRONMENT if missing else ExitCode.OK)


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


def _store() -> Check:
    root = store_root()
    existing = next(path for path in (root, *root.parents) if path.exists())
    try:
        check_writable(existing, hint="set KDKIT_STORE to a directory you may write")
    except EnvironmentUnmet as error:
        return Check("store", "missing", f"{root}: {error.what}", error.hint or "")
    return Check("store", "ok", f"{root}, {shutil.disk_usage(existing).free / _GIB:.1f} GiB free")


def _models() -> Iterator[Check]:
    token = "set" if os.environ.get("HF_TOKEN") else "not set"
    yield Check("hub", "ok", f"{'offline' if is_offline() else 'online'}, HF_TOKEN {token}")
    for name, model in KNOWN.items():
        directory = pulled(model)
        if directory is None:
            yield Check("model", "note", f"{name} is not in {_short(models_dir())}", f"kdkit models pull {name}")
        else:
            yield Check("model", "ok", f"{name} in {_short(directory)}")


def _backends() -> Iterator[Check]:
    """What the quantizer gptq can work with besides its own code."""
    for name, state in states().items():
        yield Check("gptq", "ok" if state.usable else "note", f"backend {name}: {state.found}", state.hint)


def _plugins() -> Iterator[Check]:
    catalog = Catalog.discover(strict=False)
    yield Check("components", "ok", str(len(catalog.entries())))
    for broken in catalog.broken:
        yield Check("plugin", "note", str(broken), f"kdkit plugins show {broken.dist}")


def _sandbox() -> Iterator[Check]:
    """Programs that try to break out are run: whether a sandbox holds cannot be read off the machine."""
    catalog = Catalog.discover(strict=False)
    if any(entry.name == "auto" and entry.dist == BUILT_IN for entry in catalog.entries("sandbox")):
        spec = cast("SandboxSpec[Any]", catalog.find("sandbox", f"{BUILT_IN}/auto").spec)
        report = spec.build(spec.params()).probe()
        hint = "" if report.usable else report.hint
        yield Check("sandbox", "ok" if report.usable else "note", report.reason, hint)


def _short(path: Path) -> str:
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
