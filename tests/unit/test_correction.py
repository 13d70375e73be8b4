"""The iteration against closed forms of a linear denoiser, in float64."""

import math

import pytest
import torch

from iec_core.correction import CorrectionSettings, Step, corrected_denoised

SIGMA, SIGMA_NEXT = 2.0, 1.5
X = torch.tensor([[0.7, -1.2], [3.0, 0.4]], dtype=torch.float64)
SCALE = 1.1
STEP = Step.euler(SIGMA, SIGMA_NEXT, SCALE)
SLOPE, OFFSET = 0.3, 0.05


def eps(x):
    return SLOPE * x + OFFSET


def run(settings, x=X, slope=SLOPE):
    """Return (x' after an Euler step with the corrected prediction, list of inputs that the network saw)."""
    seen = []

    def evaluate(x_in, sigma, iteration):
        assert iteration == len(seen)
        assert sigma == (SIGMA if settings.evaluation_point == "paper" or not seen else SIGMA_NEXT)
        seen.append(x_in.clone())
        return x_in - sigma * (slope * x_in + OFFSET)

    denoised, trace = corrected_denoised(evaluate, x, STEP, settings)
    assert not trace.fell_back.any()
    return x + (x - denoised) / SIGMA * (SIGMA_NEXT - SIGMA), seen


@pytest.mark.parametrize("lambda_", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_equals_the_iteration_on_the_result(lambda_, iterations):
    step = SIGMA_NEXT - SIGMA
    expected = X + step * eps(X)
    inputs = [X]
    for _ in range(iterations):
        inputs.append(expected * SCALE)
        expected = (1 - lambda_) * expected + lambda_ * (X + step * eps(expected * SCALE))
    result, seen = run(CorrectionSettings.parse("all", lambda_, iterations, 0))
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(seen, inputs, rtol=1e-14, atol=0)


@pytest.mark.parametrize("lambda_", [0.5, 1.0])
@pytest.mark.parametrize("iterations", [1, 3])
def test_next_point_blends_with_the_prediction_at_the_next_sigma(lambda_, iterations):
    step = SIGMA_NEXT - SIGMA
    expected = X + step * eps(X)
    inputs = [X]
    for _ in range(iterations):
        inputs.append(expected)
        expected = (1 - lambda_) * expected + lambda_ * (X + step * eps(expected))
    result, seen = run(CorrectionSettings.parse("all", lambda_, iterations, 0, "next"))
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(seen, inputs, rtol=1e-14, atol=0)


def test_next_point_has_nothing_to_correct_before_sigma_zero():
    settings = CorrectionSettings.parse("all", evaluation_point="next")
    assert settings.corrected_steps([3.0, 2.0, 1.0, 0.0]) == {0, 1}
    assert CorrectionSettings.parse("all").corrected_steps([3.0, 2.0, 1.0, 0.0]) == {0, 1, 2}
    assert CorrectionSettings.parse("all", max_iterations=0).corrected_steps([3.0, 2.0, 0.0]) == set()


def test_converges_to_the_fixed_point():
    step = SIGMA_NEXT - SIGMA
    fixed_point = (X + step * OFFSET) / (1 - step * SLOPE * SCALE)
    result, seen = run(CorrectionSettings.parse("all", 0.5, 100, 1e-13))
    torch.testing.assert_close(result, fixed_point, rtol=1e-12, atol=0)
    assert len(seen) < 80


def test_no_iterations_is_the_plain_prediction():
    denoised = torch.randn(2, 3)
    settings = CorrectionSettings.parse("all", 0.5, 0)
    assert corrected_denoised(lambda *_: denoised, torch.randn(2, 3), STEP, settings)[0] is denoised


def test_items_of_a_batch_stop_each_for_itself():
    quick = torch.full((1, 2), -OFFSET / SLOPE / SCALE, dtype=torch.float64)  # close to where eps vanishes
    slow = torch.full((1, 2), 40.0, dtype=torch.float64)
    settings = CorrectionSettings.parse("all", 0.5, 12, 1e-4)
    alone_quick, seen_quick = run(settings, quick)
    alone_slow, seen_slow = run(settings, slow)
    together, seen = run(settings, torch.cat([quick, slow]))
    assert len(seen_quick) != len(seen_slow)
    assert len(seen) == max(len(seen_quick), len(seen_slow))
    assert torch.equal(together, torch.cat([alone_quick, alone_slow]))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"lambda_": 0.0}, "lambda_"),
        ({"lambda_": 1.01}, "lambda_"),
        ({"lambda_": math.nan}, "lambda_"),
        ({"max_iterations": -1}, "max_iterations"),
        ({"tolerance": -1e-9}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"correction_steps": "some"}, "correction_steps"),
        ({"evaluation_point": "middle"}, "evaluation_point"),
        ({"lambda_mode": "free"}, "lambda_mode"),
    ],
)
def test_bad_settings_are_refused_with_the_input_named(values, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        CorrectionSettings.parse(**values)
