"""What quantization costs each layer, and which layers to leave out of it."""

import math
from dataclasses import dataclass

from .mixed_precision import least_cost


@dataclass
class LayerError:
    """Of one quantized layer: format: in words. backend: what computes it. nbytes, full_nbytes: of its weight, and of that in
    full precision. signal, noise: sums of squares of its output in full precision, and of what the quantized layer's differs
    from it by for the same input. weight_sqnr: of its weight, in dB. predicted: square of what this layer alone changes of the
    model's predictions, relative to these.
    """

    name: str
    format: str
    backend: str
    nbytes: int
    full_nbytes: int
    weight_sqnr: float
    signal: float = 0.0
    noise: float = 0.0
    predicted: float = 0.0

    @property
    def worth(self):
        """What full precision spares of the prediction's squared error, for each byte more."""
        return self.predicted / max(self.full_nbytes - self.nbytes, 1)

    @property
    def sqnr(self):
        """Signal to quantization noise of the output, in dB; nan where the layer was not run."""
        return decibels(self.signal, self.noise)

    @property
    def relative_noise(self):
        """Noise over signal; 0 where the layer was not run."""
        return self.noise / self.signal if self.signal > 0 else 0.0


def decibels(signal, noise):
    """Return 10 log10(signal / noise): inf without noise, nan without signal."""
    if signal <= 0:
        return math.nan
    return math.inf if noise <= 0 else 10 * math.log10(signal / noise)


def table(errors):
    """Return a Markdown table of LayerErrors, what costs most at equal bytes first."""
    lines = [
        "| layer | format | computed by | prediction error | output SQNR, dB | weight SQNR, dB | weight, MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for error in ranked(errors):
        sizes = f"{math.sqrt(error.predicted):.6f} | {error.sqnr:.1f} | {error.weight_sqnr:.1f} | {error.nbytes / 2**20:.3f}"
        lines.append(f"| {error.name} | {error.format} | {error.backend} | {sizes} |")
    megabytes = [sum(sizes) / 2**20 for sizes in zip(*((error.nbytes, error.full_nbytes) for error in errors))]
    lines += ["", "All {} quantized weights take {:.2f} MB, and {:.2f} MB in full precision.".format(len(errors), *megabytes)]
    return "\n".join(lines)


def ranked(errors):
    """Return LayerErrors, what costs the prediction most at equal bytes first."""
    return sorted(errors, key=lambda error: (-error.worth, -error.relative_noise))


def left_for_size(errors, budget):
    """Return names of layers to leave in full precision, so that all weights take at most `budget` bytes, and what is left of
    the predictions' squared errors, each layer's alone, sums up to the least. Raises ValueError where the quantized weights
    alone take more.
    """
    total = sum(error.nbytes for error in errors)
    if total > budget:
        raise ValueError(
            f"size_mb: the quantized layers take {total / 2**20:.2f} MB already; allow more, or quantize with fewer bits."
        )
    found = least_cost(
        [(error.predicted, 0.0) for error in errors], [(error.nbytes, error.full_nbytes) for error in errors], budget
    )  # fmt: skip
    return [error.name for error, choice in zip(errors, found) if choice]


def left_for_error(errors, least):
    """Return names of layers to leave in full precision, so that no layer's output has less than `least` dB of SQNR."""
    return [error.name for error in errors if error.sqnr < least]
