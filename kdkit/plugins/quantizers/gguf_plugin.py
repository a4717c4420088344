"""Parameters of the ``gguf`` quantizer. Light: no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from kdkit.api import Params, QuantizerSpec

if TYPE_CHECKING:
    from kdkit.api import Quantizer

__all__ = ["GGUF", "GgufParams", "GgufType"]

GgufType: TypeAlias = Literal["F16", "Q8_0", "Q4_0", "Q4_1"]


class GgufParams(Params):
    """One .gguf file for llama.cpp and Ollama. Llama, Qwen2 and Gemma 1 to 3 (text); needs no calibration."""

    type: GgufType = "Q8_0"
    """How matrices are stored: 16 bit, or blocks of 32 weights with one scale, at 8.5 (Q8_0), 4.5 (Q4_0) or 5 bits
    (Q4_1, which has an offset too). Norms and biases stay in float32, and a matrix whose width is no multiple of 32 in
    F16. K-quants are llama.cpp's own: make F16 here and run its llama-quantize."""
    embeddings: Literal["auto"] | GgufType = "auto"
    """How the token table and the output projection are stored. ``auto`` is Q8_0 under a 4-bit type, since both are
    what a small model can least spare bits of, and ``type`` otherwise."""

    @property
    def table(self) -> GgufType:
        """The type of the token table and of the output projection."""
        if self.embeddings != "auto":
            return self.embeddings
        return "Q8_0" if self.type.startswith("Q4") else self.type


def _gguf(params: GgufParams) -> Quantizer:
    from kdkit.plugins.quantizers.gguf_export import GgufQuantizer

    return GgufQuantizer(params)


GGUF: QuantizerSpec[Any] = QuantizerSpec(
    name="gguf",
    summary="One GGUF file for llama.cpp and Ollama: F16, Q8_0, Q4_0 or Q4_1",
    params=GgufParams,
    build=_gguf,
    extras=("gguf",),
)
