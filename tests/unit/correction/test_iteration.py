"""The iteration compared with closed forms of a linear denoiser, in float64."""

import gc
import math

import pytest
import torch

from iec_core.correction.iteration import CorrectionSettings, Step, corrected_denoised

SIGMA, SIGMA_NEXT = 2.0, 1.5
X = torch.tensor([[0.7, -1.2], [3.0, 0.4]], dtype=torch.float64)
SCALE = 1.1
STEP = Step.euler(SIGMA, SIGMA_NEXT, SCALE)
SLOPE, OFFSET = 0.3, 0.05


def eps(x):
    return SLOPE * x + OFFSET


def run(settings, x=X):
    """Return (x' after an Euler step with the corrected prediction, list of the network's inputs)."""
    seen = []

    def evaluate(x_in, sigma, iteration):
        assert iteration == len(seen)
        assert sigma == (SIGMA if settings.evaluation_point == "paper" or not seen else SIGMA_NEXT)
        seen.append(x_in.clone())
        return x_in - sigma * (SLOPE * x_in + OFFSET)

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


def test_ahead_corrects_steps_with_a_known_end():
    settings = CorrectionSettings.parse("all", evaluation_point="ahead")
    assert settings.corrected_steps([3.0, 2.0, 1.0, 0.0], known_ends={0, 1}) == {0, 1}
    assert settings.corrected_steps([3.0, 2.0, 1.0, 0.0]) == set()
    assert CorrectionSettings.parse("steps:1,2", evaluation_point="ahead").corrected_steps([3, 2, 1, 0], None, {0, 1}) == {1}


@pytest.mark.parametrize(
    ("point", "iterations", "added"),
    [("paper", 0, 0), ("paper", 2, 2), ("next", 1, 1), ("ahead", 0, 0), ("ahead", 1, 0), ("ahead", 3, 2)],
)
def test_evaluations_that_a_corrected_step_adds(point, iterations, added):
    assert CorrectionSettings.parse("all", max_iterations=iterations, evaluation_point=point).added_evaluations == added


