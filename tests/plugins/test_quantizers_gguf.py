from __future__ import annotations

from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from gguf_models import CHAT, HARD, Context, byte_tokenizer, export, model_of, piece_tokenizer, save, spm, tokenizer_for
from tokenizers import pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from kdkit.api.errors import EnvironmentUnmet, ModelError, Stopped
from kdkit.models import gguf_import
from kdkit.models.gguf_import import import_gguf
from kdkit.models.pretrained import quiet
from kdkit.plugins.quantizers import gguf_export
from kdkit.plugins.quantizers.gguf_export_splits import split_rule
from kdkit.plugins.quantizers.gguf_export_tokenizer import chat_template
from kdkit.plugins.quantizers.gguf_plugin import GGUF, GgufParams
from kdkit.testing.conformance import QuantizerConformance

ROWS = 420
IDS = torch.arange(3, 35).unsqueeze(0)
READABLE = ("llama", "qwen2", "gemma2", "gemma3_text")
"""transformers reads no GGUF of Gemma 1."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Makes a saved model of a family once."""
    made = {}

    def make(kind, **changes):
        key = kind, *sorted(changes.items())
        if key not in made:
            path = tmp_path_factory.mktemp("source") / "model"
            made[key] = save(model_of(kind, ROWS, **changes), tokenizer_for(kind), path)
        return made[key]

    return make


def read_back(file):
    with quiet():
        return AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )


def fields(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def tensors(file):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def halved(model):
    """The model with every matrix rounded to float16."""
    model.load_state_dict(
        {name: value.half().float() if value.dim() > 1 else value for name, value in model.state_dict().items()}
    )
    return model


class TestQ8(QuantizerConformance):
    tolerance = 0.1

    @pytest.fixture
    def source(self, tmp_path):
        return save(model_of("llama", ROWS), tokenizer_for("llama"), tmp_path / "source")

    def build(self):
        return GGUF.build(GgufParams())


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_hidden_layers": 1}),
        ("qwen2", {"num_key_value_heads": 1}),
        ("gemma2", {}),
        ("gemma3_text", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_f16_is_the_model_itself(kind, changes, sources, tmp_path):
    source = sources(kind, **changes)
    file, info = export(source, tmp_path / "out", type="F16")
    model = halved(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    loaded = read_back(file)
    assert loaded.config.tie_word_embeddings is model.config.tie_word_embeddings
    theirs = loaded.state_dict()
    for name, value in model.state_dict().items():
        # A norm is stored with one added for Gemma, and float32 drops a last bit on the way there and back.
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=2e-7 if "norm" in name else 0, msg=name)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert (info.bits, info.group_size, info.bytes_on_disk) == (16, 1, file.stat().st_size)


def test_biases_of_llama_in_the_words_of_the_format(sources, tmp_path):
    """transformers reads a llama without its biases."""
    source = sources("llama", attention_bias=True, mlp_bias=True)
    file, _ = export(source, tmp_path / "out", type="Q4_0")
    state, stored = AutoModelForCausalLM.from_pretrained(source).state_dict(), tensors(file)
    bias = state["model.layers.0.self_attn.k_proj.bias"].numpy()
    pairs = [half * 16 + row + head * 32 for head in range(2) for row in range(16) for half in range(2)]
    np.testing.assert_array_equal(stored["blk.0.attn_k.bias"].data, bias[pairs])
    for theirs, ours in (
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_down", "mlp.down_proj"),
    ):
        np.testing.assert_array_equal(stored[f"blk.1.{theirs}.bias"].data, state[f"model.layers.1.{ours}.bias"].numpy())


def test_gemma_1_in_the_words_of_the_format(sources, tmp_path):
    source = sources("gemma")
    file, _ = export(source, tmp_path / "out", type="F16")
    state = AutoModelForCausalLM.from_pretrained(source).state_dict()
    stored, known = tensors(file), fields(file)
    assert len(stored) == 2 + 9 * 3
    norm = state["model.layers.1.post_attention_layernorm.weight"].numpy()
    np.testing.assert_array_equal(stored["blk.1.ffn_norm.weight"].data, norm + 1)
    np.testing.assert_array_equal(
        stored["blk.2.attn_q.weight"].data, state["model.layers.2.self_attn.q_proj.weight"].half().numpy()
    )
    assert known["general.architecture"] == "gemma"
    assert known["gemma.attention.key_length"] == known["gemma.attention.value_length"] == 32


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8), ("Q4_0", 4), ("Q4_1", 4)])
def test_a_weight_moves_by_no_more_than_the_step_of_its_block(kind, bits, sources, tmp_path):
    source = sources("llama")
    file, info = export(source, tmp_path / "out", type=kind, embeddings=kind)
    assert (info.bits, info.group_size) == (bits, 32)
    model = AutoModelForCausalLM.from_pretrained(source)
    theirs = read_back(file).state_dict()
    for name, value in model.state_dict().items():
        if value.dim() == 1:
            assert torch.equal(theirs[name], value)
            continue
        blocks, error = value.reshape(-1, 32), (theirs[name] - value).reshape(-1, 32).abs()
        reach = blocks.abs().amax(1)
        # Q4_0 puts the largest weight at -8 steps, so that one of the other sign may be cut by a whole step.
        step = {"Q8_0": reach / 127 / 2, "Q4_0": reach / 8, "Q4_1": (blocks.amax(1) - blocks.amin(1)) / 15 / 2}[kind]
        assert bool((error.amax(1) <= step * 1.01 + reach * 2**-9).all()), name
        assert float(error.max()) > 0
        lost = float((theirs[name] - value).square().sum() / value.square().sum())
        assert info.layer_errors[name.removesuffix(".weight")] == pytest.approx(lost, rel=1e-4)
    assert len(info.layer_errors) == 2 + 7 * 3


