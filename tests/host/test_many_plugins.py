"""Fifty plugins, five of them broken: what benchmarks/plugins_list.py measures is a listing that is right."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("plugins_list")
    sys.modules.pop("plugins_list", None)


def kdkit(site: Path, *arguments: str, then: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.argv = ['kdkit', *{arguments!r}]\nfrom kdkit.cli.app import main\n"
    code += f"try: main()\nfinally: {then or 'pass'}"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)])}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_the_broken_ones_are_named_and_the_others_listed(bench, tmp_path):
    broken = bench.install(tmp_path, 50)
    done = kdkit(tmp_path, "plugins", "list", then="print(sorted(m for m in sys.modules if m.endswith('.heavy')))")
    assert done.returncode == 0, done.stderr
    bench.check(done.stdout, 50, broken)
    assert done.stdout.splitlines()[-1] == "[]", "nothing that a component is made of is imported"
    reasons = [line.partition("): ")[2] for line in done.stdout.splitlines() if line.startswith("broken: ")]
    wanted = ["a_module_that_nobody_has", "no hook 'kdkit_xmetrics'", "catalogue", "ValueError: no", "needs kdkit>=99"]
    for reason, words in zip(reasons, wanted, strict=True):
        assert words in reason


def test_json_has_all_of_them(bench, tmp_path):
    broken = bench.install(tmp_path, 12)
    found = json.loads(kdkit(tmp_path, "plugins", "list", "--json").stdout)
    assert [item["dist"] for item in found["broken"]] == sorted(broken)
    own = {entry["dist"] for entry in found["components"]} - {"kdkit"}
    assert own == {f"kdkit-plugin-{number}" for number in range(7)}


def test_the_check_notices_a_listing_that_lacks_something(bench, tmp_path):
    broken = bench.install(tmp_path, 8)
    text = kdkit(tmp_path, "plugins", "list").stdout
    bench.check(text, 8, broken)
    with pytest.raises(AssertionError):
        bench.check(text.replace("kdkit-plugin-1 1.0", "gone"), 8, broken)
    with pytest.raises(AssertionError):
        bench.check(text.replace("broken: kdkit-plugin-7", ""), 8, broken)


def test_recorded_figures_are_of_this_benchmark(bench):
    found = json.loads(bench.RESULT.read_text(encoding="utf-8"))
    assert (found["plugins"], found["broken"]) == (bench.COUNT, len(bench.BROKEN)) == (50, 5)
    assert found["cpu_s"]["kdkit plugins list, 50 plugins"]["median"] < found["bound_s"] == 1.0