def ahead(settings, evaluate, x=X, step=STEP):
    """Return (denoised, trace, the prediction that is kept for the next step)."""
    kept = []
    denoised, trace = corrected_denoised(evaluate, x, step, settings, keep=kept.append)
    (prediction,) = kept
    return denoised, trace, prediction


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_ahead_equals_next_and_keeps_its_last_prediction(iterations):
    seen = []

    def evaluate(x_in, sigma, iteration):
        seen.append(x_in - sigma * (SLOPE * x_in + OFFSET))
        return seen[-1]

    settings = [CorrectionSettings.parse("all", 0.5, iterations, 0, point) for point in ("next", "ahead")]
    expected, _ = corrected_denoised(evaluate, X, STEP, settings[0])
    denoised, _, kept = ahead(settings[1], evaluate)
    torch.testing.assert_close(denoised, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(kept, seen[-1], rtol=0, atol=0)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_ahead_keeps_the_prediction_at_the_iterate_that_an_item_falls_back_to(at):
    """Item 1 breaks in one iteration: it ends at the previous iterate, whose prediction becomes its next step's."""
    seen = []

    def evaluate(x_in, sigma, iteration):
        denoised = x_in - sigma * (SLOPE * x_in + OFFSET)
        if iteration == at:
            denoised[1] = 1e6
        seen.append((x_in.clone(), denoised))
        return denoised

    denoised, trace, kept = ahead(CorrectionSettings.parse("all", 0.5, 4, 0, "ahead"), evaluate)
    assert trace.fell_back.tolist() == [False, True]
    assert torch.equal(kept[0], seen[-1][1][0])
    assert torch.equal(kept[1], seen[max(at - 1, 1)][1][1])  # if the first correction fails, D_0 stays, whose x' was the input
    ends_at = STEP.x_factor * X[1] + STEP.denoised_factor * denoised[1]
    torch.testing.assert_close(seen[max(at - 1, 1)][0][1], ends_at, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_latent_evaluated_ahead_equals_eulers(dtype):
    """The latent equals k-diffusion's bit for bit, with the sigmas in the latent's dtype."""
    x, denoised = (torch.randn(2, 500, generator=torch.Generator().manual_seed(1), dtype=dtype) for _ in range(2))
    sigmas = torch.tensor([2.7, 1.9], dtype=dtype)
    expected = x + (x - denoised) / sigmas[0].reshape(1, 1) * (sigmas[1] - sigmas[0])
    seen = []

    def evaluate(x_in, sigma, iteration):
        seen.append(x_in)
        return denoised

    ahead(CorrectionSettings.parse("all", evaluation_point="ahead"), evaluate, x, Step.euler(*sigmas.tolist()))
    assert torch.equal(seen[1], expected)


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


def test_items_of_a_batch_stop_independently():
    quick = torch.full((1, 2), -OFFSET / SLOPE / SCALE, dtype=torch.float64)  # close to where eps vanishes
    slow = torch.full((1, 2), 40.0, dtype=torch.float64)
    settings = CorrectionSettings.parse("all", 0.5, 12, 1e-4)
    alone_quick, seen_quick = run(settings, quick)
    alone_slow, seen_slow = run(settings, slow)
    together, seen = run(settings, torch.cat([quick, slow]))
    assert len(seen_quick) != len(seen_slow)
    assert len(seen) == max(len(seen_quick), len(seen_slow))
    assert torch.equal(together, torch.cat([alone_quick, alone_slow]))


def iterate(slope, lambda_=0.5, iterations=1, mode="fixed", x=X, broken=None):
    """Iterate a linear map x' -> slope x' + ..., whose slope may differ between items: (predictions D_0, D after, trace).

    broken: {iteration: value}, the network's output at that iteration.
    """
    slope = torch.as_tensor(slope, dtype=torch.float64).reshape(-1, 1) * torch.ones_like(x)
    reach, first = STEP.denoised_factor * SCALE, []

    def evaluate(x_in, sigma, iteration):
        if iteration in (broken or {}):
            return torch.full_like(x_in, broken[iteration])
        # G(D) = x - x_in + D(x_in) must have the slope d G / d D = slope, through x_in = ... + reach D
        denoised = x_in + slope / reach * x_in - 0.3
        first.append(denoised)
        return denoised

    settings = CorrectionSettings.parse("all", lambda_, iterations, 0.0, lambda_mode=mode)
    denoised, trace = corrected_denoised(evaluate, x, STEP, settings)
    return first[0], denoised, trace


def fixed_point(slope, x=X):
    """Return D = x - x_in + D(x_in) of the linear map in `iterate`, solved for D."""
    reach = STEP.denoised_factor * SCALE
    start = x - 0.3 + slope / reach * SCALE * STEP.x_factor * x
    return start / (1 - slope)


@pytest.mark.parametrize("slope", [-4.0, -0.8, 0.3, 0.95])
def test_anderson_solves_a_line_in_two_iterations(slope):
    damping = 0.1  # all of them converge with this damping
    _, denoised, trace = iterate(slope, damping, 2, "anderson")
    torch.testing.assert_close(denoised, fixed_point(slope), rtol=1e-10, atol=0)
    assert not trace.fell_back.any()


@pytest.mark.parametrize("slope", [-4.0, -1.0, -0.2])
def test_contractive_uses_the_damping_that_solves_a_line(slope):
    _, denoised, trace = iterate(slope, 1.0, 1, "contractive")
    torch.testing.assert_close(denoised, fixed_point(slope), rtol=1e-10, atol=0)
    torch.testing.assert_close(trace.lambdas[0], torch.full((2,), 1 / (1 - slope), dtype=torch.float64))


def test_contractive_damping_is_at_most_lambda_and_zero_without_contraction():
    _, _, trace = iterate([0.4, 1.2], 0.5, 1, "contractive")
    assert trace.lambdas[0].tolist() == [0.5, 0.0]
    first, denoised, _ = iterate(1.2, 0.5, 3, "contractive")
    assert torch.equal(denoised, first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("mode", "iterations"), [("contractive", 1), ("anderson", 2), ("fixed", 3)])
def test_residuals_of_16_bit_latents_are_computed_in_32_bits(dtype, mode, iterations):
    """The square of the latent overflows in float16; the linear map has slope -1, which the damping 1 / 2 solves."""
    x = 14 * torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
    assert x.square().sum(1).min() > 2 * torch.finfo(torch.float16).max
    reach = STEP.denoised_factor * SCALE

    def evaluate(x_in, sigma, iteration):
        return (x_in.double() * (1 - 1 / reach) - 0.3).to(dtype)

    largest = 0.5 if mode == "fixed" else 1.0 if mode == "contractive" else 0.4
    settings = CorrectionSettings.parse("all", largest, iterations, 0.0, lambda_mode=mode)
    denoised, trace = corrected_denoised(evaluate, x.to(dtype), STEP, settings)
    assert denoised.dtype == dtype and denoised.isfinite().all()
    expected = fixed_point(-1.0, x.double())
    assert ((denoised.double() - expected).norm() / expected.norm()).item() < 20 * torch.finfo(dtype).eps
    last = trace.lambdas[-1] if mode != "fixed" else trace.lambdas[0]
    torch.testing.assert_close(last, torch.full((2,), 0.5), rtol=0.05, atol=0)
    assert all(row.isfinite().all() and row.dtype == torch.float32 for row in trace.residuals)


@pytest.mark.parametrize("lambda_", [0.2, 0.5, 0.9])
def test_reported_contraction_is_of_the_damped_map(lambda_):
    slopes = torch.tensor([-0.6, 0.7], dtype=torch.float64)
    _, _, trace = iterate(slopes, lambda_, 4)
    for contraction in trace.contraction:
        torch.testing.assert_close(contraction, (1 - lambda_ + lambda_ * slopes).abs())
    residuals = torch.stack(trace.residuals)
    assert (residuals[1:] < residuals[:-1]).all()


def test_an_iteration_that_would_not_converge_keeps_the_prediction():
    first, denoised, trace = iterate([-4.0, 0.3], 0.5, 3)
    assert trace.fell_back.tolist() == [True, False]
    assert torch.equal(denoised[0], first[0])
    torch.testing.assert_close(denoised[1], iterate(0.3, 0.5, 3, x=X[1:])[1][0])


@pytest.mark.parametrize("value", [1e6, math.nan, math.inf])
@pytest.mark.parametrize("mode", ["fixed", "contractive", "anderson"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_residual_that_grows_or_is_not_finite_falls_back_to_the_best_iterate(value, mode, at):
    if (value, mode, at) == (1e6, "contractive", 1):
        pytest.skip("a steep first slope is met with a damping that contracts it")
    best = iterate(0.3, 0.5, at - 2, mode)[1] if at > 2 else iterate(0.3)[0]
    _, denoised, trace = iterate(0.3, 0.5, 3, mode, broken={at: value})
    assert trace.fell_back.all()
    torch.testing.assert_close(denoised, best, rtol=1e-12, atol=0)
    assert denoised.isfinite().all()


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_device_is_read_at_most_once_per_iteration_and_never_at_one(iterations):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    with torch.inference_mode(False), Reads() as reads:  # in inference mode reads are not dispatched to modes
        iterate(0.3, 0.5, iterations)
        assert reads.count == iterations - 1
        X.clone().sum().item()
    assert reads.count == iterations


@pytest.fixture
def objects_of_the_test():
    """Return objects_of_the_test(), which gives the Python objects made since the test began; a loaded ComfyUI has a million
    more.
    """

    def made():
        gc.collect()
        return gc.get_objects()

    gc.freeze()
    yield made
    gc.unfreeze()


@pytest.mark.parametrize("mode", ["fixed", "contractive", "anderson"])
@pytest.mark.parametrize("iterations", [1, 2, 4])
@pytest.mark.parametrize("within", ["a step", "a stochastic step", "a mask"])
def test_two_latents_are_held_while_the_network_runs(mode, iterations, within, objects_of_the_test):
    x, counts = torch.randn(2, 977, dtype=torch.float64), []
    noise = (lambda: torch.ones_like(x)) if within == "a stochastic step" else None
    mask = (lambda: torch.ones_like(x)) if within == "a mask" else None

    def evaluate(x_in, sigma, iteration):
        tensors = [thing for thing in objects_of_the_test() if type(thing) is torch.Tensor and thing.shape == x.shape]
        counts.append(len({tensor.data_ptr() for tensor in tensors}) - 1)
        return 0.9 * x_in

    settings = CorrectionSettings.parse("all", 0.5, iterations, 0.0, lambda_mode=mode)
    corrected_denoised(evaluate, x, STEP, settings, noise, mask)
    assert counts == [0] + iterations * [2]


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_every_iterate_includes_the_steps_noise(iterations):
    noise = torch.tensor([[0.4, -1.1], [0.2, 0.9]], dtype=torch.float64)
    expected = X + (SIGMA_NEXT - SIGMA) * eps(X) + noise
    for _ in range(iterations):
        expected = 0.5 * expected + 0.5 * (X + (SIGMA_NEXT - SIGMA) * eps(expected * SCALE) + noise)

    def evaluate(x_in, sigma, iteration):
        return x_in - sigma * eps(x_in)

    settings = CorrectionSettings.parse("all", 0.5, iterations, 0)
    denoised, _ = corrected_denoised(evaluate, X, STEP, settings, lambda: noise.clone())
    result = STEP.x_factor * X + STEP.denoised_factor * denoised + noise
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("iterations", [1, 3])
def test_mask_is_how_much_of_a_number_is_corrected(iterations):
    """Each iteration moves D by mask * lambda * (G(D) - D); where the mask is 0 the prediction is unchanged, bit for bit."""
    mask = torch.tensor([[1.0, 0.0], [0.25, 0.0]], dtype=torch.float64)
    plain = X - SIGMA * eps(X)
    expected = plain
    for _ in range(iterations):
        x_in = SCALE * (STEP.x_factor * X + STEP.denoised_factor * expected)
        expected = expected + mask * 0.5 * (X - SIGMA * eps(x_in) - expected)

    def evaluate(x_in, sigma, iteration):
        return x_in - sigma * eps(x_in)

    settings = CorrectionSettings.parse("all", 0.5, iterations, 0)
    denoised, _ = corrected_denoised(evaluate, X, STEP, settings, mask=lambda: mask)
    torch.testing.assert_close(denoised, expected, rtol=1e-13, atol=0)
    assert torch.equal(denoised[mask == 0], plain[mask == 0])


@pytest.mark.parametrize("iterations", [2, 3, 5])
def test_anderson_is_the_mixture_of_depth_one_written_out(iterations):
    """The map has four unequal slopes. The mixture continues with the damping of its last move, as its docstring says."""
    slopes = torch.tensor([-0.7, -0.1, 0.2, 0.6], dtype=torch.float64)
    x = torch.tensor([[1.0, -0.5, 0.8, 0.3]], dtype=torch.float64)
    reach = STEP.denoised_factor * SCALE
    start = x + slopes / reach * SCALE * STEP.x_factor * x - 0.3  # G(D) = start + slopes D
    points, residuals, beta = [x + slopes / reach * x - 0.3], [], 0.5
    for _ in range(iterations):
        residuals.append(start + slopes * points[-1] - points[-1])
        if len(points) == 1:
            points.append(points[0] + beta * residuals[0])
            continue
        difference = residuals[-1] - residuals[-2]
        gamma = (residuals[-1] * difference).sum() / (difference * difference).sum()
        mixed = points[-1] - gamma * (points[-1] - points[-2])
        points.append(mixed + beta * (residuals[-1] - gamma * difference))
        beta = beta * (1 - gamma)

    settings = CorrectionSettings.parse("all", 0.5, iterations, 0.0, lambda_mode="anderson")
    denoised, trace = corrected_denoised(lambda x_in, *_: x_in + slopes / reach * x_in - 0.3, x, STEP, settings)
    torch.testing.assert_close(denoised, points[-1], rtol=1e-11, atol=0)
    assert not trace.fell_back.any()
    assert trace.lambdas[-1].item() == pytest.approx(beta.item(), rel=1e-9)


def test_a_step_independent_of_the_prediction_stops_after_one_iteration():
    step, count = Step(SIGMA, SIGMA, 1.0, 0.0), []

    def evaluate(x_in, sigma, iteration):
        count.append(iteration)
        return 0.9 * x_in

    denoised, _ = corrected_denoised(evaluate, X, step, CorrectionSettings.parse("all", 0.5, 3, 0.0))
    assert count == [0, 1] and denoised.isfinite().all()


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
