from __future__ import annotations

import json

import pytest
import yaml

from kdkit.api.slots import LOOKUP
from kdkit.api.specs import KINDS
from kdkit.host import Catalog
from kdkit.host.snippet import yaml_snippet

EVERY_KIND = """
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal
from pydantic import Field
from kdkit.api import *
from kdkit.api.artifacts import Model, Scores

class Colour(Enum):
    RED = "red"

class Inner(Params):
    share: float = Field(gt=0, lt=1)
    optional: int = 3

class Plain(Params):
    gamma: float = 2.0
    name: str = "on"

class Needy(Params):
    model: Ref[Model]
    rows: Ref[Dataset]
    scores: list[Ref[Scores]]
    models: dict[str, Ref[Model]]
    colour: Colour
    mode: Literal["fast", "slow"] | None
    file: Path
    anything: Any
    steps: int = Field(ge=16, multiple_of=8)
    odd: int = Field(gt=2)
    low: float = Field(lt=-1)
    negative: int = Field(le=0)
    rate: Annotated[float, Field(gt=0)]
    size: tuple[int, float]
    word: str = Field(min_length=6)
    several: list[int] = Field(min_length=2)
    flag: bool
    inner: Inner
    losses: OneOrMore[Weighted[Loss]]
    teacher: Component[Teacher]
    sampling: Sampling = Sampling(do_sample=True)

def none(*args):
    raise AssertionError("validation must not build")

PLAIN = dict(name="plain", summary="s", params=Plain)
NEEDY = dict(name="needy", summary="s", params=Needy)

@hookimpl
def kdkit_losses():
    yield LossSpec(**PLAIN, build=none)
    yield LossSpec(**NEEDY, build=none)
@hookimpl
def kdkit_rewards():
    yield RewardSpec(**PLAIN, build=none, range=(0.0, 1.0))
    yield RewardSpec(**NEEDY, build=none, range=(0.0, 1.0))
@hookimpl
def kdkit_datasets():
    yield DatasetSpec(**PLAIN, build=none)
    yield DatasetSpec(**NEEDY, build=none)
@hookimpl
def kdkit_teachers():
    yield TeacherSpec(**NEEDY, build=none, gives=frozenset({"text"}))
    yield TeacherSpec(**PLAIN, build=none, gives=frozenset({"text"}))
@hookimpl
def kdkit_quantizers():
    yield QuantizerSpec(**PLAIN, build=none)
    yield QuantizerSpec(**NEEDY, build=none)
@hookimpl
def kdkit_metrics():
    yield MetricSpec(**PLAIN, build=none, higher_is_better=True)
    yield MetricSpec(**NEEDY, build=none, higher_is_better=True)
@hookimpl
def kdkit_stages():
    yield StageSpec(**PLAIN, run=none, outputs={"model": Model})
    yield StageSpec(**NEEDY, run=none)
@hookimpl
def kdkit_rollouts():
    yield RolloutSpec(**PLAIN, build=none)
    yield RolloutSpec(**NEEDY, build=none)
@hookimpl
def kdkit_trackers():
    yield TrackerSpec(**PLAIN, build=none)
    yield TrackerSpec(**NEEDY, build=none)
@hookimpl
def kdkit_sandboxes():
    yield SandboxSpec(**PLAIN, build=none)
    yield SandboxSpec(**NEEDY, build=none)
"""
WHERE = {
    "loss": ("losses", 0),
    "reward": ("rewards", 0),
    "metric": ("metrics", 0),
    "tracker": ("track", 0),
    "dataset": ("data",),
    "teacher": ("teacher",),
    "quantizer": ("quantizer",),
    "rollout": ("rollout",),
    "sandbox": ("sandbox",),
}


@pytest.fixture
def everything(tmp_path, install, catalog) -> Catalog:
    install("kdkit-every", {"every_kind": EVERY_KIND})
    found = catalog()
    assert not found.broken
    return found


@pytest.mark.parametrize("uncommented", [False, True])
@pytest.mark.parametrize("name", ["plain", "needy"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_snippet_validates_as_it_stands_and_with_its_defaults_uncommented(kind, name, uncommented, everything):
    entry = everything.entry(kind, name)
    text = yaml_snippet(entry, everything)
    value = yaml.safe_load(text.replace("# ", "") if uncommented else text)
    for step in ("stages", name) if kind == "stage" else WHERE[kind]:
        value = value[step]
    assert value.pop("kind" if kind == "stage" else "use") == name
    params = entry.spec.params.model_validate_json(json.dumps(value), context={LOOKUP: everything})
    assert set(value) == {
        key for key, field in entry.spec.params.model_fields.items() if uncommented or field.is_required()
    }
    if uncommented and name == "plain":
        assert params == entry.spec.params()


def test_the_text(everything):
    assert yaml_snippet(everything.entry("loss", "plain"), everything) == (
        "losses:\n  - use: plain\n    # gamma: 2.0\n    # name: 'on'\n"
    )
    assert yaml_snippet(everything.entry("stage", "plain"), everything) == (
        "stages:\n  plain:\n    kind: plain\n    # gamma: 2.0\n    # name: 'on'\n"
    )


def test_nested_components_are_the_ones_that_ask_for_least(everything):
    text = yaml_snippet(everything.entry("loss", "needy"), everything)
    value = yaml.safe_load(text)["losses"][0]
    assert value["teacher"] == {"use": "plain"}
    assert value["losses"] == [{"use": "plain"}]
    assert "    # sampling: {do_sample: true}\n" in text


def test_an_ambiguous_component_is_written_with_its_distribution(install, catalog, loss_module):
    install("kdkit-a", {"snippet_a": loss_module()})
    install("kdkit-b", {"snippet_b": loss_module()})
    found = catalog()
    assert yaml_snippet(found.entries("loss")[1], found).startswith("losses:\n  - use: kdkit-b/focal\n")


def test_a_slot_without_any_installed_component(install, catalog):
    source = (
        "from kdkit.api import *\nclass P(Params):\n    sandbox: Component[Sandbox]\n@hookimpl\ndef kdkit_losses():\n"
        "    yield LossSpec(name='x', summary='s', params=P, build=print)\n"
    )
    install("kdkit-lone", {"lone": source})
    found = catalog()
    assert "sandbox: {use: NAME}" in yaml_snippet(found.entry("loss", "x"), found)
