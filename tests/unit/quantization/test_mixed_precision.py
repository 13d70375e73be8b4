"""The number of bits per layer, compared with all possible choices and with an integer program of scipy."""

import itertools
import math

import numpy
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_array, vstack

from iec_core.quantization.mixed_precision import Budget, LayerChoices, PredictionError, least_cost


def of(values, choices):
    return sum(one[choice] for one, choice in zip(values, choices))


@pytest.mark.parametrize("seed", range(60))
def test_small_problems_against_all_choices(seed):
    """The cases include equal sizes and costs, layers with one choice, choices worse than another, and budgets that
    none meets.
    """
    draw = numpy.random.default_rng(seed)
    counts = draw.integers(1, 5, draw.integers(1, 7))
    whole = seed % 2
    costs = [draw.integers(0, 6, count).astype(float) if whole else draw.random(count) for count in counts]
    sizes = [draw.integers(0, 8, count).astype(float) if whole else 8 * draw.random(count) for count in counts]
    most = draw.integers(0, 4 * len(counts))
    ways = [way for way in itertools.product(*map(range, counts)) if of(sizes, way) <= most]
    if not ways:
        with pytest.raises(ValueError, match="the smallest choices of all layers are together larger"):
            least_cost(costs, sizes, most)
        return
    found = least_cost(costs, sizes, most)
    assert len(found) == len(counts) and of(sizes, found) <= most
    assert of(costs, found) == pytest.approx(min(of(costs, way) for way in ways), rel=1e-9, abs=1e-12)


def program(costs, sizes, most):
    """Return the least cost by an integer program."""
    one_each = block_diag([numpy.ones((1, len(cost))) for cost in costs])
    within = LinearConstraint(
        vstack([one_each, csr_array(numpy.concatenate(sizes)[None] / most)]).tocsr(),
        [1] * len(costs) + [0], [1] * len(costs) + [1],
    )  # fmt: skip
    whole = numpy.ones(sum(map(len, costs)))
    found = milp(
        numpy.concatenate(costs), constraints=within, bounds=Bounds(0, 1), integrality=whole, options={"mip_rel_gap": 1e-9}
    )
    return found.fun


@pytest.mark.parametrize("share", [0.27, 0.35, 0.5, 0.8])
def test_as_many_layers_as_a_network_has_against_an_integer_program(share):
    draw = numpy.random.default_rng(1)
    weights = numpy.exp(draw.normal(12, 1.5, 150)).round() * 16
    error = numpy.exp(draw.normal(-8, 2, len(weights)))
    sizes = [numpy.array([0.5, 1, 2]) * count for count in weights]
    costs = [numpy.array([1, 0.01, 0]) * one * draw.uniform(0.5, 1.5, 3) for one in error]
    most = share * 2 * weights.sum()
    found = least_cost(costs, sizes, most)
    assert of(sizes, found) <= most
    assert of(costs, found) == pytest.approx(program(costs, sizes, most), rel=1e-6)
    smallest = least_cost(sizes, costs, of(costs, found))
    assert of(costs, smallest) <= of(costs, found) * (1 + 1e-9)
    assert of(sizes, smallest) == pytest.approx(program(sizes, costs, of(costs, found)), rel=1e-6)


def test_layers_without_error_get_the_smallest_format():
    assert least_cost([(0.0, 0.0), (1.0, 0.0)], [(1, 2), (1, 2)], 100).tolist() == [0, 1]
    assert least_cost([(0.0,)], [(5,)], 5).tolist() == [0]


def choices(name, squares, weights=800, nbytes=(400, 800, 1600)):
    return LayerChoices(name, weights, ("4 bits", "8 bits", "16 bits"), nbytes, squares)


