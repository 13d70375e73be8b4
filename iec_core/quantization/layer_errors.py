"""The error that quantization causes in each layer, and the choice of layers to leave in full precision."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import SettingsError
from .mixed_precision import least_cost


@dataclass
class LayerError:
    """The error of one quantized layer.

    format: the format, as text. backend: the name of the implementation that computes the layer. nbytes, full_nbytes: size of
    its weight in bytes, quantized and in full precision. weight_sqnr: signal to quantization noise of its weight, in dB.
    signal: sum of squares of its output in full precision. noise: sum of squares of the difference between the quantized
    layer's output and the full-precision output for the same input. predicted: squared relative error of the model's
    predictions with only this layer quantized.
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
    def worth(self) -> float:
        """How much full precision reduces the prediction's squared error, per additional byte."""
        return self.predicted / max(self.full_nbytes - self.nbytes, 1)

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise of the output, in dB; nan if the layer was not run."""
        return decibels(self.signal, self.noise)

    @property
    def relative_noise(self) -> float:
        """Noise divided by signal; 0 if the layer was not run."""
        return self.noise / self.signal if self.signal > 0 else 0.0


def decibels(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise): inf without noise, nan without signal."""
    if signal <= 0:
        return math.nan
    return math.inf if noise <= 0 else 10 * math.log10(signal / noise)


def table(errors: Sequence[LayerError]) -> str:
    """Return a Markdown table of LayerErrors by descending `worth`, with the total size."""
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


def ranked(errors: Iterable[LayerError]) -> list[LayerError]:
    """Return LayerErrors sorted by descending `worth`, then by descending `relative_noise`."""
    return sorted(errors, key=lambda error: (-error.worth, -error.relative_noise))


def left_for_size(errors: Sequence[LayerError], budget: float) -> list[str]:
    """Return the names of layers to leave in full precision. The weights of all layers then take at most `budget` bytes, and
    the sum of the remaining layers' squared prediction errors is least. Raises SettingsError if the quantized weights already
    take more.
    """
    total = sum(error.nbytes for error in errors)
    if total > budget:
        raise SettingsError(
            f"size_mb: the quantized layers take {total / 2**20:.2f} MB already; allow more, or quantize with fewer bits."
        )
    found = least_cost(
        [(error.predicted, 0.0) for error in errors], [(error.nbytes, error.full_nbytes) for error in errors], budget
    )  # fmt: skip
    return [error.name for error, choice in zip(errors, found) if choice]


def left_for_error(errors: Iterable[LayerError], least: float) -> list[str]:
    """Return the names of layers whose output has less than `least` dB of SQNR, to leave them in full precision."""
    return [error.name for error in errors if error.sqnr < least]
