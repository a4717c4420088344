"""How fast rows become tokens, and in how much memory: python benchmarks/data_loading.py

Two cases, on rows that the script makes up in a temporary directory (8 GB of disk at full size, with the peer's cache):

- instructions: 15,000 Dolly rows are loaded, rendered with the chat template and tokenised, all of them held.
- functions: 500,000 rows with the columns of PyTorrent are loaded, and their code is tokenised while they stream by.

Each runs with kdkit and with the peer, ``datasets.load_dataset("json")`` and ``map`` with the same tokenizer, every
measurement in a process of its own. Seconds count from after the imports to the last token; CPU seconds are there for
machines that do other things too; memory is the peak resident set of the process, imports included. Writes
benchmarks/results/data_loading.json and fails when a bound is missed: instructions in 20 s, functions in 1 GB.
`kdkit models pull smollm2-135m-instruct` fetches the tokenizer once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "data_loading.json"
SIZES = {"instructions": 15_000, "functions": 500_000}
BATCH = 1000
SECONDS = 20.0
BYTES = 1_000_000_000
WORDS = (
    "value index result total item node count stream buffer table river house seven early paper light of the in to a"
)


# --- rows -------------------------------------------------------------------------------------------------------------


def instructions(count: int) -> Iterator[dict[str, Any]]:
    """Rows as long as Dolly's: 12 words asked and 60 answered on average, 200 of context in three of ten."""
    source, words = random.Random(1), WORDS.split()

    def text(mean: float) -> str:
        length = 1 + int(source.expovariate(1 / mean))
        return f"{' '.join(source.choices(words, k=length)).capitalize()}."

    for number in range(count):
        yield {
            "instruction": f"{text(11)} ({number})",
            "context": text(200) if source.random() < 0.3 else "",
            "response": text(60),
            "category": source.choice(["open_qa", "closed_qa", "brainstorming"]),
        }


def functions(count: int) -> Iterator[dict[str, Any]]:
    """Rows with the 15 columns of PyTorrent and 6 kB each, as much as real functions."""
    source, words = random.Random(2), WORDS.split()
    for number in range(count):
        body = [
            f"    {source.choice(words)}_{n} = {source.choice(words)}({source.choice(words)}, {n})" for n in range(22)
        ]
        doc = " ".join(source.choices(words, k=90)).capitalize() + "."
        code = f"def function_{number}({source.choice(words)}):\n" + "\n".join(body)
        tokens = code.replace("(", " ( ").replace(")", " ) ").split()
        yield {
            "repo": f"owner/project{number % 5000}",
            "path": "package/module.py",
            "func_name": f"function_{number}",
            "original_string": code.replace("\n", f'\n    """{doc}"""\n', 1),
            "language": "python",
            "code": code,
            "code_tokens": tokens,
            "docstring": doc,
            "docstring_tokens": doc.split(),
            "sha": f"{number:040x}",
            "url": f"https://example.org/{number}",
            "partition": "train",
            "code_tokens_ast": tokens,
            "code_with_docstrings": "",
            "summary": doc.partition(".")[0],
        }


ROWS: dict[str, Callable[[int], Iterator[dict[str, Any]]]] = {"instructions": instructions, "functions": functions}


def write_rows(name: str, count: int, directory: Path) -> Path:
    path = directory / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for row in ROWS[name](count):
            stream.write(json.dumps(row) + "\n")
    return path


# --- what is measured -------------------------------------------------------------------------------------------------


class Context:
    """What a loader needs of a stage."""

    seed = 0
    offline = True

    def resolve(self, ref: Any, /) -> Any:
        from kdkit.api import Dataset

        return Dataset(path=Path(str(ref.source)))

    def build(self, component: Any, /, *args: Any) -> Any:
        return component.found.spec.build(component.params, *args)

    def log(self, message: str, /) -> None:
        print(message, file=sys.stderr)


def kdkit_instructions(path: Path, tokenizer: Any) -> Callable[[], tuple[int, int]]:
    from kdkit.models.chat import ChatEncoder
    from kdkit.plugins.datasets.dolly import DollyLoader
    from kdkit.plugins.datasets.plugin import DollyParams
    from kdkit.train.encoding import encode_rows

    loader = DollyLoader(DollyParams.model_validate_json(json.dumps({"source": str(path), "split": "all"})))

    def run() -> tuple[int, int]:
        rows = loader.load(Context())
        encoder = ChatEncoder(tokenizer)
        encoded = encode_rows(rows.examples, encoder, max_length=10**6, overlong="drop", log=print, name="rows")
        return len(encoded), sum(len(row.ids) for row in encoded)

    return run


def peer_instructions(path: Path, tokenizer: Any) -> Callable[[], tuple[int, int]]:
    from datasets import load_dataset

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        prompt = f"{row['instruction']}\n\n{row['context']}" if row["context"] else row["instruction"]
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": row["response"]}]
        return dict(tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False))

    def run() -> tuple[int, int]:
        table = load_dataset("json", data_files=str(path), cache_dir=str(path.parent / "cache"), split="train")
        table = table.map(encode, remove_columns=table.column_names)
        return len(table), sum(map(len, table["input_ids"]))

    return run


