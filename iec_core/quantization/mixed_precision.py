"""Choose the number of bits of each layer within a budget, by the error that each choice causes in a model's predictions.

The prediction error of a layer's quantization is measured with only that layer quantized. The squared errors of all layers are
summed.

The choice is a multiple-choice knapsack problem, solved exactly by dynamic programming over lists (Nemhauser and Ullmann 1969).
A list has the pairs (cost, size) that the layers so far can reach. Each next layer adds each of its choices to each pair. Pairs
that are not better than another pair in cost or size are dropped, so that a Pareto front remains. Pairs that cannot become
better than a known solution are dropped too. Their lower bound comes from a price per unit of size (Pisinger 1995). Without
this bound, the fronts of hundreds of layers would not fit in memory.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy
import torch

from ..errors import SettingsError

BISECTIONS = 100  # steps that find the price
SLACK = 1e-12  # relative rounding error allowed for sums of floating-point numbers


class PredictionError:
    """The prediction error that one choice of one layer causes in a run, measured in some of its steps.

    steps: number of steps of the run. The error of the image is the sum of the errors of all steps. Rounded weights cause
    nearly the same error in every step. Errors that differ from step to step, as those of rounded activations, cancel out.
    """

    def __init__(self, steps: int) -> None:
        self._steps, self._count, self._squares, self._sum = steps, 0, 0.0, torch.zeros(())

    def take_up(self, change: torch.Tensor) -> None:
        """Add the error of one step's prediction, divided by the prediction's norm, float32 [n]."""
        self._count += 1
        self._squares += change.square().sum().item()
        self._sum = self._sum + change

    @property
    def squared(self) -> float:
        """Estimate of the squared norm of the mean error over all steps of the run; 0 if no step was measured.

        The squared norm is the mean of the inner products of all pairs of steps, including each step with itself.
        """
        if self._count < 2:
            return self._squares
        of_one = self._squares / self._count
        of_two = (self._sum.square().sum().item() - self._squares) / (self._count * (self._count - 1))
        return of_one / self._steps + (1 - 1 / self._steps) * max(of_two, 0.0)


@dataclass(frozen=True)
class LayerChoices:
    """The choices of one layer, from the smallest to full precision.

    weights: number of weights in the layer. For each choice: words: its bits, as text. nbytes: size of the weight in bytes.
    squares: squared prediction error with only this layer quantized, from `PredictionError.squared`.
    """

    name: str
    weights: int
    words: tuple[str, ...]
    nbytes: tuple[int, ...]
    squares: tuple[float, ...]

    @property
    def worth(self) -> float:
        """How much full precision reduces the squared error, compared with the smallest choice, per additional byte."""
        return (self.squares[0] - self.squares[-1]) / max(self.nbytes[-1] - self.nbytes[0], 1)


@dataclass(frozen=True)
class Budget:
    """The limit of a choice: bits per weight on average, including scales and branches, or, if bits is None, the relative error
    of the prediction.
    """

    bits: float | None = None
    error: float | None = None

    def spent(self, layers: list[LayerChoices]) -> "MixedPrecision":
        """Return the best choice for all layers: with `bits` that of least error, with `error` the smallest. Raises
        SettingsError if no choice is within the budget, or if full precision is the best choice for every layer.
        """
        squares, nbytes = [layer.squares for layer in layers], [layer.nbytes for layer in layers]
        if self.bits is None:
            assert self.error is not None  # one of both is given
            found = least_cost(nbytes, squares, self.error**2)
        else:
            weights = sum(layer.weights for layer in layers)
            least = 8 * sum(map(min, nbytes)) / weights
            if self.bits < least:
                raise SettingsError(
                    f"average_bits: {self.bits:g} is less than the smallest possible, {math.ceil(100 * least) / 100:.2f} "
                    "with scales and branches; allow that, or choose a smaller rank or larger groups."
                )
            found = least_cost(squares, nbytes, self.bits * weights / 8)
        if all(choice == len(layer.words) - 1 for choice, layer in zip(found, layers)):
            raise SettingsError(self._all_full())
        return MixedPrecision(layers, dict(zip((layer.name for layer in layers), found.tolist())))

    def _all_full(self) -> str:
        if self.bits is None:
            return f"most_error: no layer can be quantized within {self.error:g}; allow a larger error."
        return f"average_bits: {self.bits:g} is enough for all layers to stay unquantized; choose a smaller number."


@dataclass(frozen=True)
class MixedPrecision:
    """The choice for all layers. layers: their LayerChoices. chosen: {name of a layer: index of its choice}."""

    layers: list[LayerChoices]
    chosen: dict[str, int]

    @property
    def bits(self) -> float:
        """Bits per weight on average."""
        return self._of(lambda layer: self.chosen[layer.name])[0]

    def _of(self, choice: Callable[[LayerChoices], int]) -> tuple[float, float]:
        """Return (bits per weight, error) if choice(layer) is the index of each layer's choice."""
        nbytes = sum(layer.nbytes[choice(layer)] for layer in self.layers)
        squares = sum(layer.squares[choice(layer)] for layer in self.layers)
        return 8 * nbytes / sum(layer.weights for layer in self.layers), math.sqrt(squares)

    def verdict(self) -> str:
        """Return a sentence: how many layers have how many bits, and the expected error compared with the same choice for all
        layers.
        """
        counts: dict[str, int] = {}
        for layer in self.layers:
            words = layer.words[self.chosen[layer.name]]
            counts[words] = counts.get(words, 0) + 1
        counted = ", ".join(f"{counts[words]} at {words}" for words in sorted(counts, key=lambda words: int(words.split()[0])))
        bits, error = self._of(lambda layer: self.chosen[layer.name])
        alike = [
            f"all at {words}: error {{1:.4f}} at {{0:.2f}} bits per weight".format(*self._of(lambda layer: number))  # noqa: B023
            for number, words in enumerate(self.layers[0].words[:-1])
        ]
        return (
            f"Mixed precision: {counted}; {bits:.2f} bits per weight, expected error of a prediction {error:.4f} "
            f"({'; '.join(alike)})."
        )

    def table(self) -> str:
        """Return a Markdown table of the layers by descending `worth`, and the verdict."""
        words = self.layers[0].words
        lines = [
            f"| layer | chosen | {' | '.join(f'error at {one}' for one in words[:-1])} | weight, MB |",
            f"| {' | '.join(['---'] * (len(words) + 2))} |",
        ]
        for layer in sorted(self.layers, key=lambda layer: -layer.worth):
            choice = self.chosen[layer.name]
            errors = " | ".join(f"{math.sqrt(square):.6f}" for square in layer.squares[:-1])
            lines.append(f"| {layer.name} | {layer.words[choice]} | {errors} | {layer.nbytes[choice] / 2**20:.3f} |")
        return "\n".join([*lines, "", self.verdict()])


