"""Which layer gets how many bits, by what they change of a model's predictions, within a budget.

What a layer's quantization changes of the predictions is measured with that layer alone; the squares of all layers are summed.
The choice is a multiple-choice knapsack, solved exactly: layer after layer, the sums so far are carried on with each choice of
the next one; those that another is as good as in both are dropped, so that what is left is a front (dynamic programming over
lists, Nemhauser and Ullmann 1969). So are those that cannot come below a solution at hand, by the bound that a price on the
size gives (Pisinger 1995), without which fronts of hundreds of layers would grow beyond all memory.
"""

import math
from dataclasses import dataclass

import numpy

BISECTIONS = 100  # by which the price is found
SLACK = 1e-12  # of sums of floating point numbers


class PredictionError:
    """What one choice of one layer changes of the predictions of a run of so many steps, seen in some of these.

    The image moves by the sum of what all steps change. Wrong weights change much the same in every step; what differs from
    step to step, as the rounding of activations, cancels out.
    """

    def __init__(self, steps):
        self._steps, self._count, self._squares, self._sum = steps, 0, 0.0, 0.0

    def take_up(self, change):
        """Take up the change of one step's prediction over the prediction's norm, float32 [n]."""
        self._count += 1
        self._squares += change.square().sum().item()
        self._sum = self._sum + change

    @property
    def squared(self):
        """About the squared norm of the mean of all steps' changes: that of their products, among them those of each with
        itself. 0 where nothing was taken up.
        """
        if self._count < 2:
            return self._squares
        of_one = self._squares / self._count
        of_two = (self._sum.square().sum().item() - self._squares) / (self._count * (self._count - 1))
        return of_one / self._steps + (1 - 1 / self._steps) * max(of_two, 0.0)


@dataclass(frozen=True)
class LayerChoices:
    """Of one layer: weights: how many it has. Of each of its choices, from the smallest to that of full precision: words: its
    bits. nbytes: of the weight. squares: what it alone changes of the predictions, as `PredictionError.squared`.
    """

    name: str
    weights: int
    words: tuple[str, ...]
    nbytes: tuple[int, ...]
    squares: tuple[float, ...]

    @property
    def worth(self):
        """The square that full precision spares, for each byte that it takes more than the smallest choice."""
        return (self.squares[0] - self.squares[-1]) / max(self.nbytes[-1] - self.nbytes[0], 1)


@dataclass(frozen=True)
class Budget:
    """What a choice keeps to: bits a weight on average, scales and branches among them, or else an error of the prediction."""

    bits: float | None = None
    error: float | None = None

    def spent(self, layers):
        """Return the MixedPrecision of a list of LayerChoices: with bits that of least error, else the smallest. Raises
        ValueError where there is none, or it is full precision throughout.
        """
        squares, nbytes = [layer.squares for layer in layers], [layer.nbytes for layer in layers]
        if self.bits is None:
            found = least_cost(nbytes, squares, self.error**2)
        else:
            weights = sum(layer.weights for layer in layers)
            least = 8 * sum(map(min, nbytes)) / weights
            if self.bits < least:
                raise ValueError(
                    f"average_bits: {self.bits:g} is less than the {math.ceil(100 * least) / 100:.2f} that the smallest choice "
                    "of all layers takes with its scales and branches; allow that, or take a smaller rank or larger groups."
                )
            found = least_cost(squares, nbytes, self.bits * weights / 8)
        if all(choice == len(layer.words) - 1 for choice, layer in zip(found, layers)):
            raise ValueError(self._all_full())
        return MixedPrecision(layers, dict(zip((layer.name for layer in layers), found.tolist())))

    def _all_full(self):
        if self.bits is None:
            return f"most_error: no layer can be quantized within {self.error:g}; allow more."
        return f"average_bits: {self.bits:g} is enough for all layers to stay as they are; write less."


