"""4-bit GPTQ of SmolLM2-135M-Instruct on this machine: kdkit against gptqmodel, on the same rows in one run.

    python benchmarks/gptq.py                                   # with gptqmodel installed: pip install -e ".[gptq]"
    python benchmarks/gptq.py --peer-python VENV/bin/python     # with gptqmodel in an environment of its own

32 rows of 512 tokens calibrate, other documents of the same source (Dolly, English) measure perplexity: 24 windows of
512 tokens. Every quantization is a process of its own. Seconds run from reading the model to the written checkpoint,
imports left out, and are the least of the passes, whose order turns around: other work only adds to them. Perplexity is
that of the checkpoint as kdkit reads it, dequantised, in float32, whoever wrote it: no kernel takes part.

Writes benchmarks/results/gptq.json and .md, and fails when a target is missed: with groups of 64, kdkit's defaults are
not slower than gptqmodel's defaults, and their perplexity is not above by more than 0.3.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEXT = ROOT / ".." / "shared" / "data" / "dolly_en" / "databricks-dolly-15k.partial.jsonl"
SPEED, PERPLEXITY = 1.0, 0.3
WINDOW = 512
PEER = "gptqmodel"


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        who: ``none``, ``rtn``, ``kdkit`` or ``gptqmodel``.
        ordered: Columns are processed by the size of their inputs, on static groups, and grids are searched, as kdkit
            does by default; gptqmodel orders columns inside of groups unless it is told otherwise.
        repeat: Measured in every pass, because a target depends on it.
    """

    who: str
    sym: bool = True
    group_size: int = 64
    ordered: bool | None = None
    repeat: bool = False

    @property
    def key(self) -> str:
        parts = [self.who, "sym" if self.sym else "asym", f"g{self.group_size}"]
        if self.who == PEER and self.ordered:
            parts.append("as-kdkit")
        return "none" if self.who == "none" else "-".join(parts)

    @property
    def title(self) -> str:
        names = {"none": "16-bit", "rtn": "round to nearest", "kdkit": "kdkit `gptq`", PEER: "gptqmodel, its defaults"}
        return "gptqmodel, kdkit's settings" if self.who == PEER and self.ordered else names[self.who]


CASES = [
    Case("none"),
    Case("rtn"),
    Case(PEER, repeat=True),
    Case("kdkit", repeat=True),
    Case(PEER, ordered=True),
    Case("rtn", sym=False),
    Case(PEER, sym=False),
    Case("kdkit", sym=False),
    Case("rtn", group_size=32),
    Case(PEER, group_size=32),
    Case("kdkit", group_size=32),
    Case("rtn", sym=False, group_size=32),
    Case(PEER, sym=False, group_size=32),
    Case("kdkit", sym=False, group_size=32),
]


# --- rows -------------------------------------------------------------------------------------------------------------


