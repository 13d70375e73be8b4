"""By how much a correction itself moves a run's result, and the warnings about it."""

import pytest

from iec_core.correction.bias import CorrectedRun, bias_warning, moved_by
from iec_core.run_report import StepReport

FLAT = (1.0,) * 12  # a sampler without history


def step(number, *iterations, sigma_next=1.0):
    """Return a corrected step; iterations: (lambdas, residuals), each a list over the images."""
    lambdas, residuals = ([list(pair[k]) for pair in iterations] for k in (0, 1))
    return StepReport(number, 2.0, sigma_next, True, lambdas=lambdas, residuals=residuals)


def run(moves, last_ends_without_noise=True):
    """Return StepReports of one image with lambda 0.5 that move it by these shares, step by step."""
    ends = [1.0] * (len(moves) - 1) + [0.0 if last_ends_without_noise else 1.0]
    return [step(number, ([0.5], [2 * move]), sigma_next=end) for number, (move, end) in enumerate(zip(moves, ends))]


def test_moved_is_the_sum_of_lambda_times_residual_averaged_over_images():
    one = step(0, ([0.5, 0.5], [0.2, 0.4]), ([0.5, 0.0], [0.1, 0.3]))
    assert moved_by(one) == pytest.approx((0.5 * 0.2 + 0.5 * 0.1 + 0.5 * 0.4) / 2)
    assert moved_by(one, gain=-3.0) == pytest.approx(3 * moved_by(one))
    assert moved_by(step(0, ([0.5, 0.0], [0.2, None]))) == pytest.approx(0.05)  # an image that fell back
    assert moved_by(StepReport(0, 2.0, 1.0, True)) == 0


def test_warning_of_the_papers_rule_names_the_sum_and_the_largest_step():
    assert bias_warning(run([0.01, 0.01, 0.13]), CorrectedRun("paper", FLAT[:3])) == (
        "a correction at evaluation_point paper adds an error of its own; the corrections moved the result by about 15%, most "
        "of it in step 2, which ends at zero noise. correction_steps auto avoids this."
    )
    even = bias_warning(run([0.03, 0.04, 0.03]), CorrectedRun("paper", FLAT[:3]))
    assert "about 10%. " in even and "step" not in even.replace("steps", "")
    assert "most of it in step 1. " in bias_warning(run([0.01, 0.13, 0.01]), CorrectedRun("paper", FLAT[:3]))


@pytest.mark.parametrize(
    ("moves", "about"),
    [
        ([0.02, 0.02], {"evaluation_point": "paper"}),  # small
        ([0.2, 0.2], {"evaluation_point": "next"}),  # of higher order than the step
        ([0.2, 0.2], {"evaluation_point": "ahead"}),
        ([0.2, 0.2], {"evaluation_point": "paper", "is_scaled": False}),  # a flow model, where it was measured to help
        ([0.2, 0.2], {"evaluation_point": "paper", "is_scaled": False, "is_exact": True}),
        ([0.02, 0.02], {"evaluation_point": "next", "is_scaled": False, "gains": (1.0, *[1.5] * 11)}),
        ([0.2, 0.2], {"evaluation_point": "next", "is_scaled": False, "is_exact": True, "evaluates_more_than_once": True}),
        ([0.02, 0.02], {"evaluation_point": "next", "evaluates_more_than_once": True}),
        ([0.2, 0.2], {"evaluation_point": "paper", "full": [0, 5, 10]}),  # the paper's rule helped with a wide cache
        ([0.2, 0.2], {"evaluation_point": "paper", "full": [0, 1, 7]}),  # its last full step is the 8th of 12
        ([0.2, 0.2], {"evaluation_point": "next", "is_exact": True}),  # makes up for coarse steps
        ([0.02, 0.02], {"evaluation_point": "paper", "is_exact": True}),
        ([0.0005, 0.0005], {"evaluation_point": "next", "is_exact": True, "evaluates_more_than_once": True}),
        ([0.2, 0.2], {"evaluation_point": "next", "gains": (1.0, *[1.5] * 11), "full": [0, 5, 10]}),
    ],
)
def test_runs_without_a_warning(moves, about):
    assert bias_warning(run(moves), CorrectedRun(**{"gains": FLAT, **about})) is None


def test_a_run_that_corrects_nothing():
    steps = [StepReport(number, 2.0, 1.0, False) for number in range(3)]
    assert bias_warning(steps, CorrectedRun("paper", (1.0, 1.5, 1.0), evaluates_more_than_once=True, is_exact=True)) is None


def test_a_narrow_cache_changes_nothing():
    assert bias_warning(run([0.2, 0.2]), CorrectedRun("paper", FLAT, full=[0, 4, 8])) is not None
    once = [0, 1, 2, 3, 4, 5, 10]  # one wide group of five steps among twelve
    assert bias_warning(run([0.2, 0.2]), CorrectedRun("paper", FLAT, full=once)) is not None


@pytest.mark.parametrize("point", ["paper", "next"])
def test_history_multiplies_the_estimate(point):
    """dpmpp_2m: a change in step 1 enters step 1 3.4 times, and step 2 subtracts 0.5 times the change."""
    said = bias_warning(run([0.02, 0.1, 0.02]), CorrectedRun(point, (1.0, 3.4, 1.5)))
    bias = (1 - 2.4) * 0.02, (3.4 - 0.5) * 0.1, 1.5 * 0.02
    assert said == (
        "this sampler extrapolates from its last predictions, and so multiplies the change that a correction makes (by 3.4 in "
        f"step 1); the corrections moved the result by about {sum(map(abs, bias)):.0%}, most of it in step 1. correction_steps "
        "auto avoids this."
    )


def test_history_is_warned_of_at_any_size_except_after_a_cache():
    gains = (1.0, *[1.5] * 10, 1.0)
    said = bias_warning(run([0.02, 0.02]), CorrectedRun("next", gains))
    assert "by 1.5 in step 1); the corrections moved the result by about 3%" in said
    assert bias_warning(run([0.01, 0.01]), CorrectedRun("next", gains, full=[0, 3, 6, 9])) is None
    assert bias_warning(run([0.1, 0.1]), CorrectedRun("next", gains, full=[0, 3, 6, 9])) is not None
    assert bias_warning(run([0.1, 0.1]), CorrectedRun("next", gains, is_scaled=False)) is not None


def test_a_model_with_nothing_to_correct():
    said = bias_warning(run([0.04, 0.04]), CorrectedRun("paper", FLAT, is_exact=True))
    assert said.startswith(
        "this MODEL is neither quantized nor cached, so a correction has no error to remove; the corrections moved"
    )
    assert "by about 8%" in said
    said = bias_warning(run([0.004, 0.004]), CorrectedRun("next", FLAT, is_exact=True, evaluates_more_than_once=True))
    assert "nor cached, and the sampler is already of higher order, so" in said
    assert bias_warning(run([0.01, 0.01]), CorrectedRun("ahead", FLAT, is_exact=True, evaluates_more_than_once=True)) is None


def test_a_sampler_with_several_evaluations_per_step():
    said = bias_warning(run([0.05, 0.05]), CorrectedRun("next", FLAT, evaluates_more_than_once=True))
    assert said.startswith(
        "this sampler is already of higher order, and a correction takes that away; the corrections moved the result by"
    )
    said = bias_warning(run([0.05, 0.05]), CorrectedRun("paper", FLAT, evaluates_more_than_once=True))
    assert said.startswith("a correction at evaluation_point paper adds an error of its own")
