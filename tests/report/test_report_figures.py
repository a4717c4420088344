from __future__ import annotations

import pytest

from kdkit.report.figures import amount, measured, number, p_value, percent, share, size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (24.7312, "24.7"),
        (-0.04567, "-0.0457"),
        (99.96, "100"),
        (1234.5, "1,234"),
        (1234567, "1,234,567"),
        (0.00001234, "1.23e-05"),
    ],
)
def test_number_has_three_digits(value, text) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "ci95", "text"),
    [
        (24.7312, [22.9, 26.4], "24.7 ±1.8"),
        (24.7312, [24.719, 24.744], "24.731 ±0.013"),
        (24.7312, [24.635, 24.8309], "24.73 ±0.10"),
        (1234.5, [1004, 1400], "1,230 ±230"),
        (7.0, [6.5, 8.9], "7.0 ±1.9"),
        (0.0, [-0.004, 0.002], "0.0000 ±0.0040"),
        (-0.004, [-0.3, 0.2], "0.00 ±0.30"),
        (0.00001234, [0.00001, 0.00002], "1.2e-05 ±7.7e-06"),
        (24.7312, None, "24.7"),
        (None, None, "-"),
    ],
)
def test_a_measured_value_has_the_digits_of_its_interval(value, ci95, text) -> None:
    assert measured(value, ci95) == text


def test_signs_of_differences() -> None:
    assert measured(2.71, [2.0, 3.5], sign=True) == "+2.71 ±0.79"
    assert measured(-2.71, [-3.5, -2.0], sign=True) == "-2.71 ±0.79"
    assert measured(0.001, [-1, 1], sign=True) == "0.0 ±1.0"
    assert number(0.5, sign=True) == "+0.500"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0"), (9999, "9,999"), (10_000, "10.0k"), (999_999, "1.00M"), (1_543_714_304, "1.54B")],
)
def test_amount(value, text) -> None:
    assert amount(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0 B"), (512, "512 B"), (497_774_208, "498 MB"), (3.09e9, "3.09 GB"), (99_960_000, "100 MB")],
)
def test_size(value, text) -> None:
    assert size(value) == text


def test_percent_and_share() -> None:
    assert percent(0.8472, [0.81, 0.88]) == "84.7 ±3.7 %"
    assert percent(None, None) == "-"
    assert share(12, 500) == "12 (2.40 %)"
    assert share(0, 500) == "0"
    assert share(0, 0) == "0"


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (None, "-"),
        (0.0001, "<0.001"),
        (0.0123, "0.012"),
        (0.05, "0.050"),
        (0.0504, "0.0504"),
        (0.0497, "0.0497"),
        (1.0, "1.000"),
    ],
)
def test_p_agrees_with_the_verdict(p, text) -> None:
    assert p_value(p) == text
