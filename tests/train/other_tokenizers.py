"""Tokenizers that cut the same text in different places, made here."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from kdkit.testing.tiny import CHAT_TEMPLATE

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = "Ġ Ġ|Ċ Ċ|Ġ t|h e|Ġt he|f o|fo o|foo Ġ|i n|( )|Ġ =|Ċ ĠĠ|- Ġ|ð Ł|ðŁ ĺ|Ġ ðŁĺ|Ģ a|Ã ©|e Ì"


def byte_level(
    *, trim_offsets: bool = False, composes: bool = False, template: str = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """Byte-level pieces that hold spaces at either end, and bytes of two characters at once."""
    merges = [tuple(pair.split(" ")) for pair in MERGES.split("|")]
    vocab = {t: i for i, t in enumerate(dict.fromkeys([*ALPHABET, *("".join(pair) for pair in merges)]))}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    if composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return finish(tokenizer, template)


def normalising() -> PreTrainedTokenizerFast:
    """Unigram over composed, compatibility-folded text: what it reads is not what stands there."""
    letters = [("<unk>", 0.0), ("▁", -2.0), *((chr(c), -5.0) for c in range(33, 127)), ("é", -5.0), ("\n", -5.0)]
    pieces = [*letters, ("▁the", -3.0), ("ffi", -3.0), ("in", -3.0), ("▁▁", -3.0)]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    return finish(tokenizer, CHAT_TEMPLATE)


def fusing() -> PreTrainedTokenizerFast:
    """Letters after a dummy prefix; what it lacks, newlines among it, is fused into one unknown token."""
    letters = [("<unk>", 0.0), ("▁", -2.0), *((chr(c), -5.0) for c in range(33, 127))]
    tokenizer = Tokenizer(Unigram(letters, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    return finish(tokenizer, CHAT_TEMPLATE)


def finish(tokenizer: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return fast