LAYERS = [
    choices("a", (4e-4, 1e-6, 0.0)), choices("b", (1e-6, 1e-8, 0.0)), choices("c", (9e-4, 3e-4, 0.0), 80, (40, 80, 160)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "chosen", "bits"),
    [
        ({"bits": 4.0}, [0, 0, 0], 4.0),
        ({"bits": 4.6}, [0, 0, 2], 8 * 960 / 1680),
        ({"bits": 6.4}, [1, 0, 1], 8 * 1280 / 1680),  # of 1344 bytes; c in 16 bits would take 1360
        ({"bits": 6.5}, [1, 0, 2], 8 * 1360 / 1680),
        ({"error": 0.04}, [0, 0, 0], 4.0),
        ({"error": 0.0202}, [0, 0, 2], 8 * 960 / 1680),
        ({"error": 0.0015}, [1, 0, 2], 8 * 1360 / 1680),
        ({"error": 0.0001}, [2, 1, 2], 8 * 2560 / 1680),  # b alone, in 8 bits
    ],
)
def test_budgets(budget, chosen, bits):
    found = Budget(**budget).spent(LAYERS)
    assert list(found.chosen) == ["a", "b", "c"] and list(found.chosen.values()) == chosen
    assert found.bits == pytest.approx(bits)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"bits": 3.9}, r"^average_bits: 3\.9 is less than the smallest possible, 4\.00 with scales and branches; allow"),
        ({"bits": 16}, r"^average_bits: 16 is enough for all layers to stay unquantized; choose a smaller number\.$"),
        ({"error": 1e-5}, r"^most_error: no layer can be quantized within 1e-05; allow a larger error\.$"),
    ],
)
def test_impossible_budgets(budget, message):
    with pytest.raises(ValueError, match=message):
        Budget(**budget).spent(LAYERS)


def test_the_table_has_the_largest_error_per_byte_first():
    found = Budget(bits=4.6).spent(LAYERS)
    head, _, *rows, blank, verdict = found.table().splitlines()
    assert head == "| layer | chosen | error at 4 bits | error at 8 bits | weight, MB |" and not blank
    assert rows == [
        "| c | 16 bits | 0.030000 | 0.017321 | 0.000 |", "| a | 4 bits | 0.020000 | 0.001000 | 0.000 |",
        "| b | 4 bits | 0.001000 | 0.000100 | 0.000 |",
    ]  # fmt: skip
    expected = math.sqrt(4e-4 + 1e-6)
    assert verdict == found.verdict() == (
        f"Mixed precision: 2 at 4 bits, 1 at 16 bits; 4.57 bits per weight, expected error of a prediction {expected:.4f} "
        f"(all at 4 bits: error {math.sqrt(4e-4 + 1e-6 + 9e-4):.4f} at 4.00 bits per weight; all at 8 "
        f"bits: error {math.sqrt(1e-6 + 1e-8 + 3e-4):.4f} at 8.00 bits per weight)."
    )  # fmt: skip


def test_the_error_of_a_run_is_that_of_the_mean_change():
    """If all steps are seen, the error is exact; otherwise it is estimated from the seen steps.

    The error is 0 if no step was seen, and never below that of steps that differ independently.
    """
    changes = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) + 0.7
    exact = PredictionError(4)
    assert exact.squared == 0.0
    for change in changes:
        exact.take_up(change)
    assert exact.squared == pytest.approx(changes.double().mean(0).square().sum().item(), rel=1e-5)

    apart, alike = PredictionError(20), PredictionError(20)
    for sign in (1, -1, 1, -1):
        apart.take_up(sign * changes[0])
        alike.take_up(changes[0])
    square = changes[0].double().square().sum().item()
    assert apart.squared == pytest.approx(square / 20, rel=1e-5) and alike.squared == pytest.approx(square, rel=1e-5)


def test_the_error_estimate_from_some_steps_is_unbiased():
    """200 draws with a constant part and a varying part, seen in 4 of 20 steps: the estimate is right on average."""
    draw = torch.Generator().manual_seed(1)
    stays, told, true = torch.randn(40, generator=draw) / 3, [], []
    for _ in range(200):
        changes = stays + torch.randn(20, 40, generator=draw)
        error = PredictionError(20)
        for step in (2, 7, 12, 17):
            error.take_up(changes[step])
        told.append(error.squared)
        true.append(changes.mean(0).square().sum().item())
    assert numpy.mean(told) == pytest.approx(numpy.mean(true), rel=0.1)
