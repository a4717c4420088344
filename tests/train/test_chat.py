from __future__ import annotations

import pytest

from kdkit.api import DataError, Example, Message, ModelError
from kdkit.models.chat import ChatEncoder
from kdkit.testing.tiny import CHAT_TEMPLATE, tiny_tokenizer

PLAIN_CHATML = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + '<|endoftext|>' }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
HEADER_WITHOUT_PROMPT = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<|im_end|>' }}{% endfor %}"
FORGETS_EARLIER_TURNS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}{{ 'A:' }}"
    "{% else %}{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
PROMPT = (Message("system", "Be brief."), Message("user", "hi"))
TURNS = (Message("user", "a?"), Message("assistant", "b."), Message("user", "c?"))


def encoder(template: str | None = CHAT_TEMPLATE) -> ChatEncoder:
    return ChatEncoder(tiny_tokenizer(chat_template=template))


def learned_text(enc: ChatEncoder, example: Example) -> str:
    row = enc.training(example)
    return enc.tokenizer.decode([i for i, flag in zip(row.ids, row.learned, strict=True) if flag])


def whole_text(enc: ChatEncoder, example: Example) -> str:
    return enc.tokenizer.decode(list(enc.training(example).ids))


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PLAIN_CHATML])
def test_answer_and_closing_end_token_are_learned_and_nothing_else(template):
    enc = encoder(template)
    example = Example(id="1", prompt=PROMPT, completion="hello ñ")
    assert learned_text(enc, example) == "hello ñ<|im_end|>"
    assert whole_text(enc, example).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi")
    assert whole_text(enc, example).endswith("<|im_start|>assistant\nhello ñ<|im_end|>")


def test_training_starts_with_exactly_the_ids_that_generation_sees():
    enc = encoder()
    example = Example(id="1", prompt=PROMPT, completion="x")
    prompt = enc.prompt(example)
    row = enc.training(example)
    assert list(row.ids[: len(prompt)]) == prompt
    assert row.learned.index(True) == len(prompt)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PLAIN_CHATML, MISTRAL])
def test_every_assistant_turn_is_learned_when_asked(template):
    enc = encoder(template)
    example = Example(id="1", prompt=TURNS, completion="d.", every_turn=True)
    end = "<|endoftext|>" if template is MISTRAL else "<|im_end|>"
    space = " " if template is MISTRAL else ""
    assert learned_text(enc, example) == f"{space}b.{end}{space}d.{end}"
    last_only = Example(id="1", prompt=TURNS, completion="d.")
    assert learned_text(enc, last_only) == f"{space}d.{end}"
    assert whole_text(enc, example) == whole_text(enc, last_only)


def test_templates_that_cannot_mark_the_assistant_are_refused():
    example = Example(id="1", prompt=TURNS, completion="d.", every_turn=True)
    for template in (HEADER_WITHOUT_PROMPT, FORGETS_EARLIER_TURNS):
        with pytest.raises(ModelError, match="cannot mark the assistant's tokens"):
            encoder(template).training(example)
    with pytest.raises(ModelError, match="no chat template"):
        encoder(None).training(example)


def test_a_marked_template_that_rewrites_turns_uses_its_own_markers():
    marked = FORGETS_EARLIER_TURNS.replace(
        "{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}",
        "{{ m['role'] + ':' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}",
    )
    enc = encoder(marked)
    example = Example(id="1", prompt=TURNS, completion="d.", every_turn=True)
    assert learned_text(enc, example) == "d.<|im_end|>"


def test_raw_text_prompts_bypass_the_template_and_get_an_end_token():
    enc = encoder(None)
    example = Example(id="1", prompt="### Response:\n", completion="ok")
    assert whole_text(enc, example) == "### Response:\nok<|im_end|>"
    assert learned_text(enc, example) == "ok<|im_end|>"


def test_stop_ids_hold_the_template_end_even_when_the_tokenizer_ends_otherwise():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    assert ChatEncoder(tokenizer).stop_ids() == (256, 258)
    assert encoder(None).stop_ids() == (258,)


def test_rows_without_answer_or_prompt_are_named():
    with pytest.raises(DataError, match="example 7: the example has no completion"):
        encoder().training(Example(id="7", prompt=PROMPT))
    with pytest.raises(DataError, match="example 8: the prompt has no tokens"):
        encoder().prompt(Example(id="8", prompt=""))


def test_a_template_that_refuses_the_messages_is_one_error():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    with pytest.raises(ModelError, match="refused the messages: no system role"):
        encoder(template).prompt(Example(id="1", prompt=PROMPT))


def test_only_raw_text_prompts_get_the_tokenizers_own_special_tokens():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    enc = ChatEncoder(tokenizer)
    raw = enc.training(Example(id="1", prompt="q", completion="a"))
    assert raw.ids.count(256) == 1
    assert raw.ids[0] == 256
    assert list(raw.ids[:2]) == enc.prompt(Example(id="1", prompt="q"))
    chat = enc.training(Example(id="1", prompt=PROMPT, completion="a"))
    assert 256 not in chat.ids


def sentencepiece_like():
    """Metaspace with a dummy prefix, as in Llama 2: every text that is tokenised alone starts with a space."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    chars = ["▁", "\n", *"abcdefghijklmnopqrstuvwxyz[]/:.?", "▁g", "<s>", "</s>"]
    tokenizer = Tokenizer(BPE(vocab={c: i for i, c in enumerate(chars)}, merges=[("▁", "g")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = MISTRAL.replace("<|endoftext|>", "</s>").replace("INST", "inst")
    return fast


def test_a_dummy_prefix_is_not_put_before_the_answer():
    enc = ChatEncoder(sentencepiece_like())
    row = enc.training(Example(id="1", prompt=(Message("user", "hi"),), completion="good"))
    answer = enc.tokenizer.convert_ids_to_tokens([i for i, f in zip(row.ids, row.learned, strict=True) if f])
    assert answer == ["▁g", "o", "o", "d", "</s>"]
    raw = enc.training(Example(id="1", prompt="a:\n", completion="good"))
    answer = enc.tokenizer.convert_ids_to_tokens([i for i, f in zip(raw.ids, raw.learned, strict=True) if f])
    assert answer == ["g", "o", "o", "d", "</s>"]


def test_an_end_of_turn_that_has_no_name_still_stops_generation():
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE.replace("<|im_end|>", "<turn_end>"))
    tokenizer.add_tokens([AddedToken("<turn_end>", special=True)])
    assert ChatEncoder(tokenizer).stop_ids() == (258, 259)


@pytest.mark.parametrize("content", [" yo", "yo ", "yo"])
def test_an_answer_without_end_marker_gets_one_also_when_the_template_trims(content):
    turns = "{% for m in messages %}{{ '[' + m['role'] + '] ' + (m['content'] | trim) }}{% endfor %}"
    template = turns + "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    row = Example(id="1", prompt=(Message("user", "hi"),), completion=content)
    assert learned_text(encoder(template), row).strip() == "yo<|im_end|>"


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", 258)]
    )
    assert 258 not in ChatEncoder(tokenizer).prompt(Example(id="1", prompt="abc"))


def test_a_template_that_cannot_be_probed_serves_raw_text():
    enc = encoder("{{ raise_exception('no') }}")
    assert enc.stop_ids() == (258,)
    assert learned_text(enc, Example(id="1", prompt="q", completion="a")) == "a<|im_end|>"
