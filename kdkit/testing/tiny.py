"""A tiny random Llama and a byte-level tokenizer, made on the spot: no download, no network, under one megabyte.

A random model proves plumbing only; statements about quality need a trained one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["CHAT_TEMPLATE", "save_tiny_model", "tiny_model", "tiny_piece_tokenizer", "tiny_tokenizer"]

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML, with assistant turns marked for training."""

_TURNS_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
    "{{ message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_MERGES: Final = (
    "▁ ▁", "▁▁ ▁▁", "i t", "▁ it", "i s", "▁ is", "▁ w", "h a", "ha t", "▁w hat", "W hat", "I t", "e r", "▁t h", "▁ t",
    "▁t he", "h e", "o n", "r e", "\n \n", "= =", "a n", "an d", "▁ and", "in g", "i n", "s t", "▁a n", "▁ a", "o u",
    "1 0", "2 0",
)  # fmt: skip


def tiny_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 256 bytes and three special tokens, so that every text round-trips."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template
    return fast


def tiny_piece_tokenizer(*, chat_template: str | None = _TURNS_TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer unlike :func:`tiny_tokenizer`, for pairs of models that share none; it has 387 tokens.

    It works as SentencePiece does: a dummy prefix, pieces of several characters, and bytes for characters it lacks. Its
    chat template trims every message and ends it with another token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    merges = [(left, right) for left, _, right in (pair.partition(" ") for pair in _MERGES)]
    special = ["<bos>", "<start_of_turn>", "<end_of_turn>"]
    characters = ["▁", "\n", *(chr(code) for code in range(33, 127))]
    parts = (token for pair in merges for token in (*pair, "".join(pair)))
    tokens = dict.fromkeys([*(f"<0x{byte:02X}>" for byte in range(256)), *special, *characters, *parts])
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(pieces)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<end_of_turn>",
        pad_token="<end_of_turn>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template
    return fast


def tiny_model(
    *, layers: int = 2, hidden: int = 32, vocab: int = 259, seed: int = 0, tied: bool = True
) -> LlamaForCausalLM:
    """A seeded random Llama in float32 that fits :func:`tiny_tokenizer`; the global RNG is left as it was."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        bos_token_id=256,
        eos_token_id=258,
        pad_token_id=258,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def save_tiny_model(
    path: Path,
    *,
    layers: int = 2,
    hidden: int = 32,
    vocab: int = 259,
    seed: int = 0,
    tied: bool = True,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Write the tiny model and its tokenizer to ``path`` as ``save_pretrained`` does; ``vocab`` has to fit it."""
    tiny_model(layers=layers, hidden=hidden, vocab=vocab, seed=seed, tied=tied).save_pretrained(path)
    (tokenizer or tiny_tokenizer()).save_pretrained(path)
    return path


def main(target: Path) -> None:
    """Write the tiny model to ``target``, whole or not at all."""
    from kdkit.models.files import staged

    with staged(target) as directory:
        save_tiny_model(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
