from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdkit.api.errors import ModelError
from kdkit.models.quantized.linear import QuantizedLinear, group_index
from kdkit.models.quantized.packing import check_packable, pack, unpack

FIELDS = ("codes", "scales", "zeros", "g_idx")


def made(*, bits: int = 4, out: int = 16, width: int = 32, groups: int = 4, seed: int = 0, low: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return QuantizedLinear(
        codes=torch.randint(0, 2**bits, (out, width), dtype=torch.uint8, generator=generator),
        scales=torch.rand(out, groups, generator=generator).to(torch.float16),
        zeros=torch.randint(low, 2**bits, (out, groups), dtype=torch.uint8, generator=generator),
        g_idx=torch.randint(0, groups, (width,), dtype=torch.int32, generator=generator),
        bits=bits,
    )


@given(st.sampled_from([2, 4, 8]), st.sampled_from([1, 2]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5),
       st.integers(0, 2**31))  # fmt: skip
def test_round_trip(bits, version, rows, columns, groups, seed):
    per_word = 32 // bits
    linear = made(bits=bits, out=rows * per_word, width=columns * per_word, groups=groups, seed=seed, low=version % 2)
    back = unpack(pack(linear, version=version), bits=bits, version=version)
    for field in FIELDS:
        assert torch.equal(getattr(back, field), getattr(linear, field)), field
        assert getattr(back, field).dtype == getattr(linear, field).dtype
    assert back.bits == bits


@given(st.sampled_from([2, 4, 8]), st.integers(0, 2**31))
def test_every_file_is_some_layer(bits, seed):
    """Any words whatever are understood in one way: packing what was read gives them back."""
    per_word, generator = 32 // bits, torch.Generator().manual_seed(seed)
    any_word = {"low": -(2**31), "high": 2**31, "dtype": torch.int32, "generator": generator}
    tensors = {
        "qweight": torch.randint(size=(3, per_word), **any_word),
        "qzeros": torch.randint(size=(2, 1), **any_word),
        "scales": torch.rand(2, per_word, generator=generator).to(torch.float16),
        "g_idx": torch.zeros(3 * per_word, dtype=torch.int32),
    }
    again = pack(unpack(tensors, bits=bits, version=2), version=2)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_words_by_hand():
    linear = QuantizedLinear(
        codes=torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [15, 0, 0, 0, 0, 0, 0, 15]] * 4, dtype=torch.uint8),
        scales=torch.ones(8, 1, dtype=torch.float16),
        zeros=torch.full((8, 1), 8, dtype=torch.uint8),
        g_idx=group_index(8, -1),
        bits=4,
    )
    first, second = pack(linear, version=1), pack(linear, version=2)
    # The lowest four bits are the first input's.
    assert first["qweight"].tolist() == [[0x87654321 - 2**32, 0xF000000F - 2**32] * 4]
    assert first["qzeros"].tolist() == [[0x77777777]]
    assert second["qzeros"].tolist() == [[0x88888888 - 2**32]]
    assert first["scales"].tolist() == [[1.0] * 8]
    assert first["g_idx"].tolist() == [0] * 8
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in first.items()} == {
        "qweight": (torch.int32, (1, 8)),
        "qzeros": (torch.int32, (1, 1)),
        "scales": (torch.float16, (1, 8)),
        "g_idx": (torch.int32, (8,)),
    }


@pytest.mark.parametrize(("bits", "codes", "word"), [
    (2, [3, 0, 1, 2, *[0] * 11, 1], 0x40000093),
    (8, [255, 1, 128, 2], 0x028001FF),
])  # fmt: skip
def test_words_of_other_widths_by_hand(bits, codes, word):
    per_word = 32 // bits
    linear = QuantizedLinear(
        codes=torch.tensor([codes] * per_word, dtype=torch.uint8),
        scales=torch.ones(per_word, 1, dtype=torch.float16),
        zeros=torch.tensor([[code] for code in codes], dtype=torch.uint8),
        g_idx=group_index(per_word, -1),
        bits=bits,
    )
    packed = pack(linear, version=2)
    assert packed["qweight"].tolist() == [[word] * per_word]
    assert packed["qzeros"].tolist() == [[word]]


