"""The fits of tools/error_growth.py: a line and an exponential are distinguished, and their parameters found."""

import error_growth
import numpy as np
import pytest

I = np.arange(101)  # noqa: E741


def test_a_line_is_distinguished_from_an_exponential():
    fits = error_growth.fit(0.02 * I)
    (a, b), r_squared = fits["linear"]
    assert fits["better"] == "linear"
    assert (a, b, r_squared) == pytest.approx((0, 0.02, 1), abs=1e-9)
    assert fits["exponential"][1] < 0.99


def test_an_exponential_is_distinguished_from_a_line():
    fits = error_growth.fit(1e-4 * np.exp(0.05 * I))
    (a, b), r_squared = fits["exponential"]
    assert fits["better"] == "exponential"
    assert (a, b, r_squared) == pytest.approx((1e-4, 0.05, 1), rel=1e-5)
    assert fits["linear"][1] < 0.9


def test_a_power_is_found():
    fits = error_growth.fit(3e-4 * I**2.0)
    assert (*fits["power"][0], fits["power"][1]) == pytest.approx((3e-4, 2, 1), rel=1e-6)
    assert max(fits["linear"][1], fits["exponential"][1]) < 0.99


def test_a_fit_to_the_first_part_ignores_the_rest():
    curve = 0.02 * I
    curve[91:] = 50.0
    (a, b), r_squared = error_growth.fit(curve, 0.9)["linear"]
    assert (a, b, r_squared) == pytest.approx((0, 0.02, 1), abs=1e-9)
    assert error_growth.fit(curve)["linear"][1] < 0.9


def test_the_exponential_is_fitted_on_the_errors_own_scale():
    """The line is fitted on this scale too; in a log-linear fit, the smallest errors would dominate."""
    errors = 1e-3 * np.exp(0.04 * I)
    errors[:5] = 1e-9
    (a, b), _ = error_growth.fit_exponential(I, errors)
    assert (a, b) == pytest.approx((1e-3, 0.04), rel=0.02)