@pytest.mark.parametrize(("kind", "number"), [("F16", 1), ("Q4_0", 2), ("Q4_1", 3), ("Q8_0", 7)])
def test_the_file_says_what_it_holds(kind, number, sources, tmp_path):
    """llama.cpp takes the shape of the model from here, and from nowhere else. Numbers of types are its own."""
    file, _ = export(sources("llama"), tmp_path / "out", type=kind)
    known = fields(file)
    assert {name: value for name, value in known.items() if name.startswith("general.")} == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.quantization_version": 2,
        "general.file_type": number,
    }
    assert {name.removeprefix("llama."): value for name, value in known.items() if name.startswith("llama.")} == {
        "block_count": 3,
        "context_length": 128,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "rope.dimension_count": 32,
        "rope.freq_base": 10000.0,
        "vocab_size": ROWS,
    }


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q4_1"])
def test_rows_that_are_quantized_at_a_time_change_nothing(kind, sources, tmp_path, monkeypatch):
    at_once, whole = export(sources("llama"), tmp_path / "a", type=kind)
    monkeypatch.setattr(gguf_export, "_ROWS", 50)
    apart, parts = export(sources("llama"), tmp_path / "b", type=kind)
    assert apart.read_bytes() == at_once.read_bytes()
    assert parts.layer_errors == pytest.approx(dict(whole.layer_errors), rel=1e-9)


def test_tables_under_four_bits(sources, tmp_path):
    file, _ = export(sources("llama"), tmp_path / "a", type="Q4_0")
    assert {tensors(file)[name].tensor_type.name for name in ("token_embd.weight", "output.weight")} == {"Q8_0"}
    assert tensors(file)["blk.0.attn_q.weight"].tensor_type.name == "Q4_0"
    file, _ = export(sources("llama"), tmp_path / "b", type="Q8_0", embeddings="F16")
    assert tensors(file)["token_embd.weight"].tensor_type.name == "F16"
    assert tensors(file)["blk.0.ffn_down.weight"].tensor_type.name == "Q8_0"


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q4_1"])
def test_the_largest_number_of_float16_is_stored(kind, tmp_path):
    model = model_of("llama", ROWS)
    weight = model.model.layers[2].mlp.down_proj.weight
    weight.data[0, 0] = -torch.finfo(torch.float16).max
    file, _ = export(save(model, tokenizer_for("llama"), tmp_path / "source"), tmp_path / "out", type=kind)
    theirs = read_back(file).model.layers[2].mlp.down_proj.weight.detach()
    assert float(theirs[0, 0]) == pytest.approx(-65504.0, rel=1e-3)
    assert bool(theirs.isfinite().all())


def test_a_width_that_blocks_do_not_divide_stays_in_f16(sources, tmp_path):
    file, info = export(sources("llama", intermediate_size=80), tmp_path / "out", type="Q4_1")
    assert tensors(file)["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert tensors(file)["blk.0.ffn_up.weight"].tensor_type.name == "Q4_1"
    assert any("3 matrices stay in F16, such as model.layers.0.mlp.down_proj" in note for note in info.notes)
    _, info = export(sources("llama", intermediate_size=80), tmp_path / "all", type="F16")
    assert not info.notes


def test_rotary_frequencies_of_llama_3(sources, tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    source = save(model_of("llama", ROWS, rope_parameters=rope), tokenizer_for("llama"), tmp_path / "source")
    file, _ = export(source, tmp_path / "out")
    factors = torch.from_numpy(np.array(tensors(file)["rope_freqs.weight"].data))
    plain = 500000.0 ** -(torch.arange(0, 32, 2) / 32)
    used = AutoModelForCausalLM.from_pretrained(source).model.rotary_emb.inv_freq
    torch.testing.assert_close(plain / factors, used)
    assert factors[0] == 1
    assert factors[-1] == 8
    assert fields(file)["llama.rope.freq_base"] == 500000.0


def test_linear_rotary_scaling_and_windows(tmp_path):
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
    }
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]  # what pruning leaves
    model = model_of("gemma3_text", ROWS, rope_parameters=rope, layer_types=kinds, final_logit_softcapping=20.0)
    file, _ = export(save(model, tokenizer_for("gemma"), tmp_path / "source"), tmp_path / "out")
    known = fields(file)
    assert known["gemma3.rope.freq_base"] == 2e6
    assert known["gemma3.rope.freq_base_swa"] == 5e3
    assert (known["gemma3.rope.scaling.type"], known["gemma3.rope.scaling.factor"]) == ("linear", 4.0)
    assert known["gemma3.attention.sliding_window"] == 4
    assert list(known["gemma3.attention.sliding_window_pattern"]) == [False, True, True]
    assert known["gemma3.final_logit_softcapping"] == 20.0


