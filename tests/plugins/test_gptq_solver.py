"""The solver against a textbook that shares only the objective with it: no Cholesky, no blocks, no transposes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from kdkit.api.errors import ModelError
from kdkit.models.quantized.grid import GridSettings, fit_grid, from_codes, to_codes
from kdkit.models.quantized.linear import round_to_nearest
from kdkit.plugins.quantizers import gptq_solver
from kdkit.plugins.quantizers.gptq_solver import SolverSettings, solve, solve_shared

GRID = GridSettings(bits=4, sym=True, mse=0.0)
BASE = SolverSettings(grid=GRID, group_size=64, desc_act=False, static_groups=False, damp_percent=0.05, block_size=128)
ORDERS = {
    "plain": {"desc_act": False, "static_groups": False},
    "static": {"desc_act": False, "static_groups": True},
    "act order": {"desc_act": True, "static_groups": False},
    "static act order": {"desc_act": True, "static_groups": True},
}


def layer(out: int, width: int, *, seed: int = 0, tokens: int = 0, dtype=torch.float64):
    """A weight and the second moments of correlated inputs of very unequal size."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=rng, dtype=torch.float64) / width**0.5
    scale = torch.exp(torch.randn(width, generator=rng, dtype=torch.float64))
    inputs = (
        torch.randn(tokens or 3 * width, width, generator=rng, dtype=torch.float64) @ (mix + torch.eye(width)) * scale
    )
    weight = torch.randn(out, width, generator=rng, dtype=torch.float64)
    return weight.to(dtype), (inputs.T @ inputs / inputs.shape[0]).to(dtype)