def kdkit_functions(path: Path, tokenizer: Any) -> Callable[[], tuple[int, int]]:
    from kdkit.api import Example
    from kdkit.plugins.datasets.plugin import JsonlParams
    from kdkit.plugins.datasets.sources import load_rows
    from kdkit.plugins.datasets.splits import Candidate, content_id, prompt_key
    from kdkit.plugins.datasets.values import SourceRow, text

    def convert(row: SourceRow) -> Candidate:
        prompt, code = text(row.columns, "docstring"), text(row.columns, "code")
        example = Example(id=content_id(prompt, answers=(code,)), prompt=prompt, completion=code)
        return Candidate(prompt_key(prompt, code), example)

    params = JsonlParams.model_validate_json(json.dumps({"source": str(path), "split": "all"}))

    def run() -> tuple[int, int]:
        examples = load_rows(params, params, convert, Context(), hub_split="train").examples
        tokens = 0
        for start in range(0, len(examples), BATCH):
            codes = [example.completion or "" for example in examples[start : start + BATCH]]
            tokens += sum(map(len, tokenizer(codes)["input_ids"]))
        return len(examples), tokens

    return run


def peer_functions(path: Path, tokenizer: Any) -> Callable[[], tuple[int, int]]:
    from datasets import load_dataset

    def encode(rows: dict[str, Any]) -> dict[str, Any]:
        return {"length": [len(ids) for ids in tokenizer(rows["code"])["input_ids"]]}

    def run() -> tuple[int, int]:
        table = load_dataset("json", data_files=str(path), cache_dir=str(path.parent / "cache"), split="train")
        table = table.map(encode, batched=True, batch_size=BATCH, remove_columns=table.column_names)
        return len(table), sum(table["length"])

    return run


MEASURED = {
    ("instructions", "kdkit"): kdkit_instructions,
    ("instructions", "peer"): peer_instructions,
    ("functions", "kdkit"): kdkit_functions,
    ("functions", "peer"): peer_functions,
}


def read_tokenizer(name: str) -> Any:
    if name == "tiny":
        from kdkit.testing.tiny import tiny_tokenizer

        return tiny_tokenizer()
    from transformers import AutoTokenizer

    from kdkit.models.locate import locate

    return AutoTokenizer.from_pretrained(locate(name, base_dir=Path.cwd(), offline=True))


def measure(case: str, who: str, path: Path, tokenizer: str) -> None:
    """Run one measurement in this process and print it as JSON."""
    run = MEASURED[case, who](path, read_tokenizer(tokenizer))
    before, start = resource.getrusage(resource.RUSAGE_SELF), perf_counter()
    rows, tokens = run()
    seconds, after = perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    facts = {
        "rows": rows,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "rows_per_s": round(rows / seconds),
        "peak_rss_bytes": after.ru_maxrss * 1024,
        "rss_after_imports_bytes": before.ru_maxrss * 1024,
    }
    print(json.dumps(facts))


# --- all of it --------------------------------------------------------------------------------------------------------


def measured(case: str, who: str, path: Path, tokenizer: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", case, who, str(path), "--tokenizer", tokenizer]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    facts: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    mega = facts["peak_rss_bytes"] / 1e6
    print(f"{case:12} {who:5} {facts['seconds']:8.2f} s {facts['rows_per_s']:9,} rows/s {mega:8,.0f} MB", flush=True)
    return facts


def compare(case: str, count: int, tokenizer: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="kdkit-rows-") as directory:
        path = write_rows(case, count, Path(directory))
        print(f"{case}: {count:,} rows, {path.stat().st_size / 1e6:,.0f} MB", flush=True)
        facts = {who: measured(case, who, path, tokenizer) for who in ("kdkit", "peer")}
        facts["file_bytes"] = path.stat().st_size
    if facts["kdkit"]["tokens"] != facts["peer"]["tokens"]:
        print(f"{case}: kdkit made {facts['kdkit']['tokens']:,} tokens, the peer {facts['peer']['tokens']:,}")
    for name, key in (("time_ratio", "seconds"), ("memory_ratio", "peak_rss_bytes")):
        facts[name] = round(facts["kdkit"][key] / facts["peer"][key], 3)
    print(f"{case}: kdkit / peer: time {facts['time_ratio']}, memory {facts['memory_ratio']}", flush=True)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, count in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=count, help=f"rows of this case, {count:,} when not given")
    parser.add_argument("--tokenizer", default="smollm2-135m-instruct", help="a model's name or path, or 'tiny'")
    parser.add_argument("--measure", nargs=3, metavar=("CASE", "WHO", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        case, who, path = given.measure
        measure(case, who, Path(path), given.tokenizer)
        return
    cases = {name: compare(name, getattr(given, name), given.tokenizer) for name in SIZES}
    bounds = {
        "instructions_seconds": cases["instructions"]["kdkit"]["seconds"] < SECONDS,
        "functions_bytes": cases["functions"]["kdkit"]["peak_rss_bytes"] < BYTES,
    }
    if all(getattr(given, name) == count for name, count in SIZES.items()):
        machine = {"cores": os.cpu_count(), "python": platform.python_version(), "datasets": version("datasets")}
        result = {"machine": machine, "tokenizer": given.tokenizer, "cases": cases, "bounds_kept": bounds}
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    missed = [name for name, kept in bounds.items() if not kept]
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