# --- tokenizer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_byte_level_text_makes_the_same_tokens(rule, tmp_path):
    tokenizer = byte_tokenizer(rule, bos=rule == "llama-bpe")
    file, _ = export(save(model_of("llama", ROWS), tokenizer, tmp_path / "source"), tmp_path / "out")
    assert fields(file)["tokenizer.ggml.pre"] == rule
    assert fields(file)["tokenizer.ggml.add_bos_token"] is (rule == "llama-bpe")
    import_gguf(file, tmp_path / "again")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "again")
    for text in (*HARD, "use <tool> now", tokenizer.apply_chat_template(CHAT, tokenize=False)):
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_rules_are_those_of_the_reader(name):
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    split = {"type": "Split", "pattern": {"Regex": GGUF_PRE_TOKENIZER_SPLITS[name]}, "behavior": "Isolated"}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    rule = {"type": "Sequence", "pretokenizers": [split | {"invert": False}, bytes_]}
    assert split_rule(rule, ignore_merges=name in {"llama-bpe", "tekken"}, where="") == name


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_by_scores_are_those_by_merges(prefix, tmp_path):
    tokenizer = piece_tokenizer(prefix=prefix)
    file, _ = export(save(model_of("llama", ROWS), tokenizer, tmp_path / "source"), tmp_path / "out")
    known = fields(file)
    assert known["tokenizer.ggml.model"] == "llama"
    assert known["tokenizer.ggml.pre"] == "default"
    assert known["tokenizer.ggml.add_space_prefix"] is prefix
    assert known["tokenizer.ggml.add_bos_token"] is True
    for text in (*HARD[:9], "thethat  what  is", "    x", "anand"):
        prepared = ("▁" if prefix and text else "") + text.replace(" ", "▁")
        ours = tokenizer(text, add_special_tokens=False).input_ids
        assert spm(known["tokenizer.ggml.tokens"], known["tokenizer.ggml.scores"], prepared) == ours, text


def metaspace(tokenizer):
    """As old conversions of Llama have it: no leading space, and no normalizer."""
    tokenizer.backend_tokenizer.normalizer = None
    pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer


def at_spaces(tokenizer):
    """As Gemma has it: its normalizer has replaced all spaces by then, so that it splits nothing."""
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")


@pytest.mark.parametrize("change", [metaspace, at_spaces])
def test_text_without_a_prefix_in_other_words(change, tmp_path):
    tokenizer = piece_tokenizer(prefix=False)
    change(tokenizer)
    file, info = export(save(model_of("llama", ROWS), tokenizer, tmp_path / "source"), tmp_path / "out")
    known = fields(file)
    assert known["tokenizer.ggml.add_space_prefix"] is False
    assert not info.notes
    for text in HARD[:9]:
        ours = tokenizer(text, add_special_tokens=False).input_ids
        prepared = text.replace(" ", "▁")
        assert spm(known["tokenizer.ggml.tokens"], known["tokenizer.ggml.scores"], prepared) == ours, text


def test_a_prefix_only_at_the_start_is_said(tmp_path):
    tokenizer = piece_tokenizer()
    tokenizer.backend_tokenizer.normalizer = None
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.backend_tokenizer.pre_tokenizer = metaspace
    file, info = export(save(model_of("llama", ROWS), tokenizer, tmp_path / "source"), tmp_path / "out")
    assert fields(file)["tokenizer.ggml.add_space_prefix"] is True
    assert any("after added tokens" in note for note in info.notes)
    assert any("text that starts with one" in note for note in info.notes)


