from __future__ import annotations

import pytest
import yaml

from kdkit.models.card import ModelCard, render_card


def front_matter(text: str) -> dict[str, object]:
    empty, head, _ = text.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(head)


def test_front_matter_is_what_the_hub_reads():
    text = render_card(ModelCard(name="m", summary="s", base_model="Qwen/Qwen2.5-0.5B", licence="Apache-2.0"))
    assert front_matter(text) == {
        "base_model": "Qwen/Qwen2.5-0.5B",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["kdkit", "distillation"],
        "license": "apache-2.0",
    }


def test_a_known_name_becomes_its_hub_id_and_licence():
    head = front_matter(render_card(ModelCard(name="m", summary="s", base_model="smollm2-135m-instruct")))
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert head["license"] == "apache-2.0"


@pytest.mark.parametrize("base", ["./models/mine", "/abs/path", "${stages.sft.model}"])
def test_a_local_base_is_not_claimed_to_be_on_the_hub(base):
    text = render_card(ModelCard(name="m", summary="s", base_model=base))
    assert front_matter(text).keys() == {"library_name", "pipeline_tag", "tags"}
    assert base in text
    assert "licence of the base model is not known" in text


def test_facts_are_a_table():
    card = ModelCard(
        name="Tiny: student",
        summary="Distilled.",
        base_model="a/b",
        teacher="c/d",
        licence="mit",
        facts={"parameters": 1234567, "objective": "0.5 * a | b\nsecond", "seed": 17},
    )
    text = render_card(card)
    for row in ("| teacher | c/d |", "| parameters | 1,234,567 |", r"| objective | 0.5 * a \| b second |"):
        assert row in text
    assert "# Tiny: student" in text
    assert "is not known" not in text