def least_cost(costs: Iterable[Sequence[float]], sizes: Iterable[Sequence[float]], most: float) -> numpy.ndarray:
    """Return the index of each layer's choice, int64 [L], with the least summed cost and a summed size of at most `most`.

    costs, sizes: for each of the L layers, the costs and sizes of its choices, not negative. Raises SettingsError if the
    smallest choices together exceed `most`.
    """
    all_costs = [numpy.asarray(one, dtype=numpy.float64) for one in costs]
    all_sizes = [numpy.asarray(one, dtype=numpy.float64) for one in sizes]
    most *= 1 + SLACK
    if sum(one.min() for one in all_sizes) > most:
        raise SettingsError("the smallest choices of all layers are together larger than that")
    price, known = _priced(all_costs, all_sizes, most)
    bound = sum(_chosen(all_costs, known)) * (1 + SLACK) + price * most
    least_size = _sums_from([one.min() for one in all_sizes])
    least_priced = _sums_from([(cost + price * size).min() for cost, size in zip(all_costs, all_sizes)])
    front, traces = (numpy.zeros(1), numpy.zeros(1)), []
    for layer, (cost, size) in enumerate(zip(all_costs, all_sizes), 1):
        of_cost, of_size = ((one[:, None] + more).ravel() for one, more in zip(front, (cost, size)))
        priced = (of_cost + price * of_size + least_priced[layer]) * (1 - SLACK)
        left = numpy.flatnonzero((of_size + least_size[layer] <= most) & (priced <= bound))
        left = left[numpy.lexsort((of_cost[left], of_size[left]))]
        best_before = numpy.minimum.accumulate(of_cost[left])
        left = left[numpy.append(True, best_before[1:] < best_before[:-1])[: len(left)]]
        front = of_cost[left], of_size[left]
        traces.append((left // len(cost), left % len(cost)))
    return _traced(traces) if len(front[0]) else known


def _traced(traces: list[tuple[numpy.ndarray, numpy.ndarray]]) -> numpy.ndarray:
    """Return the choices of all layers that lead to the last pair of the last front, which has the least cost.

    traces: for each layer, (index of the pair that was extended, choice) of each pair on its front.
    """
    place, found = len(traces[-1][0]) - 1, []
    for before, choice in reversed(traces):
        found.append(choice[place])
        place = before[place]
    return numpy.array(found[::-1])


def _priced(costs: list[numpy.ndarray], sizes: list[numpy.ndarray], most: float) -> tuple[float, numpy.ndarray]:
    """Return (price per unit of size, choices). At that price, the choice of each layer has the least cost + price * size. The
    price is about the lowest at which the summed size of the choices is at most `most`.
    """

    def at(price: float) -> numpy.ndarray:
        return numpy.array([numpy.lexsort((size, cost + price * size))[0] for cost, size in zip(costs, sizes)])

    def fits(choices: numpy.ndarray) -> bool:
        return sum(_chosen(sizes, choices)) <= most

    low, high = 0.0, 1.0
    if fits(choices := at(low)):
        return low, choices
    while not fits(choices := at(high)) and high < 1e300:
        low, high = high, high * 16
    if not fits(choices):  # fall back to the smallest choices, which are known to fit, at price 0
        return 0.0, numpy.array([numpy.lexsort((cost, size))[0] for cost, size in zip(costs, sizes)])
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if fits(tried := at(middle)):
            high, choices = middle, tried
        else:
            low = middle
    return high, choices


def _chosen(values: list[numpy.ndarray], choices: numpy.ndarray) -> list[float]:
    return [one[choice] for one, choice in zip(values, choices)]


def _sums_from(values: list[float]) -> numpy.ndarray:
    """Return, for each value, the sum of it and all later ones, and a final 0."""
    return numpy.append(numpy.cumsum(values[::-1])[::-1], 0.0)
