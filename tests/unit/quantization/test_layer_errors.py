"""The errors of quantization per layer: the table, and the excluded layers compared with all possible choices."""

import itertools
import math

import pytest

from iec_core.quantization.layer_errors import LayerError, decibels, left_for_error, left_for_size, table


def layer(name, noise, nbytes=100, full_nbytes=400, signal=1.0):
    """Return a layer of which a tenth of the noise reaches the prediction."""
    words = "int8, activations 8 bits", "torch._int_mm"
    return LayerError(name, *words, nbytes, full_nbytes, 40.0, signal, noise, 0.1 * noise)


@pytest.mark.parametrize(
    ("signal", "noise", "expected"), [(100.0, 1.0, 20.0), (1.0, 1.0, 0.0), (2.0, 4.0, -3.0103), (5.0, 5e-5, 50.0)]
)
def test_decibels(signal, noise, expected):
    assert decibels(signal, noise) == pytest.approx(expected, abs=1e-4)
    assert layer("a", noise, signal=signal).sqnr == decibels(signal, noise)
    assert layer("a", noise, signal=signal).relative_noise == pytest.approx(10 ** (-expected / 10), rel=1e-4)


def test_decibels_without_noise_or_signal():
    assert decibels(1.0, 0.0) == math.inf
    assert math.isnan(decibels(0.0, 0.0)) and math.isnan(decibels(0.0, 1.0))
    assert layer("not run", 0.0, signal=0.0).relative_noise == 0.0


def test_table_has_the_largest_prediction_error_per_byte_first():
    errors = [layer("good", 1e-5), layer("exact", 0.0), layer("worst", 0.5), layer("not run", 0.0, signal=0.0)]
    errors.append(layer("bad", 1e-2))
    *rows, blank, total = table(errors).splitlines()
    assert not blank and total.startswith("All ")
    assert rows[0] == ("| layer | format | computed by | prediction error | output SQNR, dB | weight SQNR, dB | weight, MB |")
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows[2:]] == ["worst", "bad", "good", "exact", "not run"]
    assert {row.count("|") for row in rows} == {8}
    assert rows[2] == "| worst | int8, activations 8 bits | torch._int_mm | 0.223607 | 3.0 | 40.0 | 0.000 |"
    assert [row.split(" | ")[4] for row in rows[3:]] == ["20.0", "50.0", "inf", "nan"]


def test_table_has_sizes_in_megabytes():
    assert table([layer("a", 0.1, nbytes=3 * 2**19)]).splitlines()[2].endswith("| 1.500 |")


def total(errors, left):
    return sum(error.full_nbytes if error.name in left else error.nbytes for error in errors)


def noise_left(errors, left):
    return sum(error.predicted for error in errors if error.name not in left)


def best(errors, budget):
    """Return the least noise of any choice within the budget."""
    names = [error.name for error in errors]
    choices = [set(left) for count in range(len(names) + 1) for left in itertools.combinations(names, count)]
    return min(noise_left(errors, left) for left in choices if total(errors, left) <= budget)


NOISES = [0.02, 0.3, 0.001, 0.07, 0.0005, 0.11]


SIZES = [(100, 400), (200, 500), (50, 200), (100, 1200), (150, 300), (90, 250)]


@pytest.mark.parametrize("budget", range(700, 3500, 87))
@pytest.mark.parametrize("sizes", [SIZES, [(100, 400)] * 6])
def test_the_excluded_layers_are_the_optimal_choice(sizes, budget):
    errors = [layer(str(number), noise, *size) for number, (noise, size) in enumerate(zip(NOISES, sizes))]
    left = left_for_size(errors, budget)
    assert total(errors, left) <= budget and len(set(left)) == len(left)
    assert noise_left(errors, left) == pytest.approx(best(errors, budget), abs=1e-12)


def test_layers_are_ranked_by_prediction_error_not_their_own_noise():
    loud, heard = layer("loud", 0.5), layer("heard", 0.01)
    loud.predicted, heard.predicted = 1e-6, 1e-3
    assert left_for_size([loud, heard], 500) == ["heard"]
    assert [row.split(" | ")[0] for row in table([loud, heard]).splitlines()[2:4]] == ["| heard", "| loud"]


def test_a_large_layer_is_chosen_if_it_saves_more_in_total():
    errors = [layer("large", 0.3, 100, 10_100), layer("small", 0.1, 100, 300), layer("other", 0.15, 100, 10_000)]
    assert left_for_size(errors, 10_299) == ["other"]
    assert left_for_size(errors, 10_499) == ["large"]
    assert left_for_size(errors, 10_500) == ["large", "small"]


def test_layers_without_noise_or_without_a_run_are_not_excluded():
    errors = [layer("exact", 0.0), layer("not run", 0.0, signal=0.0), layer("noisy", 1e-9)]
    assert left_for_size(errors, 10**9) == ["noisy"]


def test_a_layer_that_quantization_enlarges_is_excluded():
    errors = [layer("a", 0.3), layer("smaller", 2e-3, nbytes=120, full_nbytes=110)]
    assert left_for_size(errors, 220) == ["smaller"]
    assert left_for_size(errors, 510) == ["a", "smaller"]  # 120 + 100, less 10, and 300 more


def test_a_budget_below_the_quantized_size_is_refused():
    errors = [layer("a", 0.1, nbytes=2**20, full_nbytes=2**22), layer("b", 0.1, nbytes=2**19, full_nbytes=2**21)]
    assert left_for_size(errors, 3 * 2**19) == []
    with pytest.raises(ValueError, match=r"^size_mb: the quantized layers take 1.50 MB already; allow more, or quantize"):
        left_for_size(errors, 3 * 2**19 - 1)


@pytest.mark.parametrize(
    ("least", "expected"), [(0, []), (5.2, []), (5.3, ["b"]), (20.0, ["b", "d"]), (31, ["a", "b", "c", "d"])]
)
def test_layers_below_the_minimum_ratio_are_excluded(least, expected):
    errors = [layer(name, noise) for name, noise in zip("abcde", [1e-2 / 2, 0.3, 1e-3, 0.07, 0.0])]
    errors.append(layer("not run", 0.0, signal=0.0))
    assert left_for_error(errors, least) == expected
