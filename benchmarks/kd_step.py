"""What a step of distillation costs: kdkit, TRL's trainers and a plain loop, on the same rows in one run.

    python benchmarks/kd_step.py                  # about a quarter of an hour on two cores
    python benchmarks/kd_step.py --device cuda    # the same on a GPU, there with Liger's chunked JSD when installed

Two pairs of models: SmolLM2-135M-Instruct with a student of 15 of its 30 layers (`kdkit models pull
smollm2-135m-instruct`), and random weights in the shape of Qwen2.5-0.5B, for its vocabulary of 151,936 entries. All
take the same Dolly rows, 8 in a step, the same float32 master weights, fused AdamW and gradient clipping, and the
forward KL at temperature 1 on the response tokens. Three layouts: natural lengths; the same rows sorted by length
before they are cut into steps, which spares a trainer that pads most of its padding; and rows of equal length, which
leave nothing to pad. Every measurement is a process of its own, in an order that turns around from pass to pass.

Speed is response tokens per second over the steps after the warm-up, the median over the passes. Memory is the peak of
these steps above what is there at the end of a step: weights, gradients, optimiser state and the interpreter. Both are
given as ratios to kdkit in the same run. Writes benchmarks/results/kd_step-DEVICE.json and .md, and fails when a bound
is missed: three times the speed of TRL's GKD trainer at its best precision on rows of natural lengths, and a third of
its memory at the large vocabulary. TRL comes with `pip install -e ".[peers]"`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kd_report import PAIRS, TITLES, machine, page

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROWS = ROOT / ".." / "shared" / "data" / "dolly_en" / "databricks-dolly-15k.partial.jsonl"
SPEED, MEMORY = 3.0, 1 / 3
_KEPT = frozenset({"pass", "step_seconds", "cpu_seconds", "peak_bytes"})
MEASURED_PAIRS = ["smollm2", "qwen-shape"]


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    pair: str
    layout: str
    who: str
    precision: str = "bf16"
    repeat: bool = False


def cases(device: str) -> list[Case]:
    """``repeat``: measured in every pass, because a bound depends on it; the others once."""
    found = [
        Case("smollm2", "natural", "kdkit", repeat=True),
        Case("smollm2", "natural", "trl-gkd", repeat=True),
        Case("smollm2", "natural", "trl-gkd", "fp32"),
        Case("smollm2", "natural", "trl-distillation"),
        Case("smollm2", "natural", "plain"),
        Case("smollm2", "grouped", "kdkit"),
        Case("smollm2", "grouped", "trl-gkd", repeat=True),
        Case("smollm2", "equal", "kdkit"),
        Case("smollm2", "equal", "trl-gkd"),
        Case("smollm2", "equal", "plain"),
        *(Case("tiny", layout, who) for layout in ("natural", "equal") for who in TITLES if who != "liger"),
        *(Case("qwen-shape", "natural", who) for who in ("kdkit", "trl-gkd", "trl-distillation", "plain")),
    ]
    if device == "cuda":
        found += [Case(pair, "natural", "liger") for pair in ("smollm2", "qwen-shape")]
    return found


# --- models and rows --------------------------------------------------------------------------------------------------


def write_pair(name: str, directory: Path, layers: tuple[int, int]) -> None:
    """Teacher and student as two directories, so that every process starts from the same weights."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from kdkit.models.locate import locate
    from kdkit.models.prune import prune
    from kdkit.testing.tiny import save_tiny_model

    if name == "tiny":
        save_tiny_model(directory / "teacher", layers=3, seed=1)
        save_tiny_model(directory / "student", layers=2, seed=2)
        return
    small = locate("smollm2-135m-instruct", base_dir=ROOT, offline=True)
    if name == "smollm2":
        (directory / "teacher").symlink_to(small)
        prune(small, directory / "student", 15)
        return
    tokenizer = AutoTokenizer.from_pretrained(small)
    for seed, (part, depth) in enumerate(zip(("teacher", "student"), layers, strict=True)):
        config = Qwen2Config(
            vocab_size=151_936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=depth,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).bfloat16().save_pretrained(directory / part)
        tokenizer.save_pretrained(directory / part)