def textbook(weight, hessian, s: SolverSettings):
    """Round a column; spread its error with the inverse of what is left of H; take the column out of that inverse."""
    width = weight.shape[1]
    size = width if s.group_size == -1 else s.group_size
    w, q = weight.clone(), torch.zeros_like(weight)
    damped = hessian + s.damp_percent * hessian.diagonal().mean() * torch.eye(width, dtype=weight.dtype)
    inverse = torch.linalg.inv(damped)
    order = sorted(range(width), key=lambda i: -float(hessian[i, i])) if s.desc_act else list(range(width))
    grids = {}
    if s.static_groups:
        grids = {g: fit_grid(weight[:, g * size : (g + 1) * size], s.grid) for g in range(width // size)}
    for place, i in enumerate(order):
        group = i // size if s.static_groups else place // size
        if group not in grids:
            grids[group] = fit_grid(w[:, order[place : place + size]], s.grid)
        scale, zero = grids[group]
        q[:, i] = from_codes(to_codes(w[:, [i]], scale, zero, s.grid.bits), scale, zero)[:, 0]
        error = (w[:, i] - q[:, i]) / inverse[i, i]
        w = w - error[:, None] * inverse[i][None]
        inverse = inverse - inverse[:, [i]] @ inverse[[i]] / inverse[i, i]
    return q


def loss(weight, quantised, hessian) -> float:
    return float(torch.trace((weight - quantised) @ hessian @ (weight - quantised).T))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("sym", "bits", "group_size", "mse"),
    [(True, 4, 64, 0.0), (False, 4, 128, 0.0), (True, 2, -1, 0.0), (False, 8, 32, 2.4)],
)
def test_a_layer_is_what_the_textbook_makes_of_it(order, sym, bits, group_size, mse):
    weight, hessian = layer(256, 512)
    settings = replace(BASE, grid=GridSettings(bits=bits, sym=sym, mse=mse), group_size=group_size, **ORDERS[order])
    solved = solve(weight, hessian, settings)
    want = textbook(weight, hessian, settings)
    assert solved.kept == "gptq"
    assert (solved.linear.dequantized(torch.float64) - want).abs().max() < 1e-6
    energy = loss(weight, 0 * weight, hessian)
    assert solved.error == pytest.approx(loss(weight, want, hessian) / energy, rel=1e-9)
    nearest = round_to_nearest(weight, settings.grid, group_size).dequantized(torch.float64)
    assert solved.rtn_error == pytest.approx(loss(weight, nearest, hessian) / energy, rel=1e-9)
    assert solved.error < solved.rtn_error


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block_size", [1, 24, 64, 96, 512, 1000])
def test_the_block_size_changes_nothing(order, block_size):
    weight, hessian = layer(32, 512, seed=1)
    settings = replace(BASE, **ORDERS[order])
    one = solve(weight, hessian, settings)
    other = solve(weight, hessian, replace(settings, block_size=block_size))
    assert torch.equal(one.linear.codes, other.linear.codes)
    assert torch.equal(one.linear.scales, other.linear.scales)


def test_optimal_brain_quantisation_of_tiny_layers():
    """Each step is the best answer to the columns rounded so far: found here by least squares over what is left."""
    for seed in range(20):
        weight, hessian = layer(1, 8, seed=seed)
        settings = replace(BASE, group_size=-1, static_groups=True, damp_percent=0.0, desc_act=bool(seed % 2))
        solved = solve(weight, hessian, settings)
        scale, zero = fit_grid(weight, settings.grid)
        w, order = weight[0].clone(), list(range(8))
        if settings.desc_act:
            order.sort(key=lambda i: -float(hessian[i, i]))
        for place, i in enumerate(order):
            w[i] = from_codes(to_codes(w[None, [i]], scale, zero, 4), scale, zero)[0, 0]
            done, left = order[: place + 1], order[place + 1 :]
            # min over d of |(w - weight + d on what is left)|_H: the later columns at their best for the rounded ones.
            if left:
                change = torch.linalg.solve(hessian[left][:, left], hessian[left][:, done] @ (w - weight[0])[done])
                w[left] = weight[0][left] - change
        if solved.kept == "gptq":
            assert torch.allclose(solved.linear.dequantized(torch.float64)[0], w, atol=1e-7)


def test_it_comes_closer_to_the_best_of_all_codes_than_rounding_does():
    """Brute force over all 4^6 codes of a row."""
    weight, hessian = layer(4, 6, seed=3)
    settings = replace(BASE, group_size=-1, static_groups=True, damp_percent=0.0, grid=replace(GRID, bits=2))
    linear = solve(weight, hessian, settings).linear
    best = all_losses(weight, hessian, linear)
    got = torch.diagonal(
        (weight - linear.dequantized(torch.float64)) @ hessian @ (weight - linear.dequantized(torch.float64)).T
    )
    nearest = round_to_nearest(weight, settings.grid, -1).dequantized(torch.float64)
    rounded = torch.diagonal((weight - nearest) @ hessian @ (weight - nearest).T)
    assert torch.all(got >= best - 1e-9)
    assert float((got / best).mean()) < float((rounded / best).mean())


def all_losses(weight, hessian, linear):
    """The smallest error [out] over all codes, 4^6 for each row."""
    codes = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.float64)
    best = []
    for row in range(weight.shape[0]):
        values = (codes - float(linear.zeros[row, 0])) * float(linear.scales[row, 0])
        change = weight[row] - values
        best.append(((change @ hessian) * change).sum(1).min())
    return torch.stack(best)


def test_the_order_of_inputs_is_immaterial_to_act_order():
    weight, hessian = layer(16, 128, seed=4)
    settings = replace(BASE, group_size=-1, desc_act=True, static_groups=True)
    shuffled = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    one = solve(weight, hessian, settings).linear
    other = solve(weight[:, shuffled], hessian[shuffled][:, shuffled], settings).linear
    assert torch.equal(one.codes[:, shuffled], other.codes)