def token_rows(path: Path, tokenizer: Any, rows: int, windows: int) -> tuple[list[list[int]], list[list[int]]]:
    """Rows to calibrate with and windows to measure on, of different documents, without special tokens."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    random.Random(0).shuffle(lines)
    texts = iter(
        "\n".join(line[name] for name in ("instruction", "context", "response") if line[name]) for line in lines
    )
    found = [list(_cut(texts, tokenizer, count)) for count in (rows, windows)]
    for made, count in zip(found, (rows, windows), strict=True):
        if len(made) < count:
            raise SystemExit(f"{path} is too short: {len(made)} of {count} rows of {WINDOW} tokens")
    return found[0], found[1]


def _cut(texts: Iterator[str], tokenizer: Any, count: int) -> Iterator[list[int]]:
    """``count`` rows of whole documents one after another; the rest of the last document is left out."""
    rest: list[int] = []
    while count:
        if len(rest) >= WINDOW:
            yield rest[:WINDOW]
            rest, count = rest[WINDOW:], count - 1
            continue
        text = next(texts, None)
        if text is None:
            return
        rest += tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]


# --- one measurement in a process of its own --------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a child process is told."""

    case: Case
    model: Path
    rows: list[list[int]] = field(repr=False)
    out: Path

    def facts(self) -> dict[str, Any]:
        """Settings by the names of the backends' job."""
        ordered = self.case.who == "kdkit" or bool(self.case.ordered)
        return {
            "source": str(self.model),
            "out": str(self.out),
            "rows": self.rows,
            "bits": 4,
            "group_size": self.case.group_size,
            "sym": self.case.sym,
            "desc_act": ordered,
            "static_groups": ordered,
            "act_group_aware": not ordered,
            "mse": 2.4 if ordered else 0.0,
            "damp_percent": 0.05,
            "true_sequential": True,
            "lm_head": False,
            "device": "cpu",
            "blocks": json.loads((self.model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"],
        }


def child() -> None:
    """Round to nearest, or kdkit's own GPTQ; the task comes on standard input, the figures go to standard output."""
    facts = json.loads(sys.stdin.readline())
    quantise = {"rtn": nearest, "kdkit": own}[facts["who"]]
    seconds = quantise(facts)
    print(json.dumps({"done": {"seconds": seconds}}), flush=True)


def write(facts: dict[str, Any], linears: Any) -> None:
    from kdkit.models.quantized.checkpoint import GptqFormat, write_checkpoint

    names = ("bits", "group_size", "sym", "lm_head", "damp_percent", "true_sequential", "static_groups")
    form = GptqFormat(desc_act=False, version=1 if facts["sym"] else 2, **{name: facts[name] for name in names})
    write_checkpoint(Path(facts["source"]), Path(facts["out"]), linears, form, write_head=False)


def nearest(facts: dict[str, Any]) -> float:
    import torch

    from kdkit.api import Model
    from kdkit.models.load import load_model
    from kdkit.models.quantized.grid import GridSettings
    from kdkit.models.quantized.layers import quantizable
    from kdkit.models.quantized.linear import round_to_nearest

    start = time.monotonic()
    model = load_model(Model(path=Path(facts["source"])), dtype=torch.float32)
    grid = GridSettings(bits=4, sym=facts["sym"], mse=0.0)
    layers = quantizable(model, lm_head=False)
    write(facts, {name: round_to_nearest(layer.weight, grid, facts["group_size"]) for name, layer in layers.items()})
    return time.monotonic() - start


class Context:
    """What kdkit's solver needs of a stage."""

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints = checkpoints

    def log(self, message: str, /) -> None:
        print(message, file=sys.stderr)

    def progress(self, step: int, total: int, /, **values: float) -> None:
        print(step, total, values, file=sys.stderr)

    def metrics(self, values: Any, /, *, step: int) -> None:
        pass

    def stopping(self) -> bool:
        return False


def own(facts: dict[str, Any]) -> float:
    import torch

    from kdkit.api import Model
    from kdkit.engine.hardware import resolve_precision
    from kdkit.models.load import load_model
    from kdkit.models.quantized.grid import GridSettings
    from kdkit.models.quantized.layers import quantizable
    from kdkit.plugins.quantizers.gptq_solver import SolverSettings
    from kdkit.plugins.quantizers.sequential import Sequential, SequentialSettings

    start = time.monotonic()
    compute = torch.bfloat16 if resolve_precision("auto") == "bf16" else torch.float32
    model = load_model(Model(path=Path(facts["source"])), dtype=torch.float32)
    solver = SolverSettings(
        grid=GridSettings(bits=4, sym=facts["sym"], mse=facts["mse"]),
        block_size=128,
        **{name: facts[name] for name in ("group_size", "desc_act", "static_groups", "damp_percent")},
    )
    settings = SequentialSettings(solver=solver, true_sequential=True, compute=compute, device="cpu", identity="")
    layers = quantizable(model, lm_head=False)
    work = Sequential(model, layers, facts["rows"], settings, Context(Path("checkpoints").absolute()))  # type: ignore[arg-type]
    work.run()
    write(facts, {name: work.finished[name] for name in layers})
    return time.monotonic() - start


class Peak(threading.Thread):
    """The most memory that a process held, read again and again while it lives.

    What wait4 says of it counts what its parent held when it was started, too.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.status, self.kilobytes, self.over = Path(f"/proc/{pid}/status"), 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.05):
            # One that has ended has no memory, until it is waited for.
            if (found := re.search(r"^VmHWM:\s+(\d+)", self.status.read_text(), re.MULTILINE)) is not None:
                self.kilobytes = int(found[1])

    def stop(self) -> int:
        """Bytes."""
        self.over.set()
        self.join()
        return self.kilobytes * 1024


def spawn(task: Task, peer_python: str) -> dict[str, Any]:
    """Seconds, peak memory and, from gptqmodel, its version."""
    from kdkit.plugins.quantizers.backends.environment import CHILD

    who = task.case.who
    command = [peer_python, "-P", str(CHILD), PEER] if who == PEER else [sys.executable, __file__, "--child"]
    cores = str(len(os.sched_getaffinity(0)))
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": cores, "MKL_NUM_THREADS": cores}
    variables["GPTQMODEL_CPU_WORKERS"] = str(max(2, (int(cores) + 1) // 2))
    if who == PEER:
        variables.pop("PYTHONPATH", None)  # its environment may have other versions of everything
    with tempfile.TemporaryDirectory(prefix="gptq-") as directory, (Path(directory) / "log").open("w+b") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=directory, env=variables
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({**task.facts(), "who": who}).encode() + b"\n")
        process.stdin.flush()
        watch = Peak(process.pid)
        messages = [json.loads(line) for line in process.stdout]
        peak = watch.stop()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or "done" not in messages[-1]:
            log.seek(0)
            raise SystemExit(f"{task.case.key} failed:\n{log.read().decode(errors='replace')[-2000:]}")
    done = messages[-1]["done"]
    return {
        "seconds": round(done["seconds"], 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_bytes": peak,
        **({"version": done["version"]} if who == PEER else {}),
    }


# --- perplexity -------------------------------------------------------------------------------------------------------


def perplexity(model: Path, checkpoint: Path | None, windows: list[list[int]]) -> float:
    """Of the model, or of the same model with the layers of ``checkpoint``, in float32."""
    import torch

    from kdkit.api import Model
    from kdkit.models.load import load_model
    from kdkit.models.quantized.checkpoint import read_checkpoint

    loaded = load_model(Model(path=model), dtype=torch.float32)
    if checkpoint is not None:
        for name, linear in read_checkpoint(checkpoint)[1].items():
            loaded.get_submodule(name).weight.data = linear.dequantized(torch.float32)
    total, count = 0.0, 0
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor([window])
            total += float(loaded(input_ids=ids, labels=ids).loss) * (len(window) - 1)
            count += len(window) - 1
    return math.exp(total / count)


# --- all of it --------------------------------------------------------------------------------------------------------


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    from transformers import AutoTokenizer

    from kdkit.models.locate import locate

    model = Path(given.model) if given.model else locate("smollm2-135m-instruct", base_dir=ROOT, offline=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows, windows = token_rows(given.text, tokenizer, given.rows, given.windows)
    wanted = [case for case in CASES if not given.cases or case.key in given.cases]
    entries: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="gptq-bench-") as scratch:
        if any(case.who == PEER for case in wanted):
            warm_up(Path(scratch), given.peer_python)
        for number in range(given.passes):
            once = wanted if number == 0 else [case for case in wanted if case.repeat]
            for case in once if number % 2 == 0 else once[::-1]:
                out = Path(scratch) / f"{case.key}-{number}"
                entry = entries.setdefault(case.key, {"title": case.title, **vars(case), "passes": []})
                if case.who != "none":
                    entry["passes"].append(spawn(Task(case, model, rows, out), given.peer_python))
                if number == 0:
                    checkpoint = None if case.who == "none" else out
                    entry["bytes"] = sum(
                        file.stat().st_size for file in (out if checkpoint else model).glob("*.safetensors")
                    )
                    entry["perplexity"] = round(perplexity(model, checkpoint, windows), 3)
                print(line(case, entry), flush=True)
    return [summary(entry) for entry in entries.values()]


def warm_up(scratch: Path, peer_python: str) -> None:
    """gptqmodel compiles an extension when it packs its first layer on a machine; that is not counted."""
    from kdkit.testing.tiny import save_tiny_model

    model = save_tiny_model(scratch / "tiny", layers=1, hidden=128)
    rows = [[(7 * place) % 256 for place in range(64)]] * 4
    for sym in (True, False):
        out = scratch / f"warm-up-{sym}"
        spawn(Task(Case(PEER, sym=sym, group_size=32), model, rows, out), peer_python)


def line(case: Case, entry: dict[str, Any]) -> str:
    last = entry["passes"][-1] if entry["passes"] else {"seconds": 0.0, "cpu_seconds": 0.0}
    return (
        f"{case.key:28}{last['seconds']:8.1f} s (CPU {last['cpu_seconds']:.1f})  perplexity {entry['perplexity']:.3f}"
    )


def summary(entry: dict[str, Any]) -> dict[str, Any]:
    """The shortest time and the most memory of the passes."""
    chosen = {"seconds": min, "cpu_seconds": min, "peak_bytes": max}
    figures = {name: pick(made[name] for made in entry["passes"]) for name, pick in chosen.items() if entry["passes"]}
    return {**entry, **figures}


def targets(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """kdkit's defaults against gptqmodel's, symmetric, groups of 64."""
    plain = [e for e in entries if e["sym"] and e["group_size"] == 64 and not e["ordered"]]
    pair = {e["who"]: e for e in plain if e["who"] in {"kdkit", PEER}}
    if len(pair) < 2:
        return {}
    ratio = pair["kdkit"]["seconds"] / pair[PEER]["seconds"]
    above = round(pair["kdkit"]["perplexity"] - pair[PEER]["perplexity"], 3)
    return {
        "seconds": {"ratio": round(ratio, 3), "bound": SPEED, "kept": ratio <= SPEED},
        "perplexity": {"above": above, "bound": PERPLEXITY, "kept": above <= PERPLEXITY},
    }


def machine(entries: list[dict[str, Any]]) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    named = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    peers = {made["version"] for entry in entries for made in entry["passes"] if "version" in made}
    return {
        "python": platform.python_version(),
        "cpu": named[0] if named else platform.machine(),
        "threads": len(os.sched_getaffinity(0)),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "torch": version("torch"),
        "transformers": version("transformers"),
        PEER: ", ".join(sorted(peers)) or None,
    }


def page(result: dict[str, Any]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if value is not None)
    settings = result["settings"]
    parts = [
        "# 4-bit GPTQ: kdkit and gptqmodel",
        f"Written by `python benchmarks/gptq.py`, not by hand. {facts}.",
        (
            f"SmolLM2-135M-Instruct, {settings['rows']} calibration rows and {settings['windows']} windows of {WINDOW} "
            "tokens, of different documents of Dolly. The model comes from a 4-bit file (Q4_1) itself. Perplexity of "
            "the dequantised weights in float32; differences under 0.3 are noise."
        ),
    ]
    for name, target in result["targets"].items():
        figure = target.get("ratio", target.get("above"))
        said = {"seconds": "Seconds over gptqmodel's", "perplexity": "Perplexity above gptqmodel's"}[name]
        parts.append(f"{said}: {figure} (bound {target['bound']}, {'kept' if target['kept'] else 'MISSED'}).")
    table = [
        "| who | grids | group | seconds | CPU seconds | peak memory | weights on disk | perplexity |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    table += [f"| {' | '.join(_cells(entry))} |" for entry in result["cases"]]
    return "\n\n".join([*parts, "\n".join(table)]) + "\n"


def _cells(entry: dict[str, Any]) -> list[str]:
    weights = [f"{entry['bytes'] / 1e6:.1f} MB", f"{entry['perplexity']:.2f}"]
    if entry["who"] == "none":
        return [entry["title"], "", "", "", "", "", *weights]
    grids = "symmetric" if entry["sym"] else "asymmetric"
    seconds = [f"{entry['seconds']:.0f}", f"{entry['cpu_seconds']:.0f}", f"{entry['peak_bytes'] / 1e6:,.0f} MB"]
    return [entry["title"], grids, str(entry["group_size"]), *seconds, *weights]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with gptqmodel")
    parser.add_argument("--model", help="another model directory, for trying the script")
    parser.add_argument("--text", type=Path, default=TEXT, help="Dolly rows: instruction, context, response")
    parser.add_argument("--rows", type=int, default=32, help="calibration rows")
    parser.add_argument("--windows", type=int, default=24, help="windows of the perplexity")
    parser.add_argument("--passes", type=int, default=2, help="measurements of the seconds")
    parser.add_argument("--cases", nargs="+", choices=[case.key for case in CASES], help="only these")
    parser.add_argument("--out", type=Path, default=RESULTS / "gptq", help="where to write, without the suffix")
    given = parser.parse_args()
    if given.child:
        child()
        return
    entries = run(given)
    settings = {name: getattr(given, name) for name in ("rows", "windows", "passes")}
    result = {"machine": machine(entries), "settings": settings, "targets": targets(entries), "cases": entries}
    given.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    given.out.with_suffix(".md").write_text(page(result), encoding="utf-8")
    print(page(result))
    if missed := [name for name, target in result["targets"].items() if not target["kept"]]:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
