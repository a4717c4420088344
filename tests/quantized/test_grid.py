from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdkit.api.errors import ModelError
from kdkit.models.quantized.grid import GridSettings, fit_grid, from_codes, resolve_group_size, to_codes
from kdkit.models.quantized.linear import QuantizedLinear, group_index, round_to_nearest


def settings(bits: int = 4, *, sym: bool = True, mse: float = 0.0) -> GridSettings:
    return GridSettings(bits=bits, sym=sym, mse=mse)


def rounded(weight: torch.Tensor, grid: GridSettings) -> torch.Tensor:
    scale, zero = fit_grid(weight, grid)
    return from_codes(to_codes(weight, scale, zero, grid.bits), scale, zero)


def test_symmetric_grid_by_hand():
    weight = torch.tensor([[-7.5, 3.0, 0.2], [0.0, 15.0, 1.0]])
    scale, zero = fit_grid(weight, settings())
    assert scale.tolist() == [1.0, 2.0]
    assert zero.tolist() == [8.0, 8.0]
    # -7.5 lies half-way between -8 and -7, and halves go to the even number; 15 / 2 goes to 8, which has no code.
    assert to_codes(weight, scale, zero, 4).tolist() == [[0, 11, 8], [8, 15, 8]]


def test_asymmetric_grid_by_hand():
    weight = torch.tensor([[-5.0, 10.0, 0.4], [2.0, 30.0, 15.0], [-15.0, -30.0, -1.5]])
    scale, zero = fit_grid(weight, settings(sym=False))
    assert scale.tolist() == [1.0, 2.0, 2.0]
    assert zero.tolist() == [5.0, 0.0, 15.0]  # zero is a point of the grid, whatever the signs
    assert rounded(weight, settings(sym=False)).tolist() == [[-5, 10, 0], [2, 30, 16], [-16, -30, -2]]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("mse", [0.0, 2.4])
def test_a_group_of_zeros_stays_zero(bits, sym, mse):
    assert rounded(torch.zeros(2, 8), settings(bits, sym=sym, mse=mse)).abs().max() == 0


@pytest.mark.parametrize("size", [1e-30, 1e-8, 6e-8, 1e-3, 1.0, 6e4, 1e9])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("mse", [0.0, 2.4])
def test_scales_are_float16_and_neither_zero_nor_infinite(size, sym, mse):
    weight = torch.linspace(-1.0, 1.0, 32).view(2, 16) * size
    scale, zero = fit_grid(weight, settings(sym=sym, mse=mse))
    assert scale.dtype == weight.dtype
    assert (scale == scale.to(torch.float16).float()).all()
    assert (scale.to(torch.float16) > 0).all()
    assert scale.to(torch.float16).isfinite().all()
    assert ((zero >= 0) & (zero <= 15) & (zero == zero.round())).all()
    assert rounded(weight, settings(sym=sym, mse=mse)).isfinite().all()


@given(
    st.integers(0, 2**31), st.sampled_from([2, 4, 8]), st.booleans(), st.sampled_from([torch.float32, torch.float64])
)
def test_the_error_is_at_most_half_a_step_within_the_grid(seed, bits, sym, dtype):
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    grid = settings(bits, sym=sym)
    scale, zero = fit_grid(weight, grid)
    low, high = -zero * scale, (2**bits - 1 - zero) * scale
    inside = weight.clamp(low[:, None], high[:, None])
    assert ((rounded(weight, grid) - inside).abs() <= scale[:, None] * 0.5001).all()
    # The largest weight may lie half a step outside (a rounded zero point), and as far as float16 rounds the scale.
    assert ((inside - weight).abs() <= scale[:, None] * (0.501 + 2**bits * 2**-11)).all()


def slow_search(weight: list[float], *, bits: int, sym: bool, norm: float) -> tuple[float, int]:
    """The best of 80 grids for one row, with Python's numbers."""
    top, best = 2**bits - 1, (float("inf"), 0.0, 0)
    low, high = min(0.0, *weight), max(0.0, *weight)
    if sym:
        high = max(-low, high)
        low = -high
    for step in range(80):
        shrink = 1 - step / 100
        scale = torch.tensor((high - low) * shrink / top, dtype=torch.float64).half().double().item()
        zero = 2 ** (bits - 1) if sym else min(max(round(-low * shrink / scale), 0), top)
        codes = [min(max(round(value / scale) + zero, 0), top) for value in weight]
        error = sum(abs((code - zero) * scale - value) ** norm for code, value in zip(codes, weight, strict=True))
        best = min(best, (error, scale, zero), key=lambda entry: entry[0])
    return best[1], best[2]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("sym", [True, False])
def test_search_finds_what_a_slow_search_finds(bits, sym):
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(bits), dtype=torch.float64) ** 3
    scale, zero = fit_grid(weight, settings(bits, sym=sym, mse=2.4))
    want = [slow_search(row, bits=bits, sym=sym, norm=2.4) for row in weight.tolist()]
    assert list(zip(scale.tolist(), zero.tolist(), strict=True)) == want
    plain = fit_grid(weight, settings(bits, sym=sym))[0]
    assert (scale < plain).any()


@pytest.mark.parametrize(
    ("asked", "widths", "want"),
    [
        ("auto", [256, 1024], 128),
        ("auto", [576, 1536], 64),
        ("auto", [96, 64], 32),
        (64, [576, 1536], 64),
        (4, [64, 172], 4),
        (-1, [172, 7], -1),
    ],
)
def test_group_size(asked, widths, want):
    assert resolve_group_size(asked, iter(widths)) == want


