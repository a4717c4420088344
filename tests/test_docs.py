from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from kdkit.api import Scheduled
from kdkit.api.hookspecs import HookSpecs
from kdkit.host import Catalog

ROOT = Path(__file__).parents[1]


def generator():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_pages_are_in_sync():
    pages = generator().pages()
    written = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "reference").glob("*.md")}
    assert written == pages, "run: make docs"


def test_every_built_in_component_and_parameter_is_documented():
    catalog = Catalog.discover(disable=["*"])
    text = "".join(generator().pages().values())
    for entry in catalog.entries():
        assert f"## {entry.name}\n" in text
        for name, field in entry.spec.params.model_fields.items():
            assert field.description, f"{entry.kind} {entry.name}: {name} has no text"


def test_no_text_is_lost_as_html():
    """``<think>`` in a text is a word, and a browser would show nothing."""
    outside = re.compile(r"```.*?```|(`+).*?\1|<!-- .*? -->", re.DOTALL)
    for name, page in generator().pages().items():
        assert re.findall(r"<[A-Za-z/!][^>]*>", outside.sub("", page)) == [], name


def test_every_hook_is_documented():
    page = generator().pages()["hooks.md"]
    for name in (name for name in vars(HookSpecs) if name.startswith("kdkit_")):
        section = page.partition(f"## {name}\n")[2].partition("\n## ")[0]
        assert f"def {name}(" in section
        assert section.rpartition("```\n")[2].strip() or "not run" in section, f"{name} has no text"


def test_every_command_and_option_is_documented():
    import typer.main

    from kdkit.cli.app import app

    page = generator().pages()["cli.md"]
    for path, command in generator().commands(typer.main.get_command(app), "kdkit"):
        section = page.partition(f"## {path}\n")[2].partition("\n## ")[0]
        assert command.help, path
        for parameter in command.params:
            documented = parameter.hidden or parameter.name == "help" or parameter.help
            assert documented, f"{path}: {parameter.name} has no text"
            for option in parameter.opts if parameter.param_type_name == "option" and not parameter.hidden else []:
                assert f"`{option}" in section or f" {option}" in section, f"{path} {option}"


def test_the_front_page_of_the_reference_names_every_component():
    page = generator().pages()["index.md"]
    for entry in Catalog.discover(disable=["*"]).entries():
        assert f"#{entry.name})" in page


def test_recipe_schema_is_in_sync():
    from kdkit.recipe.schema import recipe_schema

    written = json.loads((ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(recipe_schema(Catalog.discover(disable=["*"])))), "run: make docs"


# --- pages of methods -------------------------------------------------------------------------------------------------


def params_of(model: type[BaseModel]) -> Iterator[tuple[str, object]]:
    """Names and types of the parameters of a component, those of nested settings (``sampling``) included."""
    for name, field in model.model_fields.items():
        yield name, field.annotation
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from params_of(inner)


def known_to(page: str, text: str) -> tuple[dict[str, list[object]], set[str]]:
    """Parameters of the stage the page is about and of the components it names; names that may stand alone."""
    entries = Catalog.discover(disable=["*"]).entries()
    own = {page, *STAGES.get(page, ())}
    about = [entry for entry in entries if entry.name in own or (entry.kind == "loss" and f"`{entry.name}`" in text)]
    assert any(entry.name == page for entry in about), f"{page}.md is about no component"
    params: dict[str, list[object]] = {}
    for entry in about:
        for name, annotation in params_of(entry.spec.params):
            params.setdefault(name, []).append(annotation)
    for name, annotation in params_of(Scheduled.slot_fields()):
        params.setdefault(name, []).append(annotation)
    values = {str(value) for annotations in params.values() for a in annotations for value in literals(a)}
    return params, {*params, *values, *(entry.name for entry in entries), *logged(page), *FOREIGN.get(page, ())}


def literals(annotation: object) -> tuple[object, ...]:
    """What a parameter may be, where that is a short list; of a union, of all its members."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if annotation is bool:
        return (True, False)
    return tuple(value for inner in get_args(annotation) for value in literals(inner))


STAGES = {
    "gptq": ["quantize"],
    "forward-kl": ["distill", "cache-teacher"],
    "reverse-kl": ["distill", "minillm"],
    "jsd": ["distill"],
}
"""Stages that a page is about beside the component of its own name."""
FOREIGN = {
    "gptq": ["act_group_aware", "checkpoint_format", "gptq_v2", "quantization_config", "save_pretrained"],
}
"""What the programs call it that kdkit's files are read by."""
LOGGED = {
    "gptq": [],
    "forward-kl": [],
    "reverse-kl": [],
    "jsd": [],
    "minillm": ["policy/rollouts.py"],
    "grpo": ["policy/rollouts.py", "policy/grpo.py", "policy/buffer.py", "rewards.py", "loop.py"],
}


def logged(page: str) -> set[str]:
    """Names of values that a method logs beside those of its loss."""
    files = [ROOT / "kdkit" / "train" / file for file in LOGGED[page]]
    return {name for file in files for name in re.findall(r'"([a-z_]+)"', file.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("page", sorted(file.stem for file in (ROOT / "docs" / "methods").glob("*.md")))
def test_pages_of_methods_name_parameters_and_values_that_exist(page):
    text = (ROOT / "docs" / "methods" / f"{page}.md").read_text(encoding="utf-8")
    params, alone = known_to(page, text)
    spans = re.findall(r"`([^`\n]+)`", text)
    named = [span for span in spans if re.fullmatch(r"[a-z][a-z0-9_-]*", span)]
    settings = [found.groups() for span in spans if (found := re.fullmatch(r"([a-z0-9_]+): (\S+)", span))]
    assert len(named) > 12
    assert len(settings) >= 3
    assert {name for name in named if name not in alone} <= {"true", "false"}
    assert [name for name, _ in settings if name not in params] == []
    for name, value in settings:
        allowed = [str(v).lower() if isinstance(v, bool) else str(v) for a in params[name] for v in literals(a)]
        assert not allowed or value in allowed, f"{name}: {value}"