def test_groups_of_act_order_hold_the_largest_inputs_first():
    weight, hessian = layer(8, 128, seed=5)
    linear = solve(weight, hessian, replace(BASE, desc_act=True, group_size=32)).linear
    by_size = torch.argsort(hessian.diagonal(), descending=True)
    assert linear.g_idx[by_size].tolist() == [i // 32 for i in range(128)]
    static = solve(weight, hessian, replace(BASE, desc_act=True, static_groups=True, group_size=32)).linear
    assert static.g_idx.tolist() == [i // 32 for i in range(128)]


def test_layers_that_share_their_inputs_are_solved_as_if_alone():
    weight, hessian = layer(96, 128, seed=6)
    parts = [weight[:64], 3 * weight[64:80], weight[80:]]
    for part, together in zip(parts, solve_shared(parts, hessian, BASE), strict=True):
        alone = solve(part, hessian, BASE)
        assert torch.equal(alone.linear.codes, together.linear.codes)
        assert torch.equal(alone.linear.scales, together.linear.scales)
        assert together.error == pytest.approx(alone.error, rel=1e-9)
        assert together.rtn_error == pytest.approx(alone.rtn_error, rel=1e-9)


def test_uncorrelated_inputs_leave_nothing_to_make_up_for():
    weight, _ = layer(16, 64, seed=7)
    solved = solve(weight, torch.diag(torch.rand(64, dtype=torch.float64) + 0.1), BASE)
    assert torch.equal(solved.linear.codes, round_to_nearest(weight, GRID, 64).codes)
    assert solved.kept == "gptq"
    assert solved.error == solved.rtn_error


@pytest.mark.parametrize("order", ORDERS)
def test_an_input_that_is_always_zero_is_rounded_to_nearest(order):
    weight, hessian = layer(16, 64, seed=8)
    dead = [0, 17, 63]
    hessian[dead], hessian[:, dead] = 0, 0
    for damp in (0.0, 0.05):
        settings = replace(BASE, **ORDERS[order], damp_percent=damp, group_size=-1)
        solved = solve(weight, hessian, settings)
        scales = solved.linear.scales.double()
        gap = (solved.linear.dequantized(torch.float64) - weight)[:, dead].abs()
        inside = weight[:, dead].abs() <= 7 * scales
        assert torch.all(gap[inside] <= (scales / 2).expand_as(gap)[inside] * (1 + 1e-9))
        alive = [i for i in range(64) if i not in dead]
        assert solved.error < solved.rtn_error
        if ORDERS[order]["static_groups"]:
            continue
        alone = solve(weight[:, alive], hessian[alive][:, alive], settings)
        assert solved.error == pytest.approx(alone.error, rel=0.5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("damp", [0.0, 0.05, 0.5])
def test_inputs_that_are_always_zero_are_as_good_as_absent(order, damp):
    """They are no reason for more damping, and the damping of the others is a share of the mean of the others."""
    weight, hessian = layer(16, 64, seed=8)
    dead = [0, 17, 18, 40, 63]
    alive = [column for column in range(64) if column not in dead]
    weight[:, dead], hessian[dead], hessian[:, dead] = 0, 0, 0
    settings = replace(BASE, **ORDERS[order], damp_percent=damp, group_size=-1)
    solved, alone = solve(weight, hessian, settings), solve(weight[:, alive], hessian[alive][:, alive], settings)
    assert solved.damp == alone.damp == damp
    assert torch.equal(solved.linear.codes[:, alive], alone.linear.codes)
    assert solved.error == pytest.approx(alone.error, rel=1e-9)


@pytest.mark.parametrize("order", ["plain", "act order"])
def test_the_number_of_rows_whose_grids_are_fitted_at_once_changes_nothing(order, monkeypatch):
    weight, hessian = layer(32, 128, seed=12)
    settings = replace(BASE, **ORDERS[order], grid=replace(GRID, mse=2.4))
    at_once = solve(weight, hessian, settings).linear
    monkeypatch.setattr(gptq_solver, "_CHUNK", 5 * 64)
    apart = solve(weight, hessian, settings).linear
    assert torch.equal(at_once.codes, apart.codes)
    assert torch.equal(at_once.scales, apart.scales)


def test_inputs_that_are_all_zero_lose_nothing():
    weight, hessian = layer(8, 64)
    solved = solve(weight, 0 * hessian, BASE)
    assert (solved.error, solved.rtn_error, solved.note) == (0.0, 0.0, None)
    assert torch.equal(solved.linear.codes, round_to_nearest(weight, GRID, 64).codes)


def test_damping_rises_until_the_moments_can_be_factored():
    weight, hessian = layer(16, 64, seed=9, tokens=5)
    solved = solve(weight, hessian, replace(BASE, damp_percent=0.01))
    assert solved.damp == 0.01
    assert solved.error < solved.rtn_error
    # Its smallest eigenvalue is 1.02 - 64 * 0.02 = -0.26, as sums that rounded badly can have one.
    indefinite = torch.full((64, 64), -0.02, dtype=torch.float64).fill_diagonal_(1.0)
    for percent, taken in ((0.01, 0.3), (0.28, 0.28), (0.2, 0.3)):
        assert solve(weight, indefinite, replace(BASE, damp_percent=percent)).damp == taken


def test_damping_rises_when_the_inverse_has_no_numbers():
    """H = V V^T can be factored exactly, and the inverse of V holds powers of 64 up to 64^63."""
    factor = torch.eye(64) / 64 + torch.diag(torch.ones(63), 1)
    weight, _ = layer(16, 64, seed=13, dtype=torch.float32)
    solved = solve(weight, factor @ factor.T, replace(BASE, damp_percent=0.0))
    assert solved.damp == 0.01
    assert 0 < solved.error < solved.rtn_error


def test_errors_are_never_below_zero():
    """Moments that are not positive definite, by rounding, give some errors a negative square."""
    indefinite = torch.full((64, 64), -0.02, dtype=torch.float64).fill_diagonal_(1.0)
    # All errors of rounding point in the direction of the negative eigenvalue; the weights do not.
    weight = torch.tensor([3.4, -2.6] * 32, dtype=torch.float64)[None] / 16
    weight[0, 0] = 7.5 / 16
    nearest = round_to_nearest(weight, GRID, 64).dequantized(torch.float64)
    assert loss(weight, nearest, indefinite) < 0 < loss(weight, 0 * weight, indefinite)
    solved = solve(weight, indefinite, BASE)
    assert solved.rtn_error == 0
    assert solved.error >= 0


def test_moments_that_no_damping_can_factor_keep_rounding_to_nearest():
    weight, hessian = layer(8, 64, seed=10)
    broken = hessian.clone()
    broken[0, 1] = broken[1, 0] = 1e6
    solved = solve(weight, broken, BASE)
    assert solved.kept == "rtn"
    assert "not positive definite" in solved.note
    assert torch.equal(solved.linear.codes, round_to_nearest(weight, GRID, 64).codes)


def test_what_is_worse_than_rounding_to_nearest_is_not_kept():
    """Heavy clipping that pushes errors into a column that ends far outside its grid."""
    found = None
    for seed in range(200):
        weight, hessian = layer(1, 4, seed=seed)
        settings = replace(BASE, group_size=-1, static_groups=True, grid=replace(GRID, bits=2), damp_percent=0.0)
        want = textbook(weight, hessian, settings)
        nearest = round_to_nearest(weight, settings.grid, -1)
        if loss(weight, want, hessian) > loss(weight, nearest.dequantized(torch.float64), hessian) * 1.01:
            found = solve(weight, hessian, settings), nearest
            break
    assert found is not None, "no such layer among 200"
    solved, nearest = found
    assert solved.kept == "rtn"
    assert "rounding to nearest" in solved.note
    assert solved.error == solved.rtn_error
    assert torch.equal(solved.linear.codes, nearest.codes)


def test_a_result_without_numbers_is_not_kept(monkeypatch):
    weight, hessian = layer(8, 64, seed=14)
    nearest = round_to_nearest(weight, GRID, 64)
    broken = replace(nearest, scales=torch.full_like(nearest.scales, float("nan")))
    monkeypatch.setattr(gptq_solver, "_compensated", lambda *_given: broken)
    solved = solve(weight, hessian, BASE)
    assert solved.kept == "rtn"
    assert 0 < solved.error == solved.rtn_error
    assert torch.equal(solved.linear.scales, nearest.scales)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    weight, hessian = layer(8, 64)
    broken = hessian.clone()
    broken[3, 3] = value
    with pytest.raises(ModelError, match="not finite"):
        solve(weight, broken, BASE)
    weight[2, 5] = value
    with pytest.raises(ModelError, match="not finite"):
        solve(weight, hessian, BASE)


def test_a_group_size_that_does_not_divide_is_refused():
    weight, hessian = layer(8, 64)
    with pytest.raises(ModelError, match="does not divide"):
        solve(weight, hessian, replace(BASE, group_size=48))


def test_float32_is_as_good_as_float64():
    weight, hessian = layer(64, 512, seed=11, dtype=torch.float32)
    for order in ORDERS.values():
        settings = replace(BASE, **order)
        single, double = solve(weight, hessian, settings), solve(weight.double(), hessian.double(), settings)
        assert single.linear.dequantized(torch.float32).dtype == torch.float32
        assert single.error == pytest.approx(double.error, rel=1e-2)
