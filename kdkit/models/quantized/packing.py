"""The four tensors of a quantised layer in a GPTQ checkpoint.

For a layer of width ``in`` with ``out`` outputs, ``G`` groups and f = 32 / bits codes in a word:

* ``qweight`` int32 [in / f, out]: word (r, o) holds the codes of inputs f*r to f*r + f - 1, the first of them in the
  lowest bits;
* ``qzeros`` int32 [G, out / f]: word (g, c) holds the zero points of outputs f*c to f*c + f - 1, minus 1 in version 1;
* ``scales`` float16 [G, out];
* ``g_idx`` int32 [in], the group of every input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

from kdkit.api.errors import ModelError
from kdkit.models.quantized.grid import BITS
from kdkit.models.quantized.linear import QuantizedLinear, group_index

__all__ = ["PARTS", "Version", "check_packable", "pack", "unpack"]

Version: TypeAlias = Literal[1, 2]
PARTS: Final = ("qweight", "qzeros", "scales", "g_idx")
_WORD: Final = 32


def check_packable(shapes: Mapping[str, tuple[int, int]], bits: int) -> None:
    """Refuse layers whose codes do not fill whole words.

    Args:
        shapes: Name to (out, in) of every layer that is to be packed.
        bits: Width of a code.

    Raises:
        ModelError: Names the first such layer, and the widths of codes that fit every layer.
    """
    odd = [name for name, shape in shapes.items() if not _fits(shape, bits)]
    if odd:
        out, width = shapes[odd[0]]
        fitting = [str(other) for other in BITS if all(_fits(shape, other) for shape in shapes.values())]
        raise ModelError(
            f"{out} outputs by {width} inputs of {bits} bits do not fill whole 32-bit words "
            f"(both must be multiples of {_WORD // bits}; {len(odd)} of {len(shapes)} layers are not)",
            where=odd[0],
            allowed=f"bits: {', '.join(fitting)}" if fitting else None,
            hint=None if fitting else "the GPTQ layout cannot hold this model",
        )


def _fits(shape: tuple[int, int], bits: int) -> bool:
    return all(size % (_WORD // bits) == 0 for size in shape)


def pack(linear: QuantizedLinear, *, version: Version) -> dict[str, Tensor]:
    """The tensors of ``linear``, by the names of :data:`PARTS`.

    Version 1 (``gptq``) stores every zero point minus 1, version 2 (``gptq_v2``) as it is.

    Raises:
        ModelError: The layer does not fill whole words, or version 1 cannot say one of its zero points: 0 would be
            stored as -1, which readers understand in different ways.
    """
    out, width = linear.codes.shape
    check_packable({"layer": (out, width)}, linear.bits)
    zeros = linear.zeros.T.to(torch.int64)
    if version == 1:
        if not bool((zeros > 0).all()):
            raise ModelError("has zero points of 0, which checkpoint format gptq cannot hold", allowed="gptq_v2")
        zeros = zeros - 1
    return {
        "qweight": _words(linear.codes.T.to(torch.int64), linear.bits, dim=0),
        "qzeros": _words(zeros, linear.bits, dim=1),
        "scales": linear.scales.T.contiguous(),
        "g_idx": linear.g_idx.to(torch.int32).contiguous(),
    }


def _words(codes: Tensor, bits: int, *, dim: int) -> Tensor:
    """Join the codes along ``dim``, 32 / ``bits`` of them to an int32, the first in the lowest bits."""
    shifts = torch.arange(0, _WORD, bits, device=codes.device)
    apart = codes.unflatten(dim, (-1, len(shifts)))
    view = [1] * apart.dim()
    view[dim + 1] = -1
    words = (apart << shifts.view(view)).sum(dim + 1)
    # From an unsigned number of 32 bits to the signed one with the same bits.
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def _codes(words: Tensor, bits: int, *, dim: int) -> Tensor:
    """What :func:`_words` joined, as uint8."""
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32, device=words.device)
    view = [1] * (words.dim() + 1)
    view[dim + 1] = -1
    apart = (words.unsqueeze(dim + 1) >> shifts.view(view)) & (2**bits - 1)
    return apart.flatten(dim, dim + 1).to(torch.uint8)


def unpack(tensors: Mapping[str, Tensor], *, bits: int, version: Version) -> QuantizedLinear:
    """The layer that :func:`pack` wrote; ``g_idx`` may be absent when groups are neighbours.

    Raises:
        ModelError: A tensor is absent, or its type, shape or content does not fit the others.
    """
    if bits not in BITS:
        raise ModelError(f"has codes of {bits} bits", allowed="2, 4 or 8")
    width = _check(tensors, bits)
    qzeros = tensors["qzeros"]
    if version == 1:
        # Whole words at a time, as they are written: a writer that borrowed from the next code for a zero point of 0
        # is understood, and every other file reads the same either way.
        ones = _words(torch.ones(1, _WORD // bits, dtype=torch.int64), bits, dim=1).item()
        qzeros = qzeros.to(torch.int64).add_(ones).add_(2**31).remainder_(2**32).sub_(2**31).to(torch.int32)
    scales = tensors["scales"].to(torch.float16)
    index = tensors.get("g_idx")
    return QuantizedLinear(
        codes=_codes(tensors["qweight"], bits, dim=0).T.contiguous(),
        scales=scales.T.contiguous(),
        zeros=_codes(qzeros, bits, dim=1).T.contiguous(),
        g_idx=group_index(width, width // scales.shape[0]) if index is None else index.to(torch.int32),
        bits=bits,
    )


def _check(tensors: Mapping[str, Tensor], bits: int) -> int:
    """The layer's width; the tensors fit each other."""
    for name in PARTS[:3]:
        if name not in tensors:
            raise ModelError(f"has no {name}")
    qweight, qzeros, scales = (tensors[name] for name in PARTS[:3])
    for name, tensor in (("qweight", qweight), ("qzeros", qzeros)):
        if tensor.dtype != torch.int32 or tensor.dim() != 2:
            raise _unfit(name, tensor, "int32 with two dimensions")
    if not scales.is_floating_point() or scales.dim() != 2 or 0 in scales.shape:
        raise _unfit("scales", scales, "floating point with two dimensions")
    per_word = _WORD // bits
    width, groups, out = int(qweight.shape[0]) * per_word, int(scales.shape[0]), int(scales.shape[1])
    if qweight.shape[1] != out or width == 0:
        raise _unfit("qweight", qweight, f"[in / {per_word}, {out}] as scales has {out} outputs")
    if tuple(qzeros.shape) != (groups, out // per_word) or out % per_word:
        raise _unfit("qzeros", qzeros, f"[{groups}, {out} / {per_word}] as scales has shape [{groups}, {out}]")
    if not bool(scales.to(torch.float16).isfinite().all()):
        raise ModelError("has scales that are not finite in float16")
    _check_groups(tensors.get("g_idx"), width, groups)
    return width


def _check_groups(index: Tensor | None, width: int, groups: int) -> None:
    if index is None:
        if width % groups:
            raise ModelError(f"has no g_idx, and {groups} groups do not divide {width} inputs")
        return
    if index.is_floating_point() or index.dtype == torch.bool or tuple(index.shape) != (width,):
        raise _unfit("g_idx", index, f"integers of shape [{width}]")
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise ModelError(f"has a g_idx from {int(index.min())} to {int(index.max())} for {groups} groups")


def _unfit(name: str, tensor: Tensor, allowed: str) -> ModelError:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return ModelError(f"{name} is {dtype} of shape {list(tensor.shape)}", allowed=allowed)
