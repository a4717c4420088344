from __future__ import annotations

import json
from collections import Counter

import pytest

from kdkit.api import Component, DataError, Dataset, EnvironmentUnmet, Message, Ref
from kdkit.api.slots import Found
from kdkit.plugins.datasets.dolly import DollyLoader
from kdkit.plugins.datasets.instructions import InstructionsLoader
from kdkit.plugins.datasets.options import CATEGORIES, Decontaminate
from kdkit.plugins.datasets.plugin import DollyParams, InstructionsParams, kdkit_datasets
from kdkit.plugins.datasets.prompts import alpaca_prompt


def params(**given) -> DollyParams:
    return DollyParams.model_validate_json(json.dumps(given, default=str))


def load(ctx, source, **given):
    return DollyLoader(params(source=str(source), **{"split": "all", **given})).load(ctx)


@pytest.fixture
def file(tmp_path):
    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


PLAIN = {"instruction": "Name a bird.", "context": "", "response": "An owl.", "category": "open_qa"}
WITH_CONTEXT = {"instruction": "Who?", "context": "Ana sings.", "response": "Ana.", "category": "closed_qa"}


def only(rows):
    (example,) = rows.examples
    return example


def test_chat_prompts(load_context, file):
    assert only(load(load_context, file(PLAIN))).prompt == (Message("user", "Name a bird."),)
    example = only(load(load_context, file(WITH_CONTEXT), system="Be brief."))
    assert example.prompt == (Message("system", "Be brief."), Message("user", "Who?\n\nAna sings."))
    assert (example.completion, example.category, example.references) == ("Ana.", "closed_qa", ())
    assert example.targets == ("Ana.",)


def test_alpaca_prompts(load_context, file):
    assert only(load(load_context, file(PLAIN), prompt_style="alpaca")).prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a bird.\n\n### Response:\n"
    )
    spanish = only(load(load_context, file(WITH_CONTEXT), prompt_style="alpaca", language="es")).prompt
    assert spanish.endswith("\n\n### Instrucción:\nWho?\n\n### Entrada:\nAna sings.\n\n### Respuesta:\n")
    assert "###" not in spanish.split("\n\n")[0]
    assert "Entrada" not in only(load(load_context, file(PLAIN), prompt_style="alpaca", language="es")).prompt


def test_braces_in_rows_are_only_text(load_context, file):
    row = {**WITH_CONTEXT, "instruction": "What is {x}?", "context": "{context} {{ 7 * 7 }} {0}"}
    assert "What is {x}?\n\n### Input:\n{context} {{ 7 * 7 }} {0}\n" in alpaca_prompt(
        row["instruction"], row["context"], "en"
    )
    template = file(name="t.jinja")
    template.write_text("{{ instruction }}|{{ context }}")
    example = only(load(load_context, file(row), prompt_style="template", template=template))
    assert example.prompt == "What is {x}?|{context} {{ 7 * 7 }} {0}"


def test_template_keeps_its_final_newline(load_context, file, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("[{{ category }}] {{ instruction }}{% if context %}\n> {{ context }}{% endif %}\n")
    example = only(load(load_context, file(WITH_CONTEXT), prompt_style="template", template=template))
    assert example.prompt == "[closed_qa] Who?\n> Ana sings.\n"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{{ instruction", r"t\.jinja:1: is no Jinja template: "),
        ("ok\n{% if %}", r"t\.jinja:2: is no Jinja template: "),
        ("{{ question }}", r"t\.jinja: cannot be rendered: 'question' is undefined; allowed: instruction, context, c"),
        ("{{ instruction.__class__.__mro__[1].__subclasses__() }}", r"t\.jinja: cannot be rendered: access to attr"),
        ("{{ 1 // 0 }}", r"t\.jinja: cannot be rendered: "),
        ("{{ instruction + 3 }}", r"t\.jinja: cannot be rendered: "),
        ("{% include '/etc/hostname' %}", r"t\.jinja: cannot be rendered: "),
        ("{% for i in range(10 ** 9) %}{{ i }}{% endfor %}", r"t\.jinja: cannot be rendered: Range too big"),
        (" \n{% if false %}x{% endif %}", r"t\.jinja: renders to an empty prompt"),
    ],
)
def test_template_errors_are_one_line_and_never_skipped(load_context, file, tmp_path, text, error):
    template = tmp_path / "t.jinja"
    template.write_text(text)
    with pytest.raises(DataError, match=error) as raised:
        load(load_context, file(PLAIN), prompt_style="template", template=template, on_error="skip")
    assert "\n" not in str(raised.value)


def test_template_file_errors(load_context, file, tmp_path):
    with pytest.raises(DataError, match="no such template"):
        load(load_context, file(PLAIN), prompt_style="template", template=tmp_path / "absent")
    with pytest.raises(EnvironmentUnmet, match="the template cannot be read"):
        load(load_context, file(PLAIN), prompt_style="template", template=tmp_path)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="the template is not UTF-8"):
        load(load_context, file(PLAIN), prompt_style="template", template=tmp_path / "latin")


