"""benchmarks/gptq.py measures what its page says: the same rows for all, other documents for perplexity."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest

from kdkit.api import Model
from kdkit.testing.tiny import save_tiny_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("gptq")
    sys.modules.pop("gptq", None)


def words(text, **_options):
    """A tokenizer: every word is its own number."""
    return {"input_ids": [int(word) for word in text.split()]}


def test_rows_and_windows_come_from_different_documents(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "WINDOW", 8)
    documents = [list(range(100 * number, 100 * number + 5)) for number in range(20)]
    lines = [
        {"instruction": " ".join(map(str, ids[:2])), "context": "", "response": " ".join(map(str, ids[2:]))}
        for ids in documents
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    rows, windows = bench.token_rows(path, words, 4, 3)
    assert [len(row) for row in (*rows, *windows)] == [8] * 7
    first, second = ({token // 100 for row in part for token in row} for part in (rows, windows))
    assert not first & second
    with pytest.raises(SystemExit, match="too short"):
        bench.token_rows(path, words, 4, 30)


def entry(bench, case, seconds, perplexity):
    passes = [{"seconds": value, "cpu_seconds": value, "peak_bytes": 10**9} for value in seconds]
    return bench.summary(
        {"title": case.title, **vars(case), "bytes": 10**8, "perplexity": perplexity, "passes": passes}
    )


def test_targets_compare_the_defaults_of_both(bench):
    def found(seconds, perplexity):
        return bench.targets(
            [
                entry(bench, bench.Case("none"), [], 20.0),
                entry(bench, bench.Case("kdkit"), seconds, perplexity),
                entry(bench, bench.Case(bench.PEER), [90.0, 110.0], 30.0),
                entry(bench, bench.Case(bench.PEER, ordered=True), [10.0], 10.0),
                entry(bench, bench.Case(bench.PEER, group_size=32), [10.0], 10.0),
                entry(bench, bench.Case("kdkit", sym=False), [10.0], 10.0),
            ]
        )

    good, slow, worse = found([90.0, 120.0], 30.3), found([91.0], 30.0), found([50.0], 30.31)
    assert good["seconds"] == {"ratio": 1.0, "bound": 1.0, "kept": True}
    assert good["perplexity"]["kept"]
    assert not slow["seconds"]["kept"]
    assert slow["perplexity"]["kept"]
    assert worse["seconds"]["kept"]
    assert not worse["perplexity"]["kept"]
    assert bench.targets([entry(bench, bench.Case("kdkit"), [1.0], 30.0)]) == {}


def test_seconds_are_the_least_and_memory_the_most_of_the_passes(bench):
    passes = [{"seconds": s, "cpu_seconds": 2 * s, "peak_bytes": 3 * s} for s in (100.0, 80.0, 500.0)]
    found = bench.summary({"passes": passes})
    assert (found["seconds"], found["cpu_seconds"], found["peak_bytes"]) == (80.0, 160.0, 1500.0)


def test_each_is_asked_for_what_its_row_says(bench, tmp_path):
    """gptqmodel orders columns inside of groups and searches no grids, unless it is given kdkit's settings."""
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 3}')
    names = ("desc_act", "static_groups", "act_group_aware", "mse")
    found = {}
    for case in bench.CASES[1:]:
        facts = bench.Task(case, tmp_path, [[1]], tmp_path / "out").facts()
        assert (facts["sym"], facts["group_size"]) == (case.sym, case.group_size)
        assert (facts["bits"], facts["rows"], facts["damp_percent"], facts["blocks"]) == (4, [[1]], 0.05, 3)
        found.setdefault(f"{case.who} {bool(case.ordered)}", set()).add(tuple(facts[name] for name in names))
    assert found["kdkit False"] == found["gptqmodel True"] == {(True, True, False, 2.4)}
    assert found["gptqmodel False"] == {(False, False, True, 0.0)}


def test_perplexity_is_that_of_all_tokens_of_the_checkpoint(bench, tmp_path):
    import torch

    from kdkit.models.load import load_model
    from kdkit.models.quantized.checkpoint import write_checkpoint
    from kdkit.models.quantized.form import GptqFormat
    from kdkit.models.quantized.grid import GridSettings
    from kdkit.models.quantized.layers import quantizable
    from kdkit.models.quantized.linear import round_to_nearest

    windows = [list(range(40)), list(range(100, 109))]

    def expected(model):
        losses = []
        for window in windows:
            with torch.no_grad():
                logprobs = model(input_ids=torch.tensor([window])).logits[0].log_softmax(-1)
            losses += [-float(logprobs[place, token]) for place, token in enumerate(window[1:])]
        return math.exp(sum(losses) / len(losses))

    source = save_tiny_model(tmp_path / "source")
    plain = load_model(Model(path=source), dtype=torch.float32)
    layers = quantizable(plain, lm_head=False).items()
    made = {name: round_to_nearest(layer.weight, GridSettings(2, True, 0.0), 32) for name, layer in layers}
    form = GptqFormat.standard(bits=2, group_size=32, sym=True)
    write_checkpoint(source, tmp_path / "q", made, form, write_head=False)
    assert bench.perplexity(source, None, windows) == pytest.approx(expected(plain), rel=1e-5)
    for name, linear in made.items():
        plain.get_submodule(name).weight.data = linear.dequantized(torch.float32)
    assert bench.perplexity(source, tmp_path / "q", windows) == pytest.approx(expected(plain), rel=1e-5)


def test_the_page_has_a_row_for_every_case(bench):
    entries = [entry(bench, case, [] if case.who == "none" else [10.0], 30.0) for case in bench.CASES]
    settings = {"rows": 32, "windows": 24, "passes": 2}
    facts = {"torch": "2", bench.PEER: None}
    page = bench.page({"machine": facts, "settings": settings, "targets": bench.targets(entries), "cases": entries})
    assert len([line for line in page.splitlines() if line.startswith("| ")]) == len(bench.CASES) + 2
    assert "Seconds over gptqmodel's: 1.0 (bound 1.0, kept)." in page
    assert len({case.key for case in bench.CASES}) == len(bench.CASES)