@dataclass(frozen=True)
class MixedPrecision:
    """What was chosen: layers: the LayerChoices. chosen: {name of a layer: number of its choice}."""

    layers: list[LayerChoices]
    chosen: dict[str, int]

    @property
    def bits(self):
        """Bits a weight on average."""
        return self._of(lambda layer: self.chosen[layer.name])[0]

    def _of(self, choice):
        """Return (bits a weight, error) where choice(layer) is the number of its choice."""
        nbytes = sum(layer.nbytes[choice(layer)] for layer in self.layers)
        squares = sum(layer.squares[choice(layer)] for layer in self.layers)
        return 8 * nbytes / sum(layer.weights for layer in self.layers), math.sqrt(squares)

    def verdict(self):
        """Return a sentence: how many layers have what, and what that is expected to cost beside all alike."""
        counts = {}
        for layer in self.layers:
            words = layer.words[self.chosen[layer.name]]
            counts[words] = counts.get(words, 0) + 1
        counted = ", ".join(f"{counts[words]} at {words}" for words in sorted(counts, key=lambda words: int(words.split()[0])))
        bits, error = self._of(lambda layer: self.chosen[layer.name])
        alike = [
            f"all at {words}: {{1:.4f}} with {{0:.2f}}".format(*self._of(lambda layer: number))  # noqa: B023
            for number, words in enumerate(self.layers[0].words[:-1])
        ]
        return (
            f"Mixed precision: {counted}; {bits:.2f} bits a weight, expected error of a prediction {error:.4f} "
            f"({'; '.join(alike)})."
        )

    def table(self):
        """Return a Markdown table, what costs most at equal bytes first, and the verdict."""
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


def least_cost(costs, sizes, most):
    """Return int64 [L], the number of each layer's choice: those of least summed cost whose summed size is at most `most`.

    costs, sizes: for each of the L layers, sequences of as many numbers, none negative, as it has choices. Raises ValueError
    where even the smallest choices are larger than that.
    """
    costs = [numpy.asarray(one, dtype=numpy.float64) for one in costs]
    sizes = [numpy.asarray(one, dtype=numpy.float64) for one in sizes]
    most *= 1 + SLACK
    if sum(one.min() for one in sizes) > most:
        raise ValueError("the smallest choices of all layers are together larger than that")
    price, known = _priced(costs, sizes, most)
    bound = sum(_chosen(costs, known)) * (1 + SLACK) + price * most
    least_size = _sums_from([one.min() for one in sizes])
    least_priced = _sums_from([(cost + price * size).min() for cost, size in zip(costs, sizes)])
    front, traces = (numpy.zeros(1), numpy.zeros(1)), []
    for layer, (cost, size) in enumerate(zip(costs, sizes), 1):
        of_cost, of_size = ((one[:, None] + more).ravel() for one, more in zip(front, (cost, size)))
        priced = (of_cost + price * of_size + least_priced[layer]) * (1 - SLACK)
        left = numpy.flatnonzero((of_size + least_size[layer] <= most) & (priced <= bound))
        left = left[numpy.lexsort((of_cost[left], of_size[left]))]
        best_before = numpy.minimum.accumulate(of_cost[left])
        left = left[numpy.append(True, best_before[1:] < best_before[:-1])[: len(left)]]
        front = of_cost[left], of_size[left]
        traces.append((left // len(cost), left % len(cost)))
    return _traced(traces) if len(front[0]) else known


def _traced(traces):
    """Return the choices that lead to the last, which is that of least cost, of what the last layer has left."""
    place, found = len(traces[-1][0]) - 1, []
    for before, choice in reversed(traces):
        found.append(choice[place])
        place = before[place]
    return numpy.array(found[::-1])


def _priced(costs, sizes, most):
    """Return (price of a unit of size, choices) where each layer's choice is the best at that price: about the least price at
    which they are within `most` together.
    """

    def at(price):
        return numpy.array([numpy.lexsort((size, cost + price * size))[0] for cost, size in zip(costs, sizes)])

    def fits(choices):
        return sum(_chosen(sizes, choices)) <= most

    low, high = 0.0, 1.0
    if fits(choices := at(low)):
        return low, choices
    while not fits(choices := at(high)) and high < 1e300:
        low, high = high, high * 16
    if not fits(choices):  # what is no larger costs nothing more; the smallest are within it
        return 0.0, numpy.array([numpy.lexsort((cost, size))[0] for cost, size in zip(costs, sizes)])
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if fits(tried := at(middle)):
            high, choices = middle, tried
        else:
            low = middle
    return high, choices


def _chosen(values, choices):
    return [one[choice] for one, choice in zip(values, choices)]


def _sums_from(values):
    """Return the sums of the values from each on, and 0 behind the last."""
    return numpy.append(numpy.cumsum(values[::-1])[::-1], 0.0)