def test_kinds_of_tokens(tmp_path):
    tokenizer = piece_tokenizer(prefix=False)
    file, _ = export(save(model_of("llama", ROWS), tokenizer, tmp_path / "source"), tmp_path / "out")
    known = fields(file)
    tokens, kinds = known["tokenizer.ggml.tokens"], known["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == len(set(tokens)) == known["llama.vocab_size"] == 420
    assert [kinds[tokens.index(token)] for token in ("<unk>", "<s>", "<0x41>", "▁the", "<tool>", "     ")] == [
        2,
        3,
        6,
        1,
        4,
        4,
    ]
    assert tokens[len(tokenizer) :] == [f"[PAD{row}]" for row in range(len(tokenizer), 420)]
    assert set(kinds[len(tokenizer) :]) == {5}
    assert [known[f"tokenizer.ggml.{name}_token_id"] for name in ("unknown", "bos", "eos")] == [0, 1, 2]


def test_special_tokens_and_template(tmp_path):
    tokenizer = byte_tokenizer()
    model = model_of("llama", ROWS)
    model.generation_config.eos_token_id = [2, 0]
    file, _ = export(save(model, tokenizer, tmp_path / "source"), tmp_path / "out")
    known = {name.removeprefix("tokenizer.ggml."): value for name, value in fields(file).items()}
    assert [known[f"{name}_token_id"] for name in ("bos", "eos", "eot", "padding")] == [1, 2, 0, 0]
    assert known["add_bos_token"] is known["add_eos_token"] is False
    template = known["tokenizer.chat_template"]
    assert "generation" not in template
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False) == whole
    assert "Bien 👍<|im_end|><|im_start|>user\nok" in whole  # the marks swallow the line break after them, too


def test_a_start_token_that_only_the_model_knows(tmp_path):
    """llama.cpp would take token 1 or 11 for it, whatever that is."""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    source = save(model_of("llama", ROWS, bos_token_id=2), tokenizer, tmp_path / "source")
    file, _ = export(source, tmp_path / "out")
    assert fields(file)["tokenizer.ggml.bos_token_id"] == 2
    assert fields(file)["tokenizer.ggml.add_bos_token"] is False


def test_text_that_ends_with_an_end_token(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)]
    )
    file, _ = export(save(model_of("llama", ROWS), tokenizer, tmp_path / "source"), tmp_path / "out")
    known = fields(file)
    assert (known["tokenizer.ggml.add_bos_token"], known["tokenizer.ggml.add_eos_token"]) == (False, True)


def test_of_several_templates_the_default_one_is_taken():
    several = {"tool_use": "{{ tools }}", "default": "{% generation %}{{ messages }}{% endgeneration %}"}
    assert chat_template(SimpleNamespace(chat_template=several)) == "{% if true %}{{ messages }}{% endif %}"
    assert chat_template(SimpleNamespace(chat_template={"tool_use": "{{ tools }}"})) is None
    assert chat_template(SimpleNamespace(chat_template=None)) is None


def test_differences_that_remain_are_said(tmp_path):
    from tokenizers import AddedToken, normalizers

    tokenizer = byte_tokenizer("qwen2")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    _, info = export(save(model_of("qwen2", ROWS), tokenizer, tmp_path / "source"), tmp_path / "out")
    assert any("NFC" in note for note in info.notes)
    assert any("'<mask>'" in note for note in info.notes)


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_is_written(sources, tmp_path):
    ctx = Context()
    file, _ = export(sources("qwen2"), tmp_path / "deep" / "out", ctx, type="Q4_0")
    assert sorted(path.name for path in file.parent.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-Q4_0.gguf",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in file.parent.parent.iterdir()] == ["out"]
    assert ctx.steps[-1][0] == ctx.steps[-1][1] == len(tensors(file))
    again, _ = export(sources("qwen2"), tmp_path / "again", type="Q4_0")
    assert again.read_bytes() == file.read_bytes()


def test_an_import_of_the_export_is_the_model_again(sources, tmp_path):
    file, _ = export(sources("llama"), tmp_path / "out", type="F16")
    import_gguf(file, tmp_path / "again")
    ours = AutoModelForCausalLM.from_pretrained(sources("llama"), dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    ours.load_state_dict(
        {
            name: value.half().bfloat16().float() if value.dim() > 1 else value.bfloat16()
            for name, value in ours.state_dict().items()
        }
    )
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, rtol=1e-4, atol=1e-4)


def test_stopping_leaves_nothing(sources, tmp_path):
    with pytest.raises(Stopped):
        export(sources("llama"), tmp_path / "out", Context(stop_after=3))
    assert not list(tmp_path.iterdir())


def test_a_directory_in_use_is_left_alone(sources, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ModelError, match="already exists"):
        export(sources("llama"), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_without_the_package(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_import, "find_spec", lambda _: None)
    with pytest.raises(EnvironmentUnmet, match=r"kdkit\[gguf\]"):
        GGUF.build(GgufParams()).quantize(sources("llama"), (), tmp_path / "out", Context())
    assert not list(tmp_path.iterdir())
