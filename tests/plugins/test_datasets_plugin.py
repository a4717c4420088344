from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kdkit.api import DatasetSpec
from kdkit.plugins.datasets import plugin
from kdkit.plugins.datasets.options import is_hub_id

SPECS = {spec.name: spec for spec in plugin.kdkit_datasets()}


def test_names_and_kinds():
    assert set(SPECS) == {"dolly", "jsonl", "instructions", "bugnet", "pytorrent", "codeforces", "io-problems", "mbpp"}
    assert all(isinstance(spec, DatasetSpec) for spec in SPECS.values())
    assert SPECS["instructions"].rows == "prompt-only"


@pytest.mark.parametrize("name", SPECS)
def test_every_parameter_is_documented(name):
    params = SPECS[name].params
    assert params.__doc__
    assert {field for field, info in params.model_fields.items() if not info.description} == set()


@pytest.mark.parametrize("name", SPECS)
def test_built_component_has_a_sample(name):
    given = {"source": "./absent.jsonl"} if name == "jsonl" else {}
    loader = SPECS[name].build(SPECS[name].params.model_validate_json(json.dumps(given)))
    rows = loader.sample()
    assert len(rows.examples) >= 8
    assert len({example.id for example in rows.examples}) == len(rows.examples)
    assert rows.counts["broken"] == 0
    assert list(loader.sample().examples) == list(rows.examples)
    answers = [example.completion for example in rows.examples]
    assert all(answer is None for answer in answers) if SPECS[name].rows == "prompt-only" else all(answers)


def test_the_plugin_module_is_light():
    code = (
        "import sys, kdkit.plugins.datasets.plugin;"
        "print(sorted({'torch', 'transformers', 'datasets', 'accelerate', 'pyarrow', 'jinja2'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("text", ["org/name", "a.b-c/d_e.f"])
def test_hub_ids(text):
    assert is_hub_id(text)


@pytest.mark.parametrize("text", ["./a/b", "../a", "/a", "~/a", "~x/y", "name", "a/b/c", "a/", "/", "", None])
def test_no_hub_ids(text):
    assert not is_hub_id(text)