def test_minillm_columns_and_several_references(load_context, file):
    row = {"topic": "t1", "instruction": "Name a bird.", "input": "", "output": ["Owl", "Crow"], "prompt": "Below ..."}
    example = only(load(load_context, file(row)))
    assert (example.completion, example.references, example.category) == ("Owl", ("Owl", "Crow"), "t1")
    single = only(load(load_context, file({**row, "output": ["Owl"]})))
    assert (single.completion, single.references) == ("Owl", ())


def test_the_identity_baseline_says_the_context_or_else_the_instruction(load_context, file):
    for style in ("chat", "alpaca"):
        assert only(load(load_context, file(PLAIN), prompt_style=style)).echo == "Name a bird."
        assert only(load(load_context, file(WITH_CONTEXT), prompt_style=style)).echo == "Ana sings."
    assert all(example.echo for example in instructions(load_context, split="all").examples)


SPANISH = {
    "instruction": "\ufeff¿Cuándo nació Ñusta?",
    "context": "\ufeffÑusta nació en 1498.",
    "response": "En 1498.",
    "category": "closed_qa",
    "instruction_original_en": "When was Ñusta born?",
    "context_original_en": "Ñusta was born in 1498.",
    "response_original_en": "In 1498.",
    "id": 7,
}


def test_spanish_rows_of_the_multilingual_schema(load_context, file):
    path = file(SPANISH, {**SPANISH, "instruction": "¿Qué?", "context": "", "category": "open_qa", "id": 8})
    both = load(load_context, path, language="es", prompt_style="alpaca").examples
    assert sorted(example.category for example in both) == ["closed_qa", "open_qa"]
    example = only(load(load_context, path, language="es", prompt_style="alpaca", categories=["closed_qa"]))
    assert "\n\n### Instrucción:\n¿Cuándo nació Ñusta?\n\n### Entrada:\nÑusta nació en 1498.\n" in example.prompt
    assert (example.completion, example.echo) == ("En 1498.", "Ñusta nació en 1498.")
    assert "born" not in example.prompt
    older = {key.replace("_original_en", "_en"): value for key, value in SPANISH.items() if key != "id"}
    assert only(load(load_context, file(older), language="es", prompt_style="alpaca")) == example


@pytest.mark.parametrize(("dedup", "kept"), [("none", 4), ("exact", 2), ("prompt", 1)])
def test_duplicates(load_context, file, dedup, kept):
    rows = [PLAIN, PLAIN, {**PLAIN, "response": "AN  OWL."}, {**PLAIN, "response": "A crow."}]
    found = load(load_context, file(*rows), dedup=dedup)
    assert (len(found.examples), found.counts.get("duplicate", 0)) == (kept, 4 - kept)


def test_absent_or_null_context_and_category_are_empty(load_context, file):
    for extra in ({}, {"context": None, "category": None}):
        example = only(load(load_context, file({"instruction": "A?", "response": "B", **extra})))
        assert (example.prompt, example.category) == ((Message("user", "A?"),), "")


def test_parts_and_ids_do_not_depend_on_the_prompt_style(load_context, file):
    path = file(*({**PLAIN, "instruction": f"Name bird {n}."} for n in range(60)))
    styles = [{}, {"prompt_style": "alpaca"}, {"system": "Be brief."}, {"language": "es"}]
    ids = [[e.id for e in load(load_context, path, split="test", test_fraction=0.4, **s).examples] for s in styles]
    assert ids[0]
    assert all(other == ids[0] for other in ids)


def test_the_same_words_with_and_without_a_context_are_in_one_part(load_context, file):
    both = [
        {**PLAIN, "instruction": f"Name bird {n}.", "context": f"Or {n}."}
        if with_context
        else {**PLAIN, "instruction": f"Name bird {n}.\n\nOr {n}.", "response": "A crow."}
        for n in range(100)
        for with_context in (True, False)
    ]
    parts = [
        load(load_context, file(*both), split=part, test_fraction=0.4).examples
        for part in ("train", "validation", "test")
    ]
    prompts = [{example.prompt for example in part} for part in parts]
    assert all(prompts)
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert len(load(load_context, file(*both)).examples) == 200


