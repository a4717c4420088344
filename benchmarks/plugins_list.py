"""How much CPU ``kdkit plugins list`` takes with many plugins installed: python benchmarks/plugins_list.py

Fifty distributions are made in a temporary directory that stands on the import path, as packages with the metadata that
pip leaves; five of them are broken, each in its own way. The command runs in a process of its own, with byte code
compiled, and user and system time of that process are counted. Beside it: kdkit without any of them, and the Python
interpreter with nothing to do. Writes benchmarks/results/plugins_list.json and fails when the median reaches a second,
or when a broken plugin is not named.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "plugins_list.json"
SECONDS = 1.0
COUNT = 50
KINDS = ("Loss", "Reward", "Dataset", "Teacher", "Metric", "Quantizer")
NEEDS = {"Reward": "range=(0.0, 1.0), ", "Teacher": 'gives=frozenset({"text"}), ', "Metric": "higher_is_better=True, "}

PLUGIN = '''
"""A plugin as people write them: two components, parameters with bounds and documentation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from kdkit import hookimpl
from kdkit.api import Params, {specs}


class FirstParams(Params):
    """Parameters of the first component."""

    gamma: Annotated[float, Field(ge=0, le=10)] = 2.0
    """How much easy tokens count less."""
    mode: Literal["token", "sequence"] = "token"
    """What is weighted."""
    limits: tuple[int, ...] = (1, 2)
    """Where it begins."""


class SecondParams(FirstParams):
    """Parameters of the second."""

    scale: float = 1.0
    """A factor."""


def build(params: Params, *_: object) -> object:
    from {package}.heavy import Component

    return Component(params)

{hooks}
'''
HOOK = '''
@hookimpl
def kdkit_{hook}() -> Iterator[{kind}Spec]:
    """What this package provides."""
    yield {kind}Spec(name="{name}", summary="Number {number} of many plugins", params={params}, {head}build=build)
'''
HEAVY = 'raise AssertionError("listing imports what a component is made of")\n'
BROKEN = (
    ("import error", lambda text: text.replace("from pydantic", "import a_module_that_nobody_has\nfrom pydantic")),
    ("misspelt hook", lambda text: text.replace("def kdkit_", "def kdkit_x")),
    ("wrong argument", lambda text: text.replace("() -> Iterator", "(catalogue) -> Iterator")),
    ("raises in its generator", lambda text: text.replace("    yield", "    raise ValueError('no')\n    yield")),
    ("too new a requirement", lambda text: text),
)
"""What is wrong, and how the code of a plugin becomes so."""


# --- plugins ----------------------------------------------------------------------------------------------------------


def plugin_code(number: int, package: str) -> str:
    """The code of one plugin: two components of two kinds that go round."""
    kinds = [KINDS[number % len(KINDS)], KINDS[(number + 1) % len(KINDS)]]
    hooks = [
        HOOK.format(
            hook=f"{kind.lower()}{'es' if kind == 'Loss' else 's'}",
            kind=kind,
            name=f"{kind.lower()}-{number}",
            number=number,
            params="FirstParams" if place == 0 else "SecondParams",
            head=NEEDS.get(kind, ""),
        )
        for place, kind in enumerate(kinds)
    ]
    specs = ", ".join(sorted(f"{kind}Spec" for kind in kinds))
    return PLUGIN.format(specs=specs, package=package, hooks="\n".join(hooks))


def install(site: Path, count: int) -> list[str]:
    """Write ``count`` distributions, the last five broken; returns the names of these."""
    broken = []
    for number in range(count):
        name, package, requires = f"kdkit-plugin-{number}", f"kdkit_plugin_{number}", "kdkit>=0.1"
        code = plugin_code(number, package)
        if (place := number - (count - len(BROKEN))) >= 0:
            why, change = BROKEN[place]
            code, broken = change(code), [*broken, name]
            requires = "kdkit>=99" if why.startswith("too new") else requires
        directory, info = site / package, site / f"{package}-1.0.dist-info"
        directory.mkdir(parents=True)
        info.mkdir()
        (directory / "__init__.py").write_text("")
        (directory / "plugin.py").write_text(code)
        (directory / "heavy.py").write_text(HEAVY)
        described = f"A plugin.\n\n{'It is described at length. ' * 40}"
        head = (
            f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\nRequires-Python: >=3.11\nRequires-Dist: {requires}\n"
        )
        (info / "METADATA").write_text(f"{head}Requires-Dist: torch>=2.10\n\n{described}\n")
        (info / "entry_points.txt").write_text(f"[kdkit.plugins]\nmain = {package}.plugin\n")
        (info / "RECORD").write_text(f"{package}/plugin.py,,\n")
    return broken


# --- measuring --------------------------------------------------------------------------------------------------------


def run(command: list[str], site: Path | None) -> tuple[float, str]:
    """CPU seconds of a process (user and system), and what it printed."""
    path = [str(ROOT), *([str(site)] if site else [])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, done.stdout


def measure(command: list[str], site: Path | None, repeats: int) -> dict[str, Any]:
    """Median, least and most of ``repeats`` runs, after one that fills the caches of byte code and of the disk."""
    run(command, site)
    seconds = sorted(run(command, site)[0] for _ in range(repeats))
    shown = {"median": statistics.median(seconds), "least": seconds[0], "most": seconds[-1]}
    return {name: round(value, 3) for name, value in shown.items()}


def check(text: str, count: int, broken: list[str]) -> None:
    """That the listing was worth the time: every plugin is in it, the broken ones by name."""
    named = [line.split()[1] for line in text.splitlines() if line.startswith("broken: ")]
    assert sorted(named) == sorted(broken), named
    good = {f"kdkit-plugin-{number} 1.0" for number in range(count)} - {f"{name} 1.0" for name in broken}
    assert all(name in text for name in good)


def benchmark(count: int, repeats: int) -> dict[str, Any]:
    """All measurements as plain data."""
    kdkit = [sys.executable, "-c", "from kdkit.cli.app import main; main()", "plugins", "list"]
    with tempfile.TemporaryDirectory() as directory:
        site = Path(directory)
        broken = install(site, count)
        check(run(kdkit, site)[1], count, broken)
        return {
            "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
            "plugins": count,
            "broken": len(broken),
            "components": 2 * (count - len(broken)),
            "bound_s": SECONDS,
            "cpu_s": {
                f"kdkit plugins list, {count} plugins": measure(kdkit, site, repeats),
                "kdkit plugins list, no plugin": measure(kdkit, None, repeats),
                "python -c pass": measure([sys.executable, "-c", "pass"], None, repeats),
            },
        }


def main() -> None:
    """Measure, write, and fail when the bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plugins", type=int, default=COUNT, metavar="N")
    parser.add_argument("--repeats", type=int, default=9, metavar="N")
    parser.add_argument("--out", type=Path, default=RESULT, metavar="FILE")
    args = parser.parse_args()
    found = benchmark(args.plugins, args.repeats)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, seconds in found["cpu_s"].items():
        print(f"{name:<36} {seconds['median']:.3f} s CPU ({seconds['least']:.3f} to {seconds['most']:.3f})")
    if next(iter(found["cpu_s"].values()))["median"] >= SECONDS:
        sys.exit(f"{args.plugins} plugins take more than {SECONDS:g} s")


if __name__ == "__main__":
    main()
