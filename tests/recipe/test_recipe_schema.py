from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from pretend_plugins import SPECS, PretendCatalog, PretendEntry

from kdkit.host import Catalog
from kdkit.recipe.nodes import plain
from kdkit.recipe.schema import recipe_schema
from kdkit.recipe.yaml import load_bytes

TRAIN = "stages: {t: {kind: train, model: ./m, data: {use: rows}, "
GOOD = [
    "stages: {a: {kind: make}}",
    "seed: 3\nrequires: [acme>=1]\nplugins: [./x.py]\ntrack: {use: board, top_k: 2}\nstages: {a: {kind: kdkit/make}}",
    "stages: {a: {kind: acme/other, anything: 1}}",
    "stages: {t: {kind: train, model: ./m, data: {use: rows, weight: 2}}}",
    "stages: {t: {kind: train, model: {from: a/b, keep_layers: [1]}, data: [{use: rows}]}}",
    TRAIN + "losses: [{use: soft-kl, weight: 1, top_k: auto}]}}",
    TRAIN + "losses: {use: mine, x: 1}}}",
    TRAIN + "rewards: [{use: correctness, sandbox: {use: auto}}]}}",
    TRAIN + "losses: ['${vars.l}'], tags: ['${vars.n}'], sampling: {top_p: '${vars.n}'}, bits: '${vars.n}'}}",
    "vars: {d: {use: rows}}\nstages: {t: {kind: train, model: '${vars.m}', data: '${vars.d}', max_steps: '${vars.n}'}}",
    "stages: {s: {kind: score, models: {a: '${stages.t.model}'}, data: {use: rows, split: test}}}",
    "stages: {s: {kind: score, models: {a: ./m}, data: {x: {use: rows}}}}",
    "stages: {s: {kind: table, scores: [a/b], extra: {use: rows}}, u: {kind: table, scores: [a/b], extra: ./x}}",
    "extends: base.yaml\nstages: {t: {max_steps: 3, losses: [{use: soft-kl}]}}",
]
BAD = [
    "stages: {}",
    "seed: 1",
    "stages: {1a: {kind: make}}",
    "name: ../x\nstages: {a: {kind: make}}",
    "kdkit: 2\nstages: {a: {kind: make}}",
    "sede: 1\nstages: {a: {kind: make}}",
    "stages: {a: {}}",
    "stages: {a: {kind: make, x: 1}}",
    "stages: {t: {kind: train, data: {use: rows}}}",
    "stages: {t: {kind: train, model: ./m, data: {split: train}}}",
    "stages: {t: {kind: train, model: ./m, data: {use: rows, splt: 1}}}",
    "stages: {t: {kind: train, model: {from: a/b, keep: 1}, data: {use: rows}}}",
    TRAIN + "max_steps: '1'}}",
    TRAIN + "max_steps: 'a${vars.n}'}}",
    TRAIN + "losses: [{use: soft-kl, temperature: 0}]}}",
    TRAIN + "losses: [{use: soft-kl, weight: 0}]}}",
    TRAIN + "rewards: [{use: correctness}]}}",
    "track: [{use: board, weight: 1}]\nstages: {a: {kind: make}}",
]


def read(text: str) -> Any:
    head = {} if text.startswith("extends") else {"kdkit": 1, "name": "x"}
    return head | plain(load_bytes(text.encode(), "r.yaml")[0])


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return recipe_schema(PretendCatalog())


def accepts(schema: dict[str, Any], text: str) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(read(text))


def test_it_is_a_schema(schema):
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)


def test_the_schema_of_the_built_in_components_is_one_and_is_deterministic():
    schema = recipe_schema(Catalog.discover(disable=["*"]))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema == recipe_schema(Catalog.discover(disable=["*"]))
    assert accepts(schema, "stages: {a: {kind: unknown-kind, x: 1}}")


@pytest.mark.parametrize("text", GOOD)
def test_good_recipes_are_accepted(schema, text):
    jsonschema.Draft202012Validator(schema).validate(read(text))


@pytest.mark.parametrize("text", BAD)
def test_mistakes_that_an_editor_can_see_are_refused(schema, text):
    assert not accepts(schema, text)


def test_a_recipe_needs_its_head_unless_it_extends_another(schema):
    validator = jsonschema.Draft202012Validator(schema)
    assert not validator.is_valid({"name": "x", "stages": {"a": {"kind": "make"}}})
    assert not validator.is_valid({"kdkit": 1, "stages": {"a": {"kind": "make"}}})
    assert validator.is_valid({"extends": "base.yaml", "name": "x"})


def test_editors_learn_names_summaries_defaults_and_documentation(schema):
    choices = schema["$defs"]["weighted-loss"]["properties"]["use"]["anyOf"]
    assert {"const": "soft-kl", "description": "KL"} in choices
    temperature = schema["$defs"]["weighted-loss.soft-kl"]["properties"]["temperature"]
    assert (temperature["description"], temperature["default"]) == ("Softmax temperature.", 1.0)
    assert list(schema["$defs"]["stage.train"]["properties"])[:3] == ["kind", "model", "data"]


def test_every_reference_in_the_schema_leads_somewhere_and_nothing_is_left_over(schema):
    used = set()

    def visit(part):
        if isinstance(part, dict):
            used.update({part["$ref"]} if isinstance(part.get("$ref"), str) else set())
            part = list(part.values())
        for item in part if isinstance(part, list) else ():
            visit(item)

    visit(schema)
    assert {ref.removeprefix("#/$defs/") for ref in used} == set(schema["$defs"])


def test_a_short_name_of_two_plugins_needs_the_long_one():
    class TwoPlugins(PretendCatalog):
        def entries(self, kind=None):
            loss = next(spec for spec in SPECS if spec.name == "hard")
            return (*super().entries(kind), PretendEntry("loss", "soft-kl", loss, dist="acme"))

    schema = recipe_schema(TwoPlugins())
    stage = "stages: {t: {kind: train, model: ./m, data: {use: rows}, losses: {use: NAME, temperature: 1}}}"
    assert accepts(schema, stage.replace("NAME", "soft-kl"))
    assert accepts(schema, stage.replace("NAME", "kdkit/soft-kl"))
    assert not accepts(schema, stage.replace("NAME", "acme/soft-kl"))