def test_what_a_template_leaves_out_makes_no_prompt_of_two_parts(load_context, file, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ category }}: {{ instruction }}")
    rows = [
        {**PLAIN, "instruction": f"Name bird {n % 40}.", "context": f"C{n}", "response": f"Owl {n}."}
        for n in range(120)
    ]
    given = {"prompt_style": "template", "template": template, "test_fraction": 0.3}
    parts = [load(load_context, file(*rows), split=part, **given) for part in ("train", "validation", "test")]
    prompts = [{example.prompt for example in part.examples} for part in parts]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert parts[0].counts["shared-with-other-split"] > 0
    # The template shows the category, so that two categories are two rows.
    twice = [PLAIN, {**PLAIN, "category": "brainstorming"}]
    for order in (twice, twice[::-1]):
        found = load(load_context, file(*order), prompt_style="template", template=template).examples
        assert {e.prompt for e in found} == {"open_qa: Name a bird.", "brainstorming: Name a bird."}


def test_which_category_a_copy_has_does_not_depend_on_the_order(load_context, file):
    twice = [PLAIN, {**PLAIN, "category": "brainstorming"}]
    assert len({only(load(load_context, file(*order))).category for order in (twice, twice[::-1])}) == 1


def test_a_byte_order_mark_is_no_text(load_context, file):
    row = {**WITH_CONTEXT, "context": "\ufeffAna\ufeff sings.", "instruction": "\ufeffWho?"}
    assert only(load(load_context, file(row))).prompt == (Message("user", "Who?\n\nAna\ufeff sings."),)


def test_dropped_rows_are_counted_by_reason(load_context, file):
    rows = load(
        load_context,
        file(PLAIN, PLAIN, WITH_CONTEXT, {**PLAIN, "instruction": " "}, {**PLAIN, "response": "\n"}, {"response": "x"}),
        categories=["open_qa", "summarization"],
        on_error="skip",
    )
    assert rows.counts == {
        "read": 6,
        "kept": 1,
        "broken": 1,
        "duplicate": 1,
        "other-category": 1,
        "empty-prompt": 1,
        "empty-completion": 1,
    }
    (line,) = load_context.lines
    assert "skipped 1 broken rows; the first: " in line
    assert "rows.jsonl:6: has no 'instruction' (columns: response)" in line


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"instruction": None}, "has no 'instruction' (columns: category, context, instruction, response)"),
        ({"instruction": 3}, "'instruction' is a number, not text"),
        ({"context": ["a"]}, "'context' is a list, not text"),
        ({"response": None}, "has no 'response' (columns: category, context, instruction, response)"),
        ({"response": {"a": 1}}, "'response' is an object, not text"),
        ({"response": []}, "'response' is an empty list"),
        ({"response": ["a", 1]}, "'response' is a list of other things than texts"),
        ({"category": True}, "'category' is true, not text"),
        ({"output": "B"}, "has both 'response' and 'output'"),
        ({"input": "B"}, "has both 'context' and 'input'"),
        ({"response": "\ud800"}, "'response' holds half of a surrogate pair"),
    ],
)
def test_broken_rows_name_file_and_line(load_context, file, change, what):
    path = file(PLAIN, {**WITH_CONTEXT, **change})
    with pytest.raises(DataError) as error:
        load(load_context, path)
    assert str(error.value) == f"{path}:2: {what}; mend the row, or set on_error: skip"


def test_sources_of_the_languages():
    assert str(params().source) == "databricks/databricks-dolly-15k"
    assert str(params(language="es").source) == "argilla/databricks-dolly-15k-curated-multilingual"
    assert str(params(language="es", source="./own.jsonl").source) == "./own.jsonl"


@pytest.mark.parametrize(
    ("given", "loc", "message"),
    [
        ({"categories": ["open_qa", "maths"]}, ("categories", 1), "'creative_writing'"),
        ({"categories": []}, ("categories",), "at least 1 item"),
        ({"language": "fr"}, ("language",), "'en' or 'es'"),
        ({"prompt_style": "template"}, ("template",), "prompt_style: template needs a Jinja file here"),
        ({"template": "t.jinja"}, ("template",), "with prompt_style: template only"),
        ({"prompt_style": "alpaca", "system": "x"}, ("system",), "with prompt_style: chat only"),
        ({"source": "./x.jsonl", "hub_split": "es"}, (), "hub_split: for a Hub id only, and ./x.jsonl is none"),
        ({"source": "${stages.gen.data}", "config": "a", "revision": "b"}, (), "config, revision: for a Hub id only"),
        ({"pormpt_style": "chat"}, ("pormpt_style",), "Extra inputs are not permitted"),
    ],
)
def test_parameters_that_make_no_sense(given, loc, message):
    with pytest.raises(ValueError, match="DollyParams") as error:
        params(**given)
    (problem,) = error.value.errors()
    assert problem["loc"] == loc
    assert message in problem["msg"]


