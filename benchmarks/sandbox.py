"""How many short programs a sandbox judges per second, and whether its memory stays flat: python benchmarks/sandbox.py

Three cases per sandbox, all through a session with one fork server per core and with a new program for every test:

- trivial: print the sum of two numbers.
- imports: the same after the imports that programs for contests have.
- cpp: one C++ program, compiled once, run for every test.

`plain` starts an interpreter per program without any protection, for comparison. The memory of all fork servers
together is taken after a tenth and after all of the `--flat` tests. Writes benchmarks/results/sandbox.json and .md, and
fails when a bound is missed: bubblewrap 150 (trivial) and 120 (imports) tests per second, landlock 100, on two cores;
memory that grows by less than 5 %.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

from kdkit.api import SandboxJob, SandboxLimits
from kdkit.plugins.sandboxes.providers import bubblewrap, landlock
from kdkit.plugins.sandboxes.session import Session, default_workers

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "sandbox.json"
BOUNDS = {("bubblewrap", "trivial"): 150.0, ("bubblewrap", "imports"): 120.0, ("landlock", "trivial"): 100.0}
GROWTH = 1.05
IMPORTS = (
    "import sys, math, collections, heapq, itertools, functools, bisect, re, string, random, decimal, datetime, json\n"
)
SUM = "a, b = map(int, input().split())\nprint(a + b)\n"
CPP = "#include <iostream>\nint main() { long long a, b; std::cin >> a >> b; std::cout << a + b << '\\n'; }\n"


def jobs(case: str, count: int) -> list[SandboxJob]:
    if case == "cpp":
        return [SandboxJob(program=CPP, language="cpp", stdin=f"{n} 1") for n in range(count)]
    head = IMPORTS if case == "imports" else ""
    return [SandboxJob(program=f"{head}{SUM}# {n}\n", stdin=f"{n} 1") for n in range(count)]


def rate(run: Callable[[Sequence[SandboxJob]], Sequence[str]], case: str, count: int) -> float:
    """Tests per second; every answer is checked."""
    todo = jobs(case, count)
    run(todo[:4])
    start = perf_counter()
    answers = run(todo)
    seconds = perf_counter() - start
    wrong = [n for n, answer in enumerate(answers) if answer != f"{n + 1}\n"]
    if wrong:
        raise SystemExit(f"{case}: {len(wrong)} wrong answers, the first one {answers[wrong[0]]!r}")
    return count / seconds


def judged(session: Session) -> Callable[[Sequence[SandboxJob]], list[str]]:
    return lambda todo: [outcome.stdout or outcome.status for outcome in session.run(todo)]


def plain(todo: Sequence[SandboxJob]) -> list[str]:
    def one(job: SandboxJob) -> str:
        command = [sys.executable, "-I", "-S", "-c", job.program]
        return subprocess.run(command, input=job.stdin, capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(default_workers()) as pool:
        return list(pool.map(one, todo))


def resident(pid: int) -> int:
    """Bytes of a process and all below it."""
    total, level = 0, {pid}
    parents: dict[int, set[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, set()).add(int(path.name))
    while level:
        level = set().union(*(parents.get(p, set()) for p in level))
        for process in level:
            try:
                total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            except OSError:
                continue
    return total


def flat(session: Session, count: int) -> dict[str, Any]:
    """Resident bytes of the fork servers, and of this process, early and at the end."""

    def both() -> tuple[int, int]:
        own = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return resident(os.getpid()), own

    run = judged(session)
    run(jobs("trivial", count // 10))
    early = both()
    for _ in range(9):
        run(jobs("trivial", count // 10))
    late = both()
    return {
        "tests": count,
        "fork_servers_bytes": [early[0], late[0]],
        "judge_bytes": [early[1], late[1]],
        "flat": late[0] < GROWTH * early[0] and late[1] < GROWTH * early[1],
    }


def page(result: dict[str, Any]) -> str:
    """The result as a page for people."""
    machine = f"{result['cores']} cores ({result['cpu']}), Linux {result['kernel']}, python {result['python']}"
    lines = [
        "# Programs judged per second",
        "",
        f"Written by `python benchmarks/sandbox.py`, not by hand. {machine}, as {result['user']} user.",
        "",
        f"{result['tests']:,} tests per case, a quarter of it for plain processes; every output is checked.",
        "`plain` starts an interpreter for each program and protects from nothing.",
        "",
        "| sandbox | trivial Python | + usual imports | C++, compiled once |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, rates in result["per_second"].items():
        cells = (_cell(name, case, rates.get(case)) for case in ("trivial", "imports", "cpp"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if result["memory"]:
        heads = ("sandbox", "tests", "fork servers, after a tenth", "at the end", "judge, after a tenth", "at the end")
        lines += ["", "Resident memory:", "", f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for name, memory in result["memory"].items():
        sizes = (*memory["fork_servers_bytes"], *memory["judge_bytes"])
        cells = (f"{memory['tests']:,}", *(f"{size / 2**20:.1f} MB" for size in sizes))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Missed: " + "; ".join(result["missed"]) + "." if result["missed"] else "All bounds are kept."]
    return "\n".join(lines) + "\n"


def _cell(name: str, case: str, rate: float | None) -> str:
    bound = BOUNDS.get((name, case))
    return "" if rate is None else f"{rate:.0f} /s" + (f" (bound {bound:.0f})" if bound else "")


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests per second and memory of the sandboxes.")
    parser.add_argument("--tests", type=int, default=1000, help="tests per case")
    parser.add_argument("--flat", type=int, default=5000, help="tests of the memory measurement; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": default_workers(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "user": "root" if os.geteuid() == 0 else "ordinary",
        "tests": options.tests,
        "per_second": {"plain": {case: rate(plain, case, options.tests // 4) for case in ("trivial", "imports")}},
        "memory": {},
    }
    for name, provider in (("bubblewrap", bubblewrap), ("landlock", landlock)):
        session = provider(None).open(SandboxLimits())
        try:
            found = {case: rate(judged(session), case, options.tests) for case in ("trivial", "imports", "cpp")}
            result["per_second"][name] = found
            if options.flat:
                result["memory"][name] = flat(session, options.flat)
        finally:
            session.close()
    missed = [
        f"{name} {case}: {result['per_second'][name][case]:.0f}/s, wanted {bound:.0f}"
        for (name, case), bound in BOUNDS.items()
        if result["per_second"][name][case] < bound
    ]
    missed += [f"{name}: memory grows" for name, memory in result["memory"].items() if not memory["flat"]]
    result["missed"] = missed
    print(json.dumps(result, indent=2))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(page(result), encoding="utf-8")
    print("\n".join(f"MISSED {line}" for line in missed) or "all bounds met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