def test_reading_the_wrong_version_shifts_every_weight_by_one_step():
    linear = made(low=1)
    wrong = unpack(pack(linear, version=2), bits=4, version=1)
    # 15 + 1 carries into the next code, so compare where that cannot happen.
    calm = made(low=1).zeros.clamp(max=14)
    linear = QuantizedLinear(linear.codes, linear.scales, calm, linear.g_idx, 4)
    wrong = unpack(pack(linear, version=2), bits=4, version=1)
    assert torch.equal(wrong.zeros, linear.zeros + 1)


def test_a_zero_point_that_was_borrowed_for_is_read():
    """Some writers subtract 1 from whole words, so that a zero point of 0 borrows from the next one."""
    linear = made(low=0, groups=6)
    assert (linear.zeros == 0).any()
    tensors = pack(linear, version=2)
    minus = tensors["qzeros"].to(torch.int64) - 0x11111111
    tensors["qzeros"] = ((minus + 2**31) % 2**32 - 2**31).to(torch.int32)
    assert torch.equal(unpack(tensors, bits=4, version=1).zeros, linear.zeros)


def test_version_1_has_no_zero_point_of_0():
    with pytest.raises(ModelError, match="zero points of 0") as caught:
        pack(made(low=0, groups=6), version=1)
    assert caught.value.allowed == "gptq_v2"


def test_absent_groups_are_neighbours():
    tensors = pack(made(groups=4), version=1)
    del tensors["g_idx"]
    assert unpack(tensors, bits=4, version=1).g_idx.tolist() == [column // 8 for column in range(32)]


def test_layers_that_do_not_fill_words_are_refused():
    shapes = {"q": (64, 64), "down": (64, 172), "up": (172, 64)}
    with pytest.raises(ModelError) as caught:
        check_packable(shapes, 4)
    assert caught.value.where == "down"
    assert "64 outputs by 172 inputs of 4 bits" in caught.value.what
    assert "multiples of 8; 2 of 3 layers are not" in caught.value.what
    assert caught.value.allowed == "bits: 8"
    check_packable(shapes, 8)
    with pytest.raises(ModelError, match="whole 32-bit words"):
        pack(made(width=12), version=1)


def replaced(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors = pack(made(), version=1) | changes
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


INT = torch.int32


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"qweight": None}, "has no qweight"),
        ({"qzeros": None}, "has no qzeros"),
        ({"scales": None}, "has no scales"),
        ({"qweight": torch.zeros(4, 16)}, "qweight is float32 of shape"),
        ({"qweight": torch.zeros(4, 16, dtype=torch.int64)}, "qweight is int64"),
        ({"qweight": torch.zeros(4, 15, dtype=INT)}, "qweight is int32 of shape"),
        ({"qweight": torch.zeros(64, dtype=INT)}, "qweight is int32 of shape"),
        ({"qweight": torch.zeros(0, 16, dtype=INT)}, "qweight is int32 of shape"),
        ({"qzeros": torch.zeros(4, 3, dtype=INT)}, "qzeros is int32 of shape"),
        ({"qzeros": torch.zeros(5, 2, dtype=INT)}, "qzeros is int32 of shape"),
        ({"scales": torch.zeros(4, 16, dtype=INT)}, "scales is int32 of shape"),
        ({"scales": torch.zeros(16)}, "scales is float32 of shape"),
        ({"scales": torch.zeros(0, 16), "qzeros": torch.zeros(0, 2, dtype=INT)}, "scales is float32 of shape"),
        ({"scales": torch.full((4, 16), float("nan"))}, "not finite"),
        ({"scales": torch.full((4, 16), 1e6)}, "not finite"),
        ({"g_idx": torch.full((32,), 4, dtype=INT)}, "g_idx from 4 to 4 for 4 groups"),
        ({"g_idx": torch.full((32,), -1, dtype=INT)}, "g_idx from -1 to -1 for 4 groups"),
        ({"g_idx": torch.zeros(31, dtype=INT)}, "g_idx is int32 of shape"),
        ({"g_idx": torch.zeros(32)}, "g_idx is float32 of shape"),
        ({"g_idx": None, "scales": torch.ones(5, 16), "qzeros": torch.zeros(5, 2, dtype=INT)}, "5 groups do not"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes, said):
    with pytest.raises(ModelError, match=said):
        unpack(replaced(**changes), bits=4, version=1)


@pytest.mark.parametrize("bits", [0, 3, 5, 16, 64])
def test_other_widths_are_refused(bits):
    with pytest.raises(ModelError, match=f"codes of {bits} bits"):
        unpack(replaced(), bits=bits, version=1)
