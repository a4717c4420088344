"""Tiny models and tokenizers for the GGUF export, and llama.cpp's SentencePiece algorithm as an oracle."""

from __future__ import annotations

import heapq
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from kdkit.plugins.quantizers.gguf_plugin import GGUF, GgufParams

HARD = (
    "Hello world",
    "  two leading spaces",
    "tabs\tand\n\nempty lines\n \n\n\n  \n",
    "1 22 333 4444 55555 3.14159 1,000,000",
    "it's WE'LL I'm 'tis she'd've",
    "def f(x):\n    return {'a': x[0] ** 2}  # ok\r\n",
    "El niño comió piñas y ¿qué más? ÁÉÍÓÚ ü",
    "emoji 🦙🦙 👩‍👩‍👧 ❤️ 😶‍🌫️!",
    "日本語とкириллица العربية",
    "end <|im_end|> in text <|im_start|>user",
    "<s>[INST] hi [/INST]</s>",
    "a \u00a0 b\u3000c ...!!??---===",
    " ",
    "\n",
    "",
)
CHAT = [
    {"role": "user", "content": "¿Qué tal?\n\n  1. uno"},
    {"role": "assistant", "content": "Bien 👍"},
    {"role": "user", "content": "ok"},
]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{%- if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{%- endgeneration -%}\n"
    "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)
CORPUS = [text * 3 for text in HARD] + ["the cat sat on the mat and that is what it is 1234 " * 4]
SPLITS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def splitter(rule: str):
    if rule == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rule == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    split = pre_tokenizers.Split(Regex(SPLITS[rule]), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_tokenizer(rule: str = "smollm", *, bos: bool = False, merges: int = 60) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges learned from :data:`CORPUS` under the splitting rule."""
    from tokenizers.trainers import BpeTrainer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(BPE(ignore_merges=rule == "llama-bpe"))
    backend.pre_tokenizer = splitter(rule)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = len(special) + len(alphabet) + merges
    trainer = BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


WORDS = ("the", "cat", "sat", "that", "is", "what", "it", "and", "an", "on", "\n\n", "qué", "niño", "def", "10", "22")


def pieces() -> dict[str, int]:
    """SentencePiece-like pieces, best first: all beginnings of some words, so that merges reach them."""
    made = [word[:end] for word in WORDS for word in (word, "▁" + word) for end in range(2, len(word) + 1)]
    made += ["▁" * width for width in (2, 4, 8)] + ["▁" * 3, "at", "he", "in", "ing", "▁th", "at▁"]
    unique = [piece for piece in dict.fromkeys(made) if piece != "\n\n"]
    return {piece: rank for rank, piece in enumerate(sorted(unique, key=lambda piece: (len(piece), piece)))}


def piece_tokenizer(
    *,
    prefix: bool = True,
    special: tuple[str, str, str] = ("<unk>", "<s>", "</s>"),
    drop: tuple[str, str] | None = None,
) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE as transformers saves it: byte fallback, and every merge that makes a piece."""
    ranks = pieces()
    single = sorted({char for text in (*HARD[:7], "\n▁", *ranks) for char in text if char != " "})
    texts = [
        *special,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *ranks,
        *single,
        "<tool>",
        *([] if prefix else ["▁▁▁▁▁"]),
    ]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(texts))}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in ranks
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    merges = [merge for merge in merges if merge != drop]
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token=special[0]))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    if not prefix:  # as Gemma has them; with a prefix llama.cpp would put another one behind
        backend.add_tokens([AddedToken("▁▁▁▁▁", normalized=True)])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{special[1]} $A", special_tokens=[(special[1], vocab[special[1]])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
        clean_up_tokenization_spaces=False,
    )


def config_of(kind: str, vocab: int, **changes):
    """A tiny configuration in which no two sizes agree by accident."""
    settings = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16 if kind == "qwen2" else 32,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": kind.startswith("gemma"),
    }
    if kind in {"gemma2", "gemma3_text"}:
        settings |= {"head_dim": 256, "sliding_window": 4}  # transformers reads no other attention scale
    return AutoConfig.for_model(kind, **(settings | changes))


def model_of(kind: str, vocab: int, *, seed: int = 0, **changes):
    """A random model whose norms and biases are not the neutral values either."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_of(kind, vocab, **changes), dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def save(model, tokenizer, path: Path) -> Path:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


class Context(SimpleNamespace):
    """What the quantizer may ask a stage for."""

    def __init__(self, stop_after: int = 10**9):
        super().__init__(lines=[], steps=[], stop_after=stop_after)

    def log(self, message):
        self.lines.append(message)

    def progress(self, step, total, **values):
        self.steps.append((step, total))

    def stopping(self):
        return len(self.steps) >= self.stop_after


def export(source, out, ctx=None, **params):
    """The file that the quantizer makes of ``source``, and what it says about it."""
    info = GGUF.build(GgufParams(**params)).quantize(source, (), out, ctx or Context())
    (file,) = out.glob("*.gguf")
    return file, info


def tokenizer_for(kind: str) -> PreTrainedTokenizerFast:
    if kind.startswith("gemma"):
        return piece_tokenizer(prefix=False)
    return byte_tokenizer("smollm" if kind == "llama" else "qwen2")


def spm(tokens: list[str], scores: list[float], text: str) -> list[int]:
    """SentencePiece's BPE over ``text`` by scores alone, as llama.cpp does it: no merge list."""
    ids = {token: index for index, token in enumerate(tokens)}
    symbols: list[str | None] = list(text)
    after = [*range(1, len(symbols)), -1]
    before = list(range(-1, len(symbols) - 1))
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and (joined := symbols[left] + symbols[right]) in ids:
            heapq.heappush(queue, (-scores[ids[joined]], left, right, joined))

    for left in range(len(symbols) - 1):
        offer(left, left + 1)
    while queue:
        _, left, right, joined = heapq.heappop(queue)
        if symbols[left] is None or symbols[right] is None or symbols[left] + symbols[right] != joined:
            continue
        symbols[left], symbols[right] = joined, None
        after[left] = after[right]
        if after[left] >= 0:
            before[after[left]] = left
        offer(before[left], left)
        offer(left, after[left])
    found = []
    for symbol in symbols:
        if symbol is not None:
            known = ids.get(symbol)
            found += [known] if known is not None else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found
