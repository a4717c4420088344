"""What benchmarks/kd_step.py compares is the same training, and its table says what was measured."""

from __future__ import annotations

import importlib
import json
import random
import sys
import warnings
from pathlib import Path

import pytest

from kdkit.models.chat import Encoded
from kdkit.testing.tiny import save_tiny_model, tiny_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in ("kd_step", "kd_contenders", "kd_report", "sandbox"):
        sys.modules.pop(name, None)


def steps(count=3, size=4):
    source, made = random.Random(5), []
    for index in range(count * size):
        length, prompt = source.randint(6, 30), source.randint(1, 4)
        ids = tuple(source.randrange(259) for _ in range(length))
        made.append(Encoded(f"row-{index}", ids, tuple(place >= prompt for place in range(length))))
    return [made[start : start + size] for start in range(0, len(made), size)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("who", ["trl-gkd", "trl-distillation", "plain"])
def test_everyone_trains_the_same_student(module, tmp_path, who):
    if who.startswith("trl"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip("trl.experimental.gkd", reason="TRL is not installed: pip install -e '.[peers]'")
    contenders = module("kd_contenders")
    save_tiny_model(tmp_path / "teacher", layers=3, seed=1)
    save_tiny_model(tmp_path / "student", seed=2)
    job = contenders.Job(tmp_path / "student", tmp_path / "teacher", steps(), "fp32")
    before = tiny_model(seed=2).state_dict()
    ours, theirs = (contenders.CONTENDERS[name](job).state_dict() for name in ("kdkit", who))
    for name, start in before.items():
        change = theirs[name] - start
        assert float(change.norm()) > 0, name
        assert float((ours[name] - theirs[name]).norm()) < 0.02 * float(change.norm()), name


def result(who, seconds, peak, *, layout="natural", precision="bf16", number=0):
    return {
        "pair": "smollm2",
        "layout": layout,
        "who": who,
        "precision": precision,
        "pass": number,
        "step_seconds": seconds,
        "response_tokens": [100] * len(seconds),
        "peak_bytes": peak,
        "state_bytes": 1,
    }


def test_ratios_are_to_kdkit_on_the_same_rows(module):
    step = module("kd_step")
    entries = step.summarise(
        [
            result("kdkit", [1.0, 3.0], 10),
            result("trl-gkd", [4.0, 4.0], 40),
            result("trl-gkd", [8.0, 8.0], 50, number=1),
            result("trl-gkd", [5.0, 5.0], 30, precision="fp32"),
            result("trl-gkd", [3.0, 3.0], 20, layout="grouped"),
            {**result("plain", [], 0), "failed": "out of memory"},
        ]
    )
    ratios = {(e["who"], e["precision"], e["layout"]): e.get("kdkit_speed_ratio") for e in entries}
    # kdkit: 200 tokens in 4 s. TRL in bf16: the median of 25 and 12.5 tokens per second.
    assert ratios == {
        ("kdkit", "bf16", "natural"): 1.0,
        ("trl-gkd", "bf16", "natural"): 2.67,
        ("trl-gkd", "fp32", "natural"): 2.5,
        ("trl-gkd", "bf16", "grouped"): 1.5,
        ("plain", "bf16", "natural"): None,
    }
    assert step.bounds(entries)["speed"] == {"ratio": 2.5, "bound": 3.0, "kept": False}
    assert [e["kdkit_memory_ratio"] for e in entries if e["who"] == "trl-gkd"] == [0.222, 0.333, 0.5]


def test_sorting_by_length_keeps_the_measured_rows(module):
    step = module("kd_step")
    rows = [row for part in steps(count=5) for row in part]
    natural, grouped = (step.lay_out(rows, name, 1, 3, 4, 25) for name in ("natural", "grouped"))
    assert natural[0] == grouped[0]
    assert {row.id for part in natural[1:] for row in part} == {row.id for part in grouped[1:] for row in part}
    padded = [sum(len(part) * max(len(row.ids) for row in part) for part in laid[1:]) for laid in (natural, grouped)]
    assert padded[1] < padded[0]
    assert all(len(row.ids) <= 25 for part in natural for row in part)


def test_equal_lengths_leave_nothing_to_pad(module):
    rows = [row for part in steps(count=8) for row in part]
    equal = module("kd_step").lay_out(rows, "equal", 1, 1, 4, 25)
    assert len({len(row.ids) for part in equal for row in part}) == 1
    assert all(row.targets for part in equal for row in part)


def test_sandbox_measures_speed_and_memory_and_writes_both_files(module, monkeypatch, tmp_path):
    bench = module("sandbox")
    for name, provider in (("bubblewrap", bench.bubblewrap), ("landlock", bench.landlock)):
        if not provider(1).probe().usable:
            pytest.skip(f"sandbox {name} does not work here")
    monkeypatch.setattr(
        sys, "argv", ["sandbox.py", "--tests", "8", "--flat", "20", "--out", str(tmp_path / "a/s.json")]
    )
    # At this size nothing is fast or flat; what counts is what is said about it.
    assert bench.main() in (0, 1)
    result = json.loads((tmp_path / "a" / "s.json").read_text())
    page = (tmp_path / "a" / "s.md").read_text()
    for name in ("bubblewrap", "landlock"):
        assert set(result["per_second"][name]) == {"trivial", "imports", "cpp"}
        assert result["memory"][name]["tests"] == 20
        assert min(result["memory"][name]["fork_servers_bytes"]) > 10**6
        assert f"| {name} | {result['per_second'][name]['trivial']:.0f} /s (bound " in page
    assert ("All bounds are kept." in page) is not bool(result["missed"])
    assert all(line in page for line in result["missed"])
