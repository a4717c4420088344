"""How fast prompts are answered, next to transformers.generate: python benchmarks/rollout.py

SmolLM2-135M-Instruct decodes greedily in bf16 and in float32, on all cores or on the GPU if there is one:

- equal: 1, 16 and 32 prompts of 64 tokens are continued by 48 tokens each, in one batch; the best of five runs.
- mixed: 64 prompts of Dolly's test split (MiniLLM's). How long each answer becomes is drawn (seed 0) from the lengths
  of the split's own answers, up to 256 tokens, and forced on both, which never end by themselves; only wanted tokens
  count. Nobody knows the lengths beforehand: ``generate`` gets batches of 32 or 64 prompts of similar length that run
  until the longest answer ends; kdkit has 32 or 64 rows at a time. The better of the two counts, on either side.

In float32 both must choose the same tokens, unless the two best logits are closer than 0.001 where they part; in bf16
the share of answers that differ is told. `kdkit models pull smollm2-135m-instruct` fetches the model once; ``--data``
names a file of Dolly's rows. A full run writes benchmarks/results/rollout.json and fails when a target is missed: as
fast for one prompt, within the 3 % that repeats differ by, and twice as fast for the mixed ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from kdkit.api import Sampling
from kdkit.api.artifacts import Model
from kdkit.api.data import Example
from kdkit.models.chat import ChatEncoder
from kdkit.models.load import load_model, load_tokenizer
from kdkit.train.rollout import decode

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "rollout.json"
DATA = ROOT.parent / "shared" / "data" / "dolly_en" / "minillm" / "dolly" / "valid.jsonl"
MODEL = Path.home() / ".cache" / "kdkit" / "models" / "smollm2-135m-instruct"
EQUAL = (1, 16, 32)
TOKENS = 48
PROMPTS = 64
LONGEST_PROMPT, LONGEST_ANSWER = 400, 256
BATCHES = (32, 64)
NEAR_TIE = 1e-3
REPEATS = 5
SAME = 0.03
"""Repeats of one and the same way with a single prompt differ by about as much."""
TARGETS = {"equal_1": 1.0 - SAME, "mixed": 2.0}
Prompts = Sequence[Sequence[int]]
Way = Callable[[PreTrainedModel, Prompts, Sequence[int], int], list[list[int]]]


@dataclass(frozen=True, slots=True)
class Case:
    """Prompts, wanted tokens of each answer, and how many rows may be decoded together."""

    name: str
    prompts: Prompts
    limits: Sequence[int]
    batches: Sequence[int]


def by_kdkit(model: PreTrainedModel, prompts: Prompts, limits: Sequence[int], batch: int) -> list[list[int]]:
    how = Sampling(max_new_tokens=max(limits))
    done = decode(model, prompts, how, [0] * len(prompts), stop_ids=(), batch_size=batch, limits=limits)
    return [row.ids for row in done]


def by_generate(model: PreTrainedModel, prompts: Prompts, limits: Sequence[int], batch: int) -> list[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    done: dict[int, list[int]] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        new = max(limits[i] for i in chosen)
        inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        out = model.generate(**inputs, do_sample=False, max_new_tokens=new, pad_token_id=0)
        for i, row in zip(chosen, out[:, width:].tolist(), strict=True):
            done[i] = row[: limits[i]]
    return [done[i] for i in range(len(prompts))]


WAYS: dict[str, Way] = {"kdkit": by_kdkit, "generate": by_generate}


def cases(data: Path, mixed: int, tokens: int) -> list[Case]:
    tokenizer = load_tokenizer(Model(path=MODEL))
    encoder = ChatEncoder(tokenizer)
    prompts, lengths = [], []
    for number, line in enumerate(data.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        asked = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
        prompts.append(encoder.prompt(Example(id=str(number), prompt=asked)))
        lengths.append(len(tokenizer(row["output"])["input_ids"]) + 1)
    source = random.Random(0)
    short = [prompt for prompt in prompts if len(prompt) <= LONGEST_PROMPT]
    chosen = source.sample(short, mixed)
    limits = [min(source.choice(lengths), LONGEST_ANSWER) for _ in chosen]
    flow = [token for prompt in prompts for token in prompt]
    rows = [flow[64 * i : 64 * (i + 1)] for i in range(max(EQUAL))]
    equal = [Case(f"equal_{count}", rows[:count], [tokens] * count, [count]) for count in EQUAL]
    return [*equal, Case("mixed", chosen, limits, BATCHES)]


def measured(case: Case, model: PreTrainedModel, repeats: int) -> tuple[dict[str, Any], dict[str, list[list[int]]]]:
    """Wanted tokens a second of both ways, the better batch size and the best of the repeats, and the tokens."""
    facts: dict[str, Any] = {"tokens": sum(case.limits)}
    said: dict[str, list[list[int]]] = {}
    for batch in case.batches:
        seconds = dict.fromkeys(WAYS, float("inf"))
        for who in list(WAYS) * repeats:
            start = perf_counter()
            said[who] = WAYS[who](model, case.prompts, case.limits, batch)
            seconds[who] = min(seconds[who], perf_counter() - start)
        facts |= {f"{who}_{batch}": round(sum(case.limits) / taken, 1) for who, taken in seconds.items()}
    best = {who: max(facts[f"{who}_{batch}"] for batch in case.batches) for who in WAYS}
    return facts | best | {"ratio": round(best["kdkit"] / best["generate"], 2)}, said


def differing(said: dict[str, list[list[int]]]) -> list[tuple[int, int]]:
    """Answer and place of the first token in which the ways differ."""
    pairs = enumerate(zip(said["kdkit"], said["generate"], strict=True))
    return [
        (i, next(place for place, both in enumerate(zip(a, b, strict=True)) if both[0] != both[1]))
        for i, (a, b) in pairs
        if a != b
    ]


@torch.no_grad()
def gap(model: PreTrainedModel, ids: Sequence[int]) -> float:
    """Between the two best logits after ``ids``, without a cache."""
    logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].float()
    first, second = logits.topk(2).values.tolist()
    return float(first - second)


def compare(case: Case, model: PreTrainedModel, repeats: int) -> dict[str, Any]:
    facts, said = measured(case, model, repeats)
    parted = differing(said)
    gaps = [gap(model, [*case.prompts[i], *said["kdkit"][i][:place]]) for i, place in parted]
    facts |= {"answers": len(case.prompts), "answers_that_differ": len(parted), "largest_gap": max(gaps, default=0.0)}
    print(
        f"{case.name:9} kdkit {facts['kdkit']:7.1f} tokens/s, generate {facts['generate']:7.1f}, ratio "
        f"{facts['ratio']:.2f}; {len(parted)} of {len(case.prompts)} answers differ, gap {facts['largest_gap']:.2g}",
        flush=True,
    )
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="rows of Dolly, as JSON lines")
    parser.add_argument("--mixed", type=int, default=PROMPTS, help=f"prompts of mixed length, {PROMPTS} when not given")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of equal answers, {TOKENS} when not given")
    given = parser.parse_args()
    full = (given.mixed, given.tokens) == (PROMPTS, TOKENS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    done: dict[str, dict[str, Any]] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        model = load_model(Model(path=MODEL), dtype=dtype).to(device).eval()
        model.generation_config.eos_token_id = None
        for way in WAYS.values():
            way(model, [[1, 2, 3]], [3], 1)
        print(name, flush=True)
        todo = cases(given.data, given.mixed, given.tokens)
        done[name] = {case.name: compare(case, model, 1 if case.name == "mixed" else REPEATS) for case in todo}
        del model
    missed = [
        f"{name} {case}: {done[name][case]['ratio']} < {target}"
        for name in done
        for case, target in TARGETS.items()
        if done[name][case]["ratio"] < target
    ]
    missed += [f"fp32 {case}: other tokens" for case, f in done["fp32"].items() if f["largest_gap"] >= NEAR_TIE]
    if full:
        machine = {
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        }
        result = {"machine": machine, "near_tie": NEAR_TIE, "precisions": done, "targets": TARGETS, "missed": missed}
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if missed and full:
        sys.exit(f"missed: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