def test_a_group_size_that_does_not_divide_is_refused_with_those_that_do():
    with pytest.raises(ModelError) as caught:
        resolve_group_size(128, [1536, 576, 576])
    assert "group_size 128 does not divide" in caught.value.what
    assert "(576, 1536)" in caught.value.what
    assert caught.value.allowed == "192, 96, 64, 48, 32, 24, 16, 12; -1 for one group for each row"
    assert caught.value.hint == "group_size: auto takes the usual one that fits"


@pytest.mark.parametrize("size", [0, -2, 5])
def test_other_group_sizes_are_refused(size):
    with pytest.raises(ModelError, match="does not divide"):
        resolve_group_size(size, [64])


def test_auto_refuses_where_no_usual_size_divides():
    with pytest.raises(ModelError) as caught:
        resolve_group_size("auto", [64, 172])
    assert "neither 128, 64 nor 32 divides" in caught.value.what
    assert caught.value.allowed == "4, 2, 1; -1 for one group for each row"
    assert caught.value.hint is None


@pytest.mark.parametrize(("bits", "mse"), [(3, 0.0), (16, 0.0), (4, -1.0), (4, float("nan"))])
def test_settings_refuse_what_no_grid_has(bits, mse):
    with pytest.raises(ModelError):
        GridSettings(bits=bits, sym=True, mse=mse)


@pytest.mark.parametrize("group_size", [-1, 8, 16])
@pytest.mark.parametrize("sym", [True, False])
def test_rounding_a_layer_rounds_every_group(group_size, sym):
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    linear = round_to_nearest(weight, settings(sym=sym, mse=2.4), group_size)
    size = 16 if group_size == -1 else group_size
    groups = [rounded(part, settings(sym=sym, mse=2.4)) for part in weight.split(size, dim=1)]
    assert torch.equal(linear.dequantized(torch.float32), torch.cat(groups, dim=1))
    assert linear.g_idx.tolist() == [column // size for column in range(16)]
    assert (linear.codes.dtype, linear.scales.dtype, linear.zeros.dtype) == (torch.uint8, torch.float16, torch.uint8)
    assert linear.scales.shape == linear.zeros.shape == (6, 16 // size)


def test_rounding_does_not_depend_on_how_many_groups_are_fitted_at_once(monkeypatch):
    weight = torch.randn(40, 32, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    at_once = round_to_nearest(weight, settings(mse=2.4), 8)
    monkeypatch.setattr("kdkit.models.quantized.linear._CHUNK", 24)
    apart = round_to_nearest(weight, settings(mse=2.4), 8)
    assert torch.equal(at_once.codes, apart.codes)
    assert torch.equal(at_once.scales, apart.scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_last_step_rounds(dtype):
    """Grids are fitted in float32, whatever the weights are in, and codes become numbers in float32."""
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    linear = round_to_nearest(weight, settings(mse=2.4), 16)
    exact = round_to_nearest(weight.float(), settings(mse=2.4), 16)
    assert torch.equal(linear.scales, exact.scales)
    assert torch.equal(linear.codes, exact.codes)
    assert torch.equal(linear.dequantized(dtype), linear.dequantized(torch.float32).to(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    weight = torch.ones(4, 8)
    weight[2, 3] = value
    with pytest.raises(ModelError, match="not finite"):
        round_to_nearest(weight, settings(), 8)


def test_groups_in_another_order():
    linear = QuantizedLinear(
        codes=torch.tensor([[9, 9, 9, 9]], dtype=torch.uint8),
        scales=torch.tensor([[1.0, 10.0]], dtype=torch.float16),
        zeros=torch.tensor([[8, 7]], dtype=torch.uint8),
        g_idx=torch.tensor([1, 0, 1, 0], dtype=torch.int32),
        bits=4,
    )
    assert linear.dequantized(torch.float64).tolist() == [[20.0, 1.0, 20.0, 1.0]]


def test_group_index():
    assert group_index(6, 2).tolist() == [0, 0, 1, 1, 2, 2]
    assert group_index(3, -1).tolist() == [0, 0, 0]


def test_the_search_goes_down_to_a_fifth_of_the_range():
    """One weight of 1 among many of a quarter: the grid with steps of a quarter clips it, and fits all others."""
    weight = torch.tensor([[1.0, *[0.25, -0.25] * 500]])
    scale, _ = fit_grid(weight, GridSettings(bits=2, sym=True, mse=2.4))
    assert float(scale) == pytest.approx(0.25, rel=0.02)
    weight = torch.tensor([[1.0, *[0.15, -0.15] * 5000]])
    scale, _ = fit_grid(weight, GridSettings(bits=2, sym=True, mse=2.4))
    assert float(scale) == pytest.approx(0.15, rel=0.04)


@pytest.mark.parametrize("sym", [True, False])
def test_a_grid_that_is_no_better_is_not_taken(sym):
    """All grids hold a group of zeros exactly."""
    plain, searched = (fit_grid(torch.zeros(2, 16), GridSettings(bits=4, sym=sym, mse=mse)) for mse in (0.0, 2.4))
    assert torch.equal(plain[0], searched[0])
    assert torch.equal(plain[1], searched[1])