class LoadContext:
    """What a dataset loader needs of a stage."""

    seed, offline = 0, True

    def resolve(self, ref: Any, /) -> Any:
        from kdkit.api import Dataset

        return Dataset(path=Path(str(ref.source)))

    def log(self, message: str, /) -> None:
        print(message, file=sys.stderr)


def encode(path: Path, tokenizer: Any, most: int) -> list[Any]:
    """Some Dolly rows as token ids, in a shuffled order."""
    from kdkit.models.chat import ChatEncoder
    from kdkit.plugins.datasets.dolly import DollyLoader
    from kdkit.plugins.datasets.plugin import DollyParams
    from kdkit.train.encoding import encode_rows

    params = DollyParams.model_validate_json(json.dumps({"source": str(path.resolve()), "split": "all"}))
    examples = list(DollyLoader(params).load(LoadContext()).examples)
    random.Random(0).shuffle(examples)
    return encode_rows(
        examples[:most], ChatEncoder(tokenizer), max_length=1024, overlong="drop", log=print, name="Dolly"
    )


def lay_out(rows: list[Any], layout: str, warmup: int, steps: int, batch: int, max_length: int) -> list[list[Any]]:
    """The rows of every step, those of the warm-up first."""
    steps += warmup
    natural = [row for row in rows if len(row.ids) <= max_length][: steps * batch]
    if layout == "equal":
        length = round(statistics.mean(len(row.ids) for row in natural))
        long = [row for row in rows if len(row.ids) >= length and row.learned.index(True) < length // 2]
        natural = [row.cut(length) for row in long[: steps * batch]]
    if layout == "grouped":
        # The measured rows are those of the natural layout.
        measured = natural[warmup * batch :]
        natural = [*natural[: warmup * batch], *sorted(measured, key=lambda row: len(row.ids))]
    if len(natural) < steps * batch:
        raise SystemExit(f"{len(natural)} rows are too few for {steps} steps of {batch}")
    return [natural[start : start + batch] for start in range(0, len(natural), batch)]


# --- one measurement in a process of its own --------------------------------------------------------------------------


def child(given: str) -> None:
    from kd_agreement import agreement
    from kd_contenders import Job, measure

    from kdkit.models.chat import Encoded

    # When memory runs out, it is this process that goes.
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    facts = json.loads(given)
    directory = Path(facts["directory"])
    written = json.loads(Path(facts["steps"]).read_text(encoding="utf-8"))
    steps = [
        [Encoded(name, tuple(ids), tuple(place >= prompt for place in range(len(ids)))) for name, ids, prompt in step]
        for step in written
    ]
    job = Job(
        directory / "student", directory / "teacher", steps, facts["precision"], facts["device"], facts["recompute"]
    )
    result = agreement(job) if facts["who"] == "agreement" else measure(facts["who"], job, facts["warmup"])
    print(json.dumps(result))


def spawn(who: str, directory: Path, steps: Path, precision: str, given: argparse.Namespace) -> dict[str, Any]:
    facts = {"who": who, "directory": str(directory), "steps": str(steps), "precision": precision}
    facts |= {"device": given.device, "warmup": given.warmup, "recompute": given.recompute}
    cores = str(len(os.sched_getaffinity(0)))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": cores, "MKL_NUM_THREADS": cores}
    command = [sys.executable, __file__, "--child", json.dumps(facts)]
    errors = sys.stderr if given.verbose else subprocess.PIPE
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
    if done.returncode == -9:
        return {"failed": "out of memory"}
    if done.returncode:
        last = (done.stderr or "see above").strip().splitlines()[-1]
        return {"failed": "out of memory" if "OutOfMemory" in last else last[:200]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def write_steps(directory: Path, steps: list[list[Any]], layout: str) -> Path:
    if any(row.learned != tuple(t >= row.learned.index(True) for t in range(len(row.ids))) for s in steps for row in s):
        raise SystemExit("a row is learned in parts")
    path = directory / f"{layout}.json"
    rows = [[(row.id, row.ids, row.learned.index(True)) for row in step] for step in steps]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


# --- all of it --------------------------------------------------------------------------------------------------------


def run(given: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoTokenizer

    wanted = [c for c in cases(given.device) if c.pair in given.pairs and c.who in given.who]
    results: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"layouts": {}, "agreement": {}}
    with tempfile.TemporaryDirectory(prefix="kd-step-") as scratch:
        for pair in given.pairs:
            directory = Path(scratch) / pair
            directory.mkdir()
            write_pair(pair, directory, tuple(given.qwen_layers))
            tokenizer = AutoTokenizer.from_pretrained(directory / "student")
            rows = encode(given.rows, tokenizer, most=60 * given.batch)
            large = pair == "qwen-shape"
            steps = given.qwen_steps if large else given.steps
            limit = given.qwen_max_length if large else given.max_length
            files = {}
            for layout in dict.fromkeys(c.layout for c in wanted if c.pair == pair):
                laid = lay_out(rows, layout, given.warmup, steps, given.batch, limit)
                files[layout] = write_steps(directory, laid, layout)
                facts["layouts"][f"{pair}/{layout}"] = describe(laid[given.warmup :])
            mine = [c for c in wanted if c.pair == pair]
            results += measure_all(mine, directory, files, given)
            if "natural" in files and "trl-gkd" in given.who and not large:
                facts["agreement"][pair] = spawn("agreement", directory, files["natural"], "fp32", given)
                print(f"{pair}: agreement with TRL: {json.dumps(facts['agreement'][pair])}", flush=True)
    facts["cases"] = summarise(results)
    return facts


def describe(steps: list[list[Any]]) -> dict[str, Any]:
    per_step = {
        "tokens": [sum(len(row.ids) for row in step) for step in steps],
        "padded_tokens": [len(step) * max(len(row.ids) for row in step) for step in steps],
        "response_tokens": [sum(row.targets for row in step) for step in steps],
    }
    return {name: round(statistics.mean(values)) for name, values in per_step.items()}


def measure_all(
    wanted: list[Case], directory: Path, files: dict[str, Path], given: argparse.Namespace
) -> list[dict[str, Any]]:
    found = []
    for number in range(given.passes):
        once = wanted if number == 0 else [case for case in wanted if case.repeat]
        for case in once if number % 2 == 0 else once[::-1]:
            measured = spawn(case.who, directory, files[case.layout], case.precision, given)
            found.append({**asdict(case), "pass": number, **measured})
            print(line(found[-1]), flush=True)
    return found


def line(result: dict[str, Any]) -> str:
    head = " ".join(f"{result[key]:16}" for key in ("pair", "layout", "who")) + f"{result['precision']:5}"
    if "failed" in result:
        return f"{head} failed: {result['failed']}"
    mean = statistics.mean(result["step_seconds"])
    cpu = statistics.mean(result["cpu_seconds"])  # on a machine that does other things, too, this is what to look at
    return (
        f"{head} {mean:7.2f} s/step (CPU {cpu:.2f}) {speed(result):8.1f} tokens/s {result['peak_bytes'] / 1e6:8,.0f} MB"
    )


def speed(result: dict[str, Any]) -> float:
    return float(sum(result["response_tokens"]) / sum(result["step_seconds"]))


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per case: medians over its passes, and ratios to kdkit on the same pair and rows."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in ("pair", "layout", "who", "precision")), []).append(result)
    lines: dict[tuple[str, ...], dict[str, Any]] = {}
    for key, group in groups.items():
        entry: dict[str, Any] = dict(zip(("pair", "layout", "who", "precision"), key, strict=True))
        good = [result for result in group if "failed" not in result]
        if good:
            entry["response_tokens_per_s"] = round(statistics.median(map(speed, good)), 2)
            entry["seconds_per_step"] = round(statistics.median(statistics.mean(r["step_seconds"]) for r in good), 3)
            entry["peak_bytes"] = round(statistics.median(result["peak_bytes"] for result in good))
            entry["state_bytes"] = good[0]["state_bytes"]
        else:
            entry["failed"] = group[0]["failed"]
        entry["passes"] = [{k: v for k, v in r.items() if k in _KEPT} for r in good]
        lines[key] = entry
    for (pair, layout, *_), entry in lines.items():
        # The grouped layout has the rows of the natural one, which kdkit trains on as they come.
        own = lines.get((pair, "natural" if layout == "grouped" else layout, "kdkit", "bf16"), {})
        if "failed" not in entry and "response_tokens_per_s" in own:
            entry["kdkit_speed_ratio"] = round(own["response_tokens_per_s"] / entry["response_tokens_per_s"], 2)
            entry["kdkit_memory_ratio"] = round(own["peak_bytes"] / entry["peak_bytes"], 3)
    return list(lines.values())


def bounds(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The least speed ratio over TRL's precisions, and the memory ratio at the large vocabulary."""
    gkd = [e for e in entries if e["who"] == "trl-gkd" and e["layout"] == "natural"]
    speeds = [e["kdkit_speed_ratio"] for e in gkd if e["pair"] == "smollm2" and "kdkit_speed_ratio" in e]
    memory = [e["kdkit_memory_ratio"] for e in gkd if e["pair"] == "qwen-shape" and "kdkit_memory_ratio" in e]
    found: dict[str, Any] = {}
    if speeds:
        found["speed"] = {"ratio": min(speeds), "bound": SPEED, "kept": min(speeds) >= SPEED}
    if memory:
        found["memory"] = {"ratio": max(memory), "bound": round(MEMORY, 3), "kept": max(memory) <= MEMORY}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=Path, default=ROWS, help="Dolly rows: instruction, context, response, category")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", nargs="+", choices=tuple(PAIRS), default=MEASURED_PAIRS)
    parser.add_argument("--who", nargs="+", choices=tuple(TITLES), default=list(TITLES))
    parser.add_argument("--steps", type=int, default=6, help="measured steps of the SmolLM2 pair")
    parser.add_argument("--qwen-steps", type=int, default=2, help="measured steps of the pair in Qwen2.5's shape")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them, at least 1")
    parser.add_argument("--passes", type=int, default=2, help="repetitions of the cases a bound depends on")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--max-length", type=int, default=1024, help="longest row of the SmolLM2 pair in tokens")
    parser.add_argument("--qwen-max-length", type=int, default=256, help="longest row of the other pair")
    parser.add_argument("--qwen-layers", type=int, nargs=2, default=[24, 12], metavar=("TEACHER", "STUDENT"))
    parser.add_argument("--recompute", action="store_true", help="everyone recomputes activations (checkpointing)")
    parser.add_argument("--out", type=Path, help="directory of the results; by default those of all pairs are kept")
    parser.add_argument("--verbose", action="store_true", help="show what the trainers write")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return
    facts = run(given)
    kept = bounds(facts["cases"])
    publish(facts, kept, given)
    missed = [name for name, bound in kept.items() if not bound["kept"]]
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


def publish(facts: dict[str, Any], kept: dict[str, Any], given: argparse.Namespace) -> None:
    settings = {k: v for k, v in vars(given).items() if k not in {"rows", "out", "child", "verbose"}}
    result = {"machine": machine(given.device), "settings": settings, "bounds": kept, **facts}
    text = page(result)
    print(text)
    whole = set(given.pairs) == set(MEASURED_PAIRS) and set(given.who) == set(TITLES) and not given.recompute
    directory = given.out or (RESULTS if whole else None)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        written = json.dumps(result, indent=1) + "\n"
        (directory / f"kd_step-{given.device}.json").write_text(written, encoding="utf-8")
        (directory / f"kd_step-{given.device}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