@pytest.mark.parametrize("language", ["en", "es"])
def test_sample(language):
    rows = DollyLoader(params(language=language, prompt_style="alpaca", categories=["open_qa"], max_rows=1)).sample()
    assert len(rows.examples) == 12
    assert {example.category for example in rows.examples} == set(CATEGORIES)
    heading = {"en": "### Response:\n", "es": "### Respuesta:\n"}[language]
    assert all(example.prompt.endswith(heading) and example.completion for example in rows.examples)


def instructions(ctx, **given):
    return InstructionsLoader(InstructionsParams.model_validate_json(json.dumps(given))).load(ctx)


def test_instructions(load_context):
    rows = instructions(load_context, split="all")
    assert len(rows.examples) == 480
    assert Counter(example.category for example in rows.examples) == dict.fromkeys(CATEGORIES, 60)
    assert all(example.completion is None and example.targets == () for example in rows.examples)
    by_id = {example.id: example for example in rows.examples}
    assert by_id["open_qa-002"].prompt == (Message("user", "Why does ice float on water? Explain in two sentences."),)


def test_instructions_splits_categories_and_styles(load_context):
    parts = [instructions(load_context, split=name).examples for name in ("train", "validation", "test")]
    assert sum(map(len, parts)) == 480
    assert all(parts)
    some = instructions(load_context, categories=["closed_qa"], prompt_style="alpaca", split="all")
    assert some.counts["other-category"] == 420
    assert all("\n### Input:\n" in example.prompt for example in some.examples)


def test_instructions_sample():
    rows = InstructionsLoader(InstructionsParams(categories=["open_qa"])).sample()
    assert Counter(example.category for example in rows.examples) == dict.fromkeys(CATEGORIES, 2)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["dev", "valid"])
def test_alpaca_is_what_minillm_was_trained_on(shared_data, load_context, name):
    path = shared_data / f"dolly_en/minillm/dolly/{name}.jsonl"
    rows = load(load_context, path, prompt_style="alpaca", on_error="skip")
    published = {json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").split("\n") if line}
    mine = {example.prompt for example in rows.examples}
    assert rows.counts["broken"] == 0
    assert mine <= published
    assert len(mine) >= 0.99 * len(published)


@pytest.mark.shared
def test_real_dolly(shared_data, load_context):
    rows = load(load_context, shared_data / "dolly_en/databricks-dolly-15k.partial.jsonl")
    assert rows.counts["read"] == 4410
    assert rows.counts["broken"] == 0
    assert sum(rows.counts.values()) == 2 * 4410
    assert rows.counts["kept"] > 4390
    assert {example.category for example in rows.examples} == set(CATEGORIES)
    parts = {
        name: load(load_context, shared_data / "dolly_en/databricks-dolly-15k.partial.jsonl", split=name).examples
        for name in ("train", "validation", "test")
    }
    assert sum(map(len, parts.values())) == rows.counts["kept"]
    assert 150 < len(parts["test"]) < 300
    subset = load(load_context, shared_data / "dolly_en/databricks-dolly-15k.exact387.jsonl", split="test").examples
    assert {example.id for example in subset} <= {example.id for example in parts["test"]}


@pytest.mark.shared
def test_real_spanish_schema(shared_data, load_context):
    rows = load(load_context, shared_data / "dolly_es/xquad_es_in_dolly_multilingual_schema.jsonl", language="es")
    assert rows.counts["broken"] == 0
    assert rows.counts["kept"] > 1180
    assert all(example.echo and not example.echo.startswith("\ufeff") for example in rows.examples)
    assert not any(message.content.startswith("\ufeff") for e in rows.examples for message in e.prompt)


@pytest.mark.shared
def test_real_test_rows_are_taken_out_of_the_training_rows(shared_data, load_context):
    source = shared_data / "dolly_en/databricks-dolly-15k.partial.jsonl"
    valid = shared_data / "dolly_en/minillm/dolly/valid.jsonl"
    given = DollyParams.model_validate(
        {
            "source": Ref(Dataset, str(source)),
            "split": "all",
            "decontaminate": Decontaminate.model_construct(against=[component(source=str(valid))], ngram=13),
        }
    )
    rows = DollyLoader(given).load(load_context)
    # 500 of the rows are the evaluation set itself, under other column names.
    assert 480 < rows.counts["contaminated"] < 700
    left = {example.prompt for example in rows.examples}
    assert not left & {example.prompt for example in load(load_context, valid).examples}


def component(**given):
    spec = next(spec for spec in kdkit_datasets() if spec.name == "dolly")
    return Component("dataset", Found(spec, "dolly", "1", "here"), params(split="all", **given))


@pytest.mark.shared
def test_real_super_natural_instructions(shared_data, load_context):
    rows = load(load_context, shared_data / "eval_sets/sinst/11_/valid.jsonl")
    assert rows.counts["broken"] == 0
    assert max(len(example.references) for example in rows.examples) > 1
    assert all(example.completion == example.targets[0] for example in rows.examples)
