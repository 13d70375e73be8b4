"""What quantization costs each layer, and which layers to leave out of it."""

import math
from dataclasses import dataclass


@dataclass
class LayerError:
    """Of one quantized layer: format: in words. backend: what computes it. nbytes, full_nbytes: of its weight, and of that in
    full precision. signal, noise: sums of squares of its output in full precision, and of what the quantized layer's differs
    from it by for the same input. weight_sqnr: of its weight, in dB.
    """

    name: str
    format: str
    backend: str
    nbytes: int
    full_nbytes: int
    weight_sqnr: float
    signal: float = 0.0
    noise: float = 0.0

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
    """Return a Markdown table of LayerErrors, the worst output first."""
    lines = [
        "| layer | format | computed by | output SQNR, dB | weight SQNR, dB | weight, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for error in sorted(errors, key=lambda error: -error.relative_noise):
        sizes = f"{error.sqnr:.1f} | {error.weight_sqnr:.1f} | {error.nbytes / 2**20:.3f}"
        lines.append(f"| {error.name} | {error.format} | {error.backend} | {sizes} |")
    megabytes = [sum(sizes) / 2**20 for sizes in zip(*((error.nbytes, error.full_nbytes) for error in errors))]
    lines += ["", "All {} quantized weights take {:.2f} MB, and {:.2f} MB in full precision.".format(len(errors), *megabytes)]
    return "\n".join(lines)


def left_for_size(errors, budget):
    """Return names of layers to leave in full precision, so that all weights take at most `budget` bytes: greedily, those that
    take most noise away for a byte more. Raises ValueError where the quantized weights alone take more.
    """
    total = sum(error.nbytes for error in errors)
    if total > budget:
        raise ValueError(
            f"size_mb: the quantized layers take {total / 2**20:.2f} MB already; allow more, or quantize with fewer bits."
        )
    left = []
    by_worth = sorted(errors, key=lambda error: -error.relative_noise / max(error.full_nbytes - error.nbytes, 1))
    for error in by_worth:
        more = error.full_nbytes - error.nbytes
        if error.relative_noise > 0 and total + more <= budget:
            left.append(error.name)
            total += more
    return left


def left_for_error(errors, least):
    """Return names of layers to leave in full precision, so that no layer's output has less than `least` dB of SQNR."""
    return [error.name for error in errors if error.sqnr < least]
