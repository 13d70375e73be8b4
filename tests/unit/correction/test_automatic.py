"""The choices of `auto` in the situations that were measured."""

import pytest

from iec_core.correction.automatic import Situation, choose
from iec_core.correction.iteration import CorrectionSettings


def chosen(situation):
    """Return (numbers of the steps, evaluation point)."""
    choice = choose(situation)
    return sorted(choice.steps.of(situation.steps)), choice.evaluation_point


def sigmas_of(steps):
    return tuple(1.0 - step / steps for step in range(steps + 1))


def test_one_prediction_samplers_are_corrected_ahead_at_all_possible_steps():
    assert chosen(Situation(sigmas_of(12), frozenset(range(11)))) == (list(range(11)), "ahead")
    assert chosen(Situation(sigmas_of(12), frozenset({1, 3}))) == ([1, 3], "ahead")
    assert chosen(Situation(sigmas_of(12), frozenset({1, 3}), noise="ancestral")) == ([1, 3], "ahead")


def test_after_a_cache_the_step_before_each_full_step_is_corrected():
    every = frozenset(range(11))
    assert chosen(Situation(sigmas_of(12), every, full=frozenset({0, 3, 6, 9}))) == ([2, 5, 8], "ahead")
    assert chosen(Situation(sigmas_of(12), every, full=frozenset(range(12)))) == (list(range(11)), "ahead")
    assert chosen(Situation(sigmas_of(12), every, full=frozenset({0}))) == ([], None)


@pytest.mark.parametrize("first", [4518.0, 999999999.9])
def test_steps_to_less_than_a_quarter_of_their_sigma_are_not_corrected(first):
    """Such steps begin where there is no signal, or are the last but one of a schedule that ends in a large step."""
    assert chosen(Situation((first, *(20 * sigma for sigma in sigmas_of(12))), frozenset(range(12))))[0] == list(range(1, 12))
    assert chosen(Situation((*sigmas_of(12)[:-1], 0.02, 0.0), frozenset(range(12))))[0] == list(range(11))


@pytest.mark.parametrize(
    ("situation", "reason"),
    [
        (Situation(sigmas_of(12), why_none="also uses predictions of earlier steps"), "the sampler also uses predictions"),
        (Situation(sigmas_of(12), frozenset(range(11)), noise="other"), "the sampler adds noise in another way"),
        (Situation(sigmas_of(9), frozenset(range(8))), "fewer than 10 steps"),
        (Situation(sigmas_of(12)[::-1], frozenset(range(11))), "sigma rises within the schedule"),
        (Situation((*sigmas_of(12)[:-1], 0.5, 0.2, 0.0), frozenset(range(13))), "sigma rises within the schedule"),
        (Situation(sigmas_of(12), frozenset(range(11)), other_cache="EasyCache"), "EasyCache is on the MODEL"),
        (Situation(sigmas_of(12)), "no step"),
    ],
)
def test_auto_corrects_nothing_without_a_measured_benefit(situation, reason):
    assert chosen(situation) == ([], None)
    why = choose(situation).why
    assert why.startswith("auto corrects nothing: ") and reason in why and why.endswith(".")


@pytest.mark.parametrize(("iterations", "cost"), [(1, ", at no extra cost."), (3, " and at most 2 more.")])
def test_the_sentence_says_what_a_corrected_step_costs(iterations, cost):
    run = {"sigmas": sigmas_of(12), "known_ends": frozenset(range(11)), "max_iterations": iterations}
    assert choose(Situation(**run)).why == f"auto corrects 11 of 12 steps, each with the next step's own evaluation{cost}"
    assert choose(Situation(**run, full=frozenset({0, 6}))).why.endswith(f"in full, each with that evaluation{cost}")


def test_settings_change_only_by_the_choice():
    settings = CorrectionSettings.parse("auto", 0.4, 2, 1e-3, "next", "contractive")
    assert settings.is_auto and not settings.is_off and settings.summary() == "auto contractive lambda 0.4 K 2"
    assert settings.corrected_steps([3.0, 2.0, 1.0, 0.0]) == frozenset()  # chosen for each run
    taken = settings.with_choice(choose(Situation(sigmas_of(12), frozenset(range(11)))))
    assert (taken.evaluation_point, taken.lambda_, taken.max_iterations) == ("ahead", 0.4, 2)
    assert taken.corrected_steps(sigmas_of(12), None, frozenset(range(11))) == set(range(11))
    off = settings.with_choice(choose(Situation(sigmas_of(1))))
    assert off.is_off and off.evaluation_point == "next"


def test_without_iterations_auto_is_off():
    settings = CorrectionSettings.parse("auto", max_iterations=0)
    assert settings.is_off and not settings.is_auto
